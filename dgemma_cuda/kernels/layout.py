"""NVFP4 stacks re-tiled for the grouped matmul: as many bytes as the checkpoint's, in the order of their use.

A kernel that unpacks nibbles as they are stored spends 12 instructions a weight and is bound by issue, not
by memory. So the bits are reordered once, at load: the bytes of one tile are adjacent, and the two weights
that share a register of a matrix fragment come out of a word together, as bfloat16, by a rotation and a
mask. The price is that a loaded stack no longer is what its file holds, and belongs to one tile height.

A word holds 4 pairs of adjacent inputs: pair i of word w is the inputs 16i + 2w and 16i + 2w + 1 of a block
of 64, hence of scale group i, and the byte 8i + w of the block as ModelOpt and MLX store it.

    E experts  O outputs  I inputs  P parts (2: gate and up, adjacent in a tile)  T tiles of R rows a part
    B blocks of 64 inputs
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from dgemma import nvfp4
from dgemma.quantized import Quantized

BLOCK = 64  # inputs a word of scales is for: the largest power of two that divides 704 and 2,816
CHUNK = 1 << 22  # words made at a time: what bounds the temporaries

# Bits, from the lowest, of the four bits of a code (magnitude, then sign) in the lower half of its word; the
# second code of a pair is 16 bits above. Pairs 0, 1 and 2 are bits 6–8 and 15 of the word rotated to the left
# by 3·i; pair 3 has the bits left over, which three shifts bring to the same places.
PLACES = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))


@dataclass(frozen=True, eq=False)
class Tiled:
    """A stack [E, O, I] of NVFP4 weights, O of `parts` equal runs of rows; see the module for the order."""

    words: torch.Tensor  # int32 [E, T, B, P, R, 8]
    scales: torch.Tensor  # int32 [E, T, B, P, R]: four UE5M3 bytes, of group i at bit 8i
    factor: torch.Tensor  # float32 [E, T, P, R]: what a row's sum is multiplied by
    shape: tuple[int, int, int]  # (E, O, I), without the padding

    @property
    def parts(self) -> int:
        return self.words.shape[3]

    @property
    def rows(self) -> int:
        """Rows of a tile, R."""
        return self.words.shape[4]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + self.factor.nbytes


def tile(record: Quantized, rows: int, parts: int = 1) -> Tiled:
    """The tiles of an NVFP4 record [E, O, I] on its device, `rows` rows high; gate_up has two `parts`.

    Rows and inputs that fill up the last tile and block are zeros. A factor that divides becomes its
    reciprocal, rounded once; everything else is kept exactly. Temporaries are a few experts' worth.
    """
    assert record.form.mode == "nvfp4" and record.codes.ndim == 3 and record.scales is not None
    E, O, I = record.shape
    assert O % parts == 0, (record.shape, parts)
    T, B = -(-O // parts // rows), -(-I // BLOCK)
    device = record.codes.device
    words = torch.empty((E, T, B, parts, rows, 8), dtype=torch.int32, device=device)
    scales = torch.empty((E, T, B, parts, rows), dtype=torch.int32, device=device)
    step = max(1, CHUNK * E // words.numel())
    for a in range(0, E, step):
        some = slice(a, a + step)
        _fill(words[some], scales[some], record.codes[some], record.scales[some])
    return Tiled(words, scales, _factor(record, T, parts, rows), (E, O, I))


def _fill(words: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, stored: torch.Tensor) -> None:
    """Codes [e, O, I/2] and E4M3 scales [e, O, I/16] as words and scale words, in place."""
    T, B, P, R = words.shape[1:5]
    fields, ue5m3, keep, flip = (x.to(words.device) for x in _tables())
    old = _blocks(stored, B, 4, P, T * R)  # [e, P, T·R, B, 4]
    # A negative scale moves its sign to the codes; under a zero scale the codes become zeros.
    octets = _blocks(codes, B, 32, P, T * R).unflatten(-1, (4, 8))
    octets = ((octets ^ flip[old.int()][..., None]) & keep[old.int()][..., None]).int()  # [..., B, 4, 8]
    new = fields[0][octets[..., 0, :]]
    for i in (1, 2, 3):
        new |= fields[i][octets[..., i, :]]
    words.copy_(new.unflatten(2, (T, R)).permute(0, 2, 4, 1, 3, 5))
    packed = ue5m3[old.int()].view(torch.int32)[..., 0]
    scales.copy_(packed.unflatten(2, (T, R)).permute(0, 2, 4, 1, 3))


def _blocks(x: torch.Tensor, B: int, width: int, P: int, rows: int) -> torch.Tensor:
    """Bytes [e, O, n] as [e, P, rows, B, width], filled up with zeros."""
    x = x.unflatten(1, (P, -1))
    return F.pad(x, (0, B * width - x.shape[-1], 0, rows - x.shape[2])).unflatten(-1, (B, width))


def _factor(record: Quantized, T: int, parts: int, rows: int) -> torch.Tensor:
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
    """The values [E, O, I] in float32, as `Ops.dequantize` has them: the definition of the tiles."""
    E, O, I = tiled.shape
    codes = torch.zeros((*tiled.words.shape, 4, 2), dtype=torch.int32, device=tiled.words.device)
    for i, places in enumerate(PLACES):
        for j in (0, 1):
            for bit, place in enumerate(places):
                codes[..., i, j] |= (tiled.words >> (place + 16 * j) & 1) << bit
    values = torch.from_numpy(nvfp4.E2M1).to(codes.device)[codes]  # [E, T, B, P, R, 8, 4, 2]
    octets = tiled.scales.unsqueeze(-1).view(torch.uint8).int()  # [E, T, B, P, R, 4]
    scales = (1 + (octets & 7) / 8) * torch.exp2((octets >> 3) - 10.0)
    scales = scales.where(octets != 255, torch.nan)
    values = values * scales[..., None, :, None]
    # [E, P, T, R, B, 4, 8, 2]: inputs in order.
    values = values.permute(0, 3, 1, 4, 2, 6, 5, 7).reshape(E, tiled.parts, -1, values.shape[2] * BLOCK)
    values = values[:, :, : O // tiled.parts, :I]
    factor = tiled.factor.transpose(1, 2).flatten(2)[:, :, : values.shape[2]]
    return (values * factor[..., None]).reshape(E, O, I)


@cache
def _tables() -> tuple[torch.Tensor, ...]:
    """By a byte of two codes: its bits in a word, int32 [4, 256]. By an E4M3 scale: the UE5M3 byte, a mask
    (zero for a zero scale) and the bits to flip in a byte of codes (the signs, of a negative scale)."""
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
    """Bytes of positive values of E4M3 as (1 + m/8) · 2^(e − 10), e in the upper five bits: all are normal.

    255 stands for NaN: the kernels turn it into one. What zero becomes does not matter, its codes are zeros.
    """
    mantissa, exponent = np.frexp(np.where((x > 0) & np.isfinite(x), x, 1.0))
    return ((exponent - 1 + 10) << 3) | (mantissa * 16 - 8).astype(np.int64)
