"""Triton sources of the products in FP4, for `fp4`. Importing needs Triton.

`tl.dot_scaled` multiplies codes by codes in the tensor cores, which apply a scale for 16 inputs to either
operand. Weights are its left operand: tcgen05 does this for 128 rows only, and Triton 3.9 silently decodes
both sides and multiplies bfloat16 for fewer. Bytes of codes and of scales go from memory to the tensor cores
as they are.

Triton's interpreter knows no E4M3 scales, so INTERPRET decodes both operands into float32.

    R weight rows of a tile  M rows of a block of picks  T tiles of a matrix  B blocks of 64 inputs
    S blocks of 64 inputs that a step multiplies  K picks a token  E experts
"""
# Parameters of kernels are Triton's own types, which no annotation names.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .device import code_fp8, e2m1, geglu, share


@triton.jit
def encoded(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, MOST: tl.constexpr):
    """Codes of float32 |x| as `formats.nvfp4` rounds them, to nearest and ties to even, saturated."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    y = tl.minimum(tl.abs(x), MOST)
    bits = y.to(tl.int32, bitcast=True)
    bits = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED
    normal = bits - ((127 - BIAS) << MANTISSA)
    # In float32, 2^23 and more are whole numbers: the sum is rounded to one.
    subnormal = (y * (1 << (MANTISSA + BIAS - 1)) + 8388608.0) - 8388608.0
    return tl.where(y < 2.0 ** (1 - BIAS), subnormal.to(tl.int32), normal)


@triton.jit
def quantize(
    x, owners, codes, scales, factor, width, stride_x, groups,
    E: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """See `fp4.quantized`. One program a row: C holds its `width` inputs, and `groups` · 16 are stored."""
    row = tl.program_id(0).to(tl.int64)
    if E > 0:  # rows of a plan, of which some have no expert
        owner = tl.load(owners + row // M)
        if owner == E:
            return
    at = tl.arange(0, C)
    v = tl.load(x + row * stride_x + at, mask=at < width, other=0.0).to(tl.float32)
    # As integers, magnitudes have the order of the numbers, and NaN is the largest: it is not lost.
    peak = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    unit = tl.div_rn(peak, 2688.0)
    unit = tl.where(unit == 0, 1.0, unit)
    tl.store(factor + row, unit)
    v = tl.reshape(tl.div_rn(v, unit), (C // 16, 16))
    octets = tl.maximum(encoded(tl.div_rn(tl.max(tl.abs(v), 1), 6.0), 3, 7, 448.0), 1)
    found = encoded(tl.div_rn(v, code_fp8(octets, 0)[:, None]), 1, 1, 6.0)
    found |= (v.to(tl.int32, bitcast=True) >> 28) & 8
    low, high = tl.split(tl.reshape(found, (C // 16, 8, 2)))
    group = tl.arange(0, C // 16)
    tl.store(scales + row * groups + group, octets.to(tl.uint8), mask=group < groups)
    at_code = codes + (row * groups + group)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(at_code, (low | (high << 4)).to(tl.uint8), mask=(group < groups)[:, None])


@triton.jit
def decoded(codes, scales, R: tl.constexpr, G: tl.constexpr):
    """Values [R, 16 · G] in float32 of bytes [R, 8 · G] and E4M3 bytes [R, G]."""
    codes = codes.to(tl.int32)
    low, high = e2m1(codes & 7, (codes >> 3) & 1), e2m1((codes >> 4) & 7, codes >> 7)
    values = tl.reshape(tl.join(low, high), (R, G, 16))
    scale = tl.where(scales == 0x7F, float("nan"), code_fp8(scales.to(tl.int32), 0))
    return tl.reshape(values * scale[:, :, None], (R, G * 16))


@triton.jit
def product(
    codes, marks, row, filled, words, scales, tile, B,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Rows `row` [M] of quantized activations, zeros where not `filled`, times a tile: [M, R] float32.

    Activations have whole steps of inputs; unless WHOLE, the last one has fewer blocks of weights.
    """
    column, group = tl.arange(0, 32 * S), tl.arange(0, 4 * S)
    steps = tl.cdiv(B, S)
    at_x = codes + row[:, None] * (steps * (32 * S)) + column[None, :]
    at_mark = marks + row[:, None] * (steps * (4 * S)) + group[None, :]
    line = tl.arange(0, R)[:, None]
    at_w = words + tile * B * (R * 32) + line * 32 + ((column // 32) * (R * 32) + column % 32)[None, :]
    at_scale = scales + tile * B * (R * 4) + line * 4 + ((group // 4) * (R * 4) + group % 4)[None, :]
    total = tl.zeros((R, M), tl.float32)
    for b in tl.range(0, B, S):
        x = tl.load(at_x, mask=filled[:, None], other=0)
        mark = tl.load(at_mark, mask=filled[:, None], other=0)
        if WHOLE:
            w, scale = tl.load(at_w), tl.load(at_scale)
        else:
            w = tl.load(at_w, mask=(b + column // 32 < B)[None, :], other=0)
            scale = tl.load(at_scale, mask=(b + group // 4 < B)[None, :], other=0)
        if INTERPRET:
            total = tl.dot(decoded(w, scale, R, 4 * S), tl.trans(decoded(x, mark, M, 4 * S)), total)
        else:
            mark, scale = mark.to(tl.float8e4nv, bitcast=True), scale.to(tl.float8e4nv, bitcast=True)
            total = tl.dot_scaled(w, scale, "e2m1", tl.trans(x), mark, "e2m1", total)
        at_x += 32 * S
        at_mark += 4 * S
        at_w += R * 32 * S
        at_scale += R * 4 * S
    return tl.trans(total)


@triton.jit
def gate_up(
    codes, marks, units, words, scales, factor, slots, owners, h, picks, B, T,
    E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    WHOLE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """As `device.gate_up`, of quantized tokens."""
    block, tile = tl.program_id(0) // T, tl.program_id(0) % T
    expert = tl.load(owners + block).to(tl.int64)
    if expert == E:
        return
    slot = tl.load(slots + block * M + tl.arange(0, M))
    filled, row = slot < picks, (slot // K).to(tl.int64)
    total = product(
        codes, marks, row, filled, words, scales, expert * T + tile, B, M, 2 * R, S, WHOLE, INTERPRET
    )
    at_factor = factor + (expert * T + tile) * (2 * R) + tl.arange(0, 2 * R)
    unit = tl.load(units + row, mask=filled, other=0.0)
    geglu(total * tl.load(at_factor)[None, :] * unit[:, None], h, block, tile, T, M, R)


@triton.jit
def down(
    codes, marks, units, words, scales, factor, slots, owners, shares, y, picks, outputs, B, T,
    E: tl.constexpr, M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """As `device.down`, of quantized rows of `gate_up`."""
    block, tile = tl.program_id(0) // T, tl.program_id(0) % T
    expert = tl.load(owners + block).to(tl.int64)
    if expert == E:
        return
    slot = tl.load(slots + block * M + tl.arange(0, M))
    filled, row = slot < picks, (block * M + tl.arange(0, M)).to(tl.int64)
    total = product(codes, marks, row, filled, words, scales, expert * T + tile, B, M, R, S, WHOLE, INTERPRET)
    at_factor = factor + (expert * T + tile) * R + tl.arange(0, R)
    unit = tl.load(units + row, mask=filled, other=0.0)
    share(total * tl.load(at_factor)[None, :] * unit[:, None], shares, y, slot, filled, outputs, tile, R)
