"""Attention of a canvas over its past and itself, piece by piece: replaces `Ops.attend`, and copies no keys.

Keys and values stay where they are: each piece of them has scores of its own, and the heads of a KV head
are the rows of one matrix. Scores are of the compute type, the softmax is float32, and weights are rounded
to the compute type for the product, as in MLX's own attention. A past of one piece is weighed together with
the canvas. A longer one is cut into equal pieces, which are one more axis. Some at a time are weighed, and
merged in float32 by the logarithms of their masses. So no temporary grows with the context: see `slots`.

The price: the sum over a past's last piece and the canvas is rounded once more than one product would be;
a merge reads and writes float32 sums [B, H, L, C]; and values of padding must be finite, as a weight of
zero is all that hides them.

A `Path` is what differs with and without kernels; all else is the same code.

    B rows of a batch  H heads  G KV heads  L queries  P cached slots  N pieces  n slots of a piece
    C head size  R rows of a KV head's matrix: H/G · L
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import mlx.core as mx

from dgemma.network.ops import KV, Array, Mask, Ops
from dgemma.network.ops.layers import visible
from dgemma_mlx.arrays import MlxArrays

from .launch import Kernel, simd_groups

# Slots of a piece at most: a thread of the kernel holds 33 scores then, own canvas included.
SLOTS = 8192
THREADS = 256  # of a row of scores, at most


@dataclass(frozen=True)
class Weighed:
    """What pieces come to: for each a weighted mean of its values, and how much it weighs."""

    y: Array  # [B, G, N, R, C] of the compute type or float32
    log_mass: Array  # [B, G, N, R, 1] float32: log Σ exp(score)


@dataclass(frozen=True)
class Path:
    """With kernels or without."""

    at_once: int  # bytes of scores up to which several pieces are weighed at once
    # (ops, q [B, G, 1, R, C], N pieces [B, G, N, n, C], and with one the canvas's own; pad, first slot)
    weigh: Callable[[MlxArrays, Array, Sequence[KV], Array | None, int], Weighed]
    # (ops, one piece for all before, the next ones) -> one piece
    merge: Callable[[MlxArrays, Weighed | None, Weighed], Weighed]


def attend(ops: MlxArrays, q: Array, own: KV, past: KV | None, mask: Mask) -> Array:
    """`Ops.attend` of q [B, H, L, C] over `past` [B, G, P, C] and its own L slots.

    A canvas, which is not `causal`, sees all of the past that it is given; its queries are never padding, so
    that the pad [B] hides slots of the past only. Causal attention is MLX's over joined keys.
    """
    if mask.causal:
        return Ops.attend(ops, q, own, past, mask)
    return _attend(ops, q, own, past, mask.pad, Path(ops.scores_at_once, weighed, merged))


def attend_plain(ops: MlxArrays, q: Array, own: KV, past: KV | None, mask: Mask) -> Array:
    """`attend` of the same arrays without a kernel."""
    if mask.causal:
        return Ops.attend(ops, q, own, past, mask)
    return _attend(ops, q, own, past, mask.pad, Path(0, weighed_plain, merged_plain))


def _attend(ops: MlxArrays, q: Array, own: KV, past: KV | None, pad: Array | None, path: Path) -> Array:
    """`attend` of a canvas, q [B, H, L, C] -> [B, H, L, C]."""
    B, H, L, C = q.shape
    rows = q.reshape(B, own[0].shape[1], 1, -1, C)  # [B, G, 1, R, C]
    size = slots(B * H * L, ops.score_bytes)
    at_once = max(1, path.at_once // (q.itemsize * B * H * L * size))
    total = None
    if past is None or past[0].shape[2] == 0:  # then no slot is padding, whatever `pad` says
        past, pad = None, None
    for start, pieces in _groups(own, past, size, at_once):
        # Evaluation is breadth first: without this edge the scores of all groups exist at once.
        x = rows if total is None else ops.after(rows, total.y)
        new = path.weigh(ops, x, pieces, pad, start)
        total = path.merge(ops, total, new)
    assert total is not None
    return ops.like(total.y, q).reshape(B, H, L, C)


def slots(queries: int, most: int) -> int:
    """Slots of a piece, so that its scores for `queries` (B·H·L) fit `most` bytes, counted as float32.

    These scores are the largest temporary, whatever the context. A canvas of the released model has 8 MB in
    bfloat16 at 1,024 slots, 67 MB at 8,192, and 201 MB where kernels weigh three pieces at once; plain MLX
    would make a float32 copy of that. A CPU has ten operations in flight, so it holds up to ten such arrays.
    The canvas's scores of itself, B·H·L² of them, are not divided.
    """
    return max(1, min(SLOTS, most // (4 * queries)))


def _groups(own: KV, past: KV | None, size: int, at_once: int) -> Iterator[tuple[int, list[KV]]]:
    """`_pieces` to weigh together, with their first slot: whole ones of the past, then its rest and `own`."""
    alone = _pieces(own, 0, own[0].shape[2], 1)
    if past is None:
        yield 0, [alone]
        return
    P = past[0].shape[2]
    rest = (P - 1) // size * size
    for a in range(0, rest, at_once * size):
        b = min(a + at_once * size, rest)
        yield a, [_pieces(past, a, b, (b - a) // size)]
    yield rest, [_pieces(past, rest, P, 1), alone]


def _pieces(kv: KV, start: int, stop: int, count: int) -> KV:
    """Slots of keys and values [B, G, ·, C] as `count` pieces [B, G, N, n, C]."""
    B, G, _, C = kv[0].shape
    k, v = (x[:, :, start:stop].reshape(B, G, count, -1, C) for x in kv)
    return k, v


def _scores(q: Array, pieces: Sequence[KV]) -> list[Array]:
    """q [B, G, 1, R, C] @ keysᵀ of each: [B, G, N, R, n]."""
    return [q @ k.swapaxes(-1, -2) for k, _ in pieces]


def _sum(weights: Sequence[Array], pieces: Sequence[KV]) -> Array:
    """Σ weights [B, G, N, R, n] @ values over what has been weighed together: [B, G, N, R, C]."""
    y = weights[0] @ pieces[0][1]
    for p, (_, v) in zip(weights[1:], pieces[1:], strict=True):
        y = mx.addmm(y, p, v)
    return y


# ---- weighing a group ----------------------------------------------------------------------------------


def weighed(ops: MlxArrays, q: Array, pieces: Sequence[KV], pad: Array | None, start: int) -> Weighed:
    """Scores of q [B, G, 1, R, C] with each piece, `softmax` over them, and the sum of values so weighted."""
    weights, log_mass = softmax(_scores(q, pieces), pad, start)
    return Weighed(_sum(weights, pieces), log_mass)


def softmax(scores: Sequence[Array], pad: Array | None, start: int) -> tuple[list[Array], Array]:
    """Softmax over the rows of scores [B, G, N, R, n], in their type, and log Σ exp [B, G, N, R, 1] float32.

    The two of a pair have N = 1, and count as joined. Slots before `pad` [B] weigh 0; the first of the N
    pieces begins at slot `start`. A row of which nothing is left weighs 0, and its log is −3e38. One launch.
    """
    first, second = scores[0], scores[-1]
    pair = len(scores) == 2
    assert not pair or first.shape[2] == 1, first.shape
    n = sum(s.shape[-1] for s in scores)
    threads = simd_groups(n, THREADS)
    *weights, log_mass = SOFTMAX(
        first,
        second,
        mx.array([0]) if pad is None else pad,
        mx.array(start),
        grid=(threads, first.size // first.shape[-1], 1),
        group=(threads, 1, 1),
        shapes=(first.shape, second.shape if pair else (1,), (*first.shape[:-1], 1)),
        dtypes=(first.dtype, first.dtype, mx.float32),
        T=first.dtype,
        PAIR=pair,
        PADDED=pad is not None,
        HELD=-(-n // threads),
        TG=threads,
    )
    return weights[: len(scores)], log_mass


def weighed_plain(ops: MlxArrays, q: Array, pieces: Sequence[KV], pad: Array | None, start: int) -> Weighed:
    """`weighed` of the same arrays without a kernel."""
    scores = _scores(q, pieces)
    if not ops.on_gpu:
        return _weighed_on_cpu(ops, _masked(ops, scores, pad, start), pieces)
    weights, log_mass = softmax_plain(ops, scores, pad, start)
    return Weighed(_sum(weights, pieces), log_mass)


def _weighed_on_cpu(ops: MlxArrays, scores: Sequence[Array], pieces: Sequence[KV]) -> Weighed:
    """`weighed_plain` of scores [B, G, N, R, n] apart: a CPU's products would copy parts of joined weights.

    Exponentials are slow, so each score has one, and the mass divides the sum of values.
    """
    top = ops.to_wide(reduce(mx.maximum, [mx.max(s, -1, keepdims=True) for s in scores]))
    weights = [ops.exp(ops.to_wide(s) - top) for s in scores]
    mass = reduce(mx.add, [mx.sum(p, -1, keepdims=True) for p in weights])
    y = _sum([ops.like(p, s) for p, s in zip(weights, scores, strict=True)], pieces)
    return Weighed(ops.to_wide(y) / mass, top + mx.log(mass))


def softmax_plain(
    ops: MlxArrays, scores: Sequence[Array], pad: Array | None, start: int
) -> tuple[list[Array], Array]:
    """`softmax` without a kernel; the log of a row of which nothing is left is the least number's instead.

    Scores of a pair are joined, so that MLX's fused softmax reads them once: a piece and a canvas at most.
    """
    scores = _masked(ops, scores, pad, start)
    x = scores[0] if len(scores) == 1 else ops.concat(scores, -1)
    p, n = ops.softmax(x, -1), scores[0].shape[-1]
    return [p[..., :n], p[..., n:]][: len(scores)], mx.logsumexp(ops.to_wide(x), -1, keepdims=True)


def _masked(ops: MlxArrays, scores: Sequence[Array], pad: Array | None, start: int) -> list[Array]:
    """`scores` [B, G, N, R, n]; those of slots before `pad` [B] become the least number there is."""
    first, *rest = scores
    if pad is None:
        return [first, *rest]
    N, n = first.shape[2], first.shape[-1]
    # One query behind all pieces sees them: the last column is its own.
    mask = visible(ops, 1, N * n + 1, Mask(pad - start))
    assert mask is not None
    mask = mask[..., :-1].reshape(-1, 1, N, 1, n)
    return [mx.where(mask, first, mx.finfo(first.dtype).min), *rest]


# ---- merging groups ------------------------------------------------------------------------------------


def merged(ops: MlxArrays, total: Weighed | None, new: Weighed) -> Weighed:
    """One piece for all before and the N new ones, y in float32; a single piece as it is. One launch."""
    B, G, N, R, C = new.y.shape
    if total is None and N == 1:
        return new
    before = total or Weighed(mx.array([0.0]), mx.array([0.0]))
    return Weighed(
        *MERGE(
            before.y,
            before.log_mass,
            new.y,
            new.log_mass,
            grid=(C, R, B * G),
            group=(min(C, THREADS), 1, 1),
            shapes=((B, G, 1, R, C), (B, G, 1, R, 1)),
            dtypes=(mx.float32, mx.float32),
            BEFORE=total is not None,
        )
    )


def merged_plain(ops: MlxArrays, total: Weighed | None, new: Weighed) -> Weighed:
    """`merged` without a kernel."""
    each = [Weighed(new.y[:, :, i : i + 1], new.log_mass[:, :, i : i + 1]) for i in range(new.y.shape[2])]

    def add(a: Weighed, b: Weighed) -> Weighed:
        mass = mx.logaddexp(a.log_mass, b.log_mass)
        shares = [ops.to_wide(x.y) * mx.exp(x.log_mass - mass) for x in (a, b)]
        return Weighed(shares[0] + shares[1], mass)

    return reduce(add, each if total is None else [total, *each])


# A thread has the scores t, t + TG, ... of its row, first those of the one piece, then the other's. What is
# hidden or beyond the end is LOWEST, and is not read: the score of a hidden key may be NaN.
SOFTMAX = Kernel(
    name="attention_softmax",
    inputs=("first", "second", "pad", "start"),
    outputs=("p_first", "p_second", "log_mass"),
    source="""
    constexpr int SG = TG / 32;
    constexpr float LOWEST = -3e38f;
    threadgroup float tops[SG];
    threadgroup float masses[SG];
    const int t = int(thread_position_in_threadgroup.x);
    const uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    const size_t row = threadgroup_position_in_grid.y;
    const int n = first_shape[4], m = PAIR ? second_shape[4] : 0;
    const size_t piece = row / first_shape[3];
    const size_t batch = piece / (size_t(first_shape[1]) * first_shape[2]);
    const int begin = start + int(piece % first_shape[2]) * n;
    const int hidden = PADDED ? static_cast<int>(pad[batch]) - begin : 0;
    float v[HELD];
    float top = LOWEST;
    for (int i = 0; i < HELD; i++) {
        const int at = t + i * TG;
        v[i] = LOWEST;
        if (at < n && at >= hidden) v[i] = static_cast<float>(first[row * n + at]);
        if (PAIR && at >= n && at < n + m) v[i] = static_cast<float>(second[row * m + at - n]);
        top = metal::max(top, v[i]);
    }
    top = simd_max(top);
    if (lane == 0) tops[sg] = top;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    top = simd_max(lane < uint(SG) ? tops[lane] : LOWEST);
    float mass = 0.0f;
    for (int i = 0; i < HELD; i++) {
        v[i] = v[i] == LOWEST ? 0.0f : metal::precise::exp(v[i] - top);
        mass += v[i];
    }
    mass = simd_sum(mass);
    if (lane == 0) masses[sg] = mass;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    mass = simd_sum(lane < uint(SG) ? masses[lane] : 0.0f);
    const float share = mass == 0.0f ? 0.0f : 1.0f / mass;
    for (int i = 0; i < HELD; i++) {
        const int at = t + i * TG;
        if (at < n) p_first[row * n + at] = static_cast<T>(v[i] * share);
        if (PAIR && at >= n && at < n + m) p_second[row * m + at - n] = static_cast<T>(v[i] * share);
    }
    if (t == 0) log_mass[row] = mass == 0.0f ? LOWEST : top + metal::precise::log(mass);
""",
)

# A thread has a column of a row. Means of pieces that weigh nothing are 0, and so is what comes of them.
MERGE = Kernel(
    name="attention_merge",
    inputs=("before", "log_before", "y", "log_mass"),
    outputs=("out", "log_out"),
    source="""
    const int N = y_shape[2], R = y_shape[3], C = y_shape[4];
    const int c = int(thread_position_in_grid.x);
    const size_t bg = thread_position_in_grid.z, r = thread_position_in_grid.y;
    const size_t row = bg * R + r;
    float top = BEFORE ? log_before[row] : -INFINITY;
    for (int i = 0; i < N; i++) top = metal::max(top, log_mass[(bg * N + i) * R + r]);
    float mass = 0.0f, sum = 0.0f;
    if (BEFORE) {
        mass = metal::precise::exp(log_before[row] - top);
        sum = mass * before[row * C + c];
    }
    for (int i = 0; i < N; i++) {
        const size_t at = (bg * N + i) * R + r;
        const float share = metal::precise::exp(log_mass[at] - top);
        mass += share;
        sum += share * static_cast<float>(y[at * C + c]);
    }
    out[row * C + c] = sum / mass;
    if (c == 0) log_out[row] = top + metal::precise::log(mass);
""",
)
