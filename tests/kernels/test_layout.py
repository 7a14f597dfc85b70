"""The tiles hold exactly the record's values, and the bit trick that decodes them is exact in bfloat16."""

from __future__ import annotations

import numpy as np
import pytest

from dgemma.formats import nvfp4
from dgemma.formats.quantized import FP8, NVFP4, Form, Quantized, affine
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops.decoding import dequantize

torch = pytest.importorskip("torch")

from dgemma_cuda.kernels import launch, layout  # noqa: E402
from dgemma_cuda.kernels.layout import Order  # noqa: E402

FORMS_AND_ORDERS = pytest.mark.parametrize(
    ("form", "order"),
    [*((NVFP4, order) for order in Order), (FP8, Order.SHIFTED)],
    ids=lambda value: value.value if isinstance(value, Order) else str(value),
)


def random_record(
    shape: tuple[int, ...], factor: str = "row", seed: int = 0, form: Form = NVFP4
) -> Quantized:
    """A record of random codes, in NVFP4 with scales of either sign, zero among them; fields are NumPy's."""
    *lead, I = shape
    rng = np.random.default_rng(seed)
    size = {"none": None, "stack": (1,), "matrix": (*lead[:-1], 1), "row": tuple(lead)}[factor]
    factors = None if size is None else rng.uniform(0.01, 2, size).astype(np.float32)
    codes = rng.integers(0, 256, (*lead, I * form.bits // 8), dtype=np.uint8)
    if form == FP8:
        codes[codes & 127 == 127] = 0  # NaN
        return Quantized(form, codes, factor=factors)
    scales = rng.integers(0, 127, (*lead, I // 16), dtype=np.uint8)
    scales |= (rng.random(scales.shape) < 0.1).astype(np.uint8) << 7
    scales[rng.random(scales.shape) < 0.1] = 0
    return Quantized(form, codes, scales, factor=factors)


def on_torch(record: Quantized) -> Quantized:
    return record.map(torch.from_numpy)


@FORMS_AND_ORDERS
@pytest.mark.parametrize("factor", ["none", "stack", "matrix", "row"])
@pytest.mark.parametrize(
    ("shape", "rows", "parts"),
    [
        ((3, 64, 64), 64, 1),
        ((3, 128, 192), 64, 1),
        ((2, 70, 80), 32, 1),  # neither a whole tile nor a whole block
        ((3, 128, 128), 64, 2),
        ((2, 44, 16), 16, 2),  # 22 rows a part in tiles of 16, a quarter of a block
        ((1, 2, 176), 128, 2),
        ((128, 192), 64, 1),  # a matrix
        ((71, 80), 32, 1),
    ],
)
def test_tiles_hold_what_the_record_holds(
    shape: tuple[int, ...], rows: int, parts: int, factor: str, form: Form, order: Order
) -> None:
    record = random_record(shape, factor, form=form)
    tiled = layout.tile(on_torch(record), rows, parts, order)
    # float64, then rounded once: a code times its scale has 6 bits; float32 rounds by the factor only, too.
    np.testing.assert_array_equal(
        layout.untile(tiled).numpy(), dequantize(NumpyOps(), record).astype(np.float32)
    )
    assert (tiled.form, tiled.shape, tiled.rows, tiled.parts) == (form, shape, rows, parts)


def test_a_factor_that_divides_becomes_its_reciprocal() -> None:
    record = random_record((2, 16, 32))
    record = Quantized(NVFP4, record.codes, record.scales, factor=record.factor, divides=True)
    actual = layout.untile(layout.tile(on_torch(record), 16)).numpy()
    np.testing.assert_allclose(actual, dequantize(NumpyOps(), record), rtol=2.0**-22)


@FORMS_AND_ORDERS
def test_no_byte_is_added_to_a_stack_of_whole_tiles(form: Form, order: Order) -> None:
    record = random_record((2, 128, 192), "none", form=form)
    tiled = layout.tile(on_torch(record), 64, 2, order)
    assert tiled.words.nbytes == record.codes.nbytes and tiled.words.is_contiguous()
    if tiled.scales is not None and record.scales is not None:
        assert tiled.scales.nbytes == record.scales.nbytes and tiled.scales.is_contiguous()


def test_what_has_no_tiles() -> None:
    """Other forms, and FP8 with NaN: its bits would be 480."""
    assert layout.fits(on_torch(random_record((4, 64)))) and layout.fits(
        on_torch(random_record((4, 64), form=FP8))
    )
    damaged = random_record((4, 64), form=FP8)
    damaged.codes[2, 3] = 0xFF
    assert not layout.fits(on_torch(damaged))
    assert not layout.fits(on_torch(Quantized(affine(8, 64), damaged.codes)))


@pytest.mark.parametrize("order", Order)
def test_chunks_of_experts_make_no_difference(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    record = on_torch(random_record((5, 32, 64)))
    whole = layout.tile(record, 32, order=order)
    monkeypatch.setattr(layout, "CHUNK", 2 * 32 * 8)  # two experts at a time
    parts = layout.tile(record, 32, order=order)
    assert torch.equal(whole.words, parts.words)
    assert whole.scales is not None and parts.scales is not None and torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("order", Order)
def test_a_scale_that_is_nan_stays_nan(order: Order) -> None:
    record = random_record((1, 16, 64))
    record.scales[0, 3, 2] = 0x7F
    values = layout.untile(layout.tile(on_torch(record), 16, order=order)).numpy()
    assert np.isnan(values[0, 3, 32:48]).all() and np.isnan(values).sum() == 16


def test_native_tiles_are_the_bytes_of_the_record() -> None:
    """Byte 8i + w of a block is byte i of word w."""
    record = random_record((1, 16, 64), "none")
    tiled = layout.tile(on_torch(record), 16, order=Order.NATIVE)
    octets = tiled.words.numpy().view(np.uint8).reshape(16, 8, 4)
    np.testing.assert_array_equal(octets.transpose(0, 2, 1).reshape(16, 32), record.codes[0])
    assert tiled.scales is not None
    np.testing.assert_array_equal(tiled.scales.numpy().view(np.uint8).reshape(16, 4), record.scales[0])


@pytest.mark.parametrize(
    ("arch", "version", "expected"),
    [(90, (3, 9), False), (100, (3, 7), False), (100, (3, 8), True), (120, (4, 0), True)],
)
def test_native(arch: int, version: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "triton_version", lambda: version)
    assert launch.native(arch) == expected


# ---- the number format of the products ------------------------------------------------------------------
# No processor here multiplies bfloat16, and Triton's interpreter loses its subnormals (codes ±0.5 are some).


def bfloat16(halves: np.ndarray) -> np.ndarray:
    """Raw bfloat16 (uint16 in any integer type) as float64, subnormals included."""
    halves = halves.astype(np.int64)
    exponent, mantissa = halves >> 7 & 255, halves & 127
    value = np.where(
        exponent == 0, np.ldexp(mantissa, -133), np.ldexp(128 + mantissa, np.maximum(exponent, 1) - 134)
    )
    value = np.where(exponent == 255, np.where(mantissa == 0, np.inf, np.nan), value)
    return np.where(halves >> 15, -value, value)


def test_every_product_of_code_and_scale_is_exact_in_bfloat16() -> None:
    codes, scales = np.arange(16), np.arange(1, 127)
    octets = layout._tables()[1].numpy()[scales].astype(np.int64)
    assert len(np.unique(octets)) == 126  # lossless
    left = bfloat16((codes & 8) << 12 | (codes & 7) << 6)
    right = bfloat16(octets * 16 + 0x7000)
    product = left[:, None] * right[None, :]
    expected = nvfp4.E2M1[codes][:, None].astype(np.float64) * nvfp4.E4M3[scales]
    np.testing.assert_array_equal(product * 2.0**19, expected)
    # Seven bits of mantissa and a normal exponent: rounding to bfloat16 changes nothing.
    mantissa, exponent = np.frexp(product)
    np.testing.assert_array_equal(mantissa * 256, np.rint(mantissa * 256))
    assert exponent[product != 0].min() > -126 and exponent.max() < 127


def test_the_byte_for_nan_becomes_nan() -> None:
    assert layout._tables()[1][0x7F] == 255
    assert np.isnan(bfloat16(np.array([255 * 16 + 0x7000])))
