"""Custom kernels and compiled functions, and the rest: fills, ranges, random bits, decoded weights."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.launches.count import ArrayView
from benchmarks.launches.fusion import Fusion
from benchmarks.launches.graph import Node, kernel_of, trace
from benchmarks.launches.metal import Region
from benchmarks.launches.walk import Walk, rule


@rule("mlx_dequantize")
def _dequantized(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return walk.launched("other", node, [walk.in_rows(x) for x in inputs], label="dequantized")


@rule("Arange", "Full", "RandomBits")
def _source(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    return walk.launched("other", node, inputs)


@rule("CustomKernel")
def _custom(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    """A kernel of ours; inputs are put into rows first unless it says that it reads strides."""
    wants_rows, start = node.arguments[9], node.arguments[10]
    reads = [walk.in_rows(x) for x in inputs] if wants_rows else inputs
    made = walk.outputs(node, kernel_of(node))
    if start != []:
        walk.count.launch("copy", [], made, times=len(made))
    flops = KERNEL_FLOPS.get(kernel_of(node), lambda inputs, outputs: 0)
    walk.count.launch("kernel", reads, made, flops(inputs, made))
    return made


def _expert_flops(inputs: list[ArrayView], outputs: list[ArrayView]) -> int:
    """x [., I] times a stack of words [E, O, .]; an output may hold half as many columns as were made."""
    return 2 * outputs[0].shape[0] * inputs[1].shape[1] * inputs[0].shape[-1]


# The kernels of ours that multiply matrices.
KERNEL_FLOPS: dict[str, Callable[[list[ArrayView], list[ArrayView]], int]] = {
    "dgemma_expert_product": _expert_flops
}


@rule("region")
def _region(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    function, blanks = Region.calls[int(kernel_of(node).removeprefix("region"))]
    inner = Fusion(trace(function, *blanks)).run()
    return Walk(inner, walk.count).run(inputs)
