"""A pass over a graph that launches its nodes, each by its rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
import numpy as np

from benchmarks.launches.count import ArrayView, Buffer, Count, row_major
from benchmarks.launches.graph import Graph, Node, kernel_of

# A rule is given the walk, the node and how its inputs lie, and says how its outputs lie.
Rule = Callable[["Walk", Node, list[ArrayView]], list[ArrayView]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """The function is what `Walk` takes for primitives or custom kernels of these names."""

    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return keep


class Walk:
    """One pass over a graph that launches its nodes into `count`."""

    def __init__(self, graph: Graph, count: Count):
        self.graph, self.count = graph, count

    def run(self, inputs: Sequence[ArrayView]) -> list[ArrayView]:
        """How the outputs lie, given how the inputs do."""
        views = dict(zip(self.graph.inputs, inputs, strict=True))
        views |= {name: self.made(name, "constant") for name in self.graph.constants}
        for node in self.graph.nodes:
            made = find_rule(node)(self, node, [views[name] for name in node.inputs])
            views |= zip(node.outputs, made, strict=True)
        return [views[name] for name in self.graph.outputs]

    def made(self, name: str, label: str, layout: np.ndarray | None = None) -> ArrayView:
        """A new array, in rows unless a layout is given."""
        shape, itemsize = self.graph.types[name]
        return ArrayView(row_major(shape) if layout is None else layout, itemsize, Buffer(label))

    def outputs(self, node: Node, label: str = "") -> list[ArrayView]:
        return [self.made(name, label or node.name) for name in node.outputs]

    def launched(
        self,
        kind: str,
        node: Node,
        inputs: list[ArrayView],
        layout: np.ndarray | None = None,
        label: str = "",
    ) -> list[ArrayView]:
        """One launch that reads all inputs and writes all outputs."""
        made = [self.made(name, label or node.name, layout) for name in node.outputs]
        self.count.launch(kind, inputs, made)
        return made

    def copied(self, view: ArrayView, label: str = "copy") -> ArrayView:
        """The array in rows, by one launch."""
        copy = ArrayView(row_major(view.shape), view.itemsize, Buffer(label))
        self.count.launch("copy", [view], [copy])
        return copy

    def in_rows(self, view: ArrayView) -> ArrayView:
        return view if view.in_rows else self.copied(view)

    def with_rows(self, view: ArrayView) -> ArrayView:
        return view if view.has_rows else self.copied(view)

    def matrix(self, view: ArrayView) -> ArrayView:
        """A factor of a product: its last two axes may be swapped, but one of them is without gaps."""
        return view if 1 in view.layout.strides[-2:] else self.copied(view)


def find_rule(node: Node) -> Rule:
    key = kernel_of(node).rstrip("0123456789")
    key = key if key in RULES else node.name
    if key not in RULES:
        raise click.ClickException(f"no rule says what MLX launches for the primitive {node.name}")
    return RULES[key]
