"""Rows that are gathered, written elsewhere or joined."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.launches.count import ArrayView, Buffer
from benchmarks.launches.graph import Node
from benchmarks.launches.walk import Walk, rule


@rule("Gather", "GatherAxis")
def _gather(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    """A gather reads as much as it writes, and its indices."""
    made = walk.outputs(node)
    rows = ArrayView(made[0].layout, inputs[0].itemsize, Buffer("rows"))
    walk.count.launch("gather", [rows, *inputs[1:]], made)
    return made


@rule("Scatter", "ScatterAxis", "SliceUpdate")
def _update(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    whole = replace(walk.copied(inputs[0]), buffer=Buffer(node.name))
    walk.count.launch("gather", inputs[1:], [])
    walk.count.written += inputs[-1].nbytes
    return [whole]


@rule("Pad")
def _pad(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    walk.count.launch("copy", [], walk.outputs(node))
    return walk.launched("copy", node, inputs)


@rule("Concatenate")
def _concatenate(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    made = walk.outputs(node)
    walk.count.launch("copy", inputs, made, times=len(inputs))
    return made


@rule("mlx_contiguous")
def _in_rows(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return [walk.in_rows(inputs[0])]
