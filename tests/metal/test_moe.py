"""The expert kernels against the composite `Ops.experts` on NumPy float64, from the stacks' own values.

With float32 activations, sums of a hundred terms agree to 1e-5, and a bit in the wrong place shows. With
others every value that is stored is rounded to the format, twice on the way, and so are decoded weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma.formats.encode import quantize
from dgemma.formats.quantized import MXFP4, MXFP8, NVFP4, Form, Quantized, affine
from dgemma.network.ops.decoding import dequantize
from dgemma_mlx.kernels import moe
from dgemma_mlx.kernels.plan import plan, plan_plain
from dgemma_mlx.ops import MlxOps
from tests.compare import EPS, REFERENCE, close
from tests.metal import simulator

pytestmark = pytest.mark.usefixtures("metal")

ORDERS = ("forward", "backward", "shuffled")
BOUNDS = {mx.float32: 1e-5, mx.bfloat16: 2 * EPS["bfloat16"], mx.float16: 2 * 2.0**-10}
F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16


@dataclass
class Layer:
    """Experts on the device and as NumPy arrays or records, and inputs."""

    x: mx.array
    weights: np.ndarray
    ids: np.ndarray
    stacks: tuple[Any, Any]  # gate_up, down
    definition: tuple[Any, Any]

    @property
    def inputs(self) -> tuple[Any, Any, Any, Any, Any]:
        return self.x, mx.array(self.weights), mx.array(self.ids.astype(np.int32)), *self.stacks

    def expected(self) -> np.ndarray:
        """The composite on float64 of the very same numbers."""
        x = host(self.x).astype(np.float64)
        return REFERENCE.experts(x, self.weights.astype(np.float64), self.ids, *self.definition)


def host(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def stack(rng: np.random.Generator, shape: tuple[int, ...], form: Form | None, dtype: mx.Dtype) -> Any:
    """A random stack [E, O, I] on the device."""
    x = (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
    if form is None:
        return mx.array(x).astype(dtype)
    record = quantize(x, form).map(mx.array)
    if form.mode != "affine" or dtype != BF16:
        return record
    # As MLX has them; `quantize` chose bfloat16 values.
    return record.map(lambda x: x.astype(dtype) if x.dtype == F32 else x)


def factored(rng: np.random.Generator, record: Quantized, factor: str) -> Quantized:
    """The record with a factor a row, multiplying or dividing, with none, or as it is: one a matrix."""
    if factor == "matrix":
        return record
    if factor == "none":
        return replace(record, factor=None)
    rows = mx.array(rng.uniform(0.5, 2, record.shape[:2]).astype(np.float32))
    rows = rows if record.factor is None else rows * record.factor
    return replace(record, factor=1 / rows if factor == "divides" else rows, divides=factor == "divides")


def numpy(weight: Any) -> Any:
    if isinstance(weight, Quantized):
        return weight.map(lambda x: np.array(x) if x.dtype == mx.uint8 else host(x).astype(np.float64))
    return host(weight).astype(np.float64)


def layer(
    form: Form | None = None,
    dtype: mx.Dtype = F32,
    D: int = 64,
    M: int = 96,
    *,
    E: int = 4,
    N: int = 9,
    K: int = 2,
    factors: tuple[str, str] = ("matrix", "matrix"),
    only: list[int] | None = None,
    weights: mx.Dtype | None = None,
) -> Layer:
    """Random experts and inputs; picks are of the experts `only`, stacks without codes of type `weights`."""
    rng = np.random.default_rng([E, N, K, D, M])
    stacks = stack(rng, (E, 2 * M, D), form, weights or dtype), stack(rng, (E, D, M), form, weights or dtype)
    if form is not None:
        stacks = factored(rng, stacks[0], factors[0]), factored(rng, stacks[1], factors[1])
    scale = 1e-3 if "none" in factors else 1.0  # NVFP4 scales without their factor are large
    x = mx.array((scale * rng.standard_normal((N, D))).astype(np.float32)).astype(dtype)
    picks = rng.uniform(0.1, 1, (N, K)).astype(np.float32)
    ids = np.stack([rng.permutation(E if only is None else only)[:K] for _ in range(N)])
    return Layer(x, picks, ids, stacks, (numpy(stacks[0]), numpy(stacks[1])))


def check(part: Layer, what: str, fused: bool = True) -> mx.array:
    ops = MlxOps(F32 if part.x.dtype == F16 else part.x.dtype)
    actual = moe.experts(ops, *part.inputs, fused=fused)
    assert actual.dtype == part.x.dtype
    close(host(actual), part.expected(), BOUNDS[part.x.dtype], what)
    return actual


# ---- the fused products -------------------------------------------------------------------------------

FORMATS: dict[str, dict[str, Any]] = {
    "float32": dict(),
    "float32, odd sizes": dict(D=130, M=37),
    "bfloat16": dict(dtype=BF16),
    "float16": dict(dtype=F16),
    "float32 with bfloat16 weights": dict(weights=BF16),
    "4 bits": dict(form=affine(4, 64), D=128, M=64),
    "4 bits, bfloat16": dict(form=affine(4, 32), dtype=BF16),
    "8 bits": dict(form=affine(8, 32)),
    "8 bits, float16": dict(form=affine(8, 128), dtype=F16, D=128, M=256, E=2, N=3),
    "nvfp4, half a step of 32 inputs": dict(form=NVFP4, D=80, M=48, factors=("rows", "divides")),
    "nvfp4, no factor": dict(form=NVFP4, factors=("none", "none")),
    "nvfp4, bfloat16": dict(form=NVFP4, dtype=BF16),
    "mxfp4": dict(form=MXFP4),
    "mxfp4, bfloat16": dict(form=MXFP4, dtype=BF16),
    "mxfp8": dict(form=MXFP8, factors=("divides", "rows")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    check(layer(**FORMATS[name]), name)


SIZES: dict[str, dict[str, Any]] = {
    "experts without rows": dict(E=7, only=[1, 5]),
    "one expert takes all": dict(N=70, K=1, only=[2]),
    "one token, one pick": dict(N=1, K=1),
    "one expert": dict(E=1, N=5, K=1),
    "all experts": dict(N=3, K=4),
    "more than 32 experts": dict(E=70, N=3, K=67),
    "several threadgroups a tile": dict(D=160, M=96, N=3),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    check(layer(**SIZES[name]), name)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 24, 31, 32, 33, 64, 65])
def test_rows_of_a_tile(rows: int) -> None:
    """Tiles whose last eight are full, or have one row; the next expert's rows begin within them."""
    part = layer(N=rows + 2, K=1)
    part.ids = np.array([0] * rows + [1, 3])[:, None]
    check(part, f"{rows} rows")


def test_tiles_of_16() -> None:
    part = layer(N=20, K=2)
    x, weights, ids, gate_up, down = part.inputs
    chosen = plan(ids, 4)
    y = moe.projected(moe.gated(x, chosen, gate_up, 16), chosen, down, 16)
    close(host(moe.combined(y, chosen, weights)), part.expected(), 1e-5, "tiles of 16")


def identity(form: Form, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of a code and a finite scale: as a product with the identity reads it, and as it is.

    Scales whose products leave the range of normal float32 stay out: GPUs take these for 0.
    """
    codes = np.arange(2**form.bits, dtype=np.uint8)
    if form.mode == "mxfp8":
        codes = codes[codes % 128 != 127]  # NaN
    scales = np.arange(1, 127, dtype=np.uint8) if form.mode == "nvfp4" else np.arange(20, 240, dtype=np.uint8)
    row = np.resize(codes, -(-len(codes) // 32) * 32)
    octets = row if form.bits == 8 else row[::2] | row[1::2] << 4
    count = len(row) // form.group
    record = Quantized(
        form, np.tile(octets, (1, len(scales), 1)), np.repeat(scales[None, :, None], count, axis=2)
    )
    one = plan_plain(mx.zeros((len(row), 1), mx.int32), 1)
    y = moe.projected(mx.eye(len(row), dtype=dtype), one, record.map(mx.array))
    return host(y).T, dequantize(REFERENCE, record)[0]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", [NVFP4, MXFP4, MXFP8], ids=str)
def test_every_code_at_every_scale_is_exact(form: Form, dtype: mx.Dtype) -> None:
    actual, expected = identity(form, dtype)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("form", "code", "scale"), [(MXFP8, 255, 127), (MXFP8, 1, 255), (MXFP4, 1, 255), (NVFP4, 1, 127)], ids=str
)
def test_what_is_no_number_is_none(form: Form, code: int, scale: int) -> None:
    """Codes and scales that the formats call NaN."""
    octets = np.zeros((1, 2, 32 * form.bits // 8), np.uint8)
    scales = np.full((1, 2, 32 // form.group), 64, np.uint8)
    octets[0, 1, 5], scales[0, 1, 0] = code, scale
    one = plan_plain(mx.zeros((1, 1), mx.int32), 1)
    record = Quantized(form, octets, scales)
    y = host(moe.projected(mx.ones((1, 32)), one, record.map(mx.array)))
    assert np.isnan(dequantize(REFERENCE, record)[0, 1]).any()
    assert y[0, 0] == 0 and np.isnan(y[0, 1])


@pytest.mark.parametrize("bits", [4, 8])
def test_every_affine_code_is_exact(bits: int) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)
    row = np.resize(codes, max(32, len(codes)))
    octets = row if bits == 8 else row[::2] | row[1::2] << 4
    rng, shape = np.random.default_rng(bits), (1, 3, len(row) // 32)
    scales, biases = (rng.choice([0.5, -0.25, 3, 2.0**-10], shape).astype(np.float32) for _ in range(2))
    record = Quantized(affine(bits, 32), np.tile(octets, (1, 3, 1)), scales, biases)
    one = plan_plain(mx.zeros((len(row), 1), mx.int32), 1)
    y = moe.projected(mx.eye(len(row)), one, record.map(mx.array))
    np.testing.assert_array_equal(host(y).T, dequantize(REFERENCE, record)[0])


def test_what_belongs_to_others_does_not_leak() -> None:
    """NaN in experts without rows, in a token's row and in an expert's weights stay where they are."""
    part = layer(E=8, N=12, D=130, M=37, only=[1, 2, 4, 6])
    part.ids[3] = 4, 1
    clean = host(moe.experts(MlxOps(), *part.inputs, fused=True))
    x, weights, ids, gate_up, down = part.inputs
    for expert in (0, 3, 5, 7):
        gate_up[expert], down[expert] = np.nan, np.nan
    x[3] = np.nan
    gate_up[2, 0] = np.inf
    actual = host(moe.experts(MlxOps(), x, weights, ids, gate_up, down, fused=True))
    touched = (part.ids == 2).any(1)
    touched[3] = True
    assert np.isnan(actual[3]).all() and 1 < touched.sum() < 12
    np.testing.assert_array_equal(actual[~touched], clean[~touched])


def test_results_repeat() -> None:
    part = layer(NVFP4, BF16)
    first, second = (moe.experts(MlxOps(BF16), *part.inputs, fused=True) for _ in range(2))
    np.testing.assert_array_equal(host(first), host(second))


# ---- MLX's products ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float32, odd sizes", "bfloat16", "4 bits", "mxfp8"])
def test_the_library(name: str) -> None:
    check(layer(**FORMATS[name]), name, fused=False)


def test_formats_without_a_decoder_take_the_library() -> None:
    part = layer(affine(6, 32))
    assert not moe.supported(part.stacks[0])
    check(part, "6 bits")


def test_what_is_supported() -> None:
    for options in FORMATS.values():
        assert all(map(moe.supported, layer(**options).stacks))


@pytest.mark.parametrize(("N", "K", "D"), [(5, 3, 12), (3, 1, 33), (1, 8, 2816)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
def test_combined(dtype: mx.Dtype, N: int, K: int, D: int) -> None:
    rng = np.random.default_rng(0)
    ids = mx.array(rng.integers(0, 4, (N, K)).astype(np.int32))
    y = mx.array(rng.standard_normal((N * K, D)).astype(np.float32)).astype(dtype)
    weights = rng.uniform(0, 1, (N, K)).astype(np.float32)
    chosen = plan_plain(ids, 4)
    actual = moe.combined(y, chosen, mx.array(weights))
    rows = host(y).astype(np.float64)[np.array(chosen.inverse)].reshape(N, K, D)
    close(host(actual), (rows * weights[:, :, None]).sum(1), BOUNDS[dtype], "combined")


# ---- what only the simulator can tell ------------------------------------------------------------------

ODD = ("float32, odd sizes", "nvfp4, half a step of 32 inputs")


@pytest.mark.parametrize("name", [*ODD, "mxfp4, bfloat16"])
def test_the_order_of_lanes_makes_no_difference(simulated: None, name: str) -> None:
    part, results = layer(**FORMATS[name]), []
    for order in ORDERS:
        with simulator.installed(order=order):
            results.append(host(moe.experts(MlxOps(), *part.inputs, fused=True)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def products(name: str) -> list[simulator.Call]:
    """The calls of the three kernels here for a layer of FORMATS."""
    with simulator.recording() as calls:
        moe.experts(MlxOps(), *layer(**FORMATS[name]).inputs, fused=True)
    return calls[1:]


@pytest.mark.parametrize("name", FORMATS)
def test_types(simulated: None, name: str) -> None:
    for call in products(name):
        assert not simulator.typecheck(call)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("name", ODD)
def test_sanitizers(simulated: None, name: str, sanitizer: str) -> None:
    for call in products(name):
        assert simulator.sanitize(call, sanitizer) == []


def test_threadgroup_memory(simulated: None) -> None:
    """At most what every GPU has, and in bfloat16 so little that two groups fit."""
    for dtype, most in ((F32, 32 << 10), (BF16, 16 << 10)):
        moe.experts(MlxOps(dtype), *layer(dtype=dtype).inputs, fused=True)
        assert simulator.statistics["dgemma_expert_product"].threadgroup_bytes <= most
