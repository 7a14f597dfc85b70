"""NVFP4 and FP8 weights re-tiled for our products: as many bytes as the checkpoint's, in order of use.

A kernel that unpacks nibbles as they are stored spends 12 instructions a weight and is bound by issue, not
by memory. So the bits are reordered once, at load. The bytes of one tile are adjacent. A shift or a rotation
and a mask take two weights out of a word together, as bfloat16, in one register of a matrix fragment. A GPU
that converts codes itself gets bytes as they are, in the order of the same words. The price: a loaded stack
no longer is what its file holds, and belongs to one tile height and one order.

A word of NVFP4 holds 4 pairs of adjacent inputs: pair i of word w is the inputs 16i + 2w and 16i + 2w + 1 of
a block of 64, hence of scale group i, and the byte 8i + w of the block as ModelOpt and MLX store it. A word
of FP8 holds 2 pairs: pair i of word w is the inputs 32i + 2w and 32i + 2w + 1.

    E experts  O outputs  I inputs  P parts (2: gate and up, adjacent in a tile)  T tiles of R rows a part
    B blocks of 64 inputs  W words a row of a block: 8 in NVFP4, 16 in FP8
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from dgemma.formats import nvfp4
from dgemma.formats.quantized import FP8, NVFP4, Form, Quantized

BLOCK = 64  # inputs a word of scales is for: the largest power of two that divides 704 and 2,816
CHUNK = 1 << 22  # words made at a time: what bounds the temporaries


class Order(Enum):
    """How the bits of an NVFP4 word and of its word of scales are ordered."""

    SHIFTED = "shifted"  # codes at PLACES, scales as UE5M3: what shifts and masks decode
    NATIVE = "native"  # byte i is pair i, and scales are E4M3, all as stored: what a GPU converts
    # Bytes as stored, one after the other. E4M3 scales without signs, which codes have: what FP4 multiplies.
    UNSIGNED = "unsigned"


# Bits, from the lowest, of the four bits of a code (magnitude, then sign) in the lower half of a SHIFTED
# word; the second code of a pair is 16 bits above. Pairs 0, 1 and 2 are bits 6–8 and 15 of the word rotated
# to the left by 3·i; pair 3 has the bits left over, which three shifts bring to the same places.
PLACES = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))
# Bytes of a word of FP8, from the lowest, as 2 · pair + half: the first pair is where bfloat16 has its upper
# bytes.
OCTETS = (2, 0, 3, 1)


@dataclass(frozen=True, eq=False)
class Tiled:
    """A stack [E, O, I], whose O is `parts` equal runs of rows, or a matrix [O, I]; words as above."""

    form: Form  # NVFP4 or FP8
    words: torch.Tensor  # int32 [E, T, B, P, R, W]
    scales: torch.Tensor | None  # int32 [E, T, B, P, R]: four bytes, of group i at bit 8i; NVFP4 only
    factor: torch.Tensor  # float32 [E, T, P, R]: what a row's sum is multiplied by
    shape: tuple[int, ...]  # (E, O, I) or (O, I), without the padding
    order: Order = Order.SHIFTED  # FP8 has but one order

    @property
    def parts(self) -> int:
        return self.words.shape[3]

    @property
    def rows(self) -> int:
        """Rows of a tile, R."""
        return self.words.shape[4]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.words, self.scales, self.factor) if x is not None)


def fits(record: Quantized) -> bool:
    """Whether there are tiles for a record: for NVFP4, and for FP8 without NaN, whose code would be 480."""
    if record.form == FP8:
        return not bool((record.codes & 127 == 127).any())
    return record.form == NVFP4


def tile(record: Quantized, rows: int, parts: int = 1, order: Order = Order.SHIFTED) -> Tiled:
    """The tiles of a record [E, O, I] or [O, I] on its device, `rows` rows high; gate_up has two `parts`.

    Rows and inputs that fill up the last tile and block are zeros. A factor that divides becomes its
    reciprocal, rounded once; everything else is kept exactly. Temporaries are a few experts' worth.
    """
    shape, fp8 = record.shape, record.form == FP8
    if len(shape) == 2:
        record = record.map(lambda x: x[None])
    E, O, I = record.shape
    assert record.form in (NVFP4, FP8) and O % parts == 0, (record.form, shape, parts)
    T, B = -(-O // parts // rows), -(-I // BLOCK)
    make = partial(torch.empty, dtype=torch.int32, device=record.codes.device)
    words = make((E, T, B, parts, rows, 16 if fp8 else 8))
    scales = None if fp8 else make((E, T, B, parts, rows))
    step = max(1, CHUNK * E // words.numel())
    for a in range(0, E, step):
        some = slice(a, a + step)
        if scales is None or record.scales is None:
            _fill_fp8(words[some], record.codes[some])
        else:
            _fill(words[some], scales[some], record.codes[some], record.scales[some], order)
    return Tiled(record.form, words, scales, _factor(record, T, parts, rows), shape, order)


def _fill_fp8(words: torch.Tensor, codes: torch.Tensor) -> None:
    """Codes [e, O, I] as words, in place."""
    T, B, P, R = words.shape[1:5]
    octets = _blocks(codes, B, BLOCK, P, T * R).unflatten(-1, (2, 16, 2))  # [e, P, T·R, B, pair, word, half]
    octets = octets.transpose(-3, -2).flatten(-2)[..., list(OCTETS)]  # [e, P, T·R, B, word, byte]
    words.copy_(_joined(octets).unflatten(2, (T, R)).permute(0, 2, 4, 1, 3, 5))


def _fill(
    words: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, stored: torch.Tensor, order: Order
) -> None:
    """Codes [e, O, I/2] and E4M3 scales [e, O, I/16] as words and scale words, in place."""
    T, B, P, R = words.shape[1:5]
    octets = _blocks(codes, B, 32, P, T * R).unflatten(-1, (4, 8))  # [e, P, T·R, B, pair, word]
    new = _blocks(stored, B, 4, P, T * R)  # [e, P, T·R, B, 4]
    if order is Order.SHIFTED:
        packed, new = _shifted(octets, new)
    elif order is Order.NATIVE:
        packed = _joined(octets.transpose(-2, -1))
    else:
        packed = _joined(
            (octets ^ (new >> 7 << 7 | new >> 7 << 3)[..., None]).flatten(-2).unflatten(-1, (8, 4))
        )
        new = new & 0x7F
    words.copy_(packed.unflatten(2, (T, R)).permute(0, 2, 4, 1, 3, 5))
    scales.copy_(_joined(new).unflatten(2, (T, R)).permute(0, 2, 4, 1, 3))


def _shifted(octets: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of codes [..., 4, 8] as words int32 [..., 8], and E4M3 scales [..., 4] as UE5M3."""
    fields, ue5m3, keep, flip = (x.to(octets.device) for x in _tables())
    old = stored.int()
    # A negative scale moves its sign to the codes; under a zero scale the codes become zeros.
    octets = ((octets ^ flip[old][..., None]) & keep[old][..., None]).int()
    new = fields[0][octets[..., 0, :]]
    for i in (1, 2, 3):
        new |= fields[i][octets[..., i, :]]
    return new, ue5m3[old]


def _joined(octets: torch.Tensor) -> torch.Tensor:
    """Four bytes [..., 4] as an int32 [...], the first one lowest."""
    return octets.contiguous().view(torch.int32)[..., 0]


def _blocks(x: torch.Tensor, B: int, width: int, P: int, rows: int) -> torch.Tensor:
    """Bytes [e, O, n] as [e, P, rows, B, width], filled up with zeros."""
    x = x.unflatten(1, (P, -1))
    return F.pad(x, (0, B * width - x.shape[-1], 0, rows - x.shape[2])).unflatten(-1, (B, width))


def _factor(record: Quantized, T: int, parts: int, rows: int) -> torch.Tensor:
    """The factor of every row, [E, T, P, R] float32; 0 for rows that fill up a tile."""
    E, O, _ = record.shape
    if record.factor is None:
        factor = torch.ones((1, 1), device=record.codes.device)
    else:
        factor = record.factor.reshape(-1, record.factor.shape[-1]).float()
    if record.divides:
        factor = factor.double().reciprocal().float()
    factor = factor.expand(E, O).unflatten(1, (parts, -1))
    factor = F.pad(factor, (0, T * rows - factor.shape[-1])).unflatten(-1, (T, rows))
    return factor.transpose(1, 2).contiguous()


def untile(tiled: Tiled) -> torch.Tensor:
    """The values [E, O, I] or [O, I] float32, as `ops.decoding.dequantize` has them: what tiles mean."""
    O, I = tiled.shape[-2:]
    values = _values_fp8(tiled) if tiled.scales is None else _values(tiled, tiled.scales)
    # [E, T, B, P, R, 64] -> [E, P, T, R, B, 64] -> [E, P, rows, inputs]
    values = values.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    values = values[:, :, : O // tiled.parts, :I]
    factor = tiled.factor.transpose(1, 2).flatten(2)[:, :, : values.shape[2]]
    return (values * factor[..., None]).reshape(tiled.shape)


def _values(tiled: Tiled, scales: torch.Tensor) -> torch.Tensor:
    """Codes of NVFP4 times their scales, [E, T, B, P, R, 64]."""
    octets = scales.unsqueeze(-1).view(torch.uint8).int()  # [E, T, B, P, R, 4]
    if tiled.order is Order.SHIFTED:
        codes = _shifted_codes(tiled.words)
        factors = (1 + (octets & 7) / 8) * torch.exp2((octets >> 3) - 10.0)
        factors = factors.where(octets != 255, torch.nan)
    else:
        pairs = tiled.words.unsqueeze(-1).view(torch.uint8).int()  # [E, T, B, P, R, 8, 4]
        if tiled.order is Order.UNSIGNED:
            pairs = pairs.flatten(-2).unflatten(-1, (4, 8)).transpose(-2, -1)
        codes = torch.stack([pairs & 15, pairs >> 4], -1)
        factors = torch.from_numpy(nvfp4.E4M3).to(octets.device)[octets]
    values = torch.from_numpy(nvfp4.E2M1).to(codes.device)[codes]  # [E, T, B, P, R, 8, 4, 2]
    return (values * factors[..., None, :, None]).transpose(-3, -2).flatten(-3)


def _shifted_codes(words: torch.Tensor) -> torch.Tensor:
    """Codes of SHIFTED words [...], int32 [..., pair, half]."""
    codes = torch.zeros((*words.shape, 4, 2), dtype=torch.int32, device=words.device)
    for i, places in enumerate(PLACES):
        for j in (0, 1):
            for bit, place in enumerate(places):
                codes[..., i, j] |= (words >> (place + 16 * j) & 1) << bit
    return codes


def _values_fp8(tiled: Tiled) -> torch.Tensor:
    """Codes of FP8 as numbers, [E, T, B, P, R, 64]."""
    octets = tiled.words.unsqueeze(-1).view(torch.uint8)  # [E, T, B, P, R, 16, byte]
    octets = octets[..., [OCTETS.index(i) for i in range(4)]].unflatten(-1, (2, 2)).int()
    table = torch.from_numpy(nvfp4.E4M3).to(octets.device, torch.float32)
    return table[octets].transpose(-3, -2).flatten(-3)


@cache
def _tables() -> tuple[torch.Tensor, ...]:
    """Bits in a word, int32 [4, 256], by a byte of two codes; three tables, uint8 [256], by an E4M3 scale.

    The three are the UE5M3 byte, a mask (zero for a zero scale) and the bits to flip in a byte of codes (the
    signs, for a negative scale).
    """
    octets = np.arange(256, dtype=np.int64)
    fields = np.zeros((4, 256), np.int64)
    for i, places in enumerate(PLACES):
        for bit, place in enumerate(places):
            fields[i] |= (octets >> bit & 1) << place | (octets >> (4 + bit) & 1) << (16 + place)
    magnitude, zero = octets & 127, octets & 127 == 0
    tables = (
        fields.astype(np.uint32).view(np.int32),
        np.where(magnitude == 127, 255, _ue5m3(nvfp4.E4M3[magnitude])).astype(np.uint8),
        np.where(zero, 0, 255).astype(np.uint8),
        np.where(octets > 127, 0x88, 0).astype(np.uint8),
    )
    return tuple(torch.from_numpy(table) for table in tables)


def _ue5m3(x: np.ndarray) -> np.ndarray:
    """Bytes of E4M3's positive values x [n] as (1 + m/8) · 2^(e − 10), e in the upper five bits: all normal.

    255 stands for NaN: the kernels turn it into one. Zero becomes anything, as its codes are zeros.
    """
    mantissa, exponent = np.frexp(np.where((x > 0) & np.isfinite(x), x, 1.0))
    return ((exponent - 1 + 10) << 3) | (mantissa * 16 - 8).astype(np.int64)
