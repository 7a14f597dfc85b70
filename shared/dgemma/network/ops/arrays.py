"""The primitives: what a backend supplies, array by array. They raise until it does.

Arrays are the backend's own; operators and slicing work on all of them. "Wide" is the type of norms, softmax,
router and statistics: float32 on the fast backends, float64 on NumPy. "Compute" is the type of weights and
activations. Shapes are any unless given; results of elementwise operations keep shape and type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, mlx.core.array or torch.Tensor
KV = tuple[Array, Array]  # keys after norm and RoPE, and values: [G, tokens, C] each
Past = Sequence[KV]  # of one row in one layer: pieces, one behind the other


class Arrays:
    """Arrays of one backend, their types and the operations on them."""

    name = "ops"
    dtype_name = ""  # the compute type by its plain name: "float32", "bfloat16" or "float64"

    def asarray(self, x: np.ndarray) -> Array:
        """Host to device: floats become the compute type, integers stay integers."""
        raise NotImplementedError

    def aswide(self, x: np.ndarray) -> Array:
        """Host to device, in the wide type."""
        raise NotImplementedError

    def to_numpy(self, x: Array) -> np.ndarray:
        """Device to host: floats as float32 (float64 on NumPy), integers as they are. Synchronizes."""
        raise NotImplementedError

    def rounded(self, x: float) -> float:
        """`x` rounded to the compute type."""
        raise NotImplementedError

    def to_wide(self, x: Array) -> Array:
        """`x` in the wide type."""
        raise NotImplementedError

    def to_compute(self, x: Array) -> Array:
        """`x` in the compute type."""
        raise NotImplementedError

    def like(self, x: Array, reference: Array) -> Array:
        """`x` in the type of `reference`."""
        raise NotImplementedError

    def transpose(self, x: Array, *axes: int) -> Array:
        """`x` with all its axes in this order; may be a view."""
        raise NotImplementedError

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        """The parts one behind the other along an axis that exists."""
        raise NotImplementedError

    def take(self, x: Array, ids: Array) -> Array:
        """Rows `ids` (integers of any shape) of `x` [n, ...] -> [*ids.shape, ...]."""
        raise NotImplementedError

    def arange(self, stop: int) -> Array:
        """Integers 0 … stop − 1, [stop]."""
        raise NotImplementedError

    def where(self, condition: Array, x: Array, y: Array | float) -> Array:
        """`x` where the boolean `condition` holds, else `y`; shapes broadcast."""
        raise NotImplementedError

    def exp(self, x: Array) -> Array:
        """Elementwise e^x."""
        raise NotImplementedError

    def log(self, x: Array) -> Array:
        """Elementwise natural logarithm."""
        raise NotImplementedError

    def tanh(self, x: Array) -> Array:
        """Elementwise hyperbolic tangent."""
        raise NotImplementedError

    def cos(self, x: Array) -> Array:
        """Elementwise cosine of radians."""
        raise NotImplementedError

    def sin(self, x: Array) -> Array:
        """Elementwise sine of radians."""
        raise NotImplementedError

    def maximum(self, x: Array, y: Array) -> Array:
        """The larger of the two, elementwise; shapes broadcast."""
        raise NotImplementedError

    def sum(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        """Sum along one axis, in the type of `x`; of booleans the count, as an integer."""
        raise NotImplementedError

    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        """Maximum along one axis."""
        raise NotImplementedError

    def argmax(self, x: Array, axis: int) -> Array:
        """Place of the maximum along one axis, integer; the first of equals."""
        raise NotImplementedError

    def argsort(self, x: Array, axis: int) -> Array:
        """Places that sort `x` along one axis, integers of its shape; ascending and stable."""
        raise NotImplementedError

    def take_along(self, x: Array, ids: Array, axis: int) -> Array:
        """Values of `x` at places `ids` along one axis; the other axes pair up."""
        raise NotImplementedError

    def cumsum(self, x: Array, axis: int) -> Array:
        """Running sum along one axis, each value's own included."""
        raise NotImplementedError
