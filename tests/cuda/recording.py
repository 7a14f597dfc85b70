"""The CUDA backend's recordings on a CPU: a recorder that runs the function in place of a GPU's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from dgemma_cuda.graphs import Graphed  # noqa: E402
from dgemma_cuda.kernels import attention  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402


def record_here(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A recording without a GPU: each replay runs the function on the same inputs, into the same outputs."""
    outputs = run()

    def replay() -> None:
        for place, new in zip(outputs, run(), strict=True):
            place.copy_(new)

    return replay, outputs


def found(row: torch.Tensor, G: int, C: int, dtype: torch.dtype) -> list[Any]:
    """What attention's kernel reads by a row of a table: the pieces that are at the addresses now."""
    pieces, start = [], 0
    for entry in row[4 : 4 + 4 * int(row[0])].reshape(-1, 4).tolist():
        *addresses, end, step = entry
        numbers = (G - 1) * step + (end - start) * C
        raw = [
            (ctypes.c_byte * (numbers * dtype.itemsize)).from_address(at + start * C * dtype.itemsize)
            for at in addresses
        ]
        shape, steps = (G, end - start, C), (step, C, 1)
        pieces.append(tuple(torch.frombuffer(x, dtype=dtype).as_strided(shape, steps) for x in raw))
        start = end
    return pieces


class RecordingOps(CudaOps):
    """The backend's recordings; contexts are looked up as the kernel does it, for PyTorch's attention."""

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

    def pasts(self, layers: Any, lengths: Sequence[int]) -> Any:
        return attention.table(layers, lengths, self.device)

    def attend(self, q: Any, own: Any, past: Any, *rest: Any) -> Any:
        pieces = [found(row, len(own[0]), q.shape[2], self.dtype) for row in past]
        return super().attend(q, own, pieces, *rest)

    @property
    def recordings(self) -> int:
        """How many there are."""
        return sum(len(graphed.recordings) for graphed in self.graphed)
