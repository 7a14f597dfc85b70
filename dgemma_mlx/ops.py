"""The MLX backend: the Apple GPU through Metal, the CPU elsewhere, float32 or bfloat16.

Plain but not naive: MLX's own kernels where they compute what the definition says, blocked attention,
grouped expert products. Rotation stays the definition's: `mx.fast.rope` takes Metal's `fast::cos` of
angles up to the context length, and counts positions unsigned, so left padding would wrap around.

Evaluation is lazy and breadth first: whatever is independent exists at the same time. Loops over
blocks and tiles are chained with `mx.depends`, which costs nothing and also holds inside `mx.compile`;
`mx.eval` does not. The CPU build has slow reference kernels and no bfloat16 expert product; it is here
to test the graph and to run the embedded model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from dgemma.errors import BackendError
from dgemma.formats.quantized import MXFP8, Quantized
from dgemma.formats.stored import Stored
from dgemma.network.ops import KV, Array, Mask, Notices, Ops, Prediction
from dgemma.network.ops.decoding import dense, dequantize
from dgemma.network.ops.layers import geglu, visible
from dgemma.network.weights import AttentionWeights, BiasWeights, LayerWeights, MlpWeights

from . import elementary, verdict
from .kernels import attention, moe, norms, plan, vocabulary
from .memory import limits

# What the CPU decodes at a time of a stack of experts for its product: bytes in float32.
DECODED = 8 << 20


class MlxOps(Ops):
    """`compute` is `dtype`, `wide` is float32. Integers are int32 throughout."""

    name = "mlx"
    # Heads of 256 and 512 have no fused Metal kernel beyond 8 queries, so scores [B, H, L, S] exist: queries
    # of a prompt and keys of a canvas go in blocks that keep them below this many bytes (as float32).
    score_bytes = 128 << 20
    # Of a canvas over a long context, kernels weigh some blocks of keys at once: scores as they are stored.
    scores_at_once = 192 << 20
    # There is no plane of logits, only tiles, of which a few exist at once (`kernels.vocabulary`). Wide ones
    # save launches and passes over the sums [rows, D]; six of these are the released vocabulary, each 25 MB
    # of bfloat16 at 256 rows.
    vocab_tile = 49152

    def __init__(
        self,
        dtype: mx.Dtype = mx.float32,
        kernels: frozenset[str] | None = None,
        notices: Notices | None = None,
        on_gpu: bool | None = None,
    ):
        """`kernels` are the names in `verdict.KERNELS` that run; by default those proven on this machine.

        `on_gpu`: whether all is done as suits a GPU, by default where MLX has one. A CPU can do it, too.
        """
        if dtype not in (mx.float32, mx.bfloat16):
            kind = str(dtype).removeprefix("mlx.core.")
            raise BackendError(f"MLX runs in bfloat16 or float32, not {kind}: float16 overflows")
        super().__init__(notices)
        self.dtype, self._kernels = dtype, kernels
        self.dtype_name = str(dtype).removeprefix("mlx.core.")
        self.on_gpu = mx.default_device().type == mx.gpu if on_gpu is None else on_gpu
        if not self.on_gpu:  # up to ten operations are in flight there, each with its array; smaller ones
            self.vocab_tile, self.score_bytes = 2048, 2 << 20  # stay in its caches, too

    @property
    def kernels(self) -> frozenset[str]:
        """Composites that a Metal kernel replaces."""
        if self._kernels is None:
            self._kernels = self._proven() if self.on_gpu else frozenset()
        return self._kernels

    def _proven(self) -> frozenset[str]:
        found = verdict.read()
        if message := verdict.notice(found):
            self.notices.say(message)
        return verdict.enabled(found)

    def asarray(self, x: np.ndarray) -> Array:
        x = np.asarray(x)
        if x.dtype.kind == "f":
            return mx.array(x.astype(np.float32, copy=False)).astype(self.dtype)
        return mx.array(x if x.dtype.kind == "b" else x.astype(np.int32))

    def aswide(self, x: np.ndarray) -> Array:
        return mx.array(np.asarray(x, np.float32))

    def load(self, stored: Stored, wide: bool = False) -> Array:
        x = mx.array(stored.data)  # a copy: nothing keeps the file mapped
        x = x.view(mx.bfloat16) if stored.dtype == "BF16" else x
        x = x.astype(mx.float32 if wide else self.dtype)
        mx.eval(x)  # or each source would wait in memory for its conversion
        return x

    def raw(self, x: np.ndarray) -> Array:
        return mx.array(x)

    def integer(self, x: Array) -> Array:
        return x.astype(mx.int32)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(self.to_wide(x) if mx.issubdtype(x.dtype, mx.floating) else x)

    def rounded(self, x: float) -> float:
        return float(mx.array(x, self.dtype).item())  # type: ignore[arg-type]

    def to_wide(self, x: Array) -> Array:
        return x.astype(mx.float32)

    def to_compute(self, x: Array) -> Array:
        return x.astype(self.dtype)

    def like(self, x: Array, reference: Array) -> Array:
        return x.astype(reference.dtype)

    def transpose(self, x: Array, *axes: int) -> Array:
        return mx.transpose(x, axes)

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        return mx.concatenate(list(parts), axis)

    def take(self, x: Array, ids: Array) -> Array:
        return mx.take(x, ids, 0)

    def arange(self, stop: int) -> Array:
        return mx.arange(stop)

    def where(self, condition: Array, x: Array, y: Array | float) -> Array:
        return mx.where(condition, x, y)

    def exp(self, x: Array) -> Array:
        return mx.exp(x) if self._fast(x) else elementary.exp(x)

    def log(self, x: Array) -> Array:
        return mx.log(x)

    def tanh(self, x: Array) -> Array:
        return mx.tanh(x) if self._fast(x) else elementary.tanh(x)

    def _fast(self, x: Array) -> bool:
        """Whether MLX's own functions are as good as any: on a GPU, and where there is little to do."""
        return self.on_gpu or x.dtype != mx.float32 or x.size < 4096

    def cos(self, x: Array) -> Array:
        return mx.cos(x)

    def sin(self, x: Array) -> Array:
        return mx.sin(x)

    def maximum(self, x: Array, y: Array) -> Array:
        return mx.maximum(x, y)

    def sum(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        return mx.sum(x, axis, keepdims=keepdims)

    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        return mx.max(x, axis, keepdims=keepdims)

    # MLX indices are uint32, whose differences wrap around: signed from the start.
    def argmax(self, x: Array, axis: int) -> Array:
        return mx.argmax(x, axis).astype(mx.int32)

    def argsort(self, x: Array, axis: int) -> Array:
        return mx.argsort(x, axis).astype(mx.int32)

    def take_along(self, x: Array, ids: Array, axis: int) -> Array:
        return mx.take_along_axis(x, ids, axis)

    def cumsum(self, x: Array, axis: int) -> Array:
        return mx.cumsum(x, axis)

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        if isinstance(weight, Quantized):
            y = self._packed_linear(x, weight)
            return y if bias is None else y + bias
        if not self.on_gpu:  # the CPU multiplies bfloat16 one by one, float32 with its BLAS
            y = self.like(self.to_wide(x) @ self.to_wide(weight).T, x)
            return y if bias is None else y + bias
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)

    def _packed_linear(self, x: Array, w: Quantized) -> Array:
        if self.on_gpu:
            y = mx.quantized_matmul(x, _words(w), **_packed(w))
        else:  # decoded for the BLAS: thirty times as fast as the CPU's packed product
            y = self.to_wide(x) @ self.decoded(w).T
        return self.like(self._factored(y, w, w.factor), x)

    def decoded(self, w: Quantized, dtype: mx.Dtype = mx.float32) -> Array:
        """The matrix or stack of a record without its factor, in one operation; `dense` makes wide planes."""
        form = w.form
        assert w.scales is not None, form
        if prod(w.shape) % 32:  # MLX 0.32 reshapes the codes by 32, whatever the group
            return dequantize(self, replace(w, factor=None)).astype(dtype)
        return mx.dequantize(_words(w), w.scales, w.biases, form.group, form.bits, form.mode, dtype=dtype)

    def expert_linear(self, x: Array, weight: Array, experts: Array) -> Array:
        if isinstance(weight, Quantized):
            y = self._packed_experts(x, weight, experts)
            factor = None if weight.factor is None else weight.factor[experts]
            return self.like(self._factored(y, weight, factor), x)
        if not self.on_gpu:  # the CPU's gather_mm takes nothing but float32
            return self.like(_expert_linear(self.to_wide(x), self.to_wide(weight), experts), x)
        return _expert_linear(x, weight, experts)

    def _packed_experts(self, x: Array, w: Quantized, experts: Array) -> Array:
        if not self.on_gpu:
            return self._decoded_experts(self.to_wide(x), replace(w, factor=None), experts)
        rows = x.reshape(-1, 1, x.shape[-1])
        return mx.gather_qmm(rows, _words(w), rhs_indices=experts, sorted_indices=True, **_packed(w))[:, 0]

    def _decoded_experts(self, x: Array, w: Quantized, experts: Array) -> Array:
        """Some outputs of all experts at a time: which experts have rows, only the host could ask."""
        E, O, I = w.shape
        step = max(1, DECODED // (4 * E * I))
        parts: list[Array] = []
        for a in range(0, O, step):
            some = w[:, a : a + step]
            if parts:  # evaluation is breadth first: without this edge the whole stack exists at once
                some = replace(some, codes=self.after(some.codes, parts[-1]))
            parts.append(_expert_linear(x, self.decoded(some), experts))
        return mx.concatenate(parts, -1)

    def _factored(self, y: Array, w: Quantized, factor: Array | None) -> Array:
        if factor is None:
            return y
        return self.to_wide(y) / factor if w.divides else self.to_wide(y) * factor

    # ---- what a backend may do differently ------------------------------------------------------

    def running(self) -> AbstractContextManager[None]:
        return limits(self.on_gpu, self.notices.say)

    def peak_memory(self) -> int:
        return mx.get_peak_memory()

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        """On the CPU `fn` itself: there each fused kernel is a run of g++, 31 s in all for 5 % of speed."""
        return mx.compile(fn) if self.on_gpu else fn

    def settle(self, arrays: Any) -> None:
        mx.eval(arrays)

    def after(self, x: Array, *done: Array) -> Array:
        return mx.depends(x, list(done))

    # ---- composites with something better than the definition -----------------------------------

    def upload(self, record: Quantized) -> Quantized:
        """FP8 rows become MXFP8 with scales of 1: MLX has no mode of one scale a row, but has the factor."""
        placed = super().upload(record)
        if record.form.mode == "fp8":
            if not MXFP8.fits(record.shape[-1]):
                return dense(self, placed)
            ones = mx.full((*record.shape[:-1], record.shape[-1] // MXFP8.group), 127, mx.uint8)
            placed = replace(placed, form=MXFP8, scales=ones)
        placed.map(mx.eval)
        return placed

    def layer_weights(self, w: LayerWeights) -> LayerWeights:
        """Matrices that read the same x become one where they are of one form: one product, one reading."""
        attention = w.attention if w.bias.q is not None else stacked_heads(w.attention)
        return replace(w, attention=attention, mlp=_stacked_mlp(w.mlp))

    def gated(self, x: Array, gate: Array, up: Array) -> Array:
        if up is not None:
            return super().gated(x, gate, up)
        y = self.linear(x, gate)
        half = y.shape[-1] // 2
        return geglu(self, y[..., :half], y[..., half:])

    def soft_embedding(self, p: Array, table: Array) -> Array:
        if not isinstance(table, Quantized):
            return super().soft_embedding(p, table)
        if table.factor is not None:  # it belongs to the rows that are summed over
            p = p / table.factor if table.divides else p * table.factor
        if not self.on_gpu:
            return self.to_compute(self.to_wide(self.to_compute(p)) @ self.decoded(table))
        return mx.quantized_matmul(self.to_compute(p), _words(table), **_packed(table, transpose=False))

    def vocabulary_rows(
        self,
        h: Array,
        table: Array,
        softcap: float,
        temperature: Array,
        uniforms: Array,
        soft_bound: float = 0.0,
    ) -> Prediction:
        step = vocabulary.tile if "vocabulary" in self.kernels else vocabulary.tile_plain
        if not soft_bound:
            return vocabulary.vocabulary(self, h, table, softcap, temperature, uniforms, step)
        return vocabulary.sparse_vocabulary(self, h, table, softcap, temperature, uniforms, step, soft_bound)

    def softmax(self, x: Array, axis: int) -> Array:
        return mx.softmax(x, axis, precise=True)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        if "rms_norm" in self.kernels:
            return norms.rms_norm(x, weight, eps)
        if weight is None:
            return mx.fast.rms_norm(x, None, eps)
        # In bfloat16 the kernel would round before the weight and again after it.
        return self.like(mx.fast.rms_norm(self.to_wide(x), self.to_wide(weight), eps), x)

    def open_branches(
        self, h: Array, a: Array, post: Array, mlp: Array, experts: Array, router: Array, eps: float
    ) -> tuple[Array, Array, Array, Array]:
        run = norms.open_branches if "open_branches" in self.kernels else super().open_branches
        return run(h, a, post, mlp, experts, router, eps)

    def join_branches(
        self,
        h: Array,
        m: Array,
        e: Array,
        post_mlp: Array,
        post_experts: Array,
        post: Array,
        scalar: Array,
        eps: float,
    ) -> Array:
        run = norms.join_branches if "join_branches" in self.kernels else super().join_branches
        return run(h, m, e, post_mlp, post_experts, post, scalar, eps)

    def heads(
        self, x: Array, w: AttentionWeights, bias: BiasWeights, eps: float, rotary: Any
    ) -> tuple[Array, Array, Array]:
        if "heads" not in self.kernels:
            return super().heads(x, w, bias, eps, rotary)
        if w.rows:
            y, rows = self.linear(x, w.q), w.rows
        else:
            q, k, v = self.project(x, w, bias)
            parts = [q, k] if v is k else [q, k, v]
            y, rows = self.concat(parts, -1), tuple(part.shape[-1] for part in parts)
        return norms.heads(y, rows, w.q_norm, w.k_norm, eps, rotary)

    def keys_values(
        self, x: Array, w: AttentionWeights, bias: BiasWeights, eps: float, rotary: Any
    ) -> tuple[Array, Array]:
        """By the definition on matrices apart: of lazy products, that of q is never made."""
        if w.rows:
            Q, K, *_ = w.rows
            w = replace(w, q=w.q[:Q], k=w.q[Q : Q + K], v=w.q[Q + K :] if len(w.rows) > 2 else None, rows=())
        return super().heads(x, w, bias, eps, rotary)[1:]

    def project(self, x: Array, w: AttentionWeights, bias: BiasWeights) -> tuple[Array, Array, Array]:
        if not w.rows:
            return super().project(x, w, bias)
        y, (Q, K, *_) = self.linear(x, w.q), w.rows
        # On full layers the last columns are K's, and V is made of them.
        return y[..., :Q], y[..., Q : Q + K], y[..., -K:]

    def router(self, r: Array, proj: Array, expert_scale: Array, k: int) -> tuple[Array, Array]:
        if "router" not in self.kernels:
            return super().router(r, proj, expert_scale, k)
        return plan.route(self.linear(r, self.to_wide(proj)), expert_scale, k)

    def experts(self, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array) -> Array:
        if "experts" not in self.kernels:
            return super().experts(x, weights, ids, gate_up, down)
        return moe.experts(self, x, weights, ids, gate_up, down, fused="gather" in self.kernels)

    def attend(self, q: Array, own: KV, past: KV | None, mask: Mask) -> Array:
        run = attention.attend if "attend" in self.kernels else attention.attend_plain
        return run(self, q, own, past, mask)

    def attention(self, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        L, S = q.shape[2], k.shape[2]
        seen = None if mask.causal else visible(self, L, S, mask)
        parts: list[Array] = []
        for a, b in self._blocks(q.shape, S, mask.window if mask.causal else None):
            block = q[:, :, a:b]
            if parts:  # evaluation is breadth first: without this edge all blocks exist at once
                block = self.after(block, parts[-1])
            if mask.causal:
                parts.append(self._causal(block, k, v, mask, S - L + b))
            else:
                rows = None if seen is None else seen[:, :, a:b]
                parts.append(mx.fast.scaled_dot_product_attention(block, k, v, scale=1.0, mask=rows))
        return parts[0] if len(parts) == 1 else self.concat(parts, 2)

    def _blocks(self, shape: Sequence[int], S: int, window: int | None) -> Iterator[tuple[int, int]]:
        """Ranges of queries whose scores fit `score_bytes`; no longer than a window, so as to skip keys."""
        B, H, L, _ = shape
        rows = min(max(1, self.score_bytes // (4 * B * H * S)), window or L)
        for a in range(0, L, rows):
            yield a, min(a + rows, L)

    def _causal(self, q: Array, k: Array, v: Array, mask: Mask, stop: int) -> Array:
        """Causal attention of queries that are the last of the first `stop` slots."""
        L, pad, window = q.shape[2], mask.pad, mask.window
        start = 0 if window is None else max(0, stop - L + 1 - window)
        S = stop - start
        plain = pad is None and (window is None or window >= S)  # MLX aligns "causal" at the last key
        cut = Mask(None if pad is None else pad - start, True, window)
        seen = "causal" if plain else visible(self, L, S, cut)
        return mx.fast.scaled_dot_product_attention(
            q, k[:, :, start:stop], v[:, :, start:stop], scale=1.0, mask=seen
        )


def make(
    dtype: str | None = None,
    device: str | None = None,
    activations: str | None = None,
    notices: Notices | None = None,
) -> MlxOps:
    """`dtype` is "float32" or "bfloat16"; by default bfloat16 on a GPU and float32 on a CPU.

    BackendError for a `device` or `activations`: MLX takes the one device there is, and rounds no
    activations.
    """
    if device is not None:
        raise BackendError("a device can be chosen for the cuda backend only, not for mlx")
    if activations is not None:
        raise BackendError("activations in NVFP4 are for the cuda backend only, not for mlx")
    on_gpu = mx.default_device().type == mx.gpu
    return MlxOps(getattr(mx, dtype or ("bfloat16" if on_gpu else "float32")), notices=notices)


def _words(w: Quantized) -> Array:
    """The codes as MLX's 32-bit words: the same bytes."""
    return w.codes.view(mx.uint32)


def _packed(w: Quantized, transpose: bool = True) -> dict[str, Any]:
    """What MLX's quantized products want to know of a record beside its words."""
    return {
        "scales": w.scales,
        "biases": w.biases,
        "transpose": transpose,
        "group_size": w.form.group,
        "bits": w.form.bits,
        "mode": w.form.mode,
    }


def stacked_heads(w: AttentionWeights) -> AttentionWeights:
    """q, k and, if it has its own matrix, v as one; `w` where their forms differ."""
    parts = [w.q, w.k] if w.v is None else [w.q, w.k, w.v]
    stacked = _stacked(*parts)
    if stacked is None:
        return w
    return replace(w, q=stacked, k=None, v=None, rows=tuple(part.shape[0] for part in parts))


def _stacked_mlp(w: MlpWeights) -> MlpWeights:
    stacked = _stacked(w.gate, w.up)
    return w if stacked is None else MlpWeights(stacked, None, w.down)


def _stacked(*parts: Array) -> Array | None:
    """Matrices one above the other, in memory of their own; None where their forms differ."""
    if len({_form(part) for part in parts}) > 1:
        return None
    whole = [mx.concatenate(list(field), 0) for field in zip(*map(_fields, parts), strict=True)]
    mx.eval(whole)  # or all parts would wait in memory for it
    fields = iter(whole)
    return parts[0].map(lambda _: next(fields)) if isinstance(parts[0], Quantized) else whole[0]


def _form(w: Array) -> tuple[Any, ...] | None:
    """What matrices have in common that can be stacked."""
    return (w.form, w.divides, w.factor is None) if isinstance(w, Quantized) else None


def _fields(w: Array) -> list[Array]:
    """What a matrix is made of, rows first: of a record its fields, with a factor for each row."""
    if not isinstance(w, Quantized):
        return [w]
    factor = None if w.factor is None else mx.broadcast_to(w.factor, w.shape[:1])
    return [x for x in (w.codes, w.scales, w.biases, factor) if x is not None]


def _expert_linear(x: Array, weight: Array, experts: Array) -> Array:
    # Reshaped, not x[:, None]: the strides of a new axis send MLX's CPU product down a path four times
    # as slow.
    x = x.reshape(-1, 1, x.shape[-1])
    y = mx.gather_mm(x, weight.swapaxes(1, 2), rhs_indices=experts, sorted_indices=True)
    return y[:, 0]
