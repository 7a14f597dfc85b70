"""Launches, bytes and temporaries of one denoising step at the released geometry, counted and not timed.

    python -m benchmarks.launches                              # ours and mlx-vlm, both formats, 1k and 128k
    python -m benchmarks.launches --format bf16 --context 1024 --kinds

It needs no Mac and no weights: a step is traced over arrays that are never made, `mx.export_function` tells
its primitives in the order of evaluation, and what MLX's Metal backend launches for each is a table below.
The table was read from MLX's sources (0.32) and is checked against MLX where Linux can (what is fused).

The steps that are compared: `Model.refine` with self-conditioning, past `mx.compile` as on a GPU; and one
turn of mlx-vlm's `stream_diffusion_generate`, put together from its own functions, with the released sampler
(entropy bound, temperature 1) and the defaults for all else. Both end with a new soft embedding or what the
next step makes it from. Noise and acceptance are the device's there and the host's here. bf16 means bf16
throughout; 4bit is mlx-community's pattern, which is our preset "balanced": experts and self-conditioning
4-bit, all else 8-bit, groups of 64.

The rules:

- No launch: transposes, slices, splits, broadcasts, new and dropped axes, reshapes of what lies in rows,
  changes of type without conversion, `depends`. Layouts are followed with NumPy's strides.
- One launch: an elementwise operation or conversion, a product, norm, rope, softmax, log-sum-exp, argmax,
  gather, cumulative sum, range, fill, random bits, sort of up to 2,048 numbers a row, custom kernel.
- Two: products split along their inner dimension (few tiles: the rules of a Max or Ultra of M1 to M4),
  scatters and updates of slices (a copy first), pads (a fill first), sums of a whole array beyond 4,096.
- One for each input: concatenation. One more: what must lie in rows and does not, or must have rows of its
  own (norms of transposed heads, reshapes that cannot be strides, inputs of custom kernels).
- 2 + 2 log2(blocks): longer sorts.
- Attention of more than 8 queries with heads of 256 or 512 has no fused kernel: it is MLX's own fallback
  (product, mask, softmax, product), and its scores are arrays.
- What is compiled is fused as `mx.compile` does it: chains of elementwise operations over one shape, at most
  11 deep and 24 inputs wide, where all readers of a value lie within. All of our step is compiled, of
  mlx-vlm's GeGLU and softcap. Common subexpressions are removed from both, as export does it always.
- The launch in which MLX 0.32.4 finds each expert's first row is not counted: its host code was not read.

Bytes are those of each launch's inputs and outputs, once each; of a broadcast array what it was made from; of
gathered rows the rows, and of experts those that can be touched. Temporaries are the outputs, copies and
partial sums of launches. FLOPs are 2·M·N·K of products. Reads of the embedding table are the bytes of it that
products and kernels read, over its own; rows that are looked up are not counted.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import click
import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from dgemma.checkpoint import constants
from dgemma.config import Config, read_config, read_generation_config
from dgemma.model import Context, Model
from dgemma.quantized import Form, Quantized
from dgemma.spec import Param, text_parameters
from dgemma.weights import Weights, build
from dgemma_convert.recipe import MLX_PRESETS, recipe
from dgemma_mlx import verdict
from dgemma_mlx.ops import MlxOps

RELEASED = Path(sys.modules["dgemma"].__path__[0]) / "released"
FORMATS = ("bf16", "4bit")
MEGABYTE = 1_000_000
# Of the issue: no temporary above so many bytes, up to so many tokens of context.
CEILINGS = ((1024, 64 * MEGABYTE), (131072, 256 * MEGABYTE))

Shape = tuple[int, ...]


# ---- the graph --------------------------------------------------------------------------------------


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


# ---- what stands for an operation that is one kernel on Metal only ------------------------------------


def stand_in(name: str, inputs: Sequence[Any], shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An array that a custom kernel would make; it is never launched."""
    names, one = [f"x{i}" for i in range(len(inputs))], (1, 1, 1)
    kernel: Any = mx.fast.metal_kernel(name=name, input_names=names, output_names=["y"], source="")
    (made,) = kernel(
        inputs=list(inputs), grid=one, threadgroup=one, output_shapes=[tuple(shape)], output_dtypes=[dtype]
    )
    return made


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    return stand_in("mlx_norm", [x] if weight is None else [x, weight], x.shape, x.dtype)


def _rope(x: mx.array, dims: int, **_: Any) -> mx.array:
    return stand_in("mlx_rope" if dims == x.shape[-1] else "mlx_partial_rope", [x], x.shape, x.dtype)


def _contiguous(x: mx.array, *_: Any, **__: Any) -> mx.array:
    return stand_in("mlx_contiguous", [x], x.shape, x.dtype)


def _dequantize(w: mx.array, scales: mx.array, biases: mx.array | None = None, *a: Any, **k: Any) -> mx.array:
    bits = k.get("bits", a[1] if len(a) > 1 else 4)
    inputs = [w, scales] if biases is None else [w, scales, biases]
    shape = (*w.shape[:-1], w.shape[-1] * 32 // bits)
    return stand_in("mlx_dequantize", inputs, shape, k.get("dtype") or scales.dtype)


_FALLBACK = mx.fast.scaled_dot_product_attention


def _attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
    """The fallback, which is what a build without Metal traces, where Metal would take it too."""
    assert q.shape[2] > 8 and q.shape[3] in (256, 512), f"attention of {q.shape} has a fused kernel"
    return _FALLBACK(q, k, v, **options)


STAND_INS = (
    (mx.fast, "rms_norm", _rms_norm),
    (mx.fast, "rope", _rope),
    (mx.fast, "scaled_dot_product_attention", _attention),
    (mx, "contiguous", _contiguous),
    (mx, "dequantize", _dequantize),
)


@contextmanager
def as_on_metal() -> Iterator[None]:
    """Operations that a build without Metal takes apart become one node."""
    with ExitStack() as stack:
        for module, name, function in STAND_INS:
            stack.enter_context(mock.patch.object(module, name, function))
        yield


class Region:
    """A function given to `mx.compile`: within a step one node, whose graph is traced for itself."""

    calls: ClassVar[list[tuple[Callable[..., Any], list[mx.array]]]] = []
    live: ClassVar[bool] = False  # while a step is traced; a region within a region is part of it

    def __init__(self, function: Callable[..., Any], *_: Any, **__: Any):
        self.function = function

    def __call__(self, *arrays: Any) -> Any:
        if not Region.live:
            return self.function(*arrays)
        with mock.patch.object(Region, "live", False):
            made = self.function(*arrays)  # for its shape: nothing reads it
        Region.calls.append((self.function, [mx.zeros(x.shape, x.dtype) for x in arrays]))
        return stand_in(f"region{len(Region.calls) - 1}", arrays, made.shape, made.dtype)


# ---- what mx.compile fuses ----------------------------------------------------------------------------

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
    """`compile_fuse` over a graph: from the last node on, each takes in what only it and its kin read."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.types = dict(graph.types)
        self.nodes = [replace(node, inputs=list(node.inputs)) for node in graph.nodes]
        self.maker = {name: node for node in self.nodes for name in node.outputs}
        self.readers: dict[str, list[Node]] = {}
        # Of the node at hand: what is fused into it, by the name of what it makes, and what that reads.
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


# ---- what is counted ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory that arrays lie in."""

    label: str
    table: bool = False  # whether it is the embedding table, or a part of its record


@dataclass(frozen=True, eq=False)
class Place:
    """Where an array lies: `layout` has its shape and, as each element is a byte of it, its strides."""

    layout: np.ndarray
    itemsize: int
    buffer: Buffer

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def elements(self) -> int:
        """Those that differ: what was broadcast counts once."""
        sizes = zip(self.shape, self.layout.strides, strict=True)
        return math.prod(n for n, stride in sizes if stride or n == 1)

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for the same elements of the same buffer."""
        start = self.layout.__array_interface__["data"][0]
        return id(self.buffer), start, self.shape, self.layout.strides

    @property
    def in_rows(self) -> bool:
        return self.layout.flags.c_contiguous

    @property
    def dense(self) -> bool:
        """Whether the elements fill their memory, in whatever order of the axes."""
        order = np.argsort([-stride for stride in self.layout.strides], kind="stable")
        return self.layout.transpose(order).flags.c_contiguous

    @property
    def has_rows(self) -> bool:
        """Whether rows of the last axis lie one behind the other, as kernels over rows want them."""
        *_, n = self.shape
        strides = self.layout.strides
        row = strides[-2] in (0, n) or self.shape[-2] == 1 if len(strides) > 1 else True
        return self.dense and strides[-1] == 1 and row

    def at(self, layout: np.ndarray) -> Place:
        return replace(self, layout=layout)


NOWHERE = np.empty(1, np.uint8)


def rows_of(shape: Shape) -> np.ndarray:
    """An array of this shape in rows that has no memory: only its shape and strides are ever looked at."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return np.lib.stride_tricks.as_strided(NOWHERE, shape, strides, writeable=False)


@dataclass
class Count:
    """Of one step."""

    launches: Counter[str] = field(default_factory=Counter)  # by kind
    read: int = 0  # bytes
    written: int = 0
    table: int = 0  # bytes of the embedding table among those read
    flops: int = 0
    largest: int = 0  # bytes of the largest temporary
    what: str = ""  # which that is

    def launch(
        self, kind: str, reads: Sequence[Place], written: Sequence[Place], flops: int = 0, times: int = 1
    ) -> None:
        self.launches[kind] += times
        different = {place.key: place for place in reads}.values()
        self.read += sum(place.nbytes for place in different)
        self.table += sum(place.nbytes for place in different if place.buffer.table)
        self.written += sum(place.nbytes for place in written)
        self.flops += flops
        for place in written:
            if place.nbytes > self.largest:
                self.largest, self.what = place.nbytes, f"{place.buffer.label} {list(place.shape)}"


# A rule is given the walk, the node and where its inputs lie, and says where its outputs lie.
Rule = Callable[["Walk", Node, list[Place]], list[Place]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return keep


class Walk:
    """One pass over a graph that launches its nodes into `count`."""

    def __init__(self, graph: Graph, count: Count):
        self.graph, self.count = graph, count

    def run(self, inputs: Sequence[Place]) -> list[Place]:
        """Where the outputs lie, given where the inputs do."""
        places = dict(zip(self.graph.inputs, inputs, strict=True))
        places |= {name: self.made(name, "constant") for name in self.graph.constants}
        for node in self.graph.nodes:
            made = find_rule(node)(self, node, [places[name] for name in node.inputs])
            places |= zip(node.outputs, made, strict=True)
        return [places[name] for name in self.graph.outputs]

    def made(self, name: str, label: str, layout: np.ndarray | None = None) -> Place:
        """A new array, in rows unless a layout is given."""
        shape, itemsize = self.graph.types[name]
        return Place(rows_of(shape) if layout is None else layout, itemsize, Buffer(label))

    def outputs(self, node: Node, label: str = "") -> list[Place]:
        return [self.made(name, label or node.name) for name in node.outputs]

    def copied(self, place: Place, label: str = "copy") -> Place:
        """The array in rows, by one launch."""
        copy = Place(rows_of(place.shape), place.itemsize, Buffer(label))
        self.count.launch("copy", [place], [copy])
        return copy

    def in_rows(self, place: Place) -> Place:
        return place if place.in_rows else self.copied(place)

    def with_rows(self, place: Place) -> Place:
        return place if place.has_rows else self.copied(place)

    def matrix(self, place: Place) -> Place:
        """A factor of a product: its last two axes may be swapped, but one of them is without gaps."""
        return place if 1 in place.layout.strides[-2:] else self.copied(place)


def find_rule(node: Node) -> Rule:
    key = kernel_of(node).rstrip("0123456789")
    key = key if key in RULES else node.name
    if key not in RULES:
        raise click.ClickException(f"no rule says what MLX launches for the primitive {node.name}")
    return RULES[key]


def kernel_of(node: Node) -> str:
    """The name under which a custom kernel was made, "" of other nodes."""
    if node.name != "CustomKernel":
        return ""
    name = str(node.arguments[0]).removeprefix("custom_kernel_")
    return re.split("__|_(?=(?:bfloat16|float|u?int(?:8|32)|bool))", name)[0]  # types follow


# ---- the rules: views ---------------------------------------------------------------------------------


@rule("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze")
def _reshape(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    [x], shape = inputs, walk.graph.types[node.outputs[0]][0]
    try:
        return [x.at(x.layout.reshape(shape, copy=False))]
    except ValueError:  # no strides say it
        return [walk.copied(x).at(rows_of(shape))]


@rule("Transpose")
def _transpose(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return [inputs[0].at(inputs[0].layout.transpose(node.arguments[0]))]


@rule("Slice")
def _slice(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    index = tuple(slice(*part) for part in zip(*node.arguments, strict=True))
    return [inputs[0].at(inputs[0].layout[index])]


@rule("Split")
def _split(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    where, axis = node.arguments
    return [inputs[0].at(part) for part in np.split(inputs[0].layout, list(where), axis)]


@rule("Broadcast")
def _broadcast(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return [inputs[0].at(np.broadcast_to(inputs[0].layout, walk.graph.types[node.outputs[0]][0]))]


@rule("View")
def _view(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    [x], (shape, itemsize) = inputs, walk.graph.types[node.outputs[0]]
    if x.itemsize == itemsize:
        return [x]
    return [replace(walk.in_rows(x), layout=rows_of(shape), itemsize=itemsize)]


@rule("Depends", "Copy", "StopGradient")
def _alias(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return inputs[: len(node.outputs)]


# ---- the rules: elementwise ---------------------------------------------------------------------------


@rule(*ELEMENTWISE)
def _elementwise(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    layout = _common(inputs, walk.graph.types[node.outputs[0]][0], len(inputs) == 1)
    return _launched(walk, "elementwise", node, inputs, layout)


@rule("Compiled")
def _compiled(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    layout = _common(inputs, walk.graph.types[node.outputs[0]][0], False)
    label = "+".join(dict.fromkeys(part.name for part in node.inner if part.name != "Broadcast"))
    return _launched(walk, "fused", node, inputs, layout, label)


def _common(inputs: Sequence[Place], shape: Shape, any_order: bool) -> np.ndarray | None:
    """The layout that inputs hand on to an output: theirs if all lie alike without gaps, else rows."""
    wide = [x for x in inputs if x.elements > 1]
    if not wide or any(x.shape != shape or x.layout.strides != wide[0].layout.strides for x in wide):
        return None
    first = wide[0]
    kept = first.layout.flags.f_contiguous or ((any_order or len(wide) == 1) and first.dense)
    return first.layout if kept else None


def _launched(
    walk: Walk,
    kind: str,
    node: Node,
    inputs: list[Place],
    layout: np.ndarray | None = None,
    label: str = "",
) -> list[Place]:
    """One launch that reads all inputs and writes all outputs."""
    made = [walk.made(name, label or node.name, layout) for name in node.outputs]
    walk.count.launch(kind, inputs, made)
    return made


# ---- the rules: products ------------------------------------------------------------------------------


@rule("Matmul", "AddMM")
def _matmul(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
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


def _product(walk: Walk, reads: list[Place], y: Place, flops: int, parts: int) -> None:
    if parts == 1:
        walk.count.launch("product", reads, [y], flops)
        return
    partial = Place(rows_of((parts, *y.shape)), max(y.itemsize, 4), Buffer("partial sums"))
    walk.count.launch("product", reads, [partial], flops)
    walk.count.launch("product", [partial], [y])


@rule("QuantizedMatmul")
def _quantized(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
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
def _gathered_product(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    x, *stack, left, right = inputs
    dense = node.name == "GatherMM"
    x = walk.matrix(x) if dense else walk.with_rows(x)
    stack = [walk.matrix(part) if dense else walk.with_rows(part) for part in stack]
    [y] = walk.outputs(node, "expert product")
    touched = [_first_rows(part, right.layout.size) for part in stack]
    _product(walk, [x, *touched, left, right], y, 2 * y.layout.size * x.shape[-1], 1)
    return [y]


def _first_rows(place: Place, count: int) -> Place:
    """What at most `count` picks of the first axis can touch."""
    return place.at(place.layout[: min(count, place.shape[0])])


# ---- the rules: rows, gathers, and the rest -----------------------------------------------------------


@rule("Softmax")
def _softmax(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    x = walk.with_rows(inputs[0])
    return _launched(walk, "softmax", node, [x], x.layout)


@rule("mlx_norm")
def _norm(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    x = walk.with_rows(inputs[0])
    return _launched(walk, "norm", node, [x, *inputs[1:]], x.layout, "norm")


@rule("mlx_rope")
def _roped(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    [x] = inputs
    # Heads that were split off a row and moved before it are read where they lie.
    swapped = len(x.shape) == 4 and x.at(x.layout.transpose(0, 2, 1, 3)).in_rows
    return _launched(walk, "rope", node, [x if swapped else walk.in_rows(x)], label="rope")


@rule("mlx_partial_rope")
def _partly_roped(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return _launched(walk, "rope", node, [walk.copied(inputs[0])], label="rope")


@rule("LogSumExp")
def _logsumexp(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return _launched(walk, "reduce", node, [walk.with_rows(inputs[0])])


@rule("Reduce")
def _reduce(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    [x], [y] = inputs, walk.outputs(node)
    whole = y.layout.size == 1 and x.layout.size > 4096
    walk.count.launch("reduce", [x], [y], times=2 if whole else 1)
    return [y]


@rule("ArgReduce")
def _arg_reduce(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return _launched(walk, "reduce", node, inputs)


@rule("Scan")
def _scan(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return _launched(walk, "scan", node, [walk.in_rows(inputs[0])])


@rule("Sort", "ArgSort", "Partition", "ArgPartition")
def _sort(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    [x], made, axis = inputs, walk.outputs(node), node.arguments[-1]
    blocks = -(-x.shape[axis] // 2048)
    merges = 2 * math.ceil(math.log2(blocks))
    walk.count.launch("sort", inputs, made, times=2 + merges if blocks > 1 else 1)
    return made


@rule("Gather", "GatherAxis")
def _gather(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    """Reads as much as it writes, and its indices."""
    made = walk.outputs(node)
    rows = Place(made[0].layout, inputs[0].itemsize, Buffer("rows"))
    walk.count.launch("gather", [rows, *inputs[1:]], made)
    return made


@rule("Scatter", "ScatterAxis", "SliceUpdate")
def _update(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    whole = replace(walk.copied(inputs[0]), buffer=Buffer(node.name))
    walk.count.launch("gather", inputs[1:], [])
    walk.count.written += inputs[-1].nbytes
    return [whole]


@rule("Pad")
def _pad(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    walk.count.launch("copy", [], walk.outputs(node))
    return _launched(walk, "copy", node, inputs)


@rule("Concatenate")
def _concatenate(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    made = walk.outputs(node)
    walk.count.launch("copy", inputs, made, times=len(inputs))
    return made


@rule("mlx_contiguous")
def _in_rows(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return [walk.in_rows(inputs[0])]


@rule("mlx_dequantize")
def _dequantized(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return _launched(walk, "other", node, [walk.in_rows(x) for x in inputs], label="dequantized")


@rule("Arange", "Full", "RandomBits")
def _source(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    return _launched(walk, "other", node, inputs)


@rule("CustomKernel")
def _custom(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    """A kernel of ours; inputs are put into rows first unless it says that it reads strides."""
    wants_rows, start = node.arguments[9], node.arguments[10]
    reads = [walk.in_rows(x) for x in inputs] if wants_rows else inputs
    made = walk.outputs(node, kernel_of(node))
    if start != []:
        walk.count.launch("copy", [], made, times=len(made))
    flops = KERNEL_FLOPS.get(kernel_of(node), lambda inputs, outputs: 0)
    walk.count.launch("kernel", reads, made, flops(inputs, made))
    return made


def _expert_flops(inputs: list[Place], outputs: list[Place]) -> int:
    """Of x [., I] and a stack of words [E, O, .]; an output may hold half as many columns as were made."""
    return 2 * outputs[0].shape[0] * inputs[1].shape[1] * inputs[0].shape[-1]


# The kernels of ours that multiply matrices.
KERNEL_FLOPS: dict[str, Callable[[list[Place], list[Place]], int]] = {"dgemma_expert_product": _expert_flops}


@rule("region")
def _region(walk: Walk, node: Node, inputs: list[Place]) -> list[Place]:
    function, blanks = Region.calls[int(kernel_of(node).removeprefix("region"))]
    inner = Fusion(trace(function, *blanks)).run()
    return Walk(inner, walk.count).run(inputs)


# ---- the engines --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A function of one step, and the arrays that it is given, some of which are the embedding table."""

    function: Callable[..., Any]
    arrays: list[mx.array]
    table: set[int]  # places in `arrays`
    compiled: bool

    def count(self) -> tuple[Count, int]:
        """What it launches, and the bytes of the table."""
        buffers = [Buffer("input", table=index in self.table) for index in range(len(self.arrays))]
        places = [
            Place(rows_of(tuple(x.shape)), x.dtype.size, buffer)
            for x, buffer in zip(self.arrays, buffers, strict=True)
        ]
        count = Count()
        with as_on_metal():
            with mock.patch.object(Region, "live", True):
                graph = trace(self.function, *self.arrays)
            Walk(Fusion(graph).run() if self.compiled else graph, count).run(places)
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
    found: list[mx.array] = []
    mapped(tree, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def released() -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, without the vision tower, and generation_config.json."""
    config, generation = (
        json.loads((RELEASED / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    return config | {"vision_config": None}, generation


class Metal(MlxOps):
    """As on an Apple GPU, in bfloat16, but what is read by the host is only kept."""

    def __init__(self, kernels: frozenset[str]):
        with mock.patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)):
            super().__init__(mx.bfloat16, kernels)
        self.read: list[mx.array] = []

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        return fn  # `Step.compiled` says it

    def settle(self, arrays: Any) -> None:
        """There are no values."""

    def to_numpy(self, x: mx.array) -> np.ndarray:
        self.read.append(x)
        return np.zeros(x.shape, np.float32)


def ours(
    context: int, form: str, kernels: frozenset[str] = frozenset(), raw: dict[str, Any] | None = None
) -> Step:
    """A step of `Model.refine`, over a cache of `context` tokens and the last step's soft embedding.

    `raw` is the dictionary of config.json, by default the released one.
    """
    given_config, settings = released()
    config = read_config(raw or given_config)
    generation = read_generation_config(settings, config.vocab_size)
    ops = Metal(kernels)
    weights = blank_weights(ops, config, form)
    canvas, ids = config.canvas_length, np.zeros((1, config.canvas_length), np.int64)
    caches = [
        tuple(mx.zeros((1, layer.kv_heads, context, layer.head_dim), ops.dtype) for _ in "kv")
        for layer in config.layers
    ]
    soft = mx.zeros((1, canvas, config.hidden_size), ops.dtype)
    given = (weights, caches, soft)

    def function(*arrays: mx.array) -> list[mx.array]:
        source = iter(arrays)
        weights, caches, soft = mapped(given, lambda _: next(source))
        model = Model(ops, config, generation, weights, None)
        cache = ops.cache(config)
        cache.append(caches)
        step = model.refine(Context(cache, np.array([context])), ids, soft, 0.5, np.zeros(ids.shape), ids)
        return [ops.read.pop(), step.soft]

    arrays, table = arrays_of(given), {id(x) for x in arrays_of(weights.embed)}
    return Step(function, arrays, {i for i, x in enumerate(arrays) if id(x) in table}, compiled=True)


def blank_weights(ops: MlxOps, config: Config, form: str) -> Weights:
    """Weights of the released shapes, as loading would leave them."""
    table = text_parameters(config)
    forms = recipe(MLX_PRESETS["balanced"] if form == "4bit" else {}, [], table, ["affine"])

    def leaf(param: Param) -> Any:
        wide = param.group == "router"  # decoded when it is loaded
        own = None if wide else forms.form(param)
        if own is None:
            return mx.zeros(param.shape, mx.float32 if wide else ops.dtype)
        record = blank_record(param.shape, own, ops.dtype)
        return ops.arrange(record, str(param.path[-1])) if param.group == "experts" else record

    with mock.patch.object(mx, "eval"):
        return build(config, table, leaf, constants(config, ops), ops)


def blank_record(shape: Shape, form: Form, dtype: mx.Dtype) -> Quantized:
    codes = mx.zeros((*shape[:-1], shape[-1] * form.bits // 8), mx.uint8)
    scales, biases = (mx.zeros((*shape[:-1], shape[-1] // form.group), dtype) for _ in range(2))
    return Quantized(form, codes, scales, biases)


def peer_model(form: str) -> Any:
    """mlx-vlm's model of the released geometry, in bfloat16 or quantized as its own predicate says."""
    with mock.patch.object(mx, "compile", Region):
        import mlx.nn
        from mlx_vlm.models.diffusion_gemma import Model as Peer
        from mlx_vlm.models.diffusion_gemma import ModelConfig, language

        assert isinstance(language.geglu, Region), "mlx-vlm was imported before"
        model = Peer(ModelConfig.from_dict(released()[0]))
    model.set_dtype(mx.bfloat16)
    if form == "4bit":
        predicate = model.language_model.quant_predicate
        mlx.nn.quantize(  # type: ignore[attr-defined]
            model, group_size=64, bits=4, class_predicate=predicate
        )
    mx.random.seed(0)  # or the first key of the step would be the last of some hundred
    return model


def peer_caches(model: Any, context: int) -> list[Any]:
    """As a prefill in one go leaves them."""
    caches = model.make_cache()
    for layer, cache in zip(model.layers, caches, strict=True):
        own = layer.self_attn
        shape = (1, own.n_kv_heads, context, own.head_dim)
        cache.keys, cache.values = (mx.zeros(shape, mx.bfloat16) for _ in "kv")
        cache.offset = cache._idx = context
    return caches


def peer(context: int, form: str) -> Step:
    """A turn of mlx-vlm's loop."""
    from mlx.utils import tree_flatten, tree_unflatten

    model = peer_model(form)
    text, length = model.config.text_config, model.config.canvas_length
    weights, caches = dict(tree_flatten(model.parameters())), peer_caches(model, context)
    canvas, before = (mx.zeros((1, length), mx.int32) for _ in range(2))
    masks = model.diffusion_decoder_masks(canvas, caches, None)
    # A mask is one row for all queries, made once a canvas.
    rows = {kind: mask[:, :, :1] for kind, mask in masks.items() if mask is not None}
    # Quantized, it keeps the logits for the next step, and the soft embedding otherwise.
    width, dtype = (text.vocab_size, mx.float32) if form == "4bit" else (text.hidden_size, mx.bfloat16)
    signal = mx.zeros((1, length, width), dtype)
    given = (weights, [(cache.keys, cache.values) for cache in caches], rows, signal, canvas, before)

    def function(*arrays: mx.array) -> list[mx.array]:
        source = iter(arrays)
        weights, keys, rows, *rest = mapped(given, lambda _: next(source))
        model.update(tree_unflatten(list(weights.items())))
        for cache, pair in zip(caches, keys, strict=True):
            cache.keys, cache.values = pair
        full = {kind: mx.broadcast_to(row, masks[kind].shape) for kind, row in rows.items()}
        return peer_turn(model, caches, {kind: full.get(kind) for kind in masks}, *rest)

    arrays = arrays_of(given)
    table = {id(x) for name, x in weights.items() if "embed_tokens" in name}
    return Step(function, arrays, {i for i, x in enumerate(arrays) if id(x) in table}, compiled=False)


def peer_turn(
    model: Any, caches: Any, masks: Any, signal: mx.array, canvas: mx.array, before: mx.array
) -> list[mx.array]:
    """What `stream_diffusion_generate` computes from one canvas to the next, in its order."""
    from mlx_vlm.generate import diffusion

    context = model.diffusion_prepare_self_conditioning()
    logits = model.diffusion_decoder_logits(
        canvas, cache=caches, self_conditioning=signal, decoder_attention_mask=masks
    )
    logits = logits / diffusion._diffusion_linear_temperature(24, 48, {"t_min": 0.4, "t_max": 0.8})
    argmax = mx.argmax(logits, axis=-1).astype(canvas.dtype)
    sample = diffusion._diffusion_sample_canvas(logits, canvas.dtype, 1.0)
    entropy = diffusion._diffusion_token_entropy(logits)
    following = model.diffusion_self_conditioning(logits, context)
    accepted = diffusion._diffusion_entropy_transfer_mask(entropy, 0.1)
    kept = mx.where(accepted, sample, canvas)
    vocabulary = model.config.text_config.vocab_size
    noise = diffusion._diffusion_initialize_canvas(*canvas.shape, vocabulary, canvas.dtype)
    stable = mx.all(argmax == before)
    return [mx.where(accepted, kept, noise), following, argmax, stable]


PEER = "mlx-vlm"
EVERY = frozenset(verdict.KERNELS)
# Ours in MLX's own operations; with our kernels, but MLX's expert products; with all of our kernels.
ENGINES: dict[str, Callable[[int, str], Step]] = {
    "dgemma-mlx": ours,
    "dgemma-mlx+kernels": partial(ours, kernels=EVERY - {"gather"}),
    "dgemma-mlx+gather": partial(ours, kernels=EVERY),
    PEER: peer,
}


# ---- the report ---------------------------------------------------------------------------------------


def measure(engine: str, context: int, form: str) -> dict[str, Any]:
    """One row, ready for JSON."""
    count, table = ENGINES[engine](context, form).count()
    mx.random.seed(0)  # its key was traced too
    return {
        "engine": engine,
        "format": form,
        "context": context,
        "launches": sum(count.launches.values()),
        "kinds": dict(count.launches.most_common()),
        "bytes_read": count.read,
        "bytes_written": count.written,
        "largest_temporary": count.largest,
        "largest_is": count.what,
        "flops": count.flops,
        "table_reads": count.table / table,
    }


def judge(row: dict[str, Any], other: dict[str, Any] | None) -> dict[str, bool]:
    """The issue's targets, and whether a row of ours meets them."""
    ceiling = next(most for context, most in CEILINGS if row["context"] <= context)
    verdict = {
        f"no temporary above {ceiling // MEGABYTE} MB": row["largest_temporary"] <= ceiling,
        # A sample may read again what it needs of the table, but not the table.
        "the table read once for the head and once for the soft embedding": row["table_reads"] <= 2.01,
    }
    if other:
        verdict["half of the peer's launches"] = 2 * row["launches"] <= other["launches"]
    return verdict


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ours with the ratio to the peer's launches and what the targets say."""
    peers = {(row["format"], row["context"]): row for row in rows if row["engine"] == PEER}
    for row in rows:
        if row["engine"] != PEER and max(context for context, _ in CEILINGS) >= row["context"]:
            other = peers.get((row["format"], row["context"]))
            row["targets"] = judge(row, other)
            if other:
                row["ratio"] = row["launches"] / other["launches"]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    grid = Table(title="One denoising step of a canvas of 256, counted", title_justify="left")
    for heading in ("format", "context", "engine"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("launches", "÷ peer's", "GB read", "GB written", "largest MB", "TFLOP", "table reads"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = [f"{row['launches']:,}", f"{row['ratio']:.2f}" if "ratio" in row else ""]
        numbers += [f"{row[key] / 1e9:.2f}" for key in ("bytes_read", "bytes_written")]
        numbers += [f"{row['largest_temporary'] / MEGABYTE:.1f}", f"{row['flops'] / 1e12:.2f}"]
        grid.add_row(row["format"], str(row["context"]), row["engine"], *numbers, f"{row['table_reads']:.2f}")
    return grid


def tell(rows: Sequence[dict[str, Any]], console: Console, kinds: bool) -> None:
    """The table, and in lines what has no column."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    console.print(table(rows))
    for row in rows:
        name = f"{row['engine']}, {row['format']}, {row['context']}"
        if kinds:
            say(f"{name}: " + ", ".join(f"{kind} {n}" for kind, n in row["kinds"].items()))
        say(f"{name}: the largest temporary is {row['largest_is']}")
        for met, word in ((True, "met"), (False, "missed")):
            if those := [target for target, verdict in row.get("targets", {}).items() if verdict is met]:
                say(f"{name}: {word}: {'; '.join(those)}")
    mine = f"mlx {version('mlx')}"
    say(f"{mine}, mlx-vlm {version('mlx-vlm')}" if find_spec("mlx_vlm") else mine)


ENGINE = click.Choice(list(ENGINES))


@click.command(help="Count what a denoising step launches, reads, writes and holds, ours and mlx-vlm's.")
@click.option("-e", "--engine", "engines", multiple=True, type=ENGINE, help="Default: all there are.")
@click.option("--format", "forms", multiple=True, type=click.Choice(FORMATS), help="Default: both.")
@click.option(
    "--context", "contexts", multiple=True, type=click.IntRange(1), help="Default: 1024 and 131072."
)
@click.option("--kinds", is_flag=True, help="Also launches by kind.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of the table.")
def main(
    engines: tuple[str, ...],
    forms: tuple[str, ...],
    contexts: tuple[int, ...],
    kinds: bool,
    as_json: bool,
) -> None:
    there = [name for name in ENGINES if name != PEER or find_spec("mlx_vlm")]
    names = [name for name in there if name in engines or not engines]
    rows = judged(
        [
            measure(name, context, form)
            for form in forms or FORMATS
            for context in contexts or (1024, 131072)
            for name in names
        ]
    )
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        tell(rows, Console(width=None if sys.stdout.isatty() else 140), kinds)
