"""Attention for this model's heads of 256 and 512: replaces `Ops.attend`, without masks or repeated keys.

PyTorch's flash kernels stop at 256 and take no mask, and the others read one of L × S. Here the heads of a
KV head are rows of one matrix. Adjacent rows are one query's heads, so a block of rows spans few queries, and
keys outside its window or in padding are not read at all. Runs of keys go to different programs, if blocks
are fewer than the GPU's processors, and are merged by their log-sum-exps. Softmax and sums are float32, and
no result depends on the order in which programs run. Cached keys and values are read where they are: joining
them with a canvas's own would move 0.5 GB a step at 1k. A recorded launch finds their addresses in memory, so
that no second copy is held for it. The price: no gradients.

    B rows  L queries  S key slots  C head size  H heads  G KV heads  Z splits of S
"""
# Parameters of kernels are Triton's own types, which no annotation names.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from dgemma.network.ops import Mask

from .launch import interpreted, kernel, load, power_of_two, processors

if TYPE_CHECKING:
    import triton.language as tl

Tensor = torch.Tensor
Pair = tuple[Any, Any]  # keys and values, both tensors or both `Remote`

LEAST = 128  # keys that are worth a split
MOST = 8  # splits
MERGE_WARPS = 4
REGISTERS = 1 << 16  # of a processor


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


@dataclass(frozen=True)
class Remote:
    """Keys or values [B, G, P, C] whose address is in memory, so that a recorded launch reads any context's.

    The address is the first of `at`, int64 [2]. Two keep 16 bytes between them: Triton compiles again for a
    pointer that is not aligned so.
    """

    at: Tensor
    shape: torch.Size
    strides: tuple[int, ...]

    def stride(self) -> tuple[int, ...]:
        return self.strides


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
    """`attention` in PyTorch, of the same arrays: the mask is `dgemma.network.ops.layers.visible`'s."""
    L, S = q.shape[2], k.shape[2]
    key = torch.arange(S, device=q.device)
    query = torch.arange(S - L, S, device=q.device)[:, None]
    seen = torch.ones(1, 1, L, S, dtype=torch.bool, device=q.device)
    if mask.pad is not None:
        seen = (key >= mask.pad[:, None, None, None]) | (key == query)
    if mask.causal:
        seen = seen & (key <= query) & (key > query - (S if mask.window is None else mask.window))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=1.0, enable_gqa=q.shape[1] != k.shape[1]
    )


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, splits: int | None = None) -> Tensor:
    """`Ops.attention` of q [B, H, L, C] and k, v [B, G, S, C] -> [B, H, L, C]; see `attend`."""
    P = k.shape[2] - q.shape[2]
    own, past = (k[:, :, P:], v[:, :, P:]), (k[:, :, :P], v[:, :, :P])
    return attend(q, own, past, mask, splits)


def attend(q: Tensor, own: Pair, past: Pair | None, mask: Mask, splits: int | None = None) -> Tensor:
    """`Ops.attend` of q [B, H, L, C] over [B, G, ·, C] of `past`, then of `own`, all of one 16-bit type.

    C is a power of two from 16 on. Strides are free where C's is 1 and values have their keys'; anything else
    is copied, except a `Remote`. The result lies as [B, L, H, C] does, which is how the output projection
    reads it. NaN in slots before the pad reaches no row behind it. `splits` None is chosen from shapes, so
    that a captured step stays as it is.
    """
    load()
    B, H, L, C = q.shape
    q = q if q.stride(3) == 1 else q.contiguous()
    (k, v), (past_k, past_v) = _alike(own), _alike(past or own)
    G, P = k.shape[1], past_k.shape[2] if past else 0
    S = P + L
    remote = isinstance(past_k, Remote)
    at_k, at_v = (past_k.at, past_v.at) if remote else (past_k, past_v)
    assert H % G == 0 and k.shape[2] == L and power_of_two(C) == C and C >= 16, (q.shape, k.shape)
    tile = tile_for(C, q.device)
    pad, causal, window = mask.pad, mask.causal, S if mask.window is None else mask.window
    blocks = -(-L * (H // G) // tile.rows)
    Z = splits or _splits(blocks * B * G, S, tile, q.device)
    y = q.new_empty((B, L, H, C)).transpose(1, 2)
    # Each split's normalised result, and log2 of the sum that normalised it.
    parts = q.new_empty((Z, B, H, L, C), dtype=torch.float32) if Z > 1 else y[None]
    sums = q.new_empty((Z, B, H, L) if Z > 1 else 1, dtype=torch.float32)
    strides = [step for x in (q, k, past_k) for step in x.stride()[:3]]
    with torch.cuda.device_of(q):
        _attend[(blocks, B * G, Z)](
            q, k, v, at_k, at_v, parts, sums, sums if pad is None else pad, G, L, P, window,
            *strides, *parts.stride()[:4],
            REP=H // G, C=C, BM=tile.rows, BN=tile.keys, CAUSAL=causal, WINDOWED=causal and window < S,
            PADDED=pad is not None, SPLIT=Z > 1, REMOTE=remote, INTERPRET=interpreted(), **tile.options,
        )  # fmt: skip
        if Z > 1:
            _merge[(L, H, B)](
                parts, sums, y, Z, *y.stride()[:3], C=C, SPLITS=power_of_two(Z), num_warps=MERGE_WARPS
            )
    return y


def _alike(pair: Pair) -> Pair:
    """Keys and values [B, G, ·, C] that lie alike, C's stride 1, so that one offset is for both."""
    k, v = pair
    steps = zip(k.shape, k.stride(), v.stride(), strict=True)
    alike = all(size == 1 or step == other for size, step, other in steps)
    return pair if alike and k.stride()[3] == 1 else (k.contiguous(), v.contiguous())


def _splits(blocks: int, S: int, tile: Tile, device: torch.device) -> int:
    """As many splits as keep all blocks resident at once, if each has enough keys."""
    return max(1, min(processors(device) * tile.resident // blocks, S // LEAST, MOST))


# ---- kernels -----------------------------------------------------------------------------------------


@kernel
def _attend(
    q, k, v, past_k, past_v, out, sums, pad, G, L, P, window,
    q_b, q_h, q_l, k_b, k_g, k_s, p_b, p_g, p_s, o_z, o_b, o_h, o_l,
    REP: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr, REMOTE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One block of rows of one KV head over one run of its keys; row r is head r % REP of query r // REP.

    Slots below P are the past's, those from P on the own. One loop goes over both, and a block of keys is all
    of one or of the other. It reads only keys from `pad` on, and from the first row's window to the last
    row's query. Exponentials are powers of two.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks of a causal pass are the longest
    b, g, part = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G, tl.program_id(2)
    row, c = block * BM + tl.arange(0, BM), tl.arange(0, C)
    head, query = g * REP + row % REP, row // REP
    S = P + L
    some, slot = query < L, P + query
    x = tl.load(q + b * q_b + (head * q_h + query * q_l)[:, None] + c[None, :], mask=some[:, None], other=0.0)
    low, high = 0, S
    if CAUSAL:
        high = tl.minimum(S, S - L + (block * BM + BM - 1) // REP + 1)
    if WINDOWED:
        low = tl.maximum(0, S - L + block * BM // REP - window + 1)
    if PADDED:
        start = tl.load(pad + b).to(tl.int32)
        low = tl.maximum(low, start)
    if SPLIT:
        span = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(2)), BN) * BN
        low += part * span
        high = tl.minimum(high, low + span)
    k += b * k_b + g * k_g
    v += b * k_b + g * k_g
    if REMOTE:
        past_k = tl.multiple_of(tl.load(past_k).to(q.dtype), 16)
        past_v = tl.multiple_of(tl.load(past_v).to(q.dtype), 16)
    past_k += b * p_b + g * p_g
    past_v += b * p_b + g * p_g
    total = tl.zeros((BM, C), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    if PADDED:
        # A padding query sees itself. Row by row, so that NaN in padding stays there.
        alone = some & (slot < start) & (part == 0)
        mine = (query * k_s)[:, None] + c[None, :]
        own = tl.load(k + mine, mask=alone[:, None], other=0.0)
        score = tl.sum(x.to(tl.float32) * own.to(tl.float32), 1) * 1.4426950408889634
        top = tl.where(alone, score, top)
        mass = tl.where(alone, 1.0, mass)
        total = tl.load(v + mine, mask=alone[:, None], other=0.0).to(tl.float32)
    if INTERPRET:
        x = x.to(tl.float32)
    k -= P * k_s  # own slots are counted from P
    v -= P * k_s
    edge, start_own = tl.minimum(high, P), tl.maximum(low, P)
    runs = tl.cdiv(tl.maximum(edge - low, 0), BN)  # of the past
    for run in range(runs + tl.cdiv(tl.maximum(high - start_own, 0), BN)):
        old = run < runs
        end = tl.where(old, edge, high)
        key = tl.where(old, low, start_own - runs * BN) + run * BN + tl.arange(0, BN)
        there = (key < end)[:, None]
        at = (key * tl.where(old, p_s, k_s))[:, None] + c[None, :]
        y = tl.load(tl.where(old, past_k, k) + at, mask=there, other=0.0)
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
        z = tl.load(tl.where(old, past_v, v) + at, mask=there, other=0.0)
        p = p.to(z.dtype)
        if INTERPRET:
            p, z = p.to(tl.float32), z.to(tl.float32)
        total = tl.dot(p, z, total * fade[:, None], input_precision="ieee")
    total *= (1 / tl.where(mass == 0, 1.0, mass))[:, None]
    # The same rows again: never true, and unknown to the compiler, which else keeps all offsets in registers.
    row = (block + (L > S).to(tl.int32)) * BM + tl.arange(0, BM)
    head, query = g * REP + row % REP, row // REP
    there = out + part.to(tl.int64) * o_z + b * o_b + (head * o_h + query * o_l)[:, None] + c[None, :]
    tl.store(there, total.to(out.dtype.element_ty), mask=(query < L)[:, None])
    if SPLIT:
        here = (part * (tl.num_programs(1) // G) + b) * (G * REP * L) + head * L + query
        tl.store(sums + here, tl.log2(mass) + top, mask=query < L)


@kernel
def _merge(parts, sums, out, Z, o_b, o_h, o_l, C: tl.constexpr, SPLITS: tl.constexpr):
    """One row's splits, weighted by the sums that normalised them; a split that saw nothing weighs 0."""
    query, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    L, H, B = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    z, c = tl.arange(0, SPLITS), tl.arange(0, C)
    here = ((z * B + b) * H + head) * L + query
    logs = tl.load(sums + here, mask=z < Z, other=float("-inf"))
    weight = tl.exp2(logs - tl.max(logs, 0))
    y = tl.load(parts + here[:, None] * C + c[None, :], mask=(z < Z)[:, None], other=0.0)
    total = tl.sum(y * weight[:, None], 0) / tl.sum(weight)
    tl.store(out + b * o_b + head * o_h + query * o_l + c, total.to(out.dtype.element_ty))
