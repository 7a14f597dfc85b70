"""How a matrix becomes a record: float32 values to codes, scales and factors of every form.

O outputs (rows)  I inputs  R rows of a block
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dgemma.formats import nvfp4
from dgemma.formats.quantized import Form, Quantized


def quantize(x: np.ndarray, form: Form) -> Quantized:
    """The record of float32 x [..., O, I], in NumPy arrays; affine scales are bf16 values in float32.

    Scales are rounded to the stored type before codes are chosen, so that codes make up for the rounding.
    NVFP4 gets one float32 factor [..., 1] for each matrix, its largest magnitude / (6 · 448), as ModelOpt
    does. MLX has no place for it; `blocks` makes a record without. FP8 gets a factor [..., O] for each row,
    its largest magnitude / 448.
    """
    assert form.fits(x.shape[-1]), (x.shape, form)
    if form.is_affine:
        return Quantized(form, *_in_blocks(lambda rows: _affine(rows, form), x))
    if form.scales_rows:
        factor = _positive(np.abs(x).max(-1) / np.float32(nvfp4.E4M3_MAX))
        (codes,) = _in_blocks(lambda rows, f: (nvfp4.encode_e4m3(rows / f[:, None]),), x, factor)
        return Quantized(form, codes, factor=factor)
    if form.mode != "nvfp4":
        return blocks(x, form, None)
    peak = np.abs(x).max((-2, -1))[..., None]
    return blocks(x, form, _positive(peak / np.float32(nvfp4.E2M1_MAX * nvfp4.E4M3_MAX)))


def blocks(x: np.ndarray, form: Form, factor: np.ndarray | None) -> Quantized:
    """The record of float32 x [..., O, I] with block scales, for a float32 factor [..., 1 or O] or none."""
    if factor is None:
        return Quantized(form, *_in_blocks(lambda rows: _blocks(rows, form), x))
    rows = np.broadcast_to(factor, x.shape[:-1])
    codes, scales = _in_blocks(lambda part, f: _blocks(part / f[:, None], form), x, rows)
    return Quantized(form, codes, scales, factor=factor)


# The largest magnitude over scale in a block of MXFP4. A peak clipped from 7.25 to 6 costs less than a grid
# twice as coarse: normal values lose 3 % less than with 6, and least from 7 to 7.5.
MXFP4_PEAK = 7.25
CACHED = 1 << 17  # weights encoded at a time: temporaries fit a core's cache, which halves the time


def _in_blocks(encode: Callable[..., tuple[np.ndarray, ...]], x: np.ndarray, *more: np.ndarray) -> Any:
    """The fields [..., O, n] that `encode` makes of x [..., O, I] and `more` [..., O], a block at a time."""
    lead, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    others = [y.reshape(-1) for y in more]
    step = max(1, CACHED // x.shape[-1])
    starts = range(0, len(rows), step)
    parts = [encode(rows[a : a + step], *(y[a : a + step] for y in others)) for a in starts]
    return tuple(np.concatenate(field).reshape(*lead, -1) for field in zip(*parts, strict=True))


def _blocks(x: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes [R, I·bits/8] and scale codes [R, I/group], both uint8, of float32 x [R, I]."""
    groups = x.reshape(len(x), -1, form.group)
    peak = np.abs(groups).max(-1)
    small = form.code_type == "E2M1"
    if form.scale_type == "E4M3":
        scales = nvfp4.encode_e4m3(peak / np.float32(nvfp4.E2M1_MAX))
        scales = np.maximum(scales, 1)  # never zero: `verify` takes that for damage
    else:
        scales = nvfp4.encode_e8m0(peak / np.float32(MXFP4_PEAK if small else nvfp4.E4M3_MAX))
    encode = nvfp4.encode_e2m1 if small else nvfp4.encode_e4m3
    table = nvfp4.TABLES[str(form.scale_type)]
    codes = encode(groups / table[scales][..., None]).reshape(x.shape)
    return nvfp4.pack(codes, form.bits), scales


def _affine(x: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MLX's affine scheme for float32 x [R, I]: packed codes, scales and biases [R, I/group] float32.

    A value is code · scale + bias. The bias is the edge of larger magnitude, which is met exactly; the scale
    runs towards the other edge. Zero is nearly a code, as weights lie around it.
    """
    steps = np.float32(2**form.bits - 1)
    groups = x.reshape(len(x), -1, form.group)
    low, high = groups.min(-1), groups.max(-1)
    below = np.abs(low) > np.abs(high)
    edge = np.where(below, low, high)
    scale = np.maximum((high - low) / steps, np.float32(1e-7)) * np.where(below, 1, -1).astype(np.float32)
    zero = np.rint(edge / scale)
    scale = to_bf16(np.where(zero == 0, scale, edge / np.where(zero == 0, 1, zero)))
    bias = to_bf16(np.where(zero == 0, 0, edge).astype(np.float32))
    codes = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, steps)
    return nvfp4.pack(codes.astype(np.uint8).reshape(x.shape), form.bits), scale, bias


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 values of any shape rounded to bfloat16, nearest and ties to even; still float32."""
    return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 `x` of any shape as raw bfloat16 in uint16: nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _positive(x: np.ndarray) -> np.ndarray:
    """`x` of any shape as float32, with 1 in place of 0: a matrix of zeros has no scale of its own."""
    return np.where(x > 0, x, 1).astype(np.float32)
