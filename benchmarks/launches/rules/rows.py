"""Operations over rows, which must lie in rows: norms, rope, softmax, sums, sorts."""

from __future__ import annotations

import math

from benchmarks.launches.count import ArrayView
from benchmarks.launches.graph import Node
from benchmarks.launches.walk import Walk, rule


@rule("Softmax")
def _softmax(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    x = walk.with_rows(inputs[0])
    return walk.launched("softmax", node, [x], x.layout)


@rule("mlx_norm")
def _norm(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    x = walk.with_rows(inputs[0])
    return walk.launched("norm", node, [x, *inputs[1:]], x.layout, "norm")


@rule("mlx_rope")
def _roped(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    [x] = inputs
    # Heads that were split off a row and moved before it are read where they lie.
    swapped = len(x.shape) == 4 and x.at(x.layout.transpose(0, 2, 1, 3)).in_rows
    return walk.launched("rope", node, [x if swapped else walk.in_rows(x)], label="rope")


@rule("mlx_partial_rope")
def _partly_roped(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return walk.launched("rope", node, [walk.copied(inputs[0])], label="rope")


@rule("LogSumExp")
def _logsumexp(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return walk.launched("reduce", node, [walk.with_rows(inputs[0])])


@rule("Reduce")
def _reduce(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    [x], [y] = inputs, walk.outputs(node)
    whole = y.layout.size == 1 and x.layout.size > 4096
    walk.count.launch("reduce", [x], [y], times=2 if whole else 1)
    return [y]


@rule("ArgReduce")
def _arg_reduce(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return walk.launched("reduce", node, inputs)


@rule("Scan")
def _scan(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return walk.launched("scan", node, [walk.in_rows(inputs[0])])


@rule("Sort", "ArgSort", "Partition", "ArgPartition")
def _sort(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    [x], made, axis = inputs, walk.outputs(node), node.arguments[-1]
    blocks = -(-x.shape[axis] // 2048)
    merges = 2 * math.ceil(math.log2(blocks))
    walk.count.launch("sort", inputs, made, times=2 + merges if blocks > 1 else 1)
    return made
