"""The MLX backend: the Apple GPU through Metal, the CPU elsewhere, float32 or bfloat16.

Plain but not naive: MLX's own kernels where they compute what the definition says, blocked attention, and our
kernels where this machine has proven them. Rotation stays the definition's: `mx.fast.rope` takes Metal's
`fast::cos` of angles up to the context length, and positions that follow each other.

    L queries of a row  S keys  D hidden  H heads  G KV heads  C head size  M size of the dense MLP
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from dgemma.errors import BackendError
from dgemma.formats.quantized import Quantized
from dgemma.network.ops import KV, Array, Bias, Mask, Notices, Past, Prediction
from dgemma.network.ops.layers import geglu, visible
from dgemma.network.weights import AttentionWeights, BiasWeights, LayerWeights, MlpWeights

from . import verdict
from .arrays import MlxArrays
from .kernels import attention, moe, norms, plan, vocabulary


class MlxOps(MlxArrays):
    """The composites for which MLX, or a kernel of ours, has something better than the definition."""

    def __init__(
        self,
        dtype: mx.Dtype = mx.float32,
        kernels: frozenset[str] | None = None,
        notices: Notices | None = None,
        on_gpu: bool | None = None,
    ):
        """`kernels` are the names in `verdict.KERNELS` that run; by default those proven on this machine.

        `MlxArrays` says what `on_gpu` does.
        """
        super().__init__(dtype, notices, on_gpu)
        self._kernels = kernels
        self._gelu = self.fused(super().gelu)

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

    def layer_weights(self, w: LayerWeights) -> LayerWeights:
        """Matrices that read the same x become one where they are of one form: one product, one reading."""
        attention = w.attention if w.bias.q is not None else stacked_heads(w.attention)
        return replace(w, attention=attention, mlp=_stacked_mlp(w.mlp))

    def gelu(self, x: Array) -> Array:
        return self._gelu(x)

    def gated(self, x: Array, gate: Array, up: Array) -> Array:
        if up is not None:
            return super().gated(x, gate, up)
        y = self.linear(x, gate)
        half = y.shape[-1] // 2
        return geglu(self, y[..., :half], y[..., half:])

    def vocabulary_rows(
        self,
        h: Array,
        table: Array,
        softcap: float | None,
        temperature: Array,
        uniforms: Array,
        soft_bound: float = 0.0,
        bias: Bias | None = None,
    ) -> Prediction:
        if softcap is None:
            return super().vocabulary_rows(h, table, softcap, temperature, uniforms, soft_bound, bias)
        step = vocabulary.tile if "vocabulary" in self.kernels else vocabulary.tile_plain
        given = self, h, table, softcap, temperature, uniforms, step
        if not soft_bound:
            return vocabulary.vocabulary(*given, bias)
        return vocabulary.sparse_vocabulary(*given, soft_bound, bias)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        if "rms_norm" in self.kernels:
            return norms.rms_norm(x, weight, eps)
        if weight is None:
            return mx.fast.rms_norm(x, None, eps)
        # The kernel would round bfloat16 before the weight and again after it.
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
        """The definition on separate matrices: products are lazy, and that of q is never made."""
        if w.rows:
            Q, K, *_ = w.rows
            w = replace(w, q=w.q[:Q], k=w.q[Q : Q + K], v=w.q[Q + K :] if len(w.rows) > 2 else None, rows=())
        return super().heads(x, w, bias, eps, rotary)[1:]

    def project(self, x: Array, w: AttentionWeights, bias: BiasWeights) -> tuple[Array, Array, Array]:
        if not w.rows:
            return super().project(x, w, bias)
        y, (Q, K, *_) = self.linear(x, w.q), w.rows
        # The last columns are K's on full layers, which make V of them.
        return y[..., :Q], y[..., Q : Q + K], y[..., -K:]

    def router(self, r: Array, proj: Array, expert_scale: Array, k: int) -> tuple[Array, Array]:
        if "router" not in self.kernels:
            return super().router(r, proj, expert_scale, k)
        return plan.route(self.linear(r, self.to_wide(proj)), expert_scale, k)

    def experts(self, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array) -> Array:
        if "experts" not in self.kernels:
            return super().experts(x, weights, ids, gate_up, down)
        return moe.experts(self, x, weights, ids, gate_up, down, fused="gather" in self.kernels)

    def attend_row(self, q: Array, own: KV, past: Past, mask: Mask) -> Array:
        run = attention.attend_row if "attend" in self.kernels else attention.attend_row_plain
        return run(self, q, own, past, mask)

    def attention(self, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        L, S = q.shape[1], k.shape[1]
        parts: list[Array] = []
        for a, b in self._blocks(q.shape, S, mask.window if mask.causal else None):
            block = q[:, a:b]
            if parts:  # evaluation is breadth first: without this edge all blocks exist at once
                block = self.after(block, parts[-1])
            if mask.causal:
                parts.append(self._causal(block, k, v, mask.window, S - L + b))
            else:
                parts.append(_fast(block, k, v, None))
        return parts[0] if len(parts) == 1 else self.concat(parts, 1)

    def _blocks(self, shape: Sequence[int], S: int, window: int | None) -> Iterator[tuple[int, int]]:
        """Ranges of L, of q [H, L, C], whose scores fit `score_bytes`; a window at most, to skip keys."""
        H, L, _ = shape
        rows = min(max(1, self.score_bytes // (4 * H * S)), window or L)
        for a in range(0, L, rows):
            yield a, min(a + rows, L)

    def _causal(self, q: Array, k: Array, v: Array, window: int | None, stop: int) -> Array:
        """Causal attention of q [H, L, C], which are the last L of the first `stop` slots of k and v."""
        L = q.shape[1]
        start = 0 if window is None else max(0, stop - L + 1 - window)
        S = stop - start
        plain = window is None or window >= S  # MLX aligns "causal" at the last key
        seen = "causal" if plain else visible(self, L, S, Mask(True, window))
        return _fast(q, k[:, start:stop], v[:, start:stop], seen)


def _fast(q: Array, k: Array, v: Array, mask: Array | str | None) -> Array:
    """MLX's own attention of q [H, L, C] over k and v [G, S, C] -> [H, L, C]."""
    y = mx.fast.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0, mask=mask)
    return y.squeeze(0)


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


def stacked_heads(w: AttentionWeights) -> AttentionWeights:
    """q, k and, if it has its own, v as one matrix [rows, D]; `w` itself where their forms differ."""
    parts = [w.q, w.k] if w.v is None else [w.q, w.k, w.v]
    stacked = _stacked(*parts)
    if stacked is None:
        return w
    return replace(w, q=stacked, k=None, v=None, rows=tuple(part.shape[0] for part in parts))


def _stacked_mlp(w: MlpWeights) -> MlpWeights:
    """gate and up as one matrix [2M, D]; `w` itself where their forms differ."""
    stacked = _stacked(w.gate, w.up)
    return w if stacked is None else MlpWeights(stacked, None, w.down)


def _stacked(*parts: Array) -> Array | None:
    """Matrices [·, D] one above the other, in memory of their own; None where their forms differ."""
    if len({_form(part) for part in parts}) > 1:
        return None
    whole = [mx.concatenate(list(field), 0) for field in zip(*map(_fields, parts), strict=True)]
    mx.eval(whole)  # or all parts would wait in memory for it
    fields = iter(whole)
    return parts[0].map(lambda _: next(fields)) if isinstance(parts[0], Quantized) else whole[0]


def _form(w: Array) -> tuple[Any, ...] | None:
    """The facts that matrices must share to be stacked."""
    return (w.form, w.divides, w.factor is None) if isinstance(w, Quantized) else None


def _fields(w: Array) -> list[Array]:
    """The arrays of a matrix [O, I], rows first; a record's factor becomes one for each row, [O]."""
    if not isinstance(w, Quantized):
        return [w]
    factor = None if w.factor is None else mx.broadcast_to(w.factor, w.shape[:1])
    return [x for x in (w.codes, w.scales, w.biases, factor) if x is not None]
