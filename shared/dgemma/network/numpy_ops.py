"""NumPy float64: the living definition. It supplies primitives only and overrides no composite.

It is slow on purpose. It needs only the base install and runs the embedded model everywhere. Every kernel,
format and cache is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dgemma.formats.stored import Stored
from dgemma.network.ops import Array, Ops
from dgemma.network.ops.decoding import dense


class NumpyOps(Ops):
    """float64 everywhere: compute and wide type are the same. Shapes are those of the base classes."""

    name = "numpy"
    dtype_name = "float64"

    def asarray(self, x: np.ndarray) -> Array:
        x = np.asarray(x)
        return x.astype(np.float64) if x.dtype.kind == "f" else x.astype(np.int64)

    def aswide(self, x: np.ndarray) -> Array:
        return np.asarray(x, np.float64)

    def load(self, stored: Stored, wide: bool = False) -> Array:
        with np.errstate(invalid="ignore"):  # a NaN stays one, without a warning
            return stored.to_float32().astype(np.float64)

    def raw(self, x: np.ndarray) -> Array:
        return x.copy()

    def integer(self, x: Array) -> Array:
        return x.astype(np.int64)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def rounded(self, x: float) -> float:
        return float(x)

    def to_wide(self, x: Array) -> Array:
        return np.asarray(x, np.float64)

    def to_compute(self, x: Array) -> Array:
        return np.asarray(x, np.float64)

    def like(self, x: Array, reference: Array) -> Array:
        return x

    def transpose(self, x: Array, *axes: int) -> Array:
        return x.transpose(axes)

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        return np.concatenate(parts, axis)

    def take(self, x: Array, ids: Array) -> Array:
        return x[ids]

    def arange(self, stop: int) -> Array:
        return np.arange(stop)

    def where(self, condition: Array, x: Array, y: Array | float) -> Array:
        return np.where(condition, x, y)

    def exp(self, x: Array) -> Array:
        return np.exp(x)

    def log(self, x: Array) -> Array:
        return np.log(x)

    def tanh(self, x: Array) -> Array:
        return np.tanh(x)

    def cos(self, x: Array) -> Array:
        return np.cos(x)

    def sin(self, x: Array) -> Array:
        return np.sin(x)

    def maximum(self, x: Array, y: Array) -> Array:
        return np.maximum(x, y)

    def sum(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        return np.sum(x, axis, keepdims=keepdims)

    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        return np.max(x, axis, keepdims=keepdims)

    def argmax(self, x: Array, axis: int) -> Array:
        return np.argmax(x, axis)

    def argsort(self, x: Array, axis: int) -> Array:
        return np.argsort(x, axis, kind="stable")

    def take_along(self, x: Array, ids: Array, axis: int) -> Array:
        return np.take_along_axis(x, ids, axis)

    def cumsum(self, x: Array, axis: int) -> Array:
        return np.cumsum(x, axis)

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        y = x @ dense(self, weight).T
        return y if bias is None else y + bias

    def expert_linear(self, x: Array, weight: Array, experts: Array) -> Array:
        y = np.empty((len(x), weight.shape[1]))
        # The row of each expert's first input: rows are sorted by expert.
        edges = np.searchsorted(experts, np.arange(len(weight) + 1))
        for expert in np.unique(experts):
            rows = slice(edges[expert], edges[expert + 1])
            y[rows] = x[rows] @ dense(self, weight[expert]).T
        return y
