"""A traced function as a graph of primitives."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

Shape = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A primitive; inputs and outputs are names of arrays. `inner` are those that a fused one stands for."""

    name: str
    inputs: list[str]
    outputs: list[str]
    arguments: list[Any] = field(default_factory=list)
    inner: list[Node] = field(default_factory=list)


@dataclass
class Graph:
    """A traced function: nodes in an order of evaluation, and shape and bytes an element of each array."""

    inputs: list[str]
    outputs: list[str]
    constants: list[str]
    nodes: list[Node]
    types: dict[str, tuple[Shape, int]]


def trace(function: Callable[..., Any], *arrays: mx.array) -> Graph:
    """What `mx.export_function` tells of `function`; nothing is evaluated."""
    events: list[dict[str, Any]] = []
    mx.export_function(events.append, function, *arrays)
    told = {event["type"]: event for event in events}
    inputs, outputs = told["inputs"]["inputs"], told["outputs"]["outputs"]
    fixed = told.get("constants", {"constants": []})["constants"]
    made = [event for event in events if event["type"] == "primitive"]
    arrays_told = [*inputs, *(array for event in made for array in event["outputs"])]
    types = {name: (shape, dtype.size) for name, shape, dtype in arrays_told}
    types |= {name: (tuple(array.shape), array.dtype.size) for name, array in fixed}
    nodes = [
        Node(event["name"], _names(event["inputs"]), _names(event["outputs"]), event["arguments"])
        for event in made
    ]
    return Graph(_names(inputs), _names(outputs), _names(fixed), nodes, types)


def _names(arrays: Sequence[tuple[Any, ...]]) -> list[str]:
    return [array[0] for array in arrays]


def kernel_of(node: Node) -> str:
    """The name under which a custom kernel was made, "" of other nodes."""
    if node.name != "CustomKernel":
        return ""
    name = str(node.arguments[0]).removeprefix("custom_kernel_")
    return re.split("__|_(?=(?:bfloat16|float|u?int(?:8|32)|bool))", name)[0]  # types follow
