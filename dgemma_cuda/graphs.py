"""Steps as CUDA graphs: a pure function of arrays is recorded once for its shapes and then replayed.

A step is some five hundred kernels; launching them one by one costs a third of its time on a fast GPU. A
recording reads and writes memory at fixed places, so arguments are copied there first. A context is hundreds
of megabytes and stays where it is: its addresses are copied, and the attention kernel follows them. The price
is that a recorded function gives contexts to that kernel and to nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from .kernels.attention import Remote

# Recordings kept of a function, the least recently used dropped first.
KEPT = 4

Context = Sequence[tuple[torch.Tensor, torch.Tensor]]  # each layer's keys and values
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


class Copied:
    """An array that a recording reads in memory of its own."""

    def __init__(self, x: torch.Tensor):
        self.seen = x.clone()

    def take(self, x: torch.Tensor) -> None:
        """Copy x, an array [...] of the recorded shape, to where the recording reads."""
        self.seen.copy_(x)


class Followed:
    """A context that a recording reads where it is, by addresses in memory of its own."""

    def __init__(self, context: Context):
        self.last: list[Any] = []
        self.addresses = torch.empty((len(context), 2, 2), dtype=torch.int64, device=context[0][0].device)
        self.seen = [
            (Remote(at[0], k.shape, k.stride()), Remote(at[1], v.shape, v.stride()))
            for at, (k, v) in zip(self.addresses, context, strict=True)
        ]
        self.take(context)

    def take(self, context: Context) -> None:
        """Point the recording at another context of the recorded shapes and strides."""
        # Addresses are compared, not arrays: what lies there now is what a replay has to read.
        new = [[(x.data_ptr(), 0) for x in pair] for pair in context]
        if new != self.last:
            self.addresses.copy_(torch.tensor(new))
            self.last = new


class Graphed:
    """`function` of arrays and contexts; returns a tuple of new arrays.

    The function must be pure, read nothing on the host and make the same kernels for the same shapes.
    """

    def __init__(self, function: Callable[..., Any], record: Record = record_cuda, kept: int = KEPT):
        self.function, self.record, self.kept = function, record, kept
        self.recordings: OrderedDict[Any, Recording] = OrderedDict()

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        key = tuple(_kind(x) for x in args)
        if key not in self.recordings:
            while len(self.recordings) >= self.kept:
                self.recordings.popitem(last=False)
            self.recordings[key] = Recording(self.function, args, self.record)
        self.recordings.move_to_end(key)
        return self.recordings[key](args)


def _kind(x: Any) -> Any:
    """The facts that an argument shares with a recorded one; strides are among them if it is not copied."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype, x.device
    return tuple((k.shape, k.stride(), v.stride(), k.dtype, k.device) for k, v in x)


class Recording:
    """`function` recorded for arguments like `args`; a call takes others and returns new arrays."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], record: Record):
        self.inputs = [Copied(x) if isinstance(x, torch.Tensor) else Followed(x) for x in args]
        self.replay, self.outputs = record(lambda: function(*(x.seen for x in self.inputs)))

    def __call__(self, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        for place, x in zip(self.inputs, args, strict=True):
            place.take(x)
        self.replay()
        # Copies, as a caller may hold a step's result beyond the next step.
        return tuple(x.clone() for x in self.outputs)
