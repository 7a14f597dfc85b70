"""The CUDA backend's cache and recordings on a CPU: a recorder that runs the function in place of a GPU's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from dgemma_cuda.cache import BucketCache  # noqa: E402
from dgemma_cuda.graphs import Graphed  # noqa: E402
from dgemma_cuda.kernels.attention import Remote  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402


def record_here(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A recording without a GPU: each replay runs the function on the same inputs, into the same outputs."""
    outputs = run()

    def replay() -> None:
        for place, new in zip(outputs, run(), strict=True):
            place.copy_(new)

    return replay, outputs


def found(x: Remote, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What attention's kernel reads: the array that is at the address now."""
    numbers = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.strides, strict=True))
    raw = (ctypes.c_byte * (numbers * dtype.itemsize)).from_address(int(x.at[0]))
    return torch.frombuffer(raw, dtype=dtype).as_strided(x.shape, x.strides)


class BucketOps(CudaOps):
    """The backend's cache, and steps that are not recorded."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.cache_type = BucketCache


class RecordingOps(BucketOps):
    """And its recordings; contexts are looked up as the kernel does it, and then PyTorch's attention runs."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.graphed: list[Graphed] = []

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        if not repeats:
            return fn
        self.graphed.append(Graphed(fn, self._record))
        return self.graphed[-1]

    def _record(self, run: Callable[[], Any]) -> Any:
        return record_here(run)

    def attend(self, q: Any, own: Any, past: Any, *rest: Any) -> Any:
        if past is not None and isinstance(past[0], Remote):
            past = tuple(found(x, self.dtype) for x in past)
        return super().attend(q, own, past, *rest)
