"""Elementwise operations, alone and fused: one launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.launches.count import ArrayView
from benchmarks.launches.fusion import ELEMENTWISE
from benchmarks.launches.graph import Node, Shape
from benchmarks.launches.walk import Walk, rule


@rule(*ELEMENTWISE)
def _elementwise(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    layout = _common(inputs, walk.graph.types[node.outputs[0]][0], len(inputs) == 1)
    return walk.launched("elementwise", node, inputs, layout)


@rule("Compiled")
def _compiled(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    layout = _common(inputs, walk.graph.types[node.outputs[0]][0], False)
    label = "+".join(dict.fromkeys(part.name for part in node.inner if part.name != "Broadcast"))
    return walk.launched("fused", node, inputs, layout, label)


def _common(inputs: Sequence[ArrayView], shape: Shape, any_order: bool) -> np.ndarray | None:
    """The layout that inputs hand on to an output: theirs if all lie alike without gaps, else rows."""
    wide = [x for x in inputs if x.elements > 1]
    if not wide or any(x.shape != shape or x.layout.strides != wide[0].layout.strides for x in wide):
        return None
    first = wide[0]
    kept = first.layout.flags.f_contiguous or ((any_order or len(wide) == 1) and first.dense)
    return first.layout if kept else None
