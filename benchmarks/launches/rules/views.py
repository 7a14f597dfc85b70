"""Views: no launch, but where no strides can say it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.launches.count import ArrayView, row_major
from benchmarks.launches.graph import Node
from benchmarks.launches.walk import Walk, rule


@rule("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze")
def _reshape(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    [x], shape = inputs, walk.graph.types[node.outputs[0]][0]
    try:
        return [x.at(x.layout.reshape(shape, copy=False))]
    except ValueError:  # no strides say it
        return [walk.copied(x).at(row_major(shape))]


@rule("Transpose")
def _transpose(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return [inputs[0].at(inputs[0].layout.transpose(node.arguments[0]))]


@rule("Slice")
def _slice(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    index = tuple(slice(*part) for part in zip(*node.arguments, strict=True))
    return [inputs[0].at(inputs[0].layout[index])]


@rule("Split")
def _split(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    where, axis = node.arguments
    return [inputs[0].at(part) for part in np.split(inputs[0].layout, list(where), axis)]


@rule("Broadcast")
def _broadcast(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return [inputs[0].at(np.broadcast_to(inputs[0].layout, walk.graph.types[node.outputs[0]][0]))]


@rule("View")
def _view(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    [x], (shape, itemsize) = inputs, walk.graph.types[node.outputs[0]]
    if x.itemsize == itemsize:
        return [x]
    return [replace(walk.in_rows(x), layout=row_major(shape), itemsize=itemsize)]


@rule("Depends", "Copy", "StopGradient")
def _alias(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return inputs[: len(node.outputs)]
