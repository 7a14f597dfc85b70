"""Attention of a canvas over its past and itself, part by part: replaces `Ops.attend_row`, copies no keys.

Keys and values stay where they are: each part of them has scores of its own, and the heads of a KV head are
the rows of one matrix. Scores are of the compute type, the softmax is float32, and weights are rounded to the
compute type for the product, as in MLX's own attention. A past of one part is weighed together with the
canvas. A longer piece of it is cut into equal parts, which are one more axis. Some at a time are weighed, and
merged in float32 by the logarithms of their masses. So no temporary grows with the context: see `slots`.

The price: the sum over a past's last part and the canvas is rounded once more than one product would be; a
merge reads and writes float32 sums [H, L, C]; and the rest of every piece but the last is a group of its own.

A `Path` is what differs with and without kernels; all else is the same code.

    H heads  G KV heads  L queries  P slots of a piece of the past  N parts  n slots of a part  C head size
    R rows of a KV head's matrix: H/G · L
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import mlx.core as mx

from dgemma.network.ops import KV, Array, Mask, Ops, Past
from dgemma_mlx.arrays import MlxArrays

from .launch import Kernel, simd_groups

# Slots of a part at most: a thread of the kernel holds 33 scores then, own canvas included.
SLOTS = 8192
THREADS = 256  # of a row of scores, at most


@dataclass(frozen=True)
class Weighed:
    """What parts come to: for each a weighted mean of its values, and how much it weighs."""

    y: Array  # [G, N, R, C] of the compute type or float32
    log_mass: Array  # [G, N, R, 1] float32: log Σ exp(score)


@dataclass(frozen=True)
class Path:
    """With kernels or without."""

    at_once: int  # bytes of scores up to which several parts are weighed at once
    # (ops, q [G, 1, R, C], N parts [G, N, n, C], and with one the canvas's own)
    weigh: Callable[[MlxArrays, Array, Sequence[KV]], Weighed]
    # (ops, one part for all before, the next ones) -> one part
    merge: Callable[[MlxArrays, Weighed | None, Weighed], Weighed]


def attend_row(ops: MlxArrays, q: Array, own: KV, past: Past, mask: Mask) -> Array:
    """`Ops.attend_row` of q [H, L, C] over pieces [G, P, C] and its own L slots.

    A canvas, which is not `causal`, sees all of the past that it is given. Causal attention is MLX's over
    joined keys.
    """
    if mask.causal:
        return Ops.attend_row(ops, q, own, past, mask)
    return _attend(ops, q, own, past, Path(ops.scores_at_once, weighed, merged))


def attend_row_plain(ops: MlxArrays, q: Array, own: KV, past: Past, mask: Mask) -> Array:
    """`attend_row` of the same arrays without a kernel."""
    if mask.causal:
        return Ops.attend_row(ops, q, own, past, mask)
    return _attend(ops, q, own, past, Path(0, weighed_plain, merged_plain))


def _attend(ops: MlxArrays, q: Array, own: KV, past: Past, path: Path) -> Array:
    """`attend_row` of a canvas, q [H, L, C] -> [H, L, C]."""
    H, L, C = q.shape
    rows = q.reshape(own[0].shape[0], 1, -1, C)  # [G, 1, R, C]
    size = slots(H * L, ops.score_bytes)
    at_once = max(1, path.at_once // (q.itemsize * H * L * size))
    total = None
    for parts in _groups(own, past, size, at_once):
        # Evaluation is breadth first: without this edge the scores of all groups exist at once.
        x = rows if total is None else ops.after(rows, total.y)
        total = path.merge(ops, total, path.weigh(ops, x, parts))
    assert total is not None
    return ops.like(total.y, q).reshape(H, L, C)


def slots(queries: int, most: int) -> int:
    """Slots of a part, so that its scores for `queries` (H·L) fit `most` bytes, counted as float32.

    These scores are the largest temporary, whatever the context. A canvas of the released model has 8 MB in
    bfloat16 at 1,024 slots, 67 MB at 8,192, and 201 MB where kernels weigh three parts at once; plain MLX
    would make a float32 copy of that. A CPU has ten operations in flight, so it holds up to ten such arrays.
    The canvas's scores of itself, H·L² of them, are not divided.
    """
    return max(1, min(SLOTS, most // (4 * queries)))


def _groups(own: KV, past: Past, size: int, at_once: int) -> Iterator[list[KV]]:
    """`_parts` to weigh together: whole ones of each piece, then its rest, and the last rest with `own`."""
    alone = _parts(own, 0, own[0].shape[1], 1)
    lengths = [k.shape[1] for k, _ in past]
    last = max((i for i, P in enumerate(lengths) if P), default=None)
    for i, (piece, P) in enumerate(zip(past, lengths, strict=True)):
        whole = (P - (i == last)) // size * size  # of the last piece something is left for `own`
        for a in range(0, whole, at_once * size):
            b = min(a + at_once * size, whole)
            yield [_parts(piece, a, b, (b - a) // size)]
        if whole < P:
            rest = _parts(piece, whole, P, 1)
            yield [rest, alone] if i == last else [rest]
    if last is None:
        yield [alone]


def _parts(kv: KV, start: int, stop: int, count: int) -> KV:
    """Slots of keys and values [G, ·, C] as `count` parts [G, N, n, C]."""
    G, _, C = kv[0].shape
    k, v = (x[:, start:stop].reshape(G, count, -1, C) for x in kv)
    return k, v


def _scores(q: Array, parts: Sequence[KV]) -> list[Array]:
    """q [G, 1, R, C] @ keysᵀ of each: [G, N, R, n]."""
    return [q @ k.swapaxes(-1, -2) for k, _ in parts]


def _sum(weights: Sequence[Array], parts: Sequence[KV]) -> Array:
    """Σ weights [G, N, R, n] @ values over what has been weighed together: [G, N, R, C]."""
    y = weights[0] @ parts[0][1]
    for p, (_, v) in zip(weights[1:], parts[1:], strict=True):
        y = mx.addmm(y, p, v)
    return y


# ---- weighing a group ----------------------------------------------------------------------------------


def weighed(ops: MlxArrays, q: Array, parts: Sequence[KV]) -> Weighed:
    """Scores of q [G, 1, R, C] with each part, `softmax` over them, and the sum of values so weighted."""
    weights, log_mass = softmax(_scores(q, parts))
    return Weighed(_sum(weights, parts), log_mass)


def softmax(scores: Sequence[Array]) -> tuple[list[Array], Array]:
    """Softmax over the rows of scores [G, N, R, n], in their type, and log Σ exp [G, N, R, 1] float32.

    The two of a pair have N = 1, and count as joined. One launch.
    """
    first, second = scores[0], scores[-1]
    pair = len(scores) == 2
    assert not pair or first.shape[1] == 1, first.shape
    n = sum(s.shape[-1] for s in scores)
    threads = simd_groups(n, THREADS)
    *weights, log_mass = SOFTMAX(
        first,
        second,
        grid=(threads, first.size // first.shape[-1], 1),
        group=(threads, 1, 1),
        shapes=(first.shape, second.shape if pair else (1,), (*first.shape[:-1], 1)),
        dtypes=(first.dtype, first.dtype, mx.float32),
        T=first.dtype,
        PAIR=pair,
        HELD=-(-n // threads),
        TG=threads,
    )
    return weights[: len(scores)], log_mass


def weighed_plain(ops: MlxArrays, q: Array, parts: Sequence[KV]) -> Weighed:
    """`weighed` of the same arrays without a kernel."""
    scores = _scores(q, parts)
    if not ops.on_gpu:
        return _weighed_on_cpu(ops, scores, parts)
    weights, log_mass = softmax_plain(ops, scores)
    return Weighed(_sum(weights, parts), log_mass)


def _weighed_on_cpu(ops: MlxArrays, scores: Sequence[Array], parts: Sequence[KV]) -> Weighed:
    """`weighed_plain` of scores [G, N, R, n] apart: a CPU's products would copy parts of joined weights.

    Exponentials are slow, so each score has one, and the mass divides the sum of values.
    """
    top = ops.to_wide(reduce(mx.maximum, [mx.max(s, -1, keepdims=True) for s in scores]))
    weights = [ops.exp(ops.to_wide(s) - top) for s in scores]
    mass = reduce(mx.add, [mx.sum(p, -1, keepdims=True) for p in weights])
    y = _sum([ops.like(p, s) for p, s in zip(weights, scores, strict=True)], parts)
    return Weighed(ops.to_wide(y) / mass, top + mx.log(mass))


def softmax_plain(ops: MlxArrays, scores: Sequence[Array]) -> tuple[list[Array], Array]:
    """`softmax` without a kernel.

    Scores of a pair are joined, so that MLX's fused softmax reads them once: a part and a canvas at most.
    """
    x = scores[0] if len(scores) == 1 else ops.concat(scores, -1)
    p, n = ops.softmax(x, -1), scores[0].shape[-1]
    return [p[..., :n], p[..., n:]][: len(scores)], mx.logsumexp(ops.to_wide(x), -1, keepdims=True)


# ---- merging groups ------------------------------------------------------------------------------------


def merged(ops: MlxArrays, total: Weighed | None, new: Weighed) -> Weighed:
    """One part for all before and the N new ones, y in float32; a single part as it is. One launch."""
    G, N, R, C = new.y.shape
    if total is None and N == 1:
        return new
    before = total or Weighed(mx.array([0.0]), mx.array([0.0]))
    return Weighed(
        *MERGE(
            before.y,
            before.log_mass,
            new.y,
            new.log_mass,
            grid=(C, R, G),
            group=(min(C, THREADS), 1, 1),
            shapes=((G, 1, R, C), (G, 1, R, 1)),
            dtypes=(mx.float32, mx.float32),
            BEFORE=total is not None,
        )
    )


def merged_plain(ops: MlxArrays, total: Weighed | None, new: Weighed) -> Weighed:
    """`merged` without a kernel."""
    each = [Weighed(new.y[:, i : i + 1], new.log_mass[:, i : i + 1]) for i in range(new.y.shape[1])]

    def add(a: Weighed, b: Weighed) -> Weighed:
        mass = mx.logaddexp(a.log_mass, b.log_mass)
        shares = [ops.to_wide(x.y) * mx.exp(x.log_mass - mass) for x in (a, b)]
        return Weighed(shares[0] + shares[1], mass)

    return reduce(add, each if total is None else [total, *each])


# A thread has the scores t, t + TG, ... of its row, first those of the one part, then the other's. What is
# beyond the end weighs nothing, and is not read.
SOFTMAX = Kernel(
    name="attention_softmax",
    inputs=("first", "second"),
    outputs=("p_first", "p_second", "log_mass"),
    source="""
    constexpr int SG = TG / 32;
    threadgroup float tops[SG];
    threadgroup float masses[SG];
    const int t = int(thread_position_in_threadgroup.x);
    const uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    const size_t row = threadgroup_position_in_grid.y;
    const int n = first_shape[3], m = PAIR ? second_shape[3] : 0;
    float v[HELD];
    float top = -INFINITY;
    for (int i = 0; i < HELD; i++) {
        const int at = t + i * TG;
        v[i] = -INFINITY;
        if (at < n) v[i] = static_cast<float>(first[row * n + at]);
        if (PAIR && at >= n && at < n + m) v[i] = static_cast<float>(second[row * m + at - n]);
        top = metal::max(top, v[i]);
    }
    top = simd_max(top);
    if (lane == 0) tops[sg] = top;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    top = simd_max(lane < uint(SG) ? tops[lane] : -INFINITY);
    float mass = 0.0f;
    for (int i = 0; i < HELD; i++) {
        v[i] = metal::precise::exp(v[i] - top);
        mass += v[i];
    }
    mass = simd_sum(mass);
    if (lane == 0) masses[sg] = mass;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    mass = simd_sum(lane < uint(SG) ? masses[lane] : 0.0f);
    const float share = 1.0f / mass;
    for (int i = 0; i < HELD; i++) {
        const int at = t + i * TG;
        if (at < n) p_first[row * n + at] = static_cast<T>(v[i] * share);
        if (PAIR && at >= n && at < n + m) p_second[row * m + at - n] = static_cast<T>(v[i] * share);
    }
    if (t == 0) log_mass[row] = top + metal::precise::log(mass);
""",
)

# A thread has a column of a row.
MERGE = Kernel(
    name="attention_merge",
    inputs=("before", "log_before", "y", "log_mass"),
    outputs=("out", "log_out"),
    source="""
    const int N = y_shape[1], R = y_shape[2], C = y_shape[3];
    const int c = int(thread_position_in_grid.x);
    const size_t g = thread_position_in_grid.z, r = thread_position_in_grid.y;
    const size_t row = g * R + r;
    float top = BEFORE ? log_before[row] : -INFINITY;
    for (int i = 0; i < N; i++) top = metal::max(top, log_mass[(g * N + i) * R + r]);
    float mass = 0.0f, sum = 0.0f;
    if (BEFORE) {
        mass = metal::precise::exp(log_before[row] - top);
        sum = mass * before[row * C + c];
    }
    for (int i = 0; i < N; i++) {
        const size_t at = (g * N + i) * R + r;
        const float share = metal::precise::exp(log_mass[at] - top);
        mass += share;
        sum += share * static_cast<float>(y[at * C + c]);
    }
    out[row * C + c] = sum / mass;
    if (c == 0) log_out[row] = top + metal::precise::log(mass);
""",
)
