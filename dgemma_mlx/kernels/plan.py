"""Which experts a token picks, and where its picks stand once they are sorted by expert: two launches.

`route` replaces the softmax, the sort, the gathers and the division of `Ops.router`: a simdgroup holds a
token's experts in registers and takes the largest probability as often as there are picks. It picks from
probabilities, not from logits, because that is where the definition's ties are: what underflows to 0 is
equal.

`plan` replaces two argsorts by a counting sort. Every expert has a threadgroup of its own, which counts all
picks again and so needs no word from the others; a simdgroup walks a run of picks in their order, which is
what keeps the sort stable. The price is that the ids are read 2E times: a canvas's 2,048 picks at E = 128
are 2 MB from the cache, in 16 rounds of each simdgroup, and eight canvases 17 MB in 128. One threadgroup
for all would leave every core but one idle, and its table of counts by expert and simdgroup would take all
of its memory at E = 256.

    N tokens  K picks a token  E experts
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .launch import Kernel

Array = mx.array

GROUP = 256  # threads: tokens of `route` by simdgroups, runs of picks of `plan`


@dataclass(frozen=True, eq=False)
class Plan:
    """The picks n·K + k of ids [N, K] in the order of their experts, those of an expert ascending."""

    order: Array  # int32 [N·K]: the pick at a place
    inverse: Array  # int32 [N·K]: the place of a pick
    offsets: Array  # int32 [E + 1]: an expert's first place, and the end
    tokens: Array  # uint32 [N·K]: the token of a place, as MLX's gathers take indices
    rows: Array  # uint32 [N·K]: the expert of a place, likewise


# A lane holds experts lane, lane + 32, ...; a pick that was made is −1. If a logit is NaN, so is `total`
# and with it every p: nothing is above −1 then, and the first K experts are named, with weights of NaN.
ROUTE = Kernel(
    name="route",
    inputs=("logits", "scale"),
    outputs=("weights", "ids"),
    source="""
    constexpr int HELD = (E + 31) / 32;
    const int lane = int(thread_index_in_simdgroup);
    const size_t token = thread_position_in_grid.x / 32;
    float p[HELD];
    float top = -INFINITY;
    for (int i = 0; i < HELD; i++) {
        const int expert = i * 32 + lane;
        p[i] = expert < E ? logits[token * E + expert] : -INFINITY;
        top = metal::max(top, p[i]);
    }
    top = simd_max(top);
    float total = 0.0f;
    for (int i = 0; i < HELD; i++) {
        const bool real = i * 32 + lane < E;
        p[i] = real ? metal::precise::exp(p[i] - top) : -1.0f;
        total += real ? p[i] : 0.0f;
    }
    total = simd_sum(total);
    for (int i = 0; i < HELD; i++) p[i] = p[i] < 0.0f ? p[i] : p[i] / total;

    float mine[HELD];  // the picks that this lane writes: lane, lane + 32, ...
    int who[HELD];
    float sum = 0.0f;
    for (int i = 0; i < HELD; i++) {
        for (int j = 0; j < 32 && i * 32 + j < K; j++) {
            float best = -1.0f;
            int at = E;
            for (int h = 0; h < HELD; h++) {
                if (p[h] > best) {
                    best = p[h];
                    at = h * 32 + lane;
                }
            }
            const float most = simd_max(best);
            const int winner = simd_min(best == most ? at : E);  // of equals the lowest
            for (int h = 0; h < HELD; h++) p[h] = h * 32 + lane == winner ? -1.0f : p[h];
            sum += most;
            if (lane == j) {
                mine[i] = winner < E ? most : total;
                who[i] = winner < E ? winner : i * 32 + j;
            }
        }
    }
    for (int i = 0; i < HELD; i++) {
        const int pick = i * 32 + lane;
        if (pick < K) {
            ids[token * K + pick] = who[i];
            weights[token * K + pick] = mine[i] / sum * static_cast<float>(scale[who[i]]);
        }
    }
""",
)

# Ids are forced into range: one outside would leave places unwritten, which index other arrays later.
PLAN = Kernel(
    name="plan",
    inputs=("ids",),
    outputs=("order", "inverse", "offsets", "tokens", "rows"),
    source="""
    constexpr int RUNS = GROUP / 32;
    threadgroup int lower[RUNS];  // picks of a run for experts below this one
    threadgroup int same[RUNS];   // and for this one
    const int E = int(threadgroups_per_grid.x), expert = int(threadgroup_position_in_grid.x);
    const int run = int(simdgroup_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
    const int picks = ids_shape[0] * ids_shape[1];
    const int length = (picks + GROUP - 1) / GROUP * 32;
    const int start = metal::min(run * length, picks), stop = metal::min(start + length, picks);
    int below = 0, equal = 0;
    for (int pick = start + lane; pick < stop; pick += 32) {
        const int id = metal::clamp(static_cast<int>(ids[pick]), 0, E - 1);
        below += id < expert ? 1 : 0;
        equal += id == expert ? 1 : 0;
    }
    below = simd_sum(below);
    equal = simd_sum(equal);
    if (lane == 0) {
        lower[run] = below;
        same[run] = equal;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int first = 0, before = 0;
    for (int i = 0; i < RUNS; i++) {
        first += lower[i];
        before += i < run ? same[i] : 0;
    }
    if (run == 0 && lane == 0) {
        offsets[expert] = first;
        if (expert == E - 1) offsets[E] = picks;
    }
    int place = first + before;
    for (int from = start; from < stop; from += 32) {
        const int pick = from + lane;
        const bool here = pick < stop && metal::clamp(static_cast<int>(ids[pick]), 0, E - 1) == expert;
        const int at = place + simd_prefix_exclusive_sum(here ? 1 : 0);
        if (here) {
            order[at] = pick;
            inverse[pick] = at;
            tokens[at] = static_cast<uint>(pick / ids_shape[1]);
            rows[at] = static_cast<uint>(expert);
        }
        place += simd_sum(here ? 1 : 0);
    }
""",
)


def route(logits: Array, expert_scale: Array, k: int) -> tuple[Array, Array]:
    """Weights [N, K] float32 and experts [N, K] int32 of router logits [N, E] float32, as `Ops.router`.

    `expert_scale` [E] is of any floating type; `k` is at most E. Ties go to the lower id.
    """
    N, E = logits.shape
    assert 1 <= k <= E and expert_scale.shape == (E,) and logits.dtype == mx.float32, (logits.dtype, k)
    weights, ids = ROUTE(
        logits,
        expert_scale,
        grid=(N * 32, 1, 1),
        group=(GROUP, 1, 1),
        shapes=[(N, k), (N, k)],
        dtypes=[mx.float32, mx.int32],
        E=E,
        K=k,
    )
    return weights, ids


def route_plain(logits: Array, expert_scale: Array, k: int) -> tuple[Array, Array]:
    """`route` of the same arrays in MLX: `Ops.router` behind its product."""
    p = mx.softmax(logits, -1, precise=True)
    ids = mx.argsort(-p, -1)[:, :k].astype(mx.int32)
    weights = mx.take_along_axis(p, ids, -1)
    weights = weights / mx.sum(weights, -1, keepdims=True)
    return weights * expert_scale.astype(mx.float32)[ids], ids


def plan(ids: Array, experts: int) -> Plan:
    """The plan of ids [N, K], integers below `experts`."""
    picks = ids.size
    outputs = PLAN(
        ids,
        grid=(experts * GROUP, 1, 1),
        group=(GROUP, 1, 1),
        shapes=[(picks,), (picks,), (experts + 1,), (picks,), (picks,)],
        dtypes=[mx.int32, mx.int32, mx.int32, mx.uint32, mx.uint32],
        GROUP=GROUP,
    )
    return Plan(*outputs)


def plan_plain(ids: Array, experts: int) -> Plan:
    """`plan` of ids [N, K] in MLX."""
    flat = ids.reshape(-1)
    order = mx.argsort(flat).astype(mx.int32)
    inverse = mx.argsort(order).astype(mx.int32)
    offsets = mx.sum(flat[None] < mx.arange(experts + 1)[:, None], 1).astype(mx.int32)
    tokens = (order // ids.shape[1]).astype(mx.uint32)
    return Plan(order, inverse, offsets, tokens, flat[order].astype(mx.uint32))
