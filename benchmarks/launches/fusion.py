"""What `mx.compile` fuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.launches.graph import Graph, Node, Shape

# As in MLX's compile.cpp, with the names that export gives.
UNARY = """Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType BitwiseInvert Ceil Conjugate Cos Cosh Erf
    ErfInv Exp Expm1 Floor Imag Log Log1p LogicalNot Negative Real Remainder Round Sigmoid Sign Sin Sinh Sqrt
    Square Tan Tanh"""
BINARY = """Add ArcTan2 BitwiseBinary Divide Equal FloorDivide Greater GreaterEqual Less LessEqual LogAddExp
    LogicalAnd LogicalOr Maximum Minimum Multiply NotEqual Power Subtract"""
ELEMENTWISE = frozenset([*UNARY.split(), *BINARY.split(), "Select"])
FUSABLE = ELEMENTWISE | {"Broadcast"}
DEPTH, ARRAYS = 11, 24


class Fusion:
    """`compile_fuse` over a graph: each node, the last one first, takes in what only it and its kin read."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.types = dict(graph.types)
        self.nodes = [replace(node, inputs=list(node.inputs)) for node in graph.nodes]
        self.maker = {name: node for node in self.nodes for name in node.outputs}
        self.readers: dict[str, list[Node]] = {}
        # Nodes that are fused into the one at hand, by the name of what each makes, and what they read.
        self.members: dict[str, Node] = {}
        self.edge: set[str] = set()
        for node in self.nodes:
            self._read(node)

    def _read(self, node: Node) -> None:
        for name in node.inputs:
            self.readers.setdefault(name, []).append(node)

    def run(self) -> Graph:
        done: set[str] = set()
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if node.outputs[0] in done:
                continue
            members = self._members(node) if node.name in FUSABLE - {"Broadcast"} else {}
            if len(members) > 1:
                node = self._merge(node, members)
                done.update(members)
            kept.append(node)
        kept.reverse()
        return replace(self.graph, nodes=kept, types=self.types)

    def _members(self, last: Node) -> dict[str, Node]:
        self.members, self.edge = {}, set()
        self._take(last.outputs[0], 0, self.types[last.outputs[0]][0])
        return self.members

    def _take(self, name: str, depth: int, shape: Shape) -> None:
        """Make the maker of `name` and those below it members, as far as the rules let it."""
        if name in self.members:
            return
        node, leaves = self.maker.get(name), name in self.graph.outputs
        ends = leaves and self.types[name][0] != shape
        if depth >= DEPTH or node is None or node.name not in FUSABLE or ends:
            self.edge.add(name)
            return
        if depth and not all(reader.outputs[0] in self.members for reader in self.readers[name]):
            if node.name != "Broadcast" or len(self.edge) >= ARRAYS:
                self.edge.add(name)
                return
            node = self._split(node)  # a broadcast is free, so it is made twice
            name = node.outputs[0]
        self.edge.discard(name)
        if leaves:  # it is an input too, which counts
            self.edge.add(name)
        if len(self.edge) >= ARRAYS:
            return
        self.members[name] = node
        for below in list(node.inputs):
            self._take(below, depth + 1, shape)

    def _split(self, node: Node) -> Node:
        """A twin of a broadcast for those of its readers that are members."""
        name = node.outputs[0]
        twin = replace(node, outputs=[f"{name}'{len(self.types)}"])
        self.types[twin.outputs[0]] = self.types[name]
        self.maker[twin.outputs[0]] = twin
        mine = [reader for reader in self.readers[name] if reader.outputs[0] in self.members]
        self.readers[name] = [reader for reader in self.readers[name] if reader not in mine]
        self.readers[twin.outputs[0]] = mine
        for reader in mine:
            reader.inputs = [twin.outputs[0] if x == name else x for x in reader.inputs]
        self._read(twin)
        return twin

    def _merge(self, last: Node, members: dict[str, Node]) -> Node:
        """One node for all members; what leaves the graph among them is written too."""
        inner = self._ordered(last.outputs[0], members)
        inputs = list(dict.fromkeys(name for node in inner for name in node.inputs if name not in members))
        outputs = [name for node in inner for name in node.outputs if name in self.graph.outputs]
        outputs = [name for name in outputs if name != last.outputs[0]] + last.outputs
        fused = Node("Compiled", inputs, outputs, inner=inner)
        for name in inputs:
            others = [node for node in self.readers[name] if node.outputs[0] not in members]
            self.readers[name] = [*others, fused]
        for name in outputs:
            self.maker[name] = fused
            self.readers[name] = [
                node for node in self.readers.get(name, []) if node.outputs[0] not in members
            ]
        return fused

    def _ordered(self, name: str, members: Mapping[str, Node]) -> list[Node]:
        """Members in an order of evaluation that ends with the maker of `name`."""
        found: dict[str, Node] = {}

        def visit(name: str) -> None:
            if name in members and name not in found:
                for below in members[name].inputs:
                    visit(below)
                found[name] = members[name]

        visit(name)
        return list(found.values())
