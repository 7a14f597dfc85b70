"""How arrays lie in memory, and the count of what launches read and write of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.launches.graph import Shape


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory that arrays lie in."""

    label: str
    in_table: bool = False  # whether it is the embedding table, or a part of its record


@dataclass(frozen=True, eq=False)
class ArrayView:
    """How an array lies in a buffer.

    `layout` has its shape and, as its elements are bytes, strides that count elements. It has no values.
    """

    layout: np.ndarray
    itemsize: int
    buffer: Buffer

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def elements(self) -> int:
        """Those that differ: what was broadcast counts once."""
        sizes = zip(self.shape, self.layout.strides, strict=True)
        return math.prod(n for n, stride in sizes if stride or n == 1)

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for the same elements of the same buffer."""
        start = self.layout.__array_interface__["data"][0]
        return id(self.buffer), start, self.shape, self.layout.strides

    @property
    def in_rows(self) -> bool:
        return self.layout.flags.c_contiguous

    @property
    def dense(self) -> bool:
        """Whether the elements fill their memory, in whatever order of the axes."""
        order = np.argsort([-stride for stride in self.layout.strides], kind="stable")
        return self.layout.transpose(order).flags.c_contiguous

    @property
    def has_rows(self) -> bool:
        """Whether rows of the last axis lie one behind the other, as kernels over rows want them."""
        *_, n = self.shape
        strides = self.layout.strides
        row = strides[-2] in (0, n) or self.shape[-2] == 1 if len(strides) > 1 else True
        return self.dense and strides[-1] == 1 and row

    def at(self, layout: np.ndarray) -> ArrayView:
        return replace(self, layout=layout)


NOWHERE = np.empty(1, np.uint8)


def row_major(shape: Shape) -> np.ndarray:
    """An array of this shape in rows that has no memory: only its shape and strides are ever looked at."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return np.lib.stride_tricks.as_strided(NOWHERE, shape, strides, writeable=False)


@dataclass
class Count:
    """What a step launches, and what its launches read and write."""

    launches: Counter[str] = field(default_factory=Counter)  # by kind
    read: int = 0  # bytes
    written: int = 0
    table_read: int = 0  # bytes of the embedding table among those read
    flops: int = 0
    largest: int = 0  # bytes of the largest temporary
    largest_is: str = ""  # what that is, and its shape

    def launch(
        self,
        kind: str,
        reads: Sequence[ArrayView],
        written: Sequence[ArrayView],
        flops: int = 0,
        times: int = 1,
    ) -> None:
        self.launches[kind] += times
        different = {view.key: view for view in reads}.values()
        self.read += sum(view.nbytes for view in different)
        self.table_read += sum(view.nbytes for view in different if view.buffer.in_table)
        self.written += sum(view.nbytes for view in written)
        self.flops += flops
        for view in written:
            if view.nbytes > self.largest:
                self.largest, self.largest_is = view.nbytes, f"{view.buffer.label} {list(view.shape)}"
