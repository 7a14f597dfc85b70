"""What the vocabulary says of each position, in two passes over logits: replaces `Ops.vocabulary_rows`.

The head is one cuBLAS product into a bfloat16 plane of logits, the only one that exists. One pass over it
gathers maximum, sum and entropy online. A second turns logits into probabilities in place, and the soft
embedding is again a product. The sample reads one part of each row between the two. Everything stays on the
device and every shape follows from the arguments', so that a CUDA graph can hold it. Nothing depends on the
order in which programs run. The price: logits are rounded to bfloat16, as they are in the reference.

`sparse_vocabulary` replaces the second product for rows that a few tokens dominate, and says what is missing.

Kernels compute in powers of two: z = logit / temperature · log2(e), whose exponentials are one instruction.
With a bias, compiled in by BIASED, each adds it to z as it reads a logit: a class of two bytes and its value,
both from caches. The plane keeps the logits of the head.

    N tokens  D hidden  V vocabulary  C classes of tokens
"""
# Parameters of kernels are Triton's own types, which no annotation names.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dgemma.network.ops.vocabulary import TRACE, Bias, Prediction

from .launch import interpreted, kernel, load, power_of_two, processors

if TYPE_CHECKING:
    import triton.language as tl

Tensor = torch.Tensor

ROWS = 512  # rows of the plane of logits: 268 MB of bfloat16 at V = 262,144, which is read once a block
WIDTH = 16384  # tokens of a split: what one program reduces, and what a sample reads again
TILE = 2048  # tokens in registers at once
SHORTEST = -1e30  # log2 of no threshold at all, finite so that sums with it are

# Launch options by kernel; tests/kernels/test_aot_vocabulary.py compiles these very ones.
OPTIONS = {
    "_statistics": {"num_warps": 4},
    "_draw": {"num_warps": 8},
    "_probabilities": {"num_warps": 4},
    "_shortlist": {"num_warps": 8},
    "_decide": {"num_warps": 4},
    "_product": {"num_warps": 8, "num_stages": 3},
    "_collect": {"num_warps": 4},
}
PRODUCT = {"BM": 128, "BN": 128, "BK": 64}  # 96 KB of stages: fits every architecture from sm_80 on
COLUMNS, GATHERED = 256, 16  # of `_collect`: columns a program, table rows in registers at once


@dataclass(frozen=True)
class Sparse:
    """Which rows of the soft embedding a few tokens may stand for.

    It keeps the first `keep` tokens with p > ratio · max p. A row is sparse if they leave out at most
    `missing`; every other row gets the whole product.
    """

    ratio: float = 1e-5
    keep: int = 64
    missing: float = 1e-3


# ---- the plain twins ---------------------------------------------------------------------------------


def vocabulary_plain(
    h: Tensor,
    table: Tensor,
    softcap: float,
    temperature: Tensor | float,
    uniforms: Tensor,
    bias: Bias | None = None,
) -> Prediction:
    """`vocabulary` in PyTorch, with planes of float32 [N, V]."""
    p, argmax, sample, entropy = _plain(h, table, softcap, temperature, uniforms, bias)
    return Prediction(argmax, sample, entropy, p.to(table.dtype) @ table, p.amax(-1))


def sparse_vocabulary_plain(
    h: Tensor,
    table: Tensor,
    softcap: float,
    temperature: Tensor | float,
    uniforms: Tensor,
    sparse: Sparse | None = None,
    bias: Bias | None = None,
) -> Prediction:
    """`sparse_vocabulary` in PyTorch, with planes of float32 [N, V]."""
    sparse = sparse or Sparse()
    p, argmax, sample, entropy = _plain(h, table, softcap, temperature, uniforms, bias)
    kept = p > sparse.ratio * p.amax(-1, keepdim=True)
    kept &= kept.cumsum(-1) <= sparse.keep
    missing = torch.where(kept, 0.0, p).sum(-1)
    dense = ~(missing <= sparse.missing)
    few = torch.where(kept, p, 0.0) @ table.float()
    soft = torch.where(dense[:, None], p.to(table.dtype) @ table, few.to(table.dtype))
    missing = torch.where(dense, 0.0, missing.clamp_min(TRACE))
    return Prediction(argmax, sample, entropy, soft, p.amax(-1), missing)


def _plain(
    h: Tensor,
    table: Tensor,
    softcap: float,
    temperature: Tensor | float,
    uniforms: Tensor,
    bias: Bias | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities [N, V] float32, argmax, sample and entropy [N]."""
    heat = torch.as_tensor(temperature, device=h.device).float().reshape(-1, 1)
    z = softcap * torch.tanh(F.linear(h, table).float() / softcap) / heat
    if bias is not None:
        z = z + bias.values.gather(-1, bias.classes[bias.which].long())
    logs = torch.log_softmax(z, -1)
    p, argmax = logs.exp(), z.argmax(-1)
    sample = (p.cumsum(-1) <= uniforms[:, None]).sum(-1)
    sample = torch.where(sample < len(table), sample, argmax)
    return p, argmax, sample, -(p * logs).sum(-1)


# ---- launches ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Said:
    """Statistics of logits [N, V], which are kept beside them."""

    logits: Tensor
    softcap: float
    temperature: Tensor  # [N] float32
    argmax: Tensor  # [N] int64
    sample: Tensor  # [N] int64
    entropy: Tensor  # [N] float32, nats
    top: Tensor  # [N] float32: the largest z
    total: Tensor  # [N] float32: log2 Σ 2^z, so that p = 2^(z − total)
    best: Tensor  # [N] float32: the probability of the argmax
    bias: Bias | None

    @property
    def added(self) -> tuple[Tensor, Tensor, Tensor, int, bool]:
        """What every kernel is told of a bias: classes, which, values, C and whether there is one."""
        if self.bias is None:
            return self.argmax, self.argmax, self.total, 0, False  # none is read
        return self.bias.classes, self.bias.which, self.bias.values, self.bias.values.shape[1], True

    def prediction(self, soft: Tensor, missing: Tensor | None = None) -> Prediction:
        return Prediction(self.argmax, self.sample, self.entropy, soft, self.best, missing)


def vocabulary(
    h: Tensor,
    table: Tensor,
    softcap: float,
    temperature: Tensor | float,
    uniforms: Tensor,
    bias: Bias | None = None,
) -> Prediction:
    """`Ops.vocabulary_rows` of h [N, D] and table [V, D], both bfloat16, N up to ROWS.

    The temperature is [N] or one number, uniforms are [N]. A row that holds NaN gets NaN as its entropy
    and soft embedding and some valid ids; no other row does.
    """

    load()
    with torch.cuda.device_of(h):
        said = _said(F.linear(h, table), softcap, temperature, uniforms.float(), bias)
        _probabilities_in_place(said)
        return said.prediction(said.logits @ table)


def sparse_vocabulary(
    h: Tensor,
    table: Tensor,
    softcap: float,
    temperature: Tensor | float,
    uniforms: Tensor,
    sparse: Sparse | None = None,
    bias: Bias | None = None,
) -> Prediction:
    """As `vocabulary`, with a soft embedding that leaves improbable tokens out; `missing` says how much.

    Row n of `soft` is off by at most missing[n] · max|table| in any column, beyond its rounding. A row was
    computed in full if missing[n] is 0, and only then. The host never reads the number of such rows: programs
    of the product whose rows do not exist return at once, and with none the table is not read.
    """
    load()
    with torch.cuda.device_of(h):
        said = _said(F.linear(h, table), softcap, temperature, uniforms.float(), bias)
        return said.prediction(*_sparse_soft(said, table, sparse or Sparse()))


def _said(
    logits: Tensor, softcap: float, temperature: Tensor | float, uniforms: Tensor, bias: Bias | None
) -> _Said:
    """Statistics of logits [N, V] as the head gives them, before the softcap."""
    N, V = logits.shape
    assert N <= ROWS, (N, "rows: 32 bits would not hold their places")
    temperature = torch.as_tensor(temperature, device=logits.device).float().expand(N).contiguous()
    splits = -(-V // WIDTH)
    # Of each split: the largest logit, or with a bias the largest z; mass, weighted.
    parts = logits.new_empty((3, N, splits), dtype=torch.float32)
    places = logits.new_empty((N, splits), dtype=torch.int32)
    ids = logits.new_empty((2, N), dtype=torch.int64)
    values = logits.new_empty((4, N), dtype=torch.float32)  # entropy, top, total, best
    entropy, top, total, best = values
    said = _Said(logits, softcap, temperature, ids[0], ids[1], entropy, top, total, best, bias)
    *added, biased = said.added
    _statistics[(N, splits)](
        logits, temperature, *added, parts, places, N, V, softcap,
        BIASED=biased, WIDTH=WIDTH, TILE=TILE, **OPTIONS["_statistics"],
    )  # fmt: skip
    _draw[(N,)](
        logits, temperature, *added, uniforms.contiguous(), parts, places, ids, values, N, V, splits, softcap,
        BIASED=biased, WIDTH=WIDTH, TILE=TILE, SPLITS=power_of_two(splits), **OPTIONS["_draw"],
    )  # fmt: skip
    return said


def _probabilities_in_place(said: _Said, dense: Tensor | None = None) -> None:
    """The plane [N, V] becomes probabilities, in rows that are `dense` [N] or in all of them."""
    N, V = said.logits.shape
    *added, biased = said.added
    _probabilities[(N, -(-V // WIDTH))](
        said.logits, said.temperature, *added, said.total, said.total if dense is None else dense, V,
        said.softcap, SOME=dense is not None, BIASED=biased, WIDTH=WIDTH, TILE=TILE,
        **OPTIONS["_probabilities"],
    )  # fmt: skip


def _sparse_soft(said: _Said, table: Tensor, sparse: Sparse) -> tuple[Tensor, Tensor]:
    """Soft embedding [N, D] in the table's type, and the mass [N] that it leaves out."""
    (N, V), D, keep = said.logits.shape, table.shape[1], sparse.keep
    assert table.is_contiguous() and table.numel() < 2**31, (table.shape, table.stride())
    splits = -(-V // WIDTH)
    new = said.logits.new_empty
    ids, shares = new((N, splits, keep), dtype=torch.int32), new((N, splits, keep), dtype=torch.float32)
    counts, dropped = new((N, splits), dtype=torch.int32), new((N, splits), dtype=torch.float32)
    limit = math.log2(sparse.ratio) if sparse.ratio > 0 else SHORTEST
    *added, biased = said.added
    _shortlist[(N, splits)](
        said.logits, said.temperature, *added, said.top, said.total, ids, shares, counts, dropped,
        V, splits, said.softcap, limit, keep, BIASED=biased, WIDTH=WIDTH, TILE=TILE, **OPTIONS["_shortlist"],
    )  # fmt: skip
    few_ids, few_shares = new((N, keep), dtype=torch.int32), new((N, keep), dtype=torch.float32)
    few, dense = new(N, dtype=torch.int32), new(N, dtype=torch.int32)
    missing = new(N, dtype=torch.float32)
    _decide[(N,)](
        ids, shares, counts, dropped, few_ids, few_shares, few, dense, missing, splits, keep, sparse.missing,
        TRACE, SPLITS=power_of_two(splits), KEEP=power_of_two(keep), **OPTIONS["_decide"],
    )  # fmt: skip
    _probabilities_in_place(said, dense)
    ends = dense.cumsum(0)  # where a dense row stands among the dense, counted from 1
    rows = torch.searchsorted(ends, torch.arange(1, N + 1, device=dense.device))  # N behind the last one
    runs = _runs(N, D, V, said.logits.device)
    partial = new((runs, N, D), dtype=torch.float32)
    grid = (-(-N // PRODUCT["BM"]), -(-D // PRODUCT["BN"]), runs)
    _product[grid](
        said.logits, table, rows, ends, partial, N, V, D, -(-V // runs // PRODUCT["BK"]) * PRODUCT["BK"],
        EVEN=V % PRODUCT["BK"] == 0, INTERPRET=interpreted(), **PRODUCT, **OPTIONS["_product"],
    )  # fmt: skip
    soft = table.new_empty((N, D))
    _collect[(N, -(-D // COLUMNS))](
        table, partial, ends, dense, few_ids, few_shares, few, soft, N, D, runs, keep,
        COLUMNS=COLUMNS, GATHERED=GATHERED, **OPTIONS["_collect"],
    )  # fmt: skip
    return soft, missing


def _runs(N: int, D: int, V: int, device: torch.device) -> int:
    """How many runs of V the product is cut into, to fill the GPU once."""
    blocks = -(-N // PRODUCT["BM"]) * -(-D // PRODUCT["BN"])
    return max(1, min(processors(device) // blocks, -(-V // PRODUCT["BK"])))


# ---- kernels -----------------------------------------------------------------------------------------


@kernel
def _scaled(x, temperature, cap):
    """softcap(x) / temperature · log2(e) of float32 x; ±∞ give ±cap, finite. tanh(a) = 1 − 2 / (e^2a + 1)."""
    unit = cap * (1.4426950408889634 / temperature)
    return unit - 2 * unit / (tl.exp2(x * (2.8853900817779268 / cap)) + 1)


@kernel
def _lift(classes, values, at, V):
    """What a bias adds to z of tokens `at`, from its row's classes [V] and values [C]."""
    kind = tl.load(classes + at, mask=at < V, other=0)
    return tl.load(values + kind) * 1.4426950408889634


@kernel
def _statistics(
    logits, temperature, classes, which, values, C, parts, places, N, V, cap,
    BIASED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest logit of one split of a row, its first place, Σ e and Σ e·(z − top), e = 2^(z − top).

    `top` is the largest z so far; when it rises by δ, sums shrink by 2^−δ, and the second also by δ · Σ e.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row)
    if BIASED:
        classes += tl.load(which + row) * V
        values += row * C
    place = split * WIDTH
    peak = tl.full((), float("-inf"), tl.float32)
    top = _scaled(peak, heat, cap)
    if BIASED:  # the largest z takes the place of the largest logit
        peak = tl.full((), -3e38, tl.float32)
        top = peak
    mass = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for a in range(split * WIDTH, tl.minimum(split * WIDTH + WIDTH, V), TILE):
        at = a + tl.arange(0, TILE)
        x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        if BIASED:
            x = _scaled(x, heat, cap) + _lift(classes, values, at, V)
            x = tl.where(at < V, x, -3e38)
        best, where = tl.max(x, 0, return_indices=True)
        place = tl.where(best > peak, a + where, place)
        peak = tl.where(best > peak, best, peak)
        if BIASED:
            old, top = top, peak
            z = x - top
        else:
            old, top = top, _scaled(peak, heat, cap)
            z = _scaled(x, heat, cap) - top
        e = tl.where(at < V, tl.exp2(z), 0.0)
        fade = tl.exp2(old - top)
        weighted = fade * (weighted + mass * (old - top)) + tl.sum(e * z)
        mass = fade * mass + tl.sum(e)
    here = row * tl.num_programs(1) + split
    plane = N * tl.num_programs(1)
    tl.store(parts + here, peak)
    tl.store(parts + plane + here, mass)
    tl.store(parts + 2 * plane + here, weighted)
    tl.store(places + here, place)


@kernel
def _draw(
    logits, temperature, classes, which, values, C, uniforms, parts, places, ids, out, N, V, splits, cap,
    BIASED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merges a row's splits, and draws the first token whose cumulative mass exceeds uniform · mass.

    Its split follows from the splits' masses, and only that one is read. The argmax is drawn if rounding
    leaves no token; a token of mass 0 never is.
    """
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    if BIASED:
        classes += tl.load(which + row) * V
        values += row * C
    split = tl.arange(0, SPLITS)
    here = parts + row * splits + split
    peaks = tl.load(here, mask=split < splits, other=float("-inf"))
    mass = tl.load(here + N * splits, mask=split < splits, other=0.0)
    weighted = tl.load(here + 2 * N * splits, mask=split < splits, other=0.0)
    peak, first = tl.max(peaks, 0, return_indices=True)
    if BIASED:
        top = peak
        shift = tl.where(split < splits, peaks - top, -3e38)
    else:
        top = _scaled(peak, heat, cap)
        shift = _scaled(peaks, heat, cap) - top
    fade = tl.exp2(shift)
    weighted = tl.sum(fade * (weighted + mass * shift))
    mass = fade * mass
    total = tl.sum(mass)
    argmax = tl.load(places + row * splits + tl.minimum(first, splits - 1))
    tl.store(ids + row, argmax.to(tl.int64))
    tl.store(out + row, 0.6931471805599453 * (tl.log2(total) - weighted / total))
    tl.store(out + N + row, top)
    tl.store(out + 2 * N + row, top + tl.log2(total))
    tl.store(out + 3 * N + row, 1 / total)

    reach = tl.cumsum(mass, 0)
    goal = tl.load(uniforms + row) * total
    chosen = tl.min(tl.where((reach > goal) & (mass > 0), split, SPLITS))
    below = tl.sum(tl.where(split == chosen - 1, reach, 0.0))
    start = chosen * WIDTH  # behind the vocabulary where no split is chosen
    sample = V
    for a in range(start, tl.minimum(start + WIDTH, V), TILE):
        at = a + tl.arange(0, TILE)
        x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        z = _scaled(x, heat, cap)
        if BIASED:
            z += _lift(classes, values, at, V)
        e = tl.where(at < V, tl.exp2(z - top), 0.0)
        sums = below + tl.cumsum(e, 0)
        sample = tl.minimum(sample, tl.min(tl.where((sums > goal) & (e > 0), at, V)))
        below += tl.sum(e)
    tl.store(ids + N + row, tl.where(sample < V, sample, argmax).to(tl.int64))


@kernel
def _probabilities(
    logits, temperature, classes, which, values, C, total, dense, V, cap,
    SOME: tl.constexpr, BIASED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One split of a row becomes 2^(z − total) in place; where SOME, of a `dense` row only."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if SOME:  # noqa: SIM102, a condition on the host and one on the device
        if tl.load(dense + row) == 0:
            return
    heat = tl.load(temperature + row)
    if BIASED:
        classes += tl.load(which + row) * V
        values += row * C
    whole = tl.load(total + row)
    for a in range(split * WIDTH, tl.minimum(split * WIDTH + WIDTH, V), TILE):
        at = a + tl.arange(0, TILE)
        here = logits + row * V + at
        x = tl.load(here, mask=at < V, other=0.0).to(tl.float32)
        z = _scaled(x, heat, cap)
        if BIASED:
            z += _lift(classes, values, at, V)
        p = tl.exp2(z - whole)
        tl.store(here, p.to(logits.dtype.element_ty), mask=at < V)


@kernel
def _shortlist(
    logits, temperature, classes, which, values, C, top, total, ids, shares, counts, dropped,
    V, splits, cap, limit, keep, BIASED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first `keep` tokens with z > top + limit of one split of a row, and the mass of all others."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row)
    if BIASED:
        classes += tl.load(which + row) * V
        values += row * C
    least = tl.load(top + row) + limit
    whole = tl.load(total + row)
    here = row * splits + split
    count = 0
    rest = tl.zeros((), tl.float32)
    for a in range(split * WIDTH, tl.minimum(split * WIDTH + WIDTH, V), TILE):
        at = a + tl.arange(0, TILE)
        x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        z = _scaled(x, heat, cap)
        if BIASED:
            z += _lift(classes, values, at, V)
        p = tl.where(at < V, tl.exp2(z - whole), 0.0)
        good = (at < V) & (z > least)
        rank = count + tl.cumsum(good.to(tl.int32), 0) - 1
        kept = good & (rank < keep)
        tl.store(ids + here * keep + rank, at, mask=kept)
        tl.store(shares + here * keep + rank, p, mask=kept)
        rest += tl.sum(tl.where(kept, 0.0, p))
        count += tl.sum(good.to(tl.int32))
    tl.store(counts + here, tl.minimum(count, keep))
    tl.store(dropped + here, rest)


@kernel
def _decide(
    ids, shares, counts, dropped, few_ids, few_shares, few, dense, missing, splits, keep, most, trace,
    SPLITS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The splits' lists of a row as one, cut to `keep`; whether the row is `dense` for all that they miss."""
    row = tl.program_id(0).to(tl.int64)
    split, slot = tl.arange(0, SPLITS), tl.arange(0, KEEP)
    count = tl.load(counts + row * splits + split, mask=split < splits, other=0)
    rest = tl.sum(tl.load(dropped + row * splits + split, mask=split < splits, other=0.0))
    place = (tl.cumsum(count, 0) - count)[:, None] + slot[None, :]  # [SPLITS, KEEP]
    listed = slot[None, :] < count[:, None]
    here = (row * splits + split)[:, None] * keep + slot[None, :]
    token = tl.load(ids + here, mask=listed, other=0)
    share = tl.load(shares + here, mask=listed, other=0.0)
    kept = listed & (place < keep)
    tl.store(few_ids + row * keep + place, token, mask=kept)
    tl.store(few_shares + row * keep + place, share, mask=kept)
    rest += tl.sum(tl.sum(tl.where(kept, 0.0, share), 1), 0)
    sparse = rest <= most  # NaN is not
    tl.store(few + row, tl.minimum(tl.sum(count), keep))
    tl.store(dense + row, tl.where(sparse, 0, 1))
    tl.store(missing + row, tl.where(sparse, tl.maximum(rest, trace), 0.0))


@kernel
def _product(
    p, table, rows, ends, partial, N, V, D, span, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """partial[run, i] = Σ_v p[rows[i], v] · table[v] over a run of `span` tokens, for dense rows i only.

    EVEN: `span` tokens are whole blocks in every run, so that loads need no mask along them.
    """
    count = tl.load(ends + N - 1)
    first = tl.program_id(0) * BM
    if first >= count:
        return
    slot = first + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    some = (slot < count)[:, None]
    row = tl.load(rows + slot, mask=slot < count, other=0).to(tl.int32)
    start, k = tl.program_id(2) * span, tl.arange(0, BK)
    at_p = p + (row[:, None] * V + k[None, :])  # 32 bits hold ROWS · V and V · D
    at_table = table + (k[:, None] * D + column[None, :])
    sums = tl.zeros((BM, BN), tl.float32)
    for a in range(start, tl.minimum(start + span, V), BK):
        left, right = some, (column < D)[None, :]
        if not EVEN:
            left, right = left & (a + k < V)[None, :], right & (a + k < V)[:, None]
        x = tl.load(at_p + a, mask=left, other=0.0)
        y = tl.load(at_table + a * D, mask=right, other=0.0)
        if INTERPRET:
            x, y = x.to(tl.float32), y.to(tl.float32)
        sums = tl.dot(x, y, sums, input_precision="ieee")
    here = partial + (tl.program_id(2) * N + slot).to(tl.int64)[:, None] * D + column[None, :]
    tl.store(here, sums, mask=some & (column < D)[None, :])


@kernel
def _collect(
    table, partial, ends, dense, few_ids, few_shares, few, soft, N, D, runs, keep,
    COLUMNS: tl.constexpr, GATHERED: tl.constexpr,
):  # fmt: skip
    """Some columns of a row of `soft`: the sum of the product's parts, or of the kept tokens' table rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    if tl.load(dense + row) == 1:
        slot = tl.load(ends + row) - 1
        for run in range(runs):
            here = partial + (run * N + slot).to(tl.int64) * D + column
            total += tl.load(here, mask=column < D, other=0.0)
    else:
        count = tl.load(few + row)
        for a in range(0, count, GATHERED):
            at = a + tl.arange(0, GATHERED)
            token = tl.load(few_ids + row * keep + at, mask=at < count, other=0).to(tl.int64)
            share = tl.load(few_shares + row * keep + at, mask=at < count, other=0.0)
            there = table + token[:, None] * D + column[None, :]
            y = tl.load(there, mask=(at < count)[:, None] & (column < D)[None, :], other=0.0)
            total += tl.sum(y.to(tl.float32) * share[:, None], 0)
    tl.store(soft + row * D + column, total.to(soft.dtype.element_ty), mask=column < D)
