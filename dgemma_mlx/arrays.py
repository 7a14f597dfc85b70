"""MLX's arrays: primitives, and products with matrices as they are stored.

Evaluation is lazy and breadth first: whatever is independent exists at the same time. Loops over blocks and
tiles are chained with `mx.depends`, which costs nothing and also holds inside `mx.compile`; `mx.eval` does
not. The CPU build has slow reference kernels and no bfloat16 expert product; it is here to test the graph and
to run the embedded model.

    O outputs (rows)  I inputs  E experts  R rows of experts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from dgemma.errors import BackendError
from dgemma.formats.quantized import MXFP8, Quantized
from dgemma.formats.stored import Stored
from dgemma.network.ops import Array, Notices, Ops
from dgemma.network.ops.decoding import dense, dequantize

from . import elementary
from .memory import limits

# Bytes of float32 that the CPU decodes of a stack of experts at a time.
DECODED = 8 << 20
# Sets of shapes for which a compiled pass is kept: 1.4 MB each at the released geometry.
TRACES = 64


class MlxArrays(Ops):
    """The compute type is `dtype`, the wide one float32. Integers are int32 throughout."""

    name = "mlx"
    # Heads of 256 and 512 have no fused Metal kernel beyond 8 queries, so scores [H, L, S] exist: queries
    # of a prompt and keys of a canvas go in blocks that keep them below this many bytes (as float32).
    score_bytes = 128 << 20
    # Kernels weigh some blocks of keys at once for a canvas over a long context: bytes of scores as stored.
    scores_at_once = 192 << 20
    # A whole piece of a context is weighed at once for the released 16 heads, canvas of 256 and bfloat16.
    piece_slots = scores_at_once // (2 * 16 * 256)
    # Logits never fill a plane: a few tiles exist at once (`kernels.vocabulary`). Wide tiles save launches
    # and passes over the sums [rows, D]. Six of these are the released vocabulary, each 25 MB of bfloat16 at
    # 256 rows.
    vocab_tile = 49152

    def __init__(
        self,
        dtype: mx.Dtype = mx.float32,
        notices: Notices | None = None,
        on_gpu: bool | None = None,
    ):
        """`on_gpu` chooses what suits a GPU, by default where MLX has one. A CPU can run that, too."""
        if dtype not in (mx.float32, mx.bfloat16):
            kind = str(dtype).removeprefix("mlx.core.")
            raise BackendError(f"MLX runs in bfloat16 or float32, not {kind}: float16 overflows")
        super().__init__(notices)
        self.dtype = dtype
        self.dtype_name = str(dtype).removeprefix("mlx.core.")
        self.on_gpu = mx.default_device().type == mx.gpu if on_gpu is None else on_gpu
        if not self.on_gpu:  # a CPU has up to ten operations in flight, each with its array; small ones
            self.vocab_tile, self.score_bytes = 2048, 2 << 20  # also stay in its caches

    def asarray(self, x: np.ndarray) -> Array:
        x = np.asarray(x)
        if x.dtype.kind == "f":
            return mx.array(x.astype(np.float32, copy=False)).astype(self.dtype)
        return mx.array(x if x.dtype.kind == "b" else x.astype(np.int32))

    def aswide(self, x: np.ndarray) -> Array:
        return mx.array(np.asarray(x, np.float32))

    def asclasses(self, x: np.ndarray) -> Array:
        return mx.array(x.astype(np.int16))

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
        """Whether MLX's own functions are as fast as any for x [...]: on a GPU, and on small arrays."""
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
        """x [..., I] times the record [O, I] transposed: [..., O] in x's type."""
        if self.on_gpu:
            y = mx.quantized_matmul(x, _words(w), **_packed(w))
        else:  # decoded for the BLAS: thirty times as fast as the CPU's packed product
            y = self.to_wide(x) @ self.decoded(w).T
        return self.like(self._factored(y, w, w.factor), x)

    def decoded(self, w: Quantized, dtype: mx.Dtype = mx.float32) -> Array:
        """A record's values [..., O, I] without its factor, in one operation; `dense` makes wide planes."""
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
        """`expert_linear` of x [R, I] and a record [E, O, I], without its factor: [R, O]."""
        if not self.on_gpu:
            return self._decoded_experts(self.to_wide(x), replace(w, factor=None), experts)
        rows = x.reshape(-1, 1, x.shape[-1])
        return mx.gather_qmm(rows, _words(w), rhs_indices=experts, sorted_indices=True, **_packed(w))[:, 0]

    def _decoded_experts(self, x: Array, w: Quantized, experts: Array) -> Array:
        """Some outputs of all experts at a time, [R, O]: only the host could ask which experts have rows."""
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
        """y [..., O] times or by the factor [..., 1 or O], in float32; y itself without one."""
        if factor is None:
            return y
        return self.to_wide(y) / factor if w.divides else self.to_wide(y) * factor

    # ---- the machine -------------------------------------------------------------------------------

    def running(self) -> AbstractContextManager[None]:
        return limits(self.on_gpu, self.notices.say)

    def peak_memory(self) -> int:
        return mx.get_peak_memory()

    def free_memory(self) -> int | None:
        free = super().free_memory()
        # macOS does not tell what is taken, so that at least our own arrays must be.
        return free if free is None or not self.on_gpu else max(0, free - mx.get_active_memory())

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        """A pass of one row is compiled as a whole; of several only what is `fused`.

        MLX traces again for each set of shapes, and keeps every trace for as long as what `mx.compile` gave.
        Rows at different canvases have a new set every few steps, and a trace takes four to seven times as
        long as running `fn` does. A row has a new set every canvas; at most `TRACES` are kept.
        """
        if not self.on_gpu:
            return fn
        traces = 0

        def traced(*args: Any) -> Any:
            nonlocal traces
            traces += 1
            return fn(*args)

        compiled = mx.compile(traced)

        def run(rows: Any, *rest: Any) -> Any:
            nonlocal compiled, traces
            if len(rows) > 1:
                return fn(rows, *rest)
            if traces == TRACES:
                compiled, traces = mx.compile(traced), 0
            return compiled(rows, *rest)

        return run

    def fused(self, chain: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """A chain of elementwise operations as one kernel; within a compiled pass it is a part of that.

        The CPU runs it as it is: each kernel is a run of g++ there, 31 s in all for 5 % of speed.
        """
        return mx.compile(chain) if self.on_gpu else chain

    def settle(self, arrays: Any) -> None:
        mx.eval(arrays)

    def after(self, x: Array, *done: Array) -> Array:
        return mx.depends(x, list(done))

    def upload(self, record: Quantized) -> Quantized:
        """FP8 rows become MXFP8 with scales of 1: MLX has no mode of one scale a row; the factor is it."""
        placed = super().upload(record)
        if record.form.mode == "fp8":
            if not MXFP8.fits(record.shape[-1]):
                return dense(self, placed)
            ones = mx.full((*record.shape[:-1], record.shape[-1] // MXFP8.group), 127, mx.uint8)
            placed = replace(placed, form=MXFP8, scales=ones)
        placed.map(mx.eval)
        return placed

    def soft_embedding(self, p: Array, table: Array) -> Array:
        if not isinstance(table, Quantized):
            return super().soft_embedding(p, table)
        if table.factor is not None:  # it belongs to the rows that are summed over
            p = p / table.factor if table.divides else p * table.factor
        if not self.on_gpu:
            return self.to_compute(self.to_wide(self.to_compute(p)) @ self.decoded(table))
        return mx.quantized_matmul(self.to_compute(p), _words(table), **_packed(table, transpose=False))

    def softmax(self, x: Array, axis: int) -> Array:
        return mx.softmax(x, axis, precise=True)


def _words(w: Quantized) -> Array:
    """The codes, uint8 [..., n], as MLX's words, uint32 [..., n/4]: the same bytes."""
    return w.codes.view(mx.uint32)


def _packed(w: Quantized, transpose: bool = True) -> dict[str, Any]:
    """The arguments of MLX's quantized products for a record, but its words."""
    return {
        "scales": w.scales,
        "biases": w.biases,
        "transpose": transpose,
        "group_size": w.form.group,
        "bits": w.form.bits,
        "mode": w.form.mode,
    }


def _expert_linear(x: Array, weight: Array, experts: Array) -> Array:
    """Row r of x [R, I] times weight[experts[r]] of [E, O, I], transposed: [R, O]."""
    # Reshaped, as the strides of x[:, None] send MLX's CPU product down a path four times as slow.
    x = x.reshape(-1, 1, x.shape[-1])
    y = mx.gather_mm(x, weight.swapaxes(1, 2), rhs_indices=experts, sorted_indices=True)
    return y[:, 0]
