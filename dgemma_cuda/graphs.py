"""Steps as CUDA graphs: a pure function of arrays is recorded once for its shapes and then replayed.

A step is some five hundred kernels; launching them one by one costs a third of its time on a fast GPU. A
recording reads and writes memory at fixed places, so arguments are copied there first. Contexts are hundreds
of megabytes and stay where they are: the argument is the table by which attention's kernel finds them. So a
recording serves all contexts of as many rows, whatever their lengths.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

# Recordings kept of a function, the least recently used dropped first. There is one a number of rows, and
# rows come and go one by one. Each holds a soft embedding in and out, 3 MB a row of the released model.
KEPT = 16

Replay = Callable[[], None]
Record = Callable[[Callable[[], Any]], tuple[Replay, Any]]


def record_cuda(run: Callable[[], Any]) -> tuple[Replay, Any]:
    """Record `run` as a CUDA graph: how to replay it, and its outputs, which every replay overwrites.

    It runs twice before: first use compiles kernels and lets libraries allocate, which a recording must not.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        outputs = run()
    return graph.replay, outputs


@cache
def _pool() -> Any:
    """One pool of memory for all recordings: they replay one after the other, and results are copied out."""
    return torch.cuda.graph_pool_handle()


class Graphed:
    """`function` of arrays; returns a tuple of new arrays.

    The function must be pure, read nothing on the host and make the same kernels for the same shapes.
    """

    def __init__(self, function: Callable[..., Any], record: Record = record_cuda, kept: int = KEPT):
        self.function, self.record, self.kept = function, record, kept
        self.recordings: OrderedDict[Any, Recording] = OrderedDict()

    def __call__(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key = tuple((x.shape, x.dtype, x.device) for x in args)
        if key not in self.recordings:
            while len(self.recordings) >= self.kept:
                self.recordings.popitem(last=False)
            self.recordings[key] = Recording(self.function, args, self.record)
        self.recordings.move_to_end(key)
        return self.recordings[key](args)


class Recording:
    """`function` recorded for arguments like `args`; a call takes others and returns new arrays."""

    def __init__(self, function: Callable[..., Any], args: Sequence[torch.Tensor], record: Record):
        self.inputs = [x.clone() for x in args]
        self.replay, self.outputs = record(lambda: function(*self.inputs))

    def __call__(self, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        for place, x in zip(self.inputs, args, strict=True):
            place.copy_(x)
        self.replay()
        # Copies, as a caller may hold a step's result beyond the next step.
        return tuple(x.clone() for x in self.outputs)
