"""Which lengths of holes to try, when the model says only afterwards how well one fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Lengths = tuple[int, ...]  # one a hole
Score = Callable[[list[Lengths]], list[float]]  # of candidates that run together; more is better

# Times that every hole is looked at again, while another's length has changed.
ROUNDS = 4


def ladder(most: int, around: int = 0) -> list[int]:
    """Lengths from 0 to `most` that lie 0, 1, 2, 4, 8, … from `around`."""
    steps = [0, *(1 << k for k in range(most.bit_length() + around.bit_length()))]
    return sorted({n for step in steps for n in (around - step, around + step) if 0 <= n <= most} | {most})


def between(tried: Sequence[int], best: int) -> list[int]:
    """Lengths to try next: those beside the best one, in the middle of what lies between it and its neighbours.

    A space of up to three lengths is tried whole.
    """
    tried = sorted(tried)
    at = tried.index(best)
    found: list[int] = []
    for low, high in zip(tried[max(0, at - 1) : at + 1], tried[max(0, at - 1) + 1 : at + 2], strict=False):
        inner = range(low + 1, high)
        found += inner if len(inner) <= 3 else [inner[len(inner) // 2]]
    return found


def search(
    known: Sequence[int | None], most: Sequence[int], around: Sequence[int], score: Score
) -> Lengths:
    """The best lengths that were found, one a hole: `known` ones stay, others are sought up to `most`.

    The search of a hole begins on a ladder around its `around`, and goes on between the best rung and its
    neighbours. Several holes take turns, each with the best lengths of the others so far.
    """
    scores: dict[Lengths, float] = {}

    def best(candidates: list[Lengths]) -> Lengths:
        fresh = [one for one in dict.fromkeys(candidates) if one not in scores]
        if fresh:
            scores.update(zip(fresh, score(fresh), strict=True))
        return max(candidates, key=lambda one: scores[one])

    def settle(now: Lengths, at: int) -> Lengths:
        def put(n: int) -> Lengths:
            return (*now[:at], n, *now[at + 1 :])

        tried = sorted({*ladder(most[at], around[at]), now[at]})
        while True:
            now = best([put(n) for n in tried])
            more = between(tried, now[at])
            if not more:
                return now
            tried = sorted([*tried, *more])

    now = tuple(min(a, m) if k is None else k for k, m, a in zip(known, most, around, strict=True))
    free = [at for at, length in enumerate(known) if length is None]
    best([now])
    for _ in range(ROUNDS):
        before = now
        for at in free:
            now = settle(now, at)
        if now == before or len(free) == 1:
            break
    return now
