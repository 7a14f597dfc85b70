"""Which lengths of holes to try, when the model says only afterwards how well one fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

Lengths = tuple[int, ...]  # one a hole
Score = Callable[[list[Lengths]], list[float]]  # of candidates that run together, in nats; more is better

# A canvas whose tokens have a lower mean log-probability is not believed, and the search goes on. On the
# embedded model one right canvas in a hundred is below −0.15, and wrong ones are at −0.6 and less.
DOUBT = -0.5
ROUNDS = 4  # times that several holes take turns at most
MOST = 32  # candidates of one hole at most, before its best is taken as it is


def ladder(most: int, around: int = 0) -> list[int]:
    """Lengths from 0 to `most` that lie 0, 1, 2, 3, 4, 6, 8, 12, … from `around`."""
    steps = {0, *(n << k for n in (1, 3) for k in range(max(most, around).bit_length()))}
    return sorted({n for step in steps for n in (around - step, around + step) if 0 <= n <= most} | {most})


def search(known: Sequence[int | None], most: Sequence[int], around: Sequence[int], score: Score) -> Lengths:
    """The best lengths that were found, one a hole: `known` ones stay, others are sought up to `most`.

    A hole's search begins on a ladder around its `around` and goes on between the best rung and its neighbours;
    where even the best is to be doubted, between others. Several holes begin with their `around`, and take turns
    while that is to be doubted, each with the best lengths of the others so far.
    """
    scores: dict[Lengths, float] = {}

    def best(candidates: Sequence[Lengths]) -> Lengths:
        fresh = [one for one in dict.fromkeys(candidates) if one not in scores]
        if fresh:
            scores.update(zip(fresh, score(fresh), strict=True))
        return max(candidates, key=lambda one: scores[one])

    def settle(now: Lengths, at: int) -> Lengths:
        """`now` with the best length of one hole."""

        def put(n: int) -> Lengths:
            return (*now[:at], n, *now[at + 1 :])

        tried = sorted({*ladder(most[at], around[at]), now[at]})
        while True:
            found = best([put(n) for n in tried])
            more = _beside(tried, found[at])
            if not more and scores[found] < DOUBT and len(tried) < MOST:
                more = _elsewhere(tried, lambda n: scores[put(n)])
            if not more:
                return found
            tried = sorted({*tried, *more})

    now = tuple(a if k is None else k for k, a in zip(known, around, strict=True))
    free = [at for at, length in enumerate(known) if length is None]
    if len(free) == 1:
        return settle(now, free[0])
    for _ in range(ROUNDS):
        if best([now]) and scores[now] >= DOUBT:
            break
        before = now
        for at in free:
            now = settle(now, at)
        if now == before:
            break
    return now


def _beside(tried: Sequence[int], best: int) -> list[int]:
    """Lengths between the best one and its neighbours among those tried."""
    at = tried.index(best)
    return [n for low, high in pairwise(tried[max(0, at - 1) : at + 2]) for n in _inside(low, high)]


def _elsewhere(tried: Sequence[int], score: Callable[[int], float]) -> list[int]:
    """Lengths in the space with the best end."""
    spaces = [(low, high) for low, high in pairwise(tried) if high - low > 1]
    return _inside(*max(spaces, key=lambda ends: max(map(score, ends)))) if spaces else []


def _inside(low: int, high: int) -> list[int]:
    """All lengths between two where they are three or fewer, else the one in the middle."""
    inner = range(low + 1, high)
    return list(inner) if len(inner) <= 3 else [inner[len(inner) // 2]]
