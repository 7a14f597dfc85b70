"""Triton sources of the products with tiled weights, for `plan`, `moe` and `linear`. Importing needs Triton.

A weight's bits become bfloat16 by integer instructions alone. A rotation and a mask bring a pair of E2M1
codes of NVFP4 to where bfloat16 has sign, exponent and mantissa. That is the code's value times 2^-126, and
±0.5 is a subnormal, which the multiplier keeps. The scale comes as 2^107 times its value, so that their
product is normal and exact, and the 2^-19 of every sum is taken back at its end. Blackwell converts codes and
scales itself where NATIVE says that Triton's assembler knows how. A shift and two masks make FP8's value
times 2^-120, subnormals included, and a multiplication takes that back. No conversion of the GPU's own is
needed, which sm_80 lacks.

Triton's interpreter has no inline assembly, multiplies bfloat16 as if it were integers in `tl.dot`, and
loses its subnormals. So INTERPRET says the same layout in float32 arithmetic, which is as exact;
tests/kernels/test_assembly.py emulates the assembly itself bit by bit.

    R weight rows of a tile  M rows of a block of picks  T tiles of a matrix  B blocks of 64 inputs
    K picks a token  E experts
"""
# Parameters of kernels are Triton's own types, which no annotation names.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

INTERPRET = triton.knobs.runtime.interpret


def assembly(multiply: str) -> str:
    """PTX from a word ($8) and four scale pairs ($9–$12) to eight bfloat16 ($0–$7), in the word's order."""
    lines = [
        "and.b32 a, $8, 0x81C081C0;",
        "shf.l.wrap.b32 t, $8, $8, 3;",
        "and.b32 b, t, 0x81C081C0;",
        "shf.l.wrap.b32 t, $8, $8, 6;",
        "and.b32 c, t, 0x81C081C0;",
        "shl.b32 t, $8, 1;",
        "and.b32 d, t, 0x80008000;",
        "shr.b32 t, $8, 4;",
        "and.b32 t, t, 0x00C000C0;",
        "or.b32 d, d, t;",
        "shr.b32 t, $8, 5;",
        "and.b32 t, t, 0x01000100;",
        "or.b32 d, d, t;",
    ]
    for i, pair in enumerate("abcd"):
        lines.append(multiply.format(pair, f"${9 + i}"))
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {pair};")
    return "\n".join(["{", ".reg .b32 a, b, c, d, t, z;", "mov.b32 z, 0x80008000;", *lines, "}"])


def assembly_native() -> str:
    """As `assembly`, for words of Order.NATIVE: bytes are pairs, with the first code in the lower half."""
    lines = ["mov.b32 {a, b, c, d}, $8;"]
    for i, pair in enumerate("abcd"):
        lines.append(f"cvt.rn.bf16x2.e2m1x2 t, {pair};")
        lines.append(MULTIPLY.format("t", f"${9 + i}"))
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, t;")
    return "\n".join(["{", ".reg .b8 a, b, c, d;", ".reg .b32 t;", *lines, "}"])


def assembly_scales() -> str:
    """PTX from four E4M3 bytes ($4) to four pairs ($0–$3) of equal bfloat16, which are their values."""
    lines = ["mov.b32 {a, b}, $4;"]
    for i, two in enumerate("ab"):
        lines.append(f"cvt.rn.bf16x2.e4m3x2 t, {two};")
        lines.append(f"prmt.b32 ${2 * i}, t, t, 0x1010;")
        lines.append(f"prmt.b32 ${2 * i + 1}, t, t, 0x3232;")
    return "\n".join(["{", ".reg .b16 a, b;", ".reg .b32 t;", *lines, "}"])


def assembly_fp8(multiply: str) -> str:
    """PTX from a word ($4) to four bfloat16 ($0–$3), in the word's order: pair 0 is in the upper bytes."""
    lines = [
        "shr.b32 t, $4, 4;",
        "and.b32 a, t, 0x07F007F0;",
        "and.b32 t, $4, 0x80008000;",
        "or.b32 a, a, t;",
        "shl.b32 t, $4, 4;",
        "and.b32 b, t, 0x07F007F0;",
        "shl.b32 t, $4, 8;",
        "and.b32 t, t, 0x80008000;",
        "or.b32 b, b, t;",
        "mov.b32 s, 0x7B807B80;",  # 2^120
    ]
    for i, pair in enumerate("ab"):
        lines.append(multiply.format(pair, "s"))
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {pair};")
    return "\n".join(["{", ".reg .b32 a, b, s, t, z;", "mov.b32 z, 0x80008000;", *lines, "}"])


# A product alone needs sm_90. Below, -0 is added: the one addend that also keeps the sign of a zero.
MULTIPLY, ADD = "mul.rn.bf16x2 {0}, {0}, {1};", "fma.rn.bf16x2 {0}, {0}, {1}, z;"
MUL, FMA = tl.constexpr(assembly(MULTIPLY)), tl.constexpr(assembly(ADD))
CVT, CVT_SCALES = tl.constexpr(assembly_native()), tl.constexpr(assembly_scales())
MUL_FP8, FMA_FP8 = tl.constexpr(assembly_fp8(MULTIPLY)), tl.constexpr(assembly_fp8(ADD))
UNIT = tl.constexpr(2.0**19)  # what the decoded weights of a sum lack, in NVFP4 unless NATIVE
OPERANDS = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 5))
OPERANDS_FP8 = tl.constexpr("=h,=h,=h,=h,r")


@triton.jit
def plan(ids, slots, owners, picks, count, E: tl.constexpr, BINS: tl.constexpr, M: tl.constexpr):
    """See `plan.plan`. One program an expert, whose beginning follows from the counts of all experts."""
    CHUNK: tl.constexpr = 1024
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for a in range(0, picks, CHUNK):
        at = a + tl.arange(0, CHUNK)
        counts += tl.histogram(tl.load(ids + at, mask=at < picks, other=0).to(tl.int32), BINS)
    # What filled up the last chunk was counted as expert 0's.
    counts -= tl.where(bins == 0, tl.cdiv(picks, CHUNK) * CHUNK - picks, 0)
    filled = (counts + M - 1) // M
    first = tl.sum(tl.where(bins < expert, filled, 0))
    after = first + tl.sum(tl.where(bins == expert, filled, 0))
    left = tl.where(expert == E - 1, after, count)  # the last expert also marks what is left over
    for a in range(0, count, CHUNK):
        at = a + tl.arange(0, CHUNK)
        tl.store(owners + at, expert, mask=(at >= first) & (at < after))
        tl.store(owners + at, E, mask=(at >= left) & (at < count))
    place = first * M
    for a in range(0, picks, CHUNK):
        at = a + tl.arange(0, CHUNK)
        mine = (tl.load(ids + at, mask=at < picks, other=-1).to(tl.int32) == expert).to(tl.int32)
        tl.store(slots + place + tl.cumsum(mine, 0) - 1, at, mask=mine == 1)
        place += tl.sum(mine)
    pad = place + tl.arange(0, M)
    tl.store(slots + pad, picks, mask=pad < after * M)


@triton.jit
def code(word, I: tl.constexpr, HIGH: tl.constexpr, NATIVE: tl.constexpr):
    """The code of pair I of words [...], its second where HIGH, as float32: what `layout.Order` says."""
    word = word.to(tl.uint32, bitcast=True)
    if not NATIVE:
        word = word >> (16 if HIGH else 0)
    if NATIVE:
        bits = (word >> (8 * I + (4 if HIGH else 0))) & 7
        sign = (word >> (8 * I + (7 if HIGH else 3))) & 1
    elif I < 3:
        bits = (word >> (6 - 3 * I)) & 7
        sign = (word >> (15 - 3 * I)) & 1
    else:
        bits = ((word >> 10) & 3) | ((word >> 11) & 4)
        sign = (word >> 14) & 1
    return e2m1(bits, sign)


@triton.jit
def e2m1(bits, sign):
    """The value of a code's three bits and its sign, as float32."""
    fraction = (bits & 1).to(tl.float32) * 0.5
    power = tl.exp2((bits >> 1).to(tl.float32) - 1)
    value = tl.where(bits < 2, fraction, (1 + fraction) * power)
    return tl.where(sign == 1, -value, value)


@triton.jit
def scale(octets, I: tl.constexpr, NATIVE: tl.constexpr, INTERPRET: tl.constexpr):
    """The scale of group I: a float32, or for the assembly two equal bfloat16 at 2^107 times that."""
    octet = (octets >> (8 * I)) & 0xFF
    if not INTERPRET:
        return octet * 0x00100010 + 0x70007000
    elif NATIVE:
        return code_fp8(octets, I)
    else:
        return (1 + (octet & 7).to(tl.float32) / 8) * tl.exp2((octet >> 3).to(tl.float32) - 10)


@triton.jit
def weights(word, octets, R: tl.constexpr, NATIVE: tl.constexpr, SM: tl.constexpr, INTERPRET: tl.constexpr):
    """The tile [R, 64] of words [R, 8] and scale words [R], bfloat16 (interpreted: float32)."""
    octets = octets[:, None]
    if NATIVE and not INTERPRET:
        s0, s1, s2, s3 = tl.inline_asm_elementwise(
            CVT_SCALES, "=r,=r,=r,=r,r", [octets], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
    else:
        s0, s1 = scale(octets, 0, NATIVE, INTERPRET), scale(octets, 1, NATIVE, INTERPRET)
        s2, s3 = scale(octets, 2, NATIVE, INTERPRET), scale(octets, 3, NATIVE, INTERPRET)
    if INTERPRET:
        a0, a1 = code(word, 0, False, NATIVE) * s0, code(word, 0, True, NATIVE) * s0
        b0, b1 = code(word, 1, False, NATIVE) * s1, code(word, 1, True, NATIVE) * s1
        c0, c1 = code(word, 2, False, NATIVE) * s2, code(word, 2, True, NATIVE) * s2
        d0, d1 = code(word, 3, False, NATIVE) * s3, code(word, 3, True, NATIVE) * s3
    else:
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            CVT if NATIVE else MUL if SM >= 90 else FMA,
            OPERANDS,
            [word, s0, s1, s2, s3],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    # [R, word, pair / 2, pair % 2, half], then input 16 · pair + 2 · word + half.
    low = tl.join(tl.join(a0, c0), tl.join(b0, d0))
    high = tl.join(tl.join(a1, c1), tl.join(b1, d1))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 3, 1, 4)), (R, 64))


@triton.jit
def code_fp8(word, BYTE: tl.constexpr):
    """The code in a byte of the word, as float32."""
    octet = (word >> (8 * BYTE)) & 0xFF
    mantissa, power = (octet & 7).to(tl.float32) / 8, (octet >> 3) & 15
    value = tl.where(power == 0, 2 * mantissa, 1 + mantissa) * tl.exp2(power.to(tl.float32) - 7)
    return tl.where(octet > 127, -value, value)


@triton.jit
def weights_fp8(word, R: tl.constexpr, SM: tl.constexpr, INTERPRET: tl.constexpr):
    """The tile [R, 64] of words [R, 16], bfloat16 (interpreted: float32)."""
    if INTERPRET:
        a0, a1, b0, b1 = code_fp8(word, 1), code_fp8(word, 3), code_fp8(word, 0), code_fp8(word, 2)
    else:
        a0, a1, b0, b1 = tl.inline_asm_elementwise(
            MUL_FP8 if SM >= 90 else FMA_FP8,
            OPERANDS_FP8,
            [word],
            dtype=(tl.bfloat16,) * 4,
            is_pure=True,
            pack=1,
        )
    # [R, word, pair, half], then input 32 · pair + 2 · word + half.
    return tl.reshape(tl.permute(tl.join(tl.join(a0, b0), tl.join(a1, b1)), (0, 2, 1, 3)), (R, 64))


@triton.jit
def product(
    at_x, filled, words, scales, tile, inputs, B,
    M: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr,
    SWAP: tl.constexpr, UNROLL: tl.constexpr, SM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Rows at the pointers at_x [M, 1], zeros where not `filled`, times a tile of weights: [M, R] float32.

    `inputs` matters unless WHOLE: the last block then has fewer than 64 of them.
    """
    W: tl.constexpr = 16 if FP8 else 8
    at_word = words + tile * B * (R * W) + tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    at_scale = scales + tile * B * R + tl.arange(0, R)
    at_x += tl.arange(0, 64)[None, :]
    total = tl.zeros((R, M) if SWAP else (M, R), tl.float32)
    for b in tl.range(B, loop_unroll_factor=UNROLL):
        mask = filled[:, None]
        if not WHOLE:
            mask = mask & (b * 64 + tl.arange(0, 64) < inputs)[None, :]
        x = tl.load(at_x, mask=mask, other=0.0)
        if INTERPRET:
            x = x.to(tl.float32)
        if FP8:
            w = weights_fp8(tl.load(at_word), R, SM, INTERPRET)
        else:
            w = weights(tl.load(at_word), tl.load(at_scale), R, NATIVE, SM, INTERPRET)
        if SWAP:
            total = tl.dot(w, tl.trans(x), total)
        else:
            total = tl.dot(x, tl.trans(w), total)
        at_x += 64
        at_word += R * W
        at_scale += R
    if SWAP:
        total = tl.trans(total)
    return total if FP8 or NATIVE or INTERPRET else total * UNIT


@triton.jit
def geglu(total, h, block, tile, T, M: tl.constexpr, R: tl.constexpr):
    """Stores gelu(gate) · up of sums [M, 2R], R of gate and R of up, as columns of tile `tile` of h."""
    gate, up = tl.split(tl.permute(tl.reshape(total, (M, 2, R)), (0, 2, 1)))
    # GELU's tanh form, as x · sigmoid(2z): 1 + tanh(z) is 2 · sigmoid(2z).
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    y = gate * tl.sigmoid(2 * z) * up
    at_h = h + (block * M + tl.arange(0, M)).to(tl.int64)[:, None] * (T * R)
    tl.store(at_h + tile * R + tl.arange(0, R)[None, :], y.to(h.dtype.element_ty))


@triton.jit
def share(total, shares, y, slot, filled, outputs, tile, R: tl.constexpr):
    """Stores sums [M, R] times their slots' shares in the slots' rows of y, as columns of tile `tile`."""
    total *= tl.load(shares + slot, mask=filled, other=0.0)[:, None]
    column = tile * R + tl.arange(0, R)
    at_y = y + slot.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=filled[:, None] & (column < outputs)[None, :])


@triton.jit
def gate_up(
    x, words, scales, factor, slots, owners, h, picks, inputs, stride_x, B, T,
    E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr,
    NATIVE: tl.constexpr, WHOLE: tl.constexpr, SWAP: tl.constexpr, UNROLL: tl.constexpr, SM: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """h[block · M + r, tile · R + c] = gelu(gate) · up for the token of slot r; rows without a slot are 0.

    A tile is R rows of gate, then the same R rows of up: one product of 2R rows, so that the activations
    are read once. Tiles of a block are adjacent programs: they share its rows in the cache.
    """
    block, tile = tl.program_id(0) // T, tl.program_id(0) % T
    expert = tl.load(owners + block).to(tl.int64)
    if expert == E:
        return
    slot = tl.load(slots + block * M + tl.arange(0, M))
    at_x = x + (slot // K).to(tl.int64)[:, None] * stride_x
    total = product(
        at_x, slot < picks, words, scales, expert * T + tile, inputs, B,
        M, 2 * R, FP8, NATIVE, WHOLE, SWAP, UNROLL, SM, INTERPRET,
    )  # fmt: skip
    at_factor = factor + (expert * T + tile) * (2 * R) + tl.arange(0, 2 * R)
    geglu(total * tl.load(at_factor)[None, :], h, block, tile, T, M, R)


@triton.jit
def down(
    h, words, scales, factor, slots, owners, shares, y, picks, inputs, stride_h, outputs, B, T,
    E: tl.constexpr, M: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr,
    WHOLE: tl.constexpr, SWAP: tl.constexpr, UNROLL: tl.constexpr, SM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y[slot] = shares[slot] · (a row of `gate_up` through the expert's down projection)."""
    block, tile = tl.program_id(0) // T, tl.program_id(0) % T
    expert = tl.load(owners + block).to(tl.int64)
    if expert == E:
        return
    slot = tl.load(slots + block * M + tl.arange(0, M))
    filled = slot < picks
    at_h = h + (block * M + tl.arange(0, M)).to(tl.int64)[:, None] * stride_h
    total = product(
        at_h, filled, words, scales, expert * T + tile, inputs, B,
        M, R, FP8, NATIVE, WHOLE, SWAP, UNROLL, SM, INTERPRET,
    )  # fmt: skip
    at_factor = factor + (expert * T + tile) * R + tl.arange(0, R)
    share(total * tl.load(at_factor)[None, :], shares, y, slot, filled, outputs, tile, R)


@triton.jit
def linear(
    x, words, scales, factor, y, rows, inputs, outputs, stride_x, blocks, B,
    M: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, WHOLE: tl.constexpr,
    SWAP: tl.constexpr, UNROLL: tl.constexpr, SM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y[n] = x[n] through one matrix. Blocks of a tile are adjacent programs: its weights come once."""
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = (block * M + tl.arange(0, M)).to(tl.int64)
    some = row < rows
    total = product(
        x + row[:, None] * stride_x, some, words, scales, tile.to(tl.int64), inputs, B,
        M, R, FP8, NATIVE, WHOLE, SWAP, UNROLL, SM, INTERPRET,
    )  # fmt: skip
    column = tile * R + tl.arange(0, R)
    total *= tl.load(factor + column)[None, :]
    at_y = y + row[:, None] * outputs + column[None, :]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=some[:, None] & (column < outputs)[None, :])


@triton.jit
def combine(y, out, width, K: tl.constexpr, C: tl.constexpr):
    """out[n] = the sum of rows n · K … n · K + K − 1 of y, in that order and float32; C columns a program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros((C,), tl.float32)
    for k in range(K):
        row = y + (token * K + k) * width
        total += tl.load(row + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)
