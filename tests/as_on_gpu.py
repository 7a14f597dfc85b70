"""MLX's backend as on a GPU, while its CPU computes: the values of a Mac, but for Metal's own rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest

from dgemma.formats.quantized import Quantized
from dgemma.network.ops import Array
from dgemma_mlx.ops import MlxOps

WORKING_SET = {"max_recommended_working_set_size": 48 << 30}


class AsOnGpu(MlxOps):
    """Every branch for a GPU but the kernels, which tests/metal has: which of them run, a user's cache says.

    A step is `compiled` where a test says so. On a CPU each fused kernel is a run of g++: with all tests of
    this backend they were 555, eight minutes, and all passed. tests/graph/test_compiled.py needs 95.
    """

    def __init__(self, dtype: str, compiled: bool = False) -> None:
        self.compiled = compiled
        super().__init__(getattr(mx, dtype), kernels=frozenset(), on_gpu=True)

    def fused(self, chain: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return super().fused(chain) if self.compiled else chain

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        return super().compile(fn, repeats) if self.compiled else fn

    def expert_linear(self, x: Array, weight: Array, experts: Array) -> Array:
        if not isinstance(weight, Quantized) and not has_gather_mm(x.dtype):
            pytest.skip(f"MLX's CPU has no gather_mm in {str(x.dtype).removeprefix('mlx.core.')}")
        return super().expert_linear(x, weight, experts)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The limits of a Mac: MLX's CPU knows of no working set."""
        with ExitStack() as stack:
            with mock.patch.object(mx, "device_info", lambda: WORKING_SET):
                stack.enter_context(super().running())
            yield


@cache
def has_gather_mm(dtype: mx.Dtype) -> bool:
    """Whether MLX multiplies rows with matrices of their own here: it is tried."""
    one = mx.ones((1, 1, 1), dtype)
    try:
        mx.eval(mx.gather_mm(one, one, rhs_indices=mx.array([0])))
    except RuntimeError:
        return False
    return True
