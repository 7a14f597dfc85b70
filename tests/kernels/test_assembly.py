"""The assembly that decodes weights, run line by line on uint32: Triton's interpreter cannot run it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dgemma.formats import nvfp4
from dgemma.formats.quantized import FP8
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops.decoding import dequantize
from tests.kernels.test_layout import bfloat16, on_torch, random_record

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

from dgemma_cuda.kernels import device, layout


def halves(x: np.ndarray) -> np.ndarray:
    """Two bfloat16 a uint32, in float64: [..., 2]."""
    return bfloat16(np.stack([x & 0xFFFF, x >> 16], -1))


def joined(x: np.ndarray) -> np.ndarray:
    """The inverse of `halves`, for values that bfloat16 has."""
    bits = x.astype(np.float32).view(np.uint32)
    np.testing.assert_array_equal(bits & 0xFFFF, 0)
    return bits[..., 0] >> 16 | bits[..., 1]


def both(table: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two codes converted, the lower one into the lower half of a uint32."""
    return joined(np.stack([table[low], table[high]], -1))


def chosen(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """`prmt` without signs: byte i of the result is the one, of b and a together, that nibble i names."""
    octets = np.stack([x >> 8 * i & 0xFF for x in (a, b) for i in range(4)], -1)
    picks = [np.take_along_axis(octets, (selector >> 4 * i & 7)[..., None], -1)[..., 0] for i in range(4)]
    return picks[0] | picks[1] << 8 | picks[2] << 16 | picks[3] << 24


OPERATIONS = {
    "cvt.rn.bf16x2.e2m1x2": lambda a: both(nvfp4.E2M1, a & 15, a >> 4),
    "cvt.rn.bf16x2.e4m3x2": lambda a: both(nvfp4.E4M3, a & 0xFF, a >> 8),
    "prmt.b32": chosen,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, n: a << n,
    "shr.b32": lambda a, n: a >> n,
    "shf.l.wrap.b32": lambda a, b, n: a >> (32 - n) | b << n,
    "mul.rn.bf16x2": lambda a, b: joined(halves(a) * halves(b)),
    "fma.rn.bf16x2": lambda a, b, c: joined(halves(a) * halves(b) + halves(c)),
}


def execute(ptx: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs ($0 and on, uint16) of the assembly for its inputs (behind them, uint32)."""
    values = {f"${outputs + i}": x for i, x in enumerate(inputs)}

    def read(name: str) -> np.ndarray:
        return values[name] if name in values else np.full_like(inputs[0], int(name, 0))

    for line in ptx.splitlines():
        operation, _, rest = line.rstrip(";").partition(" ")
        operands = re.findall(r"\$\d+|\w+", rest)
        if operation == "mov.b32" and "{" in rest:  # a register taken apart
            *parts, whole = operands
            bits = 32 // len(parts)
            for i, part in enumerate(parts):
                values[part] = values[whole] >> i * bits & (1 << bits) - 1
        elif operation == "mov.b32":
            values[operands[0]] = read(operands[1])
        elif operation in OPERATIONS:
            values[operands[0]] = OPERATIONS[operation](*map(read, operands[1:]))
        else:
            assert operation in ("{", "}", ".reg"), line
    return [values[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("name", ["MUL", "FMA"])
def test_assembly_decodes_what_the_tiles_hold(name: str) -> None:
    record = random_record((2, 128, 192), "none")
    tiled = layout.tile(on_torch(record), 128)
    words = tiled.words.numpy().view(np.uint32)[:, 0, :, 0]  # [E, B, R, 8]
    octets = tiled.scales.numpy()[:, 0, :, 0, :, None].astype(np.int64)  # [E, B, R, 1]
    pairs = [device.scale.fn(octets, i, False, False).astype(np.uint32) for i in range(4)]
    pairs = [np.broadcast_to(pair, words.shape) for pair in pairs]
    found = execute(getattr(device, name).value, 8, [words, *pairs])
    values = bfloat16(np.stack(found, -1)).reshape(*words.shape, 4, 2) * device.UNIT.value
    values = values.transpose(0, 2, 1, 4, 3, 5).reshape(record.shape)  # [E, R, B, 4, 8, 2]
    np.testing.assert_array_equal(values, dequantize(NumpyOps(), record))


def test_native_assembly_decodes_what_the_tiles_hold() -> None:
    """Under every scale that E4M3 has: negative ones, subnormals, zeros and NaN."""
    record = random_record((2, 128, 192), "none")
    record.scales[:] = np.random.default_rng(0).permutation(np.resize(np.arange(256), (2, 128, 12)))
    record.scales[:, :, 0] = np.arange(256).reshape(2, 128)
    tiled = layout.tile(on_torch(record), 128, order=layout.Order.NATIVE)
    words = tiled.words.numpy().view(np.uint32)[:, 0, :, 0]  # [E, B, R, 8]
    octets = tiled.scales.numpy().view(np.uint32)[:, 0, :, 0, :, None]  # [E, B, R, 1]
    pairs = execute(device.CVT_SCALES.value, 4, [octets])
    pairs = [np.broadcast_to(pair, words.shape) for pair in pairs]
    found = execute(device.CVT.value, 8, [words, *pairs])
    values = bfloat16(np.stack(found, -1)).reshape(*words.shape, 4, 2)
    values = values.transpose(0, 2, 1, 4, 3, 5).reshape(record.shape)  # [E, R, B, 4, 8, 2]
    np.testing.assert_array_equal(values, dequantize(NumpyOps(), record))


@pytest.mark.parametrize("name", ["MUL_FP8", "FMA_FP8"])
def test_assembly_decodes_every_code_of_fp8(name: str) -> None:
    """Exactly, in each place of a word, subnormals among them."""
    record = random_record((2, 64, 256), "none", form=FP8)
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
    record.codes[:] = (
        np.random.default_rng(0).permutation(np.resize(codes, record.codes.size)).reshape(2, 64, 256)
    )
    words = layout.tile(on_torch(record), 64).words.numpy().view(np.uint32)[:, 0, :, 0]  # [E, B, R, 16]
    found = execute(getattr(device, name).value, 4, [words])
    values = bfloat16(np.stack(found, -1)).reshape(*words.shape, 2, 2)
    values = values.transpose(0, 2, 1, 4, 3, 5).reshape(record.shape)  # [E, R, B, 2, 16, 2]
    np.testing.assert_array_equal(values, dequantize(NumpyOps(), record))


def test_a_scale_that_is_nan_makes_nan() -> None:
    pairs = [np.array([device.scale.fn(255, 0, False, False)], np.uint32)] * 4
    assert np.isnan(halves(pairs[0])).all()
