"""The Metal simulator: what it computes against NumPy, and mistakes planted in kernels, which it finds.

The line of a planted mistake is marked `// here`, and what is reported must name that line.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.compare import EPS, close
from tests.metal import simulator
from tests.metal.simulator import build, sanitizers, source

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has Metal, and no GCC")

ORDERS = ("forward", "backward", "shuffled")
ROUNDING = {mx.float32: EPS["float32"], mx.bfloat16: EPS["bfloat16"], mx.float16: 2.0**-10}


@pytest.fixture(autouse=True)
def compiler() -> None:
    reason = simulator.available()
    assert reason is None, reason


@dataclass(frozen=True)
class Trial:
    """A kernel, whose outputs are called y and z, and a call of it."""

    source: str
    inputs: dict[str, Any]
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]]
    grid: tuple[int, ...] = (32, 1, 1)
    threadgroup: tuple[int, ...] = (32, 1, 1)
    template: dict[str, Any] = field(default_factory=dict)
    init_value: float | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the kernel

    def run(self, order: str = "forward") -> list[mx.array]:
        with simulator.installed(order=order):
            kernel = mx.fast.metal_kernel(
                name="trial",
                input_names=list(self.inputs),
                output_names=["y", "z"][: len(self.outputs)],
                source=self.source,
                **self.options,
            )
            return kernel(
                inputs=list(self.inputs.values()),
                template=list(self.template.items()),
                grid=self.grid,
                threadgroup=self.threadgroup,
                output_shapes=[shape for shape, _ in self.outputs],
                output_dtypes=[dtype for _, dtype in self.outputs],
                init_value=self.init_value,
            )

    def call(self) -> simulator.Call:
        """The call that `run` makes, whatever comes of it."""
        with simulator.recording() as calls, suppress(simulator.SimulatorError):
            self.run()
        return calls[0]

    def planted(self, old: str, new: str = "// here") -> Trial:
        """With a mistake in place of what is right."""
        assert self.source.count(old) == 1, old
        return replace(self, source=self.source.replace(old, new))


def marked(call: simulator.Call) -> int:
    """The line with the planted mistake."""
    return next(number for number, line in enumerate(call.source.splitlines(), 1) if "// here" in line)


def wide(x: mx.array) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a poisoned bfloat16 is a signalling NaN
        return np.array(x.astype(mx.float32), np.float64)


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(0).standard_normal(shape), mx.float32).astype(dtype)


# ---- Correct kernels. ----------------------------------------------------------------------------------

# Sums of rows, a threadgroup each: a tree in threadgroup memory, whose last levels are one simdgroup's.
SUM_ROWS = """
    threadgroup float tree[TG];
    uint t = thread_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    float sum = 0;
    for (uint i = t; i < uint(x_shape[1]); i += TG) { sum += float(x[row * x_shape[1] + i]); }
    tree[t] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint part = TG / 2; part >= 32; part /= 2) {
        if (t < part) { tree[t] += tree[t + part]; }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // of a level
    }
    if (simdgroup_index_in_threadgroup > 0) { return; }
    for (uint part = 16; part > 0; part /= 2) {
        float other = tree[t + part];
        simdgroup_barrier(mem_flags::mem_threadgroup);  // before the sum
        tree[t] += other;
        simdgroup_barrier(mem_flags::mem_threadgroup);  // after the sum
    }
    if (t == 0) { y[row] = static_cast<T>(tree[0]); }
"""
OF_LEVEL = "threadgroup_barrier(mem_flags::mem_threadgroup);  // of a level"
BEFORE_SUM = "simdgroup_barrier(mem_flags::mem_threadgroup);  // before the sum"


def sum_rows(dtype: mx.Dtype = mx.float32) -> Trial:
    """Of 3 rows of 200 small integers, so that every sum is exact."""
    x = mx.array(np.random.default_rng(0).integers(-2, 3, (3, 200))).astype(dtype)
    template = {"T": dtype, "TG": 128}
    return Trial(SUM_ROWS, {"x": x}, [((3,), dtype)], (128, 3, 1), (128, 1, 1), template)


def sums_are_right(trial: Trial, order: str) -> bool:
    return np.array_equal(wide(trial.run(order)[0]), wide(trial.inputs["x"]).sum(1))


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_reduction_with_barriers(dtype: mx.Dtype) -> None:
    for order in ORDERS:
        assert sums_are_right(sum_rows(dtype), order)
    # In each of three groups: a barrier before the tree and one in each of two levels, two in each of five.
    assert simulator.statistics["trial"] == simulator.Statistics(
        groups=3, barriers=9, simd_ops=30, threadgroup_bytes=512
    )


# The usual way: values held in registers, a reduction in two steps, a rounding where MLX has one.
RMS_NORM = """
    constexpr int HELD = (D + TG - 1) / TG;
    threadgroup float sums[32];
    uint t = thread_position_in_threadgroup.x;
    uint row = threadgroup_position_in_grid.y;
    float held[HELD];
    float total = 0;
    for (int i = 0; i < HELD; i++) {
        uint d = t + TG * i;
        held[i] = d < D ? static_cast<float>(x[row * D + d]) : 0.0f;
        total += held[i] * held[i];
    }
    total = simd_sum(total);
    if (thread_index_in_simdgroup == 0) { sums[simdgroup_index_in_threadgroup] = total; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    total = simd_sum(thread_index_in_simdgroup < TG / 32 ? sums[thread_index_in_simdgroup] : 0.0f);
    float scale = metal::precise::rsqrt(total / D + eps);
    for (int i = 0; i < HELD; i++) {
        uint d = t + TG * i;
        if (d < D) { y[row * D + d] = w[d] * static_cast<T>(held[i] * scale); }
    }
"""


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_a_norm_as_mlx_lm_writes_it(dtype: mx.Dtype) -> None:
    x, w = normal(5, 300, dtype=dtype), normal(300, dtype=dtype)
    inputs = {"x": x, "w": w, "eps": 1e-6}
    template = {"T": dtype, "D": 300, "TG": 128}
    trial = Trial(RMS_NORM, inputs, [(x.shape, dtype)], (128, 5, 1), (128, 1, 1), template)
    definition = wide(x) / np.sqrt((wide(x) ** 2).mean(1, keepdims=True) + 1e-6) * wide(w)
    for order in ORDERS:
        (y,) = trial.run(order)
        close(wide(y), definition, 4 * ROUNDING[dtype], f"norm, {order}")
    close(wide(y), wide(mx.fast.rms_norm(x, w, 1e-6)), 4 * ROUNDING[dtype], "norm against MLX")


SIMD = """
    uint lane = thread_index_in_simdgroup;
    uint i = thread_position_in_grid.x;
    float v = x[i];
    int n = int(lane);
    y[i * 8 + 0] = simd_sum(v);
    y[i * 8 + 1] = simd_max(v);
    y[i * 8 + 2] = simd_min(v);
    y[i * 8 + 3] = simd_prefix_inclusive_sum(v);
    y[i * 8 + 4] = simd_prefix_exclusive_sum(v);
    y[i * 8 + 5] = simd_shuffle(v, ushort(lane ^ 1));
    y[i * 8 + 6] = simd_broadcast(v, 2);
    y[i * 8 + 7] = quad_sum(v);
    z[i * 6 + 0] = simd_shuffle_xor(n, 3);
    z[i * 6 + 1] = simd_or(n & 5);
    z[i * 6 + 2] = simd_any(n == 7) + 2 * simd_all(n < 40) + 4 * simd_all(n == 0);
    z[i * 6 + 3] = popcount(uint(uint64_t(simd_ballot(n % 2 == 1))));
    z[i * 6 + 4] = int(simd_shuffle(ulong(n) << 40, ushort(0)) >> 40);
    z[i * 6 + 5] = simd_product(n % 2 ? 1 : -1);
"""


def simd_expected(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What SIMD computes for one simdgroup [lanes]."""
    lane = np.arange(len(x))
    same = np.ones_like(lane)
    quads = x.reshape(-1, 4).sum(1).repeat(4)
    floats = [
        *(x.sum() * same, x.max() * same, x.min() * same, x.cumsum(), x.cumsum() - x),
        *(x[lane ^ 1], x[2] * same, quads),
    ]
    votes = (len(x) > 7) + 2
    integers = [lane ^ 3, np.bitwise_or.reduce(lane & 5) * same, votes * same]
    integers += [len(x) // 2 * same, 0 * same, (-1) ** (len(x) // 2) * same]
    return np.stack(floats, 1), np.stack(integers, 1)


def test_simd_operations_also_of_a_partial_simdgroup() -> None:
    x = np.random.default_rng(0).integers(-9, 10, 40).astype(np.float32)
    outputs = [((40, 8), mx.float32), ((40, 6), mx.int32)]
    y, z = Trial(SIMD, {"x": mx.array(x)}, outputs, (40, 1, 1), (40, 1, 1)).run("shuffled")
    expected = [np.concatenate(parts) for parts in zip(*map(simd_expected, (x[:32], x[32:])), strict=True)]
    np.testing.assert_array_equal(np.array(y), expected[0])
    np.testing.assert_array_equal(np.array(z), expected[1])


FILLED = """
    uint i = thread_position_in_grid.x;
    y[i * 4 + 0] = simd_shuffle_down(x[i], 3);
    y[i * 4 + 1] = simd_shuffle_up(x[i], 3);
    y[i * 4 + 2] = simd_shuffle_and_fill_up(x[i], 100 + x[i], 3);
    y[i * 4 + 3] = simd_shuffle_rotate_down(x[i], 3);
"""


def test_shuffles_beyond_the_ends() -> None:
    (y,) = Trial(FILLED, {"x": mx.arange(32)}, [((32, 4), mx.int32)]).run()
    lane = np.arange(32)
    down, up = np.where(lane < 29, lane + 3, lane), np.where(lane >= 3, lane - 3, lane)
    expected = [down, up, np.where(lane >= 3, lane - 3, 129 + lane), (lane + 3) % 32]
    np.testing.assert_array_equal(np.array(y), np.stack(expected, 1))


# y [M, N] = a [M, K] b [N, K]ᵀ in tiles of 8x8, four simdgroups side by side; a goes by threadgroup memory.
MATMUL = """
    threadgroup T tile[8 * 8];
    uint t = thread_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y * 8, column = simdgroup_index_in_threadgroup * 8;
    simdgroup_matrix<float, 8, 8> sums = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (uint k = 0; k < K; k += 8) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t < 64) { tile[t] = a[(row + t / 8) * K + k + t % 8]; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_matrix<T, 8, 8> left, right;
        simdgroup_load(left, tile, 8);
        simdgroup_load(right, b + column * K + k, K, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sums, left, right, sums);
    }
    simdgroup_store(sums, y + row * N + column, N);
"""


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_matrix_product(dtype: mx.Dtype) -> None:
    a, b = normal(16, 24, dtype=dtype), normal(32, 24, dtype=dtype)
    template = {"T": dtype, "K": 24, "N": 32}
    trial = Trial(MATMUL, {"a": a, "b": b}, [((16, 32), mx.float32)], (128, 2, 1), (128, 1, 1), template)
    for order in ORDERS:
        close(trial.run(order)[0], wide(a) @ wide(b).T, 1e-6, f"product, {order}")


POSITIONS = """
    uint3 at = thread_position_in_grid;
    uint i = (at.z * threads_per_grid.y + at.y) * threads_per_grid.x + at.x;
    uint3 size = threads_per_threadgroup;
    uint3 within = thread_position_in_threadgroup;
    y[i * 4 + 0] = size.x * 100 + size.y * 10 + size.z;
    y[i * 4 + 1] = thread_index_in_threadgroup;
    y[i * 4 + 2] = (within.z * size.y + within.y) * size.x + within.x;
    y[i * 4 + 3] = simdgroups_per_threadgroup;
"""


def test_groups_at_the_edges_are_smaller() -> None:
    """As dispatchThreads makes them: 10 = 4 + 4 + 2, 3 = 2 + 1, and 7 clipped to the grid's 2."""
    (y,) = Trial(POSITIONS, {}, [((2, 3, 10, 4), mx.uint32)], (10, 3, 2), (4, 2, 7)).run("shuffled")
    y = np.array(y)
    sizes = np.repeat([4, 4, 2], [4, 4, 2]) * 100 + np.repeat([2, 1], [2, 1])[:, None] * 10 + 2
    np.testing.assert_array_equal(y[..., 0], np.broadcast_to(sizes, (2, 3, 10)))
    np.testing.assert_array_equal(y[..., 1], y[..., 2])
    assert (y[..., 3] == 1).all() and simulator.statistics["trial"].groups == 6


def test_tiny_inputs_and_shapes() -> None:
    """Inputs of less than 8 elements lie in constant memory, and those without dimensions are references."""
    source = """
        y[0] = n * tiny[2] + x_shape[1] + 10 * int(x_strides[0]) + 1000 * x_ndim + (flag ? 5000 : 0);
    """
    inputs = {"n": 3, "tiny": mx.array([1, 2, 4]), "x": mx.zeros((2, 7)), "flag": True}
    trial = Trial(source, inputs, [((1,), mx.int32)], (1, 1, 1), (1, 1, 1))
    assert trial.run()[0].item() == 3 * 4 + 7 + 10 * 7 + 2000 + 5000
    for text in ("const constant int32_t& n", "const constant int32_t* tiny", "const device float* x"):
        assert text in trial.call().source


STRIDED = """
    uint i = thread_position_in_grid.x;
    y[i] = x[elem_to_loc(int64_t(i), x_shape, x_strides, x_ndim)];
"""


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_strides_of_inputs_that_need_not_be_contiguous(dtype: mx.Dtype) -> None:
    base = normal(6, 10, dtype=dtype)
    for x in (base.T, base[1::2, ::3], base[::-1], mx.broadcast_to(base[0], (4, 10))):
        grid = (x.size, 1, 1)
        trial = Trial(STRIDED, {"x": x}, [(x.shape, dtype)], grid, options={"ensure_row_contiguous": False})
        np.testing.assert_array_equal(wide(trial.run()[0]), wide(x))
        plain = Trial("uint i = thread_position_in_grid.x; y[i] = x[i];", {"x": x}, [(x.shape, dtype)], grid)
        np.testing.assert_array_equal(wide(plain.run()[0]), wide(x))


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_outputs_start_as_nan_or_with_their_initial_value(dtype: mx.Dtype) -> None:
    trial = Trial("if (thread_position_in_grid.x == 0) { y[1] = 2; }", {}, [((3,), dtype)])
    np.testing.assert_array_equal(wide(trial.run()[0]), [np.nan, 2, np.nan])
    np.testing.assert_array_equal(wide(replace(trial, init_value=7.5).run()[0]), [7.5, 2, 7.5])


def test_atomics_between_groups() -> None:
    source = """
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&y[x[i] % 4], 1, memory_order_relaxed);
        atomic_fetch_max_explicit(&y[4], x[i], memory_order_relaxed);
        atomic_fetch_add_explicit(&z[0], 0.5f, memory_order_relaxed);
    """
    x = np.random.default_rng(0).integers(0, 99, 100).astype(np.int32)
    outputs = [((5,), mx.int32), ((1,), mx.float32)]
    options = {"atomic_outputs": True}
    trial = Trial(source, {"x": mx.array(x)}, outputs, (100, 1, 1), init_value=0, options=options)
    for order in ORDERS:
        counts, total = trial.run(order)
        assert counts.tolist() == [*np.bincount(x % 4, minlength=4), x.max()] and total.item() == 50


def test_templates_of_integers_booleans_and_types() -> None:
    source = """
        if (NEGATIVE) { y[0] = static_cast<T>(-N); } else { y[0] = static_cast<T>(N); }
        y[1] = static_cast<T>(1.0f / 3.0f);
    """
    for dtype, negative in [(mx.float32, False), (mx.bfloat16, True), (mx.int32, True)]:
        template = {"T": dtype, "N": 5, "NEGATIVE": negative}
        (y,) = Trial(source, {}, [((2,), dtype)], template=template).run()
        np.testing.assert_array_equal(wide(y), [-5 if negative else 5, wide(mx.array(1 / 3).astype(dtype))])


LANGUAGE = """
    float4 v = float4(x[0], x[1], x[2], x[3]);
    float4 twice = v * 2 + float4(1);
    y[0] = dot(v, twice);
    y[1] = twice.zw.y + v.xyz[0];
    y[2] = float(half(1.0h / 3.0h));
    y[3] = metal::clamp(x[0], -0.5f, 0.5f) + metal::max(x[1], x[2]) + metal::fma(x[0], x[1], x[2]);
    y[4] = metal::select(1.0f, 2.0f, x[0] < x[0] + 1) + sign(-3.0f) + fract(2.75f);
    y[5] = as_type<float>(as_type<uint>(x[3]) ^ 0x80000000u);
    device float4* out = (device float4*)(y + 8);
    out[0] = metal::fast::exp(v);
    y[6] = 0.1 * 3;
    y[7] = float(any(v > twice)) + 2 * float(all(halved(v) < v || v < 0.0f));
    z[0] = popcount(0xF0u) + clz(1u) + mulhi(1u << 31, 6u);
    z[1] = uint((ulong(1) << 40 | 77ul) % 1000003ul);
    z[2] = uint(ushort(40000) + ushort(30000)) + uint(uchar(200 + 100));
    z[3] = metal::min(7u, z_bound<4>()) + rotate(0x80000001u, 4u);
"""
LANGUAGE_HEADER = """
inline float4 halved(float4 v) { return v / 2; }
template <int N> METAL_FUNC constexpr uint z_bound() { return N; }
"""


def test_types_and_functions_of_the_language() -> None:
    x = np.array([0.75, -1.5, 2.25, 3.5, 0, 0, 0, 0], np.float32)
    outputs = [((12,), mx.float32), ((4,), mx.uint32)]
    one = (1, 1, 1)
    trial = Trial(LANGUAGE, {"x": mx.array(x)}, outputs, one, one, options={"header": LANGUAGE_HEADER})
    y, z = map(np.array, trial.run())
    v = x[:4]
    expected = [v @ (2 * v + 1), 2 * v[3] + 1 + v[0], np.float32(np.float16(1) / np.float16(3))]
    expected += [0.5 + 2.25 + v[0] * v[1] + v[2], 2 - 1 + 0.75, -v[3], np.float32(0.1) * np.float32(3), 3]
    np.testing.assert_allclose(y, [*expected, *np.exp(v)], rtol=1e-7)
    integers = [4 + 31 + 3, ((1 << 40) | 77) % 1000003, 70000 + 44, 4 + 0x18]
    np.testing.assert_array_equal(z, integers)


def test_each_operation_of_bfloat_is_rounded() -> None:
    x, y = normal(4096, dtype=mx.bfloat16), normal(2, 4096, dtype=mx.bfloat16)[1]
    source = "uint i = thread_position_in_grid.x; y[i] = a[i] * b[i] + a[i] / b[i] - b[i];"
    (z,) = Trial(source, {"a": x, "b": y}, [(x.shape, x.dtype)], (4096, 1, 1), (256, 1, 1)).run()
    np.testing.assert_array_equal(wide(z), wide(x * y + x / y - y))


# ---- Standing in for MLX. ------------------------------------------------------------------------------

DOUBLE = "uint i = thread_position_in_grid.x; y[i] = x[i] * 2;"


def test_installed_puts_everything_back() -> None:
    real = mx.fast.metal_kernel
    assert not simulator.active()
    with pytest.raises(ZeroDivisionError), simulator.installed(order="backward"):
        assert simulator.active() and mx.fast.metal_kernel is not real
        with simulator.installed():
            pass
        assert simulator.active()
        raise ZeroDivisionError
    assert not simulator.active() and mx.fast.metal_kernel is real
    with pytest.raises(ValueError, match="order is one of"), simulator.installed(order="sideways"):
        pass
    assert mx.fast.metal_kernel is real


def test_orders_apply_to_kernels_made_before() -> None:
    """Each lane notes when it came; the counter starts as poison, which is -1."""
    source = "threadgroup int next; y[thread_position_in_grid.x] = next++;"
    with simulator.installed():
        kernel = mx.fast.metal_kernel("order", [], ["y"], source)
    size: dict[str, Any] = dict(grid=(32, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(32,)])
    seen = []
    for order, seed in [("forward", 0), ("backward", 0), ("shuffled", 1), ("shuffled", 2)]:
        with simulator.installed(order=order, seed=seed):
            (y,) = kernel(inputs=[], output_dtypes=[mx.int32], **size)
            seen.append((np.array(y) + 1).tolist())
    assert seen[0] == list(range(32)) and seen[1] == seen[0][::-1]
    assert seen[2] != seen[3] and sorted(seen[2]) == sorted(seen[3]) == seen[0]


def test_code_that_compiles_its_functions_runs_unmodified() -> None:
    def double_and_one(x: mx.array) -> mx.array:
        kernel = mx.fast.metal_kernel("double", ["x"], ["y"], DOUBLE)
        (y,) = kernel(
            inputs=[x],
            grid=(x.size, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
            stream=mx.default_stream(mx.default_device()),
        )
        return y + 1

    compiled = mx.compile(double_and_one)
    with simulator.installed():
        assert compiled(mx.arange(3)).tolist() == [1, 3, 5]


def test_verbose_prints_what_mlx_generates(capsys: pytest.CaptureFixture[str]) -> None:
    with simulator.installed(), simulator.recording() as calls:
        kernel = mx.fast.metal_kernel("double", ["x"], ["y"], DOUBLE)
        arguments: dict[str, Any] = dict(grid=(8, 1, 1), threadgroup=(8, 1, 1), output_dtypes=[mx.int32])
        kernel(inputs=[mx.arange(8)], output_shapes=[(8,)], verbose=True, **arguments)
        kernel(inputs=[mx.arange(9)], output_shapes=[(9,)], **arguments)
    assert capsys.readouterr().out == calls[0].source + "\n"
    assert calls[0].source is calls[1].source, "the source is generated once for arguments alike"


def test_the_source_is_found_where_standard_output_is_closed() -> None:
    program = f"""
import mlx.core as mx
from tests.metal import simulator
with simulator.installed():
    kernel = mx.fast.metal_kernel("double", ["x"], ["y"], {DOUBLE!r})
    arguments = dict(grid=(8, 1, 1), threadgroup=(8, 1, 1), output_shapes=[(8,)], output_dtypes=[mx.int32])
    assert kernel(inputs=[mx.arange(8)], **arguments)[0].tolist() == list(range(0, 16, 2))
"""
    command = ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_available_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "'no-such-compiler -O2', which is not there" in str(simulator.available())
    monkeypatch.setenv("CXX", "false")
    assert "GCC 11 or newer" in str(simulator.available())
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "install g++" in str(simulator.available())
    with pytest.raises(simulator.SimulatorError, match=r"install g\+\+"):
        build.library("")


# ---- Planted mistakes that a launch finds. -------------------------------------------------------------

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
MISTAKES = {
    "simd operation in a branch": (
        64,
        "if (i % 2) { v = simd_sum(v); }  // here",
        "simd_sum reached by 16 of 32 lanes of the simdgroup: thread 30 of the group has returned",
    ),
    "simd operations in two branches of a line": (
        64,
        "v = i % 2 ? simd_sum(v) : simd_sum(2 * v);  // here",
        "simd_sum reached by 16 of 32 lanes .* thread 31 of the group waits at simd_sum of line",
    ),
    "simd operation beside a barrier": (
        64,
        f"if (i % 2) {{ {BARRIER} }} else {{ \n v = simd_max(v);  // here\n }}",
        "simd_max reached by 16 of 32 lanes .* waits at threadgroup_barrier of line",
    ),
    "barrier in a branch": (
        64,
        f"if (i < 40) {{ {BARRIER} }}  // here",
        "threadgroup_barrier reached by 40 of 64 lanes of the threadgroup: thread 63 .* has returned",
    ),
    "early return before a barrier": (
        64,
        f"if (i >= 50) {{ return; }}\n {BARRIER}  // here",
        "threadgroup_barrier reached by 50 of 64 lanes",
    ),
    "read of a lane that does not run": (
        40,
        "v = simd_shuffle(v, 20);  // here",
        "lane 0 of a simdgroup of 8 reads lane 20, which does not run",
    ),
    "read of a lane that does not exist": (64, "v = simd_broadcast(v, 32);  // here", "reads lane 32"),
    "matrix of a part of a simdgroup": (
        40,
        "simdgroup_matrix<float, 8, 8> one(1.0f); simdgroup_store(one, y, 8);  // here",
        "with 8 of 32 lanes",
    ),
    "too much threadgroup memory": (
        64,
        "threadgroup float a[5000], b[4000]; a[i] = b[i] = 0;  // here",
        "threadgroup variables take 36000 bytes, and a threadgroup has 32768",
    ),
    "write outside a threadgroup variable": (
        64,
        "threadgroup float few[60];  // here\n few[i] = v;",
        "lanes wrote outside this threadgroup variable of 240 bytes",
    ),
    "division by zero": (
        64,
        f"{BARRIER}  // here\n v = 5 / (int(i) - int(i));",
        r"thread 0 of group \(0, 0, 0\) divides an integer by zero, after waiting here",
    ),
    "bfloat from float without a cast": (
        64,
        "bfloat b = v; v = b;  // here",
        "conversion from .* to .*bfloat",
    ),
    "undeclared name": (64, "v = w;  // here", "not declared"),
    "simd sum of 64 bits": (64, "v = simd_sum(long(i));  // here", "at most 32 bits, and no bool"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_launch_finds(mistake: str) -> None:
    threads, code, message = MISTAKES[mistake]
    source = f"uint i = thread_position_in_grid.x; float v = i;\n {code}\n y[i] = v;"
    trial = Trial(source, {}, [((64,), mx.float32)], (threads, 1, 1), (threads, 1, 1))
    with pytest.raises(simulator.SimulatorError, match=message) as caught:
        trial.run()
    assert caught.value.line == marked(trial.call()) and "// here" in str(caught.value)
    assert "kernel trial, line" in str(caught.value)


def test_launch_finds_writes_outside_of_an_output() -> None:
    trial = Trial("y[thread_position_in_grid.x] = 1;", {}, [((31,), mx.uint8)])
    with pytest.raises(simulator.SimulatorError, match="it writes outside of its output y"):
        trial.run()


def test_a_kernel_that_crashes_ends_its_launch_only() -> None:
    wild = "y[thread_position_in_grid.x + (1ul << 40)] = 1;"
    large = "volatile int big[1 << 20]; uint i = thread_position_in_grid.x; big[i] = 1; y[i] = big[i];"
    for text in (wild, large):
        trial = Trial(text, {}, [((32,), mx.float32)])
        with pytest.raises(
            simulator.SimulatorError, match=r"thread 0 of group \(0, 0, 0\) reads or writes where"
        ):
            trial.run()
    right = Trial(DOUBLE, {"x": mx.arange(8)}, [((8,), mx.int32)], (8, 1, 1))
    assert right.run()[0].tolist() == list(range(0, 16, 2))


def test_launch_refuses_what_metal_refuses() -> None:
    trial = Trial("y[0] = 1;", {}, [((1,), mx.float32)])
    inputs = {f"x{i}": mx.zeros(8) for i in range(31)}
    refused = {
        "a threadgroup of 1025 threads, and the most is 1024": replace(trial, threadgroup=(1025, 1, 1)),
        r"grid is three positive numbers of threads, not \(32, 0, 1\)": replace(trial, grid=(32, 0, 1)),
        "threadgroup is three positive": replace(trial, threadgroup=(32, 1)),
        "32 buffers, and the most is 31": replace(trial, inputs=inputs),
    }
    for message, wrong in refused.items():
        with pytest.raises(simulator.SimulatorError, match=message):
            wrong.run()


def test_an_order_of_lanes_finds_a_dropped_barrier() -> None:
    dropped = sum_rows().planted(OF_LEVEL)
    assert not all(sums_are_right(dropped, order) for order in ORDERS)


def test_what_was_never_written_shows_as_nan() -> None:
    source = "threadgroup T few[2]; few[0] = 1; y[0] = few[0]; y[1] = few[1]; y[2] = static_cast<T>(x[8]);"
    for dtype in ROUNDING:
        (y,) = Trial(source, {"x": mx.zeros(8)}, [((3,), dtype)], template={"T": dtype}).run()
        np.testing.assert_array_equal(wide(y), [1, np.nan, np.nan])
    # Not even what another group left there.
    (y,) = Trial(
        "threadgroup float last; uint g = threadgroup_position_in_grid.x; y[g] = last; last = 1;",
        {},
        [((3,), mx.float32)],
        (3, 1, 1),
        (1, 1, 1),
    ).run()
    assert np.isnan(np.array(y)).all()


def test_a_launch_leaves_no_stacks_behind() -> None:
    """Linux allows a process 65,530 maps, and hundreds of kernels may be loaded, 1,024 lanes each."""

    def maps() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    inputs, outputs = {"x": mx.arange(8)}, [((1,), mx.float32)]
    before = maps()
    Trial("y[0] = 1.0f;", inputs, outputs, grid=(1024, 1, 1), threadgroup=(1024, 1, 1)).run()
    assert maps() - before < 100
    with pytest.raises(simulator.SimulatorError):
        Trial("y[size_t(1) << 40] = 1.0f;", inputs, outputs, (512, 1, 1), (512, 1, 1)).run()
    assert maps() - before < 100


def test_every_form_of_a_threadgroup_variable_is_found() -> None:
    def names(variable: source.Variable) -> str:
        return f"<{variable.type}|{variable.name}|{variable.extents}>"

    forms = {
        "threadgroup float a[N];": "<float|a|[N]>",
        "threadgroup vec<T, 4> a[N > 2 ? 4 : 2][8], b;": "<vec<T, 4>|a|[N > 2 ? 4 : 2][8]><vec<T, 4>|b|>",
        "threadgroup unsigned int a[f(1, 2) * 3];": "<unsigned int|a|[f(1, 2) * 3]>",
        "threadgroup Tile<T>\n a;": "<Tile<T>|a|>\n",
    }
    for code, expected in forms.items():
        assert source.replace_variables(code, names) == expected
    for code in (
        "threadgroup float* p = a;",
        "f((threadgroup half4*)p, 1);",
        "void f(const threadgroup T& x);",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "remove_addrspace_t<threadgroup T> x;",
    ):
        assert source.replace_variables(code, names) == code


def test_threadgroup_variables_that_cannot_be_read_are_an_error() -> None:
    trial = Trial("threadgroup few; y[0] = 0;", {}, [((1,), mx.float32)])
    with pytest.raises(simulator.SimulatorError, match="cannot read the declaration `threadgroup few;`"):
        trial.run()


# ---- Planted mistakes that the sanitizers find. --------------------------------------------------------

OUT_OF_BOUNDS = """
    threadgroup float few[32];
    uint i = thread_position_in_grid.x;
    few[i] = x[i + 1];  // here
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = few[i];
"""


def test_a_correct_kernel_is_clean() -> None:
    call = sum_rows().call()
    assert simulator.sanitize(call, "address") == []
    assert simulator.sanitize(call, "thread") == []


def test_address_sanitizer_finds_reads_and_writes_out_of_bounds() -> None:
    """Of an input, of a threadgroup variable and of an output, one element each."""
    outputs = [((32,), mx.float32)]
    call = Trial(OUT_OF_BOUNDS, {"x": mx.zeros(33)}, outputs, (33, 1, 1), (33, 1, 1)).call()
    found = simulator.sanitize(call, "address")
    assert {line for line, _ in found} == {marked(call), marked(call) + 2}
    for text in ("heap-buffer-overflow: read of 4 bytes", "heap-buffer-overflow: write of 4 bytes"):
        assert (marked(call), text) in found and (marked(call) + 2, text) in found
    assert (marked(call), "index 32 out of bounds for type 'float [32]'") in found


@pytest.mark.parametrize("dropped", [OF_LEVEL, BEFORE_SUM], ids=["threadgroup", "simdgroup"])
def test_thread_sanitizer_finds_a_dropped_barrier(dropped: str) -> None:
    """Between accesses of the line above, or of those around; not in one of the other order."""
    call = sum_rows().planted(dropped).call()
    found = simulator.sanitize(call, "thread")
    assert found and all("data race: a " in text for _, text in found)
    assert {line - marked(call) for line, _ in found} <= {-2, -1, 0, 1}


def test_thread_sanitizer_finds_a_race_between_two_barriers() -> None:
    """Two lanes write one place, and then all meet: what comes later does not hide it."""
    source = f"""
        threadgroup int place[16];
        {BARRIER}
        place[thread_position_in_grid.x % 16] = 1;  // here
        {BARRIER}
        y[thread_position_in_grid.x] = 1;
    """
    call = Trial(source, {}, [((32,), mx.float32)]).call()
    ((line, text),) = simulator.sanitize(call, "thread")
    assert line == marked(call)
    assert text == f"data race: a write of 4 bytes in line {line} against a write of 4 bytes in line {line}"


def test_thread_sanitizer_finds_groups_that_write_one_place() -> None:
    source = "y[thread_position_in_threadgroup.x] = 1;  // here"
    call = Trial(source, {}, [((4,), mx.float32)], (16, 1, 1), (4, 1, 1)).call()
    assert {line for line, _ in simulator.sanitize(call, "thread")} == {marked(call)}


def test_a_sanitizer_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    call = sum_rows().call()

    def refuse(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        words = "FATAL: ThreadSanitizer: unexpected memory mapping"
        return subprocess.CompletedProcess(command, 66, stdout="", stderr=words)

    simulator.sanitize(call, "thread")  # the program is there
    monkeypatch.setattr(sanitizers.subprocess, "run", refuse)
    with pytest.raises(simulator.SimulatorError, match="unexpected memory mapping"):
        simulator.sanitize(call, "thread")
    with pytest.raises(ValueError, match="kind is 'thread' or 'address'"):
        simulator.sanitize(call, "memory")


# ---- Types and address spaces. -------------------------------------------------------------------------


def test_correct_kernels_have_correct_types() -> None:
    x, few = normal(8, 24, dtype=mx.bfloat16), mx.zeros(4)
    norm = {"T": mx.bfloat16, "D": 24, "TG": 128}
    product = {"T": mx.bfloat16, "K": 24, "N": 32}
    floats, integers = [((64,), mx.float32)], [((64,), mx.uint32)]
    atomics = "atomic_fetch_add_explicit(&y[0], 1, memory_order_relaxed);"
    trials = [
        sum_rows(),
        Trial(RMS_NORM, {"x": x, "w": few, "eps": 1e-6}, [((8, 24), mx.bfloat16)], template=norm),
        Trial(SIMD, {"x": few}, [*floats, ((64,), mx.int32)]),
        Trial(FILLED, {"x": mx.arange(32)}, integers),
        Trial(MATMUL, {"a": x, "b": x}, floats, template=product),
        Trial(POSITIONS, {}, integers),
        Trial(STRIDED, {"x": x}, floats),
        Trial(LANGUAGE, {"x": mx.zeros(8)}, [*floats, *integers], options={"header": LANGUAGE_HEADER}),
        Trial(atomics, {}, integers, options={"atomic_outputs": True}),
        Trial("vec<T, 4> v = vec<T, 4>(1.5bf); y[0] = v.x;", {}, floats, template={"T": mx.bfloat16}),
    ]
    for trial in trials:
        assert simulator.typecheck(trial.call()) == [], trial.source


FIRST = "template <typename T> inline T first(const device T* x) { return x[0]; }\n"
WRONG_TYPES = {
    "a helper for device memory and an input in constant memory": (
        FIRST,
        "y[0] = first(x);  // here",
        "no matching function for call to 'first'",
    ),
    "device memory as a thread's": (
        "",
        "const thread float* p = y; y[0] = p[0];  // here",
        "cannot initialize",
    ),
    "a pointer without address space": (
        "",
        "float v[2]; float* p = v; y[0] = p[0];  // here",
        r"a pointer or reference without address space: `float\* p`",
    ),
    "a reference without address space": (
        "inline void set(float& x) { x = 1; }  // here\n",
        "float v; set(v); y[0] = v;",
        "without address space: `float& x`",
    ),
    "threadgroup memory as device memory": (
        FIRST,
        "threadgroup float s[2]; s[0] = 0; y[0] = first(s);  // here",
        "no matching function",
    ),
    "an undeclared name": ("", "y[0] = nowhere;  // here", "undeclared identifier 'nowhere'"),
    "double": ("", "double v = 1; y[0] = v;  // here", "Metal has no `double`"),
    "arguments of two types": ("", "y[0] = metal::max(1.0, 2);  // here", "call to 'max' is ambiguous"),
}


@pytest.mark.parametrize("mistake", WRONG_TYPES)
def test_typecheck_finds(mistake: str) -> None:
    header, source, message = WRONG_TYPES[mistake]
    inputs = {"x": mx.zeros(4)}
    call = Trial(source, inputs, [((1,), mx.float32)], options={"header": header}).call()
    found = simulator.typecheck(call)
    assert [line for line, _ in found] == [marked(call)], found
    assert re.search(message, found[0][1]), found


def test_a_helper_for_device_memory_takes_larger_inputs() -> None:
    """The other side of the trap: from 8 elements on, the same call is right."""
    outputs = [((1,), mx.float32)]
    call = Trial("y[0] = first(x);", {"x": mx.zeros(8)}, outputs, options={"header": FIRST}).call()
    assert simulator.typecheck(call) == []
