"""Steps as CUDA graphs: a pure function of arrays is recorded once for its shapes and then replayed.

A step is some five hundred kernels; launching them one by one costs a third of its time on a fast GPU. A
recording reads and writes memory at fixed places, so arguments are copied there first, those that are the
same objects as at the last call not again: a canvas's context is copied once, and not at every step. Places
are shared by recordings, as those of a canvas's first step and of its later ones: a context is there once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch

# Recordings kept of a function, the least recently used dropped first.
KEPT = 4

Replay = Callable[[], None]
Record = Callable[[Callable[[], Any]], tuple[Replay, Any]]


def record_cuda(run: Callable[[], Any]) -> tuple[Replay, Any]:
    """Record `run` as a CUDA graph: how to replay it, and its outputs, which every replay overwrites.

    It runs twice before: kernels are compiled and libraries allocate at first use, which a recording
    must not.
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


class Place:
    """Memory that recordings read, and the object that was copied there last."""

    def __init__(self, x: torch.Tensor):
        self.memory = x.clone()
        self.last = x  # kept alive, so that its identity cannot be taken over by another object

    def take(self, x: torch.Tensor) -> None:
        if x is not self.last:
            self.memory.copy_(x)
            self.last = x


class Places:
    """Places by what fits there, each for as long as some recording reads it."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[Any, Place] = WeakValueDictionary()

    def of(self, leaves: list[torch.Tensor]) -> list[Place]:
        """A place for each tensor, no two the same; new ones hold their tensor already."""
        found: list[Place] = []
        taken: Counter[Any] = Counter()
        for x in leaves:
            kind = x.shape, x.dtype, x.device
            taken[kind] += 1
            key = (*kind, taken[kind])
            place = self._known.get(key) or Place(x)
            self._known[key] = place
            found.append(place)
        return found


class Graphed:
    """`function` of tensors, and of lists and tuples of them; returns a tuple of new tensors.

    The function must be pure, read nothing on the host and make the same kernels for the same shapes.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        record: Record = record_cuda,
        kept: int = KEPT,
        places: Places | None = None,
    ):
        self.function, self.record, self.kept = function, record, kept
        self.places = Places() if places is None else places
        self.recordings: OrderedDict[Any, _Recording] = OrderedDict()

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        leaves: list[torch.Tensor] = []
        shape = _flatten(args, leaves)
        key = shape, tuple((x.shape, x.dtype, x.device) for x in leaves)
        if key not in self.recordings:
            while len(self.recordings) >= self.kept:
                self.recordings.popitem(last=False)
            self.recordings[key] = _Recording(self.function, shape, self.places.of(leaves), self.record)
        self.recordings.move_to_end(key)
        return self.recordings[key](leaves)


class _Recording:
    def __init__(self, function: Callable[..., Any], shape: Any, places: list[Place], record: Record):
        self.places = places
        args = _rebuild(shape, (place.memory for place in places))
        self.replay, self.outputs = record(lambda: function(*args))

    def __call__(self, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        for place, x in zip(self.places, leaves, strict=True):
            place.take(x)
        self.replay()
        # Copies, as a caller may hold a step's result beyond the next step.
        return tuple(x.clone() for x in self.outputs)


def _flatten(tree: Any, leaves: list[torch.Tensor]) -> Any:
    """The nesting of a tree, with its tensors gone to `leaves`, in order."""
    if isinstance(tree, list | tuple):
        return tuple(_flatten(child, leaves) for child in tree)
    leaves.append(tree)
    return None


def _rebuild(shape: Any, leaves: Any) -> Any:
    """The tree of such a nesting over these leaves."""
    return next(leaves) if shape is None else [_rebuild(child, leaves) for child in shape]
