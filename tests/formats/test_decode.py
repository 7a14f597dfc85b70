"""Number formats and layouts, value by value: what is read against what an independent writer wrote.

Decoding has one right answer, so NumPy float64 is held to it bit for bit, as the writers define it
(`tests.formats.writers`), and float32 backends to a rounding or two. Encoding has a best answer a value,
found here by search, and a bound a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgemma.checkpoint.checkpoint import Checkpoint, Stored
from dgemma.formats import nvfp4
from dgemma.formats.encode import quantize
from dgemma.formats.quantized import AFFINE_BITS, FP8, MXFP4, MXFP8, NVFP4, Form, Quantized, affine
from dgemma.network.ops import Ops
from dgemma.network.ops.decoding import dense, dequantize, unpack
from tests.compare import REFERENCE, backends, make
from tests.formats import writers
from tests.formats.writers import CASES, E2M1, E4M3, E8M0, LAYOUTS, Written

ULP = 2.0**-23


def widened(ops: Ops, stored: Stored | Quantized) -> np.ndarray:
    """A parameter as the backend decodes it, on the host."""
    if isinstance(stored, Stored):
        return ops.to_numpy(ops.load(stored, wide=True))
    placed = ops.upload(stored)
    # MLX decodes on placement what it has no packed product for.
    return ops.to_numpy(dequantize(ops, placed) if isinstance(placed, Quantized) else placed)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Written, Checkpoint]]:
    """Every case is written and opened once."""
    done: dict[str, tuple[Written, Checkpoint]] = {}

    def get(case: str) -> tuple[Written, Checkpoint]:
        if case not in done:
            written = CASES[case]()
            done[case] = written, Checkpoint.open(written.write(tmp_path_factory.mktemp("case")))
        return done[case]

    return get


# ---- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_numpy_decodes_every_parameter_bit_for_bit(opened: Any, case: str) -> None:
    written, checkpoint = opened(case)
    assert set(checkpoint.sources) == set(written.decoded)
    for name, expected in written.decoded.items():
        actual = widened(REFERENCE, checkpoint.read(name))
        assert actual.dtype == np.float64
        np.testing.assert_array_equal(actual, expected, f"{case}: {name}")


@pytest.mark.parametrize("case", CASES)
def test_what_is_a_record_is_what_was_quantized(opened: Any, case: str) -> None:
    written, checkpoint = opened(case)
    read = {name: checkpoint.read(name) for name in written.decoded}
    assert {name for name, stored in read.items() if isinstance(stored, Quantized)} == written.quantized
    assert {name: stored.shape for name, stored in read.items()} == {
        name: x.shape for name, x in written.decoded.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_stored_bytes_are_those_of_the_tensors(opened: Any, case: str) -> None:
    written, checkpoint = opened(case)
    total = sum(checkpoint.nbytes(name) for name in written.decoded)
    own = [name for name in written.tensors if name.partition(".self_attn.")[2] not in writers.CACHE_SCALES]
    assert total == sum(len(written.tensors[name].raw) for name in own)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", backends("float32"))
def test_backends_decode_every_parameter(opened: Any, backend: tuple[str, str], case: str) -> None:
    """Within two roundings of the largest term: affine values are differences of terms of their size."""
    ops = make(backend)
    written, checkpoint = opened(case)
    for name, expected in written.decoded.items():
        actual = widened(ops, checkpoint.read(name))
        atol = 2 * ULP * np.abs(expected).max() if name in written.quantized else 0.0
        np.testing.assert_allclose(actual, expected, rtol=2 * ULP, atol=atol, err_msg=f"{case}: {name}")


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("backend", backends("float32", "bfloat16", reference=True))
def test_parts_of_a_record_are_parts_of_the_matrix(opened: Any, backend: tuple[str, str], case: str) -> None:
    """Rows by slice and by ids, experts by index: what lookups, tiles of the head and experts use."""
    ops = make(backend)
    written, checkpoint = opened(case)
    for name in sorted(written.quantized):
        placed = ops.upload(checkpoint.read(name))
        if not isinstance(placed, Quantized):
            continue
        whole, last = ops.to_numpy(dense(ops, placed)), len(placed) - 1
        for index in (slice(1, 3), slice(last, last + 5), last, ops.asarray(np.array([2, 0, 2]))):
            # A single row is no matrix; a single expert is.
            if isinstance(index, int) and len(placed.shape) == 2:
                continue
            host = ops.to_numpy(index) if not isinstance(index, int | slice) else index
            np.testing.assert_array_equal(ops.to_numpy(dense(ops, placed[index])), whole[host], name)


# MLX decodes no nvfp4 matrix with an odd number of groups.
MLX_MODES = {case: CASES[case] for case in [*writers.AFFINE, "mlx mxfp4", "mlx mxfp8"]}
MLX_MODES |= {"mlx nvfp4": lambda: writers.mlx(writers.BY_32, writers.entry("nvfp4"))}


@pytest.mark.parametrize("case", MLX_MODES)
def test_the_writer_writes_what_mlx_reads(case: str) -> None:
    """MLX's own `dequantize` vouches for the packing and the tables of the writers."""
    mx = pytest.importorskip("mlx.core")
    written = MLX_MODES[case]()
    announcement = written.config["quantization"]
    how = {"bits": announcement["bits"], "group_size": announcement["group_size"]}
    for name in written.quantized:
        path = name.removesuffix(".weight")
        words, scales = (written.tensors[f"{path}.{part}"] for part in ("weight", "scales"))
        codes = mx.array(np.frombuffer(words.raw, np.uint32).reshape(words.shape))
        if announcement["mode"] == "affine":
            both = (written.tensors[f"{path}.{part}"] for part in ("scales", "biases"))
            own = [mx.array(writers.floats(tensor).astype(np.float32)) for tensor in both]
        else:
            own = [mx.array(np.frombuffer(scales.raw, np.uint8).reshape(scales.shape))]
        theirs = np.array(mx.dequantize(codes, *own, **how, mode=announcement["mode"]).astype(mx.float32))
        # Without a type MLX decodes the floating modes to bfloat16, whose 8 bits hold every product here.
        np.testing.assert_allclose(theirs, written.decoded[name], rtol=2.0**-7, atol=1e-6, err_msg=name)


def test_shards_and_files_of_other_order(tmp_path: Path) -> None:
    """An expert's tensors may lie in any shard."""
    written = CASES["modelopt"]()
    checkpoint = Checkpoint.open(written.write(tmp_path, shards=3))
    for name, expected in written.decoded.items():
        np.testing.assert_array_equal(widened(REFERENCE, checkpoint.read(name)), expected, name)


# ---- codes --------------------------------------------------------------------------------------


def test_tables() -> None:
    np.testing.assert_array_equal(nvfp4.E2M1, E2M1)
    np.testing.assert_array_equal(nvfp4.E4M3, E4M3)
    np.testing.assert_array_equal(nvfp4.E8M0, E8M0)
    assert [float(x) for x in E2M1[:8]] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    everything = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, everything.view(torch.float8_e4m3fn).double().numpy())
    np.testing.assert_array_equal(E8M0, everything.view(torch.float8_e8m0fnu).double().numpy())


def stored(dtype: str, data: np.ndarray) -> Stored:
    return Stored("x", dtype, data.shape, data, Path("x"))


def every_code(mode: str) -> tuple[Quantized, np.ndarray]:
    """A record with every code that is a number under every scale that is one, and its values."""
    codes, scales, form = {
        "nvfp4": (E2M1, E4M3, NVFP4),
        "mxfp4": (E2M1, E8M0, MXFP4),
        "mxfp8": (E4M3, E8M0, MXFP8),
    }[mode]
    finite, usable = np.flatnonzero(np.isfinite(codes)), np.flatnonzero(np.isfinite(scales))
    # Scales whose products float32 holds exactly: no largest and no subnormal ones.
    usable = usable[(np.abs(scales[usable]) < 2.0**100) & (np.abs(scales[usable]) > 2.0**-100)]
    row = np.resize(finite, -(-len(finite) // form.group) * form.group).astype(np.uint8)
    grid = np.broadcast_to(row, (len(usable), len(row)))
    own = np.repeat(usable[:, None], len(row) // form.group, 1).astype(np.uint8)
    record = Quantized(form, stored("U8", writers.stream(grid, form.bits)), stored("U8", own))
    return record, codes[row] * scales[usable][:, None]


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("backend", backends("float32", reference=True))
def test_every_code_under_every_scale(backend: tuple[str, str], mode: str) -> None:
    """Products of such short numbers are exact in float32 too."""
    record, expected = every_code(mode)
    np.testing.assert_array_equal(widened(make(backend), record), expected)


def test_the_smallest_and_the_largest_power_of_two() -> None:
    """2^-127 is subnormal in float32; float64 keeps it, and 6 · 2^127, which float32 does not have."""
    scales = np.array([[0, 254]], np.uint8)
    record = Quantized(MXFP4, stored("U8", np.full((1, 32), 0x77, np.uint8)), stored("U8", scales))
    expected = np.repeat([6 * 2.0**-127, 6 * 2.0**127], 32)[None]
    np.testing.assert_array_equal(widened(REFERENCE, record), expected)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("backend", backends("float32", reference=True))
def test_unpack(backend: tuple[str, str], bits: int) -> None:
    """Every width, in rows of any whole number of bytes, for a matrix and a stack."""
    ops = make(backend)
    rng = np.random.default_rng(bits)
    for shape in ((1, 8), (3, 24), (5, 88), (2, 3, 40), (7, 152)):
        codes = rng.integers(0, 2**bits, shape)
        codes[..., 0], codes[..., -1] = 2**bits - 1, 2**bits - 1
        packed = writers.stream(codes, bits)
        actual = ops.to_numpy(unpack(ops, ops.raw(packed), bits))
        np.testing.assert_array_equal(actual, codes, f"{bits} bits, {shape}")
        np.testing.assert_array_equal(nvfp4.pack(codes.astype(np.uint8), bits), packed)


def test_low_nibble_first() -> None:
    """By hand, lest writer and reader share a mistake."""
    assert writers.stream(np.array([[0x3, 0xA]]), 4).tolist() == [[0xA3]]
    assert writers.stream(np.array([[1, 2, 3, 0]]), 2).tolist() == [[0b00_11_10_01]]
    assert writers.stream(np.array([[0b101, 0b110, 0b011, 0, 0, 0, 0, 0b111]]), 3).tolist() == [
        [0b11_110_101, 0b0_000_000_0, 0b111_000_00]
    ]


# ---- encoders -----------------------------------------------------------------------------------


def nearest(x: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """Codes of the nearest values by search in float64: ties to the even code, saturated, sign on top."""
    distance = np.abs(np.abs(x.astype(np.float64))[:, None] - magnitudes)
    near = distance == distance.min(-1, keepdims=True)
    first = near.argmax(-1)  # of two that tie, neighbours, one is even
    tied = near.sum(-1) == 2
    code = np.where(tied & (first % 2 == 1), first + 1, first)
    return code + np.where(np.signbit(x), len(magnitudes) + len(magnitudes) % 2, 0)


def samples(magnitudes: np.ndarray) -> np.ndarray:
    """Every value, every middle and its two neighbours in float32, far outside, tiny, and random ones."""
    rng = np.random.default_rng(3)
    middles = (magnitudes[1:] + magnitudes[:-1]).astype(np.float32) / 2
    x = np.concatenate(
        [
            magnitudes,
            middles,
            np.nextafter(middles, np.float32(0)),
            np.nextafter(middles, np.float32(1e9)),
            [0.0, 1e-45, 1e-38, 1e9, np.nextafter(magnitudes[-1], np.inf), 1.5 * magnitudes[-1]],
            magnitudes[-1] * rng.random(5000),
            np.exp(rng.uniform(np.log(magnitudes[1] / 8), np.log(magnitudes[-1] * 2), 5000)),
        ]
    ).astype(np.float32)
    return np.concatenate([x, -x])


@pytest.mark.parametrize(
    ("encode", "magnitudes"), [(nvfp4.encode_e2m1, E2M1[:8]), (nvfp4.encode_e4m3, E4M3[:127])]
)
def test_encoders_round_to_nearest_even(encode: Callable[..., Any], magnitudes: np.ndarray) -> None:
    x = samples(magnitudes)
    np.testing.assert_array_equal(encode(x), nearest(x, magnitudes))
    assert encode(x).dtype == np.uint8
    largest = np.finfo(np.float32).max * np.array([1, -1], np.float32)
    assert encode(largest).tolist() == [len(magnitudes) - 1, nearest(-magnitudes[-1:], magnitudes).item()]


def test_e4m3_is_torchs() -> None:
    """Where both have an answer: torch gives NaN beyond 464, the encoder saturates."""
    x = samples(E4M3[:127])
    x = x[np.abs(x) <= 464]
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(nvfp4.encode_e4m3(x), theirs)


def test_codes_survive_a_round_trip() -> None:
    np.testing.assert_array_equal(nvfp4.encode_e2m1(E2M1.astype(np.float32)), np.arange(16))
    valid = writers.FINITE_E4M3
    np.testing.assert_array_equal(nvfp4.encode_e4m3(E4M3[valid].astype(np.float32)), valid)
    np.testing.assert_array_equal(nvfp4.encode_e8m0(E8M0[:255].astype(np.float32)), np.arange(255))


def test_powers_of_two() -> None:
    """The least power that is not below; held at the ends."""
    rng = np.random.default_rng(4)
    x = np.exp2(rng.uniform(-126.9, 126.9, 5000)).astype(np.float32)
    above = np.argmax(E8M0[:255] >= x[:, None], -1)
    np.testing.assert_array_equal(nvfp4.encode_e8m0(x), above)
    ends = np.array([0, 1e-45, 2.0**-127, np.finfo(np.float32).max], np.float32)
    assert nvfp4.encode_e8m0(ends).tolist() == [0, 0, 0, 254]


# ---- whole matrices -----------------------------------------------------------------------------

FORMS = [affine(bits, group) for bits, group in writers.WIDTHS] + [NVFP4, MXFP4, MXFP8, FP8]
# Largest error, of the largest magnitude of a group (fp8: a row): affine a step of a range that may be twice
# the magnitude, as MLX makes zero a code and cuts up to a step off the far end, and bfloat16's rounding of
# scale and bias; E2M1 half its widest step, 2 of 6, and in NVFP4 the scale's rounding of 1/16, in MXFP4 a
# peak that is clipped from 7.25 to 6, or half a step of a grid twice as coarse; E4M3 half a step at the top.
BOUNDS: dict[str, float] = {"nvfp4": 1.07 / 6, "mxfp4": 1 / 3.625, "mxfp8": 2.0**-4, "fp8": 2.0**-4}


def bound(form: Form) -> float:
    return BOUNDS.get(form.mode) or 2 / (2**form.bits - 1) + 2.0**-7


def decoded(record: Quantized) -> np.ndarray:
    """`dequantize` of a record fresh from `quantize`, whose fields are NumPy arrays."""
    return dequantize(REFERENCE, record)


def matrix(seed: int = 0, shape: tuple[int, ...] = (3, 24, 384)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def peaks(x: np.ndarray, form: Form) -> np.ndarray:
    """The largest magnitude of each value's group."""
    grouped = np.abs(x).reshape(*x.shape[:-1], -1, form.group or x.shape[-1])
    return np.broadcast_to(grouped.max(-1, keepdims=True), grouped.shape).reshape(x.shape)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted", "spiked", "tiny", "large"])
def test_quantize_keeps_its_bound(form: Form, kind: str) -> None:
    x = matrix()
    x = {
        "normal": lambda: x,
        "heavy": lambda: x**3,
        "shifted": lambda: np.float32(0.02) * x + np.float32(0.7),
        "spiked": lambda: np.where(np.arange(384) % 97 == 0, 20 * x, x).astype(np.float32),
        "tiny": lambda: x * np.float32(1e-4),
        "large": lambda: x * np.float32(1e4),
    }[kind]()
    record = quantize(x, form)
    y = decoded(record)
    assert record.shape == x.shape and record.form == form
    floor = 0.0
    if form == NVFP4:  # a block far below the largest of its matrix has no scale of its own
        floor = np.abs(x).max() / (6 * 448) * 2.0**-9
    elif form.mode == "affine":  # MLX's smallest scale
        floor = 1e-7
    error = np.abs(y - x)
    worst = (error / (peaks(x, form) * bound(form) + floor)).max()
    print(f"{form} {kind}: {worst:.3f} of the bound")
    assert worst <= 1


# Root mean square error of normal values, relative: about what the formats are known for.
LEVELS = {
    "2bit-g64": 0.46, "3bit-g64": 0.19, "4bit-g64": 0.09, "5bit-g64": 0.043, "6bit-g64": 0.021,
    "8bit-g64": 0.0056, "4bit-g32": 0.08, "4bit-g128": 0.1, "nvfp4": 0.095, "mxfp4": 0.112, "mxfp8": 0.027,
    "fp8": 0.027,
}  # fmt: skip


@pytest.mark.parametrize("form", [form for form in FORMS if str(form) in LEVELS], ids=str)
def test_error_of_normal_values(form: Form) -> None:
    x = matrix(1, (64, 1024)).astype(np.float64)
    y = decoded(quantize(x.astype(np.float32), form))
    error = np.sqrt(np.mean((y - x) ** 2) / np.mean(x**2))
    print(f"{form}: {error:.4f}")
    assert 0.8 * LEVELS[str(form)] < error < 1.2 * LEVELS[str(form)]


@pytest.mark.parametrize("form", FORMS[:-1], ids=str)
def test_quantize_is_no_worse_than_mlxs(form: Form) -> None:
    """MLX's own `quantize`, for the modes that it has, on the same bfloat16 weights."""
    mx = pytest.importorskip("mlx.core")
    weights = mx.array(matrix(5, (64, 1024))).astype(mx.bfloat16)
    x = np.array(weights.astype(mx.float32))
    how = {"group_size": form.group, "bits": form.bits, "mode": form.mode}
    words, *own = mx.quantize(weights, **how)
    own = [part if part.dtype == mx.uint8 else part.astype(mx.float32) for part in own]
    theirs = np.array(mx.dequantize(words, *own, **how).astype(mx.float32))
    ours = decoded(quantize(x, form))
    errors = [np.sqrt(np.mean((y - x) ** 2)) for y in (ours, theirs)]
    print(f"{form}: {errors[0]:.5f}, MLX {errors[1]:.5f}")
    assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize("form", [affine(4, 64), affine(3, 32), NVFP4, MXFP4, MXFP8, FP8], ids=str)
def test_a_stack_is_quantized_matrix_by_matrix(form: Form) -> None:
    """Large enough for the blocks of rows that `quantize` works in, and not a whole number of them."""
    x = matrix(6, (2, 300, 512)) * np.float32([[[1]], [[3]]])
    whole = decoded(quantize(x, form))
    for expert in range(2):
        np.testing.assert_array_equal(decoded(quantize(x[expert], form)), whole[expert])
        if form != NVFP4:  # whose factor is one a matrix
            np.testing.assert_array_equal(decoded(quantize(x[expert, 250:], form)), whole[expert, 250:])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_stay_zeros(form: Form) -> None:
    """A matrix of zeros, and a group and a row of zeros in one that is not."""
    assert not decoded(quantize(np.zeros((2, 8, 256), np.float32), form)).any()
    x = matrix(2, (8, 256))
    x[1], x[2, :128] = 0, 0
    record = quantize(x, form)
    y = decoded(record)
    assert np.isfinite(y).all() and not y[1].any()
    assert form == FP8 or not y[2, :128].any()
    assert record.factor is None or (record.factor > 0).all()
    assert form != NVFP4 or E4M3[record.scales].min() > 0  # `verify` takes a scale of zero for damage


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("value", [1.0, -3.0, 0.5, -(2.0**-10)])
def test_constant_blocks_are_kept(form: Form, value: float) -> None:
    """Values that bfloat16 and the code tables have: the scale takes them up, but for MXFP4's clipping."""
    y = decoded(quantize(np.full((4, 256), value, np.float32), form))
    np.testing.assert_allclose(y, value, rtol=bound(form) if form == MXFP4 else 1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_quantizing_again_changes_little(form: Form) -> None:
    """Decoded values are nearly a fixed point, so a converted checkpoint can be converted again."""
    once = decoded(quantize(matrix(3), form))
    twice = decoded(quantize(once.astype(np.float32), form))
    assert (np.abs(twice - once) <= peaks(once, form) * bound(form)).all()
    assert np.mean(np.abs(twice - once)) < 0.5 * np.mean(np.abs(once - matrix(3)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_scales_are_stored_types(form: Form) -> None:
    """Affine scales must be bfloat16 values already: codes were chosen for them."""
    record = quantize(matrix(4), form)
    for field in (record.scales, record.biases) if form.mode == "affine" else ():
        assert not (field.view(np.uint32) & 0xFFFF).any()
    if form in (NVFP4, FP8):
        assert record.factor.dtype == np.float32
        assert record.factor.shape == ((3, 24) if form == FP8 else (3, 1))
