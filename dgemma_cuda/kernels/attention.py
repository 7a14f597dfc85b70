"""Attention for this model's heads of 256 and 512: replaces `Ops.attend`, without masks or repeated keys.

PyTorch's flash kernels stop at 256 and take no mask, and the others read one of L × S. Here the heads of a
KV head are rows of one matrix. Adjacent rows are one query's heads, so a block of rows spans few queries, and
keys outside its window are not read at all. Runs of keys go to different programs, if blocks are fewer than
the GPU's processors, and are merged by their log-sum-exps. Softmax and sums are float32, and no result
depends on the order in which programs run.

One launch serves the rows of a pass, whatever their lengths. It finds each row's past in a table in device
memory: addresses and sizes of the pieces in which contexts hold it. So nothing is joined or copied, and a
recorded launch reads any contexts of as many rows. The price: no gradients.

    N queries of all rows  L of one row  C head size  H heads  G KV heads  Z splits  W width of a table
"""
# Parameters of kernels are Triton's own types, which no annotation names.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from dgemma.network.context import Pieces
from dgemma.network.ops import KV, Mask, Past

from .launch import interpreted, kernel, load, power_of_two, processors

if TYPE_CHECKING:
    import triton.language as tl

Tensor = torch.Tensor

LEAST = 128  # keys that are worth a split
MOST = 8  # splits
MERGE_WARPS = 4
REGISTERS = 1 << 16  # of a processor
ROOM = 4  # pieces that the smallest table holds a row


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a block, and the launch that holds it without spills on sm_80 to sm_120."""

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int  # programs that a processor holds at once, by registers

    @property
    def options(self) -> dict[str, int]:
        """Launch options. ptxas, left to itself, aims at 128 registers on sm_89, and spills for it."""
        registers = min(255, REGISTERS // (32 * self.warps * self.resident))
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers}


# By head size and family. A tile of 512 takes 98 KB of the 99 that consumer GPUs have. Four warps at 256 are
# one wgmma's (tcgen05's) 64 rows, and two programs fit; mma.sync would spill, so that eight warps share them.
TILES = {
    (512, "mma"): Tile(64, 16, 8, 2, resident=1),
    (512, "wgmma"): Tile(64, 16, 8, 2, resident=1),
    (256, "mma"): Tile(64, 32, 8, 2, resident=1),
    (256, "wgmma"): Tile(64, 32, 4, 2, resident=2),
}
SMALL = Tile(64, 32, 4, 2, resident=2)  # of small models' heads


@cache
def tile_for(C: int, device: torch.device) -> Tile:
    """The tile of heads of C on `device`."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return TILES.get((C, family(major)), SMALL)


def family(major: int) -> str:
    """What multiplies on GPUs of compute capability `major`; 12 is a consumer's, without tcgen05."""
    return "wgmma" if major in (9, 10) else "mma"


def attention_plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """One row in PyTorch: q [H, L, C] over k, v [G, S, C], the last L of which are its own -> [H, L, C]."""
    L, S = q.shape[1], k.shape[1]
    key = torch.arange(S, device=q.device)
    query = torch.arange(S - L, S, device=q.device)[:, None]
    seen = torch.ones(L, S, dtype=torch.bool, device=q.device)
    if mask.causal:
        seen = (key <= query) & (key > query - (S if mask.window is None else mask.window))
    gqa = q.shape[0] != k.shape[0]
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=seen, scale=1.0, enable_gqa=gqa
    )[0]


def attend_plain(q: Tensor, own: KV, past: Sequence[Past], lengths: Sequence[int], mask: Mask) -> Tensor:
    """`attend` in PyTorch, of the pieces themselves: row by row, joined."""
    parts = []
    for stop, n, pieces in zip(accumulate(lengths), lengths, past, strict=True):
        row = own[0][:, stop - n : stop], own[1][:, stop - n : stop]
        k, v = (torch.cat(x, 1) for x in zip(*pieces, row, strict=True))
        parts.append(attention_plain(q[:, stop - n : stop], k, v, mask))
    return torch.cat(parts, 1)


def table(layers: Sequence[Sequence[Past]], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where the rows of a pass lie, and the pieces of their pasts: int64 [layers, rows, W] on `device`.

    Four numbers a row: how many pieces, first token of its own, 0, own tokens. Then four for each piece
    [G, n, C]: addresses of keys and values, the row's tokens up to its end, and numbers from one KV head to
    the next. Addresses are where token 0 of the row would lie. The row's own tokens are the last piece,
    without addresses. There is room for a power of two of pieces, so that W changes seldom.

    Pieces must live until the launches that read them are queued. A head's n tokens lie one behind the other,
    in keys as in values.
    """
    most = max((len(pieces) for layer in layers for pieces in layer), default=0)
    room = max(ROOM, power_of_two(max(1, most)))
    found = np.zeros((len(layers), len(lengths), 4 * (room + 2)), np.int64)
    first = [stop - n for stop, n in zip(accumulate(lengths), lengths, strict=True)]
    for layer, rows in zip(layers, found, strict=True):
        for b, pieces in enumerate(layer):
            entries = _entries(pieces)
            end = entries[-2] if pieces else 0
            numbers = [len(pieces), first[b], 0, lengths[b], *entries, 0, 0, end + lengths[b], 0]
            rows[b, : len(numbers)] = numbers
    return torch.from_numpy(found).to(device)


def _entries(pieces: Past) -> list[int]:
    """The numbers of all pieces, which a context's own pieces keep: it is read at every step of a canvas."""
    found: list[int] | None = getattr(pieces, "note", None)
    if found is None:
        found, end = [], 0
        for k, v in pieces:
            found += _entry(k, v, end)
            end += k.shape[1]
        if isinstance(pieces, Pieces):
            pieces.note = found
    return found


def _entry(k: Tensor, v: Tensor, start: int) -> list[int]:
    """The numbers of a piece that begins with token `start` of its row."""
    (_, n, C), steps = k.shape, k.stride()
    assert v.stride() == steps and steps[1:] == (C, 1), (steps, v.stride())
    before = start * C * k.itemsize
    return [k.data_ptr() - before, v.data_ptr() - before, start + n, steps[0]]


def attend(
    q: Tensor, own: KV, past: Tensor, lengths: Sequence[int], mask: Mask, splits: int | None = None
) -> Tensor:
    """`Ops.attend` of q [H, N, C] over the pasts in a layer of `table` [rows, W], then own [G, N, C].

    All are of one type, C a power of two from 16 on. The result [H, N, C] lies as [N, H, C] does, which is
    how the output projection reads it. Programs are for the longest of `lengths`; shorter rows leave some
    idle. `splits` None is chosen from the rows' own lengths and the window. No past's length is known here,
    as a recorded launch serves all of them, so that short contexts on full layers are split as well.
    """
    load()
    H, N, C = q.shape
    q = q if q.stride(2) == 1 else q.contiguous()
    k, v = (x.contiguous() for x in own)
    G = k.shape[0]
    assert H % G == 0 and power_of_two(C) == C and C >= 16 and sum(lengths) == N, (q.shape, k.shape)
    tile, group = tile_for(C, q.device), H // G
    blocks = [-(-n * group // tile.rows) for n in lengths]
    windowed = mask.causal and mask.window is not None
    most = None if mask.window is None else mask.window - 1 + max(lengths)
    Z = splits or _splits(sum(blocks) * G, most, tile, q.device)
    y = q.new_empty((N, H, C))
    # Each split's normalised result, and log2 of the sum that normalised it.
    parts = q.new_empty((Z, N, H, C), dtype=torch.float32) if Z > 1 else y
    sums = q.new_empty((Z, N, H) if Z > 1 else 1, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _attend[(max(blocks), len(lengths) * G, Z)](
            q, k, v, past, parts, sums, G, N, past.shape[1], mask.window or 0, *q.stride()[:2],
            REP=group, C=C, BM=tile.rows, BN=tile.keys, CAUSAL=mask.causal, WINDOWED=windowed,
            SPLIT=Z > 1, INTERPRET=interpreted(), **tile.options,
        )  # fmt: skip
        if Z > 1:
            _merge[(N, H)](parts, sums, y, Z, C=C, SPLITS=power_of_two(Z), num_warps=MERGE_WARPS)
    return y.transpose(0, 1)


def _splits(blocks: int, keys: int | None, tile: Tile, device: torch.device) -> int:
    """As many splits as keep all blocks resident at once, if each has enough of at most so many keys."""
    worth = MOST if keys is None else min(MOST, keys // LEAST)
    return max(1, min(processors(device) * tile.resident // blocks, worth))


# ---- kernels -----------------------------------------------------------------------------------------


@kernel
def _find(entry, which: tl.constexpr, old, own, g):
    """Keys (0) or values (1) of KV head g: those of a piece if it is an `old` one, else the row's `own`."""
    there = tl.load(entry + which, mask=old, other=0).to(own.dtype)
    there += g * tl.load(entry + 3, mask=old, other=0)
    return tl.multiple_of(tl.where(old, there, own), 16)  # bytes


@kernel
def _attend(
    q, k, v, table, out, sums, G, N, width, window, q_h, q_n,
    REP: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SPLIT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One block of rows of one KV head over one run of its keys; row r is head r % REP of query r // REP.

    Keys are counted through a row's pieces and its own L, S in all. One loop goes over all, as two would move
    what tensor cores hold into registers, and a block of keys is all of one piece. Only keys from the first
    row's window to the last row's query are read. Exponentials are powers of two.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks of a causal pass are the longest
    b, g, part = tl.program_id(1) // G, (tl.program_id(1) % G).to(tl.int64), tl.program_id(2)
    table += b * width
    pieces, L = tl.load(table).to(tl.int32), tl.load(table + 3).to(tl.int32)
    if block * BM >= L * REP:
        return
    first, S = tl.load(table + 1), tl.load(table + 6 + 4 * pieces).to(tl.int32)
    row, c = block * BM + tl.arange(0, BM), tl.arange(0, C)
    head, query = row % REP, row // REP
    slot = S - L + query
    q += first * q_n + g * REP * q_h
    x = tl.load(q + (head * q_h + query * q_n)[:, None] + c[None, :], mask=(query < L)[:, None], other=0.0)
    low, high = 0, S
    if CAUSAL:
        high = tl.minimum(S, S - L + (block * BM + BM - 1) // REP + 1)
    if WINDOWED:
        low = tl.maximum(0, S - L + block * BM // REP - window + 1)
    if SPLIT:
        span = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(2)), BN) * BN
        low += part * span
        high = tl.minimum(high, low + span)
    own = (g * N + first - (S - L)) * C  # of token 0 of the row, as in the table
    k += own
    v += own
    piece, runs, start = 0, 0, 0
    for other in range(pieces + 1):
        end = tl.load(table + 6 + 4 * other).to(tl.int32)
        piece += (end <= low).to(tl.int32)
        runs += tl.cdiv(tl.maximum(tl.minimum(high, end) - tl.maximum(low, start), 0), BN)
        start = end
    entry = table + 4 + 4 * tl.minimum(piece, pieces)  # beyond all where a split has no keys
    at_k, at_v = _find(entry, 0, piece < pieces, k, g), _find(entry, 1, piece < pieces, v, g)
    edge = tl.load(entry + 2).to(tl.int32)
    total = tl.zeros((BM, C), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    if INTERPRET:
        x = x.to(tl.float32)
    for _ in range(runs):
        key = low + tl.arange(0, BN)
        end = tl.minimum(high, edge)
        there = (key < end)[:, None]
        at = (key * C)[:, None] + c[None, :]
        y = tl.load(at_k + at, mask=there, other=0.0)
        if INTERPRET:
            y = y.to(tl.float32)
        scores = tl.dot(x, tl.trans(y), input_precision="ieee")
        seen = (key < end)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= slot[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > slot[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1) * 1.4426950408889634)
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        p = tl.exp2(scores * 1.4426950408889634 - base[:, None])
        fade = tl.exp2(top - base)
        top, mass = new, mass * fade + tl.sum(p, 1)
        z = tl.load(at_v + at, mask=there, other=0.0)
        p = p.to(z.dtype)
        if INTERPRET:
            p, z = p.to(tl.float32), z.to(tl.float32)
        total = tl.dot(p, z, total * fade[:, None], input_precision="ieee")
        low = tl.minimum(low + BN, edge)
        # The next piece, or else the row's own. Loads that are masked out cost nothing.
        over = (low == edge) & (piece < pieces)
        piece += over.to(tl.int32)
        entry = table + 4 + 4 * piece
        old = over & (piece < pieces)
        at_k = tl.where(over, _find(entry, 0, old, k, g), at_k)
        at_v = tl.where(over, _find(entry, 1, old, v, g), at_v)
        edge = tl.load(entry + 2, mask=over, other=edge).to(tl.int32)
    total *= (1 / tl.where(mass == 0, 1.0, mass))[:, None]
    # The same rows again: never true, and unknown to the compiler, which else keeps all offsets in registers.
    row = (block + (S < L).to(tl.int32)) * BM + tl.arange(0, BM)
    head, query = row % REP, row // REP
    here, offset = ((part * N + first) * G + g) * REP, query * (G * REP) + head
    there = out + here * C + (offset * C)[:, None] + c[None, :]
    tl.store(there, total.to(out.dtype.element_ty), mask=(query < L)[:, None])
    if SPLIT:
        tl.store(sums + here + offset, tl.log2(mass) + top, mask=query < L)


@kernel
def _merge(parts, sums, out, Z, C: tl.constexpr, SPLITS: tl.constexpr):
    """One query's splits, weighted by the sums that normalised them; a split that saw nothing weighs 0."""
    N, H = tl.num_programs(0), tl.num_programs(1)
    here = tl.program_id(0) * H + tl.program_id(1)
    z, c = tl.arange(0, SPLITS), tl.arange(0, C)
    at = z.to(tl.int64) * N * H + here
    logs = tl.load(sums + at, mask=z < Z, other=float("-inf"))
    weight = tl.exp2(logs - tl.max(logs, 0))
    y = tl.load(parts + at[:, None] * C + c[None, :], mask=(z < Z)[:, None], other=0.0)
    total = tl.sum(y * weight[:, None], 0) / tl.sum(weight)
    tl.store(out + here.to(tl.int64) * C + c, total.to(out.dtype.element_ty))
