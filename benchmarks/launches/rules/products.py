"""Products: one launch, or two where the inner dimension is split."""

from __future__ import annotations

import math

from benchmarks.launches.count import ArrayView, Buffer, row_major
from benchmarks.launches.graph import Node
from benchmarks.launches.walk import Walk, rule


@rule("Matmul", "AddMM")
def _matmul(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    a, b, *more = inputs
    a, b = walk.matrix(a), walk.matrix(b)
    [y] = walk.outputs(node, "product")
    *batch, M, N = y.shape
    K, count = a.shape[-1], math.prod(batch)
    if not any(b.layout.strides[:-2]):  # one matrix for all: their rows are those of one product
        M, count = M * count, 1
    parts = split_dense(M, N, K) if count == 1 else 1
    _product(walk, [a, b, *more], y, 2 * y.layout.size * K, parts)
    return [y]


def split_dense(M: int, N: int, K: int) -> int:
    """Parts of a dense product's inner dimension, each a partial result; two at least where it is split."""
    few = -(-M // 16) * -(-N // 16) <= 2048
    return 2 if few and K // 16 >= 8 and max(M, N) <= K else 1


def split_packed(M: int, N: int, K: int, group: int) -> int:
    """Parts of a product with packed words: as many as make 512 tiles of 32 × 32, in whole groups."""
    parts = min(max(1, 512 // (-(-M // 32) * -(-N // 32))), max(1, K // group))
    return next(n for n in range(parts, 0, -1) if K % (n * group) == 0)


def _product(walk: Walk, reads: list[ArrayView], y: ArrayView, flops: int, parts: int) -> None:
    if parts == 1:
        walk.count.launch("product", reads, [y], flops)
        return
    partial = ArrayView(row_major((parts, *y.shape)), max(y.itemsize, 4), Buffer("partial sums"))
    walk.count.launch("product", reads, [partial], flops)
    walk.count.launch("product", [partial], [y])


@rule("QuantizedMatmul")
def _quantized(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    group, _, _, transpose = node.arguments
    x, *record = inputs
    x, record = walk.with_rows(x), [walk.with_rows(part) for part in record]
    [y] = walk.outputs(node, "product")
    K, N = x.shape[-1], y.shape[-1]
    # A matrix of words without batch axes takes all rows at once.
    parts = split_packed(y.layout.size // N, N, K, group) if transpose and len(record[0].shape) == 2 else 1
    _product(walk, [x, *record], y, 2 * y.layout.size * K, parts)
    return [y]


@rule("GatherMM", "GatherQMM")
def _gathered_product(walk: Walk, node: Node, inputs: list[ArrayView]) -> list[ArrayView]:
    x, *stack, left, right = inputs
    dense = node.name == "GatherMM"
    x = walk.matrix(x) if dense else walk.with_rows(x)
    stack = [walk.matrix(part) if dense else walk.with_rows(part) for part in stack]
    [y] = walk.outputs(node, "expert product")
    touched = [_first_rows(part, right.layout.size) for part in stack]
    _product(walk, [x, *touched, left, right], y, 2 * y.layout.size * x.shape[-1], 1)
    return [y]


def _first_rows(view: ArrayView, count: int) -> ArrayView:
    """What at most `count` picks of the first axis can touch."""
    return view.at(view.layout[: min(count, view.shape[0])])
