"""A denoising step as a function of arrays that are never made, and its count."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from unittest import mock

import mlx.core as mx

import benchmarks.launches.rules  # noqa: F401, rules are known once they are imported
from benchmarks.launches.count import ArrayView, Buffer, Count, row_major
from benchmarks.launches.fusion import Fusion
from benchmarks.launches.graph import trace
from benchmarks.launches.metal import Region, as_on_metal
from benchmarks.launches.walk import Walk
from dgemma.released import RELEASED_DIR

FORMATS = ("bf16", "4bit")


@dataclass(frozen=True)
class Step:
    """A function of one step, and the arrays that it is given, some of which are the embedding table."""

    function: Callable[..., Any]
    arrays: list[mx.array]
    table: set[int]  # indices in `arrays`
    compiled: bool

    def count(self) -> tuple[Count, int]:
        """What it launches, and the bytes of the table."""
        buffers = [Buffer("input", in_table=index in self.table) for index in range(len(self.arrays))]
        views = [
            ArrayView(row_major(tuple(x.shape)), x.dtype.size, buffer)
            for x, buffer in zip(self.arrays, buffers, strict=True)
        ]
        count = Count()
        with as_on_metal():
            with mock.patch.object(Region, "live", not self.compiled):
                graph = trace(self.function, *self.arrays)
            Walk(Fusion(graph).run() if self.compiled else graph, count).run(views)
        return count, sum(self.arrays[index].nbytes for index in self.table)


def mapped(tree: Any, function: Callable[[mx.array], mx.array]) -> Any:
    """A tree of dataclasses, dictionaries and sequences with every array of it replaced."""
    if isinstance(tree, mx.array):
        return function(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(value, function) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: mapped(getattr(tree, f.name), function) for f in fields(tree)}
        return replace(tree, **values)
    return tree


def arrays_of(tree: Any) -> list[mx.array]:
    """Every array of a tree, in the order in which `mapped` meets them."""
    found: list[mx.array] = []
    mapped(tree, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def released() -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, without the vision tower, and generation_config.json."""
    config, generation = (
        json.loads((RELEASED_DIR / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    return config | {"vision_config": None}, generation
