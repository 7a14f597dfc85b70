"""The counter of launches: what it fuses is what MLX fuses, and a step as it is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import pytest

from benchmarks.launches.count import Count
from benchmarks.launches.fusion import Fusion
from benchmarks.launches.graph import kernel_of, trace
from benchmarks.launches.metal import Region, as_on_metal
from benchmarks.launches.ours import EVERY, TracedOps, ours
from benchmarks.launches.report import MEGABYTE, counted
from benchmarks.launches.step import FORMATS, Step
from dgemma.network.config import read_config
from dgemma.network.weights import AttentionWeights, BiasWeights
from dgemma_mlx.ops import stacked_heads
from tests.checkpoints import small

# Names in MLX's graph that export does not tell apart.
SAME = {"Rsqrt": "Sqrt"} | dict.fromkeys(
    ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift"), "BitwiseBinary"
)


def count(function: Callable[..., Any], *arrays: mx.array, compiled: bool = False) -> Count:
    return Step(function, list(arrays), set(), compiled).count()[0]


def zeros(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


# ---- fusion -------------------------------------------------------------------------------------------


def fused_by_mlx(function: Callable[..., Any], arrays: list[mx.array], file: Path) -> Counter[str]:
    """Names of the fused nodes of the compiled function, which is not evaluated."""
    mx.export_to_dot(str(file), *mx.compile(function)(*arrays))
    names = re.findall('label ="(Compiled[^"]*)"', file.read_text())
    for name, other in SAME.items():
        names = [text.replace(name, other) for text in names]
    return Counter(names)


def fused_here(function: Callable[..., Any], arrays: list[mx.array]) -> Counter[str]:
    nodes = Fusion(trace(function, *arrays)).run().nodes
    return Counter("Compiled" + "".join(x.name for x in node.inner) for node in nodes if node.inner)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("context", [9, 100])
def test_a_step_is_fused_as_mlx_fuses_it(form: str, context: int, tmp_path: Path) -> None:
    step = ours(context, form, raw=small())
    wanted = fused_by_mlx(step.function, step.arrays, tmp_path / "graph.dot")
    assert wanted.total() > 50
    assert fused_here(step.function, step.arrays) == wanted


def deep(x: mx.array) -> mx.array:
    for _ in range(30):
        x = mx.tanh(x) + 1
    return x


def wide(*arrays: mx.array) -> mx.array:
    y = arrays[0]
    for x in arrays[1:]:
        y = y * x
    return y


def shared(x: mx.array) -> tuple[mx.array, mx.array]:
    y = mx.exp(x) * 2
    return mx.tanh(y), mx.sum(y + 1, -1, keepdims=True) + y


def broadcast(x: mx.array, row: mx.array) -> tuple[mx.array, mx.array]:
    y = mx.broadcast_to(row, x.shape)
    return mx.exp(x + y), mx.sum(y, 0)


@pytest.mark.parametrize("function", [deep, shared, broadcast], ids=lambda f: f.__name__)
def test_limits_of_fusion_are_mlxs(function: Callable[..., Any], tmp_path: Path) -> None:
    arrays = [zeros(4, 8), zeros(8)][: 2 if function is broadcast else 1]
    assert fused_here(function, arrays) == fused_by_mlx(function, arrays, tmp_path / "graph.dot")


def test_many_inputs_are_fused_as_mlx_does_it(tmp_path: Path) -> None:
    arrays = [zeros(4) for _ in range(40)]
    assert fused_here(wide, arrays) == fused_by_mlx(wide, arrays, tmp_path / "graph.dot")


def test_only_a_compiled_function_is_fused() -> None:
    def function(x: mx.array) -> mx.array:
        return mx.tanh(x) * 2 + 1

    assert count(function, zeros(4, 8)).launches == {"elementwise": 3}
    assert count(function, zeros(4, 8), compiled=True).launches == {"fused": 1}
    assert count(Region(function), zeros(4, 8)).launches == {"fused": 1}


# ---- the rules ----------------------------------------------------------------------------------------


def test_views_launch_nothing_and_copies_are_seen() -> None:
    x = zeros(2, 3, 4)
    assert not count(lambda x: x.transpose(0, 2, 1)[:, 1:][None].reshape(2, 3, 3).squeeze(), x).launches
    assert count(lambda x: x.transpose(0, 2, 1).reshape(2, 12), x).launches == {"copy": 1}
    assert count(lambda x: mx.concatenate([x, x, x], 1), x).launches == {"copy": 3}


def test_norms_want_rows_of_their_own() -> None:
    def heads(x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x.reshape(1, 6, 2, 8).transpose(0, 2, 1, 3), None, 1e-6)

    assert count(heads, zeros(1, 6, 16)).launches == {"norm": 1, "copy": 1}
    assert count(lambda x: mx.fast.rms_norm(x, None, 1e-6), zeros(1, 6, 16)).launches == {"norm": 1}


def test_a_product_is_counted_by_its_sizes() -> None:
    got = count(lambda x, w: x @ w.T, zeros(512, 64), zeros(256, 64))
    assert got.launches == {"product": 1}
    assert (got.flops, got.read, got.written) == (2 * 512 * 64 * 256, 4 * 64 * 768, 4 * 512 * 256)


def test_picked_experts_are_read_once() -> None:
    def pick(x: mx.array, stack: mx.array, ids: mx.array) -> mx.array:
        return mx.gather_mm(x, stack.swapaxes(1, 2), rhs_indices=ids, sorted_indices=True)

    ids = zeros(2, dtype=mx.int32)
    few = count(pick, zeros(2, 1, 8), zeros(16, 4, 8), ids)
    assert few.flops == 2 * 2 * 4 * 8
    assert 2 * 4 * 8 * 4 < few.read < 3 * 4 * 8 * 4


def test_an_operation_without_a_rule_is_an_error() -> None:
    with pytest.raises(click.ClickException, match="FFT"):
        count(lambda x: mx.fft.fft(x), zeros(8))


# ---- the step of the released model -------------------------------------------------------------------


@pytest.fixture(scope="module", params=FORMATS)
def steps(request: pytest.FixtureRequest) -> dict[bool, Count]:
    """By whether our kernels run; neither evaluates anything."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    kernels = {False: frozenset[str](), True: EVERY}
    counts = {on: ours(1024, request.param, names).count() for on, names in kernels.items()}
    assert mx.get_peak_memory() - before < 10 * MEGABYTE
    return {on: got for on, (got, _) in counts.items()}


def test_kernels_multiply_as_much_and_launch_less(steps: dict[bool, Count]) -> None:
    assert steps[True].flops == pytest.approx(steps[False].flops, rel=1e-3)
    assert 2 * steps[True].launches.total() < steps[False].launches.total()
    assert steps[True].read < steps[False].read


@pytest.mark.parametrize("form", FORMATS)
def test_q_k_and_v_are_one_launch(form: str) -> None:
    """Of a layer, behind one product, which there is without the kernel, too."""
    raw, made = small(), []
    for kernels in (EVERY, EVERY - {"heads"}):
        step = ours(9, form, kernels, raw)
        with as_on_metal():
            nodes = trace(step.function, *step.arrays).nodes
        made.append(Counter(kernel_of(node) or node.name for node in nodes))
    with_it, without = made
    assert with_it["dgemma_heads"] == len(read_config(raw).layers) and not without["dgemma_heads"]
    for product in ("Matmul", "QuantizedMatmul"):
        assert with_it[product] == without[product]
    assert with_it["Concatenate"] <= without["Concatenate"]


@pytest.mark.parametrize("own_v", [True, False])
def test_keys_and_values_alone_make_no_q(own_v: bool) -> None:
    """Where the encoder ends: of stacked matrices the rows of k and v only."""
    C, D, L, ops = 8, 64, 5, TracedOps(EVERY)
    q, k, v = (zeros(heads * C, D) for heads in (4, 2, 2))
    norm, turn = zeros(C), zeros(L, C // 2)
    w = stacked_heads(AttentionWeights(q, k, None, norm, norm, v if own_v else None))
    assert w.rows == ((32, 16, 16) if own_v else (32, 16))

    def keys_values(x: mx.array) -> tuple[mx.array, mx.array]:
        return ops.keys_values(x, w, BiasWeights(), 1e-6, (turn, turn))

    got = count(keys_values, zeros(L, D))
    assert got.flops == 2 * L * D * sum(w.rows[1:]) and got.launches["product"] == len(w.rows) - 1


def test_no_array_is_large(steps: dict[bool, Count]) -> None:
    for got in steps.values():
        assert got.largest <= 64 * MEGABYTE, got.largest_is


@pytest.mark.parametrize("form", FORMATS)
def test_the_table_is_read_twice(form: str) -> None:
    row = counted("dgemma-mlx+gather", 1024, form)
    assert row["table_reads"] == pytest.approx(2)


# ---- rows that share a step ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_more_launches_its_attention_only(form: str) -> None:
    """A copy of its q, two products each over past and canvas, a softmax, and its part of what is joined."""
    two, three = (ours(9, form, EVERY, small(), rows).count()[0] for rows in (2, 3))
    layers = len(read_config(small()).layers)
    assert three.launches - two.launches == {"kernel": layers, "product": 4 * layers, "copy": 2 * layers}
    assert three.table_read == two.table_read


@pytest.mark.parametrize("form", FORMATS)
def test_rows_share_the_weights(form: str) -> None:
    one, two = (counted("dgemma-mlx+gather", 1024, form, rows) for rows in (1, 2))
    assert two["flops"] == pytest.approx(2 * one["flops"], rel=1e-3)
    assert two["bytes_read_a_token"] < 0.65 * one["bytes_read_a_token"]
