"""The sampler's small arrays: counter-based noise, row ids, and each choice against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dgemma.engine.sampler import Noise, Stop, accept, few, kept, majority, row_ids
from dgemma.network.ops.few import Few
from dgemma.settings import GenerationConfig

# ---- noise --------------------------------------------------------------------------------------


def test_golden_numbers() -> None:
    """Spelled out: a seed must mean the same on every machine and in every release."""
    expected = {
        5: ([0.96649402, 0.65131605, 0.2988578, 0.31848023], [85232, 169279, 243337, 26787]),
        7: ([0.51163813, 0.72622392, 0.39139826, 0.95487977], [63478, 65428, 259648, 65919]),
    }
    for row, (numbers, ids) in expected.items():
        uniforms, noise = Noise(seed=1234, row=row, canvas=2, vocab_size=262144).draw(step=3, length=4)
        np.testing.assert_allclose(uniforms, numbers, atol=5e-9)
        assert noise.tolist() == ids
    assert Noise(0, 0, 0, 197).start(steps=48, length=6).tolist() == [93, 71, 58, 10, 176, 117]
    large = 16445330854941881837
    assert row_ids([[2, 105], [1], [2, 105]]) == [large, 18232024504446223411, large + 1]
    # Ids of 64 bits next to a small seed: NumPy would make such a pair float64, where these two are one.
    for id, ids in (
        (large, [639, 862, 222, 634, 522, 329, 58, 785]),
        (large + 1, [998, 173, 182, 152, 130, 816, 948, 752]),
    ):
        assert Noise(0, id, 0, 1000).draw(1, 8)[1].tolist() == ids


@given(
    seed=st.integers(0, 2**64 - 1),
    row=st.integers(0, 2**64 - 1),
    canvas=st.integers(0, 1000),
    step=st.integers(1, 1000),
    length=st.integers(1, 40),
    vocab=st.integers(2, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_draw(seed: int, row: int, canvas: int, step: int, length: int, vocab: int) -> None:
    """In range, and repeatable."""
    uniforms, fresh = Noise(seed, row, canvas, vocab).draw(step, length)
    assert uniforms.shape == fresh.shape == (length,)
    assert uniforms.dtype == np.float64 and fresh.dtype == np.int64
    assert (uniforms >= 0).all() and (uniforms < 1).all()
    assert (fresh >= 0).all() and (fresh < vocab).all()
    again = Noise(seed, row, canvas, vocab).draw(step, length)
    np.testing.assert_array_equal(again[0], uniforms)
    np.testing.assert_array_equal(again[1], fresh)


def test_every_coordinate_matters() -> None:
    """Seed, row, canvas, step and attempt each change every number; none is used twice."""
    base = {"seed": 3, "row": 4, "canvas": 5, "attempt": 0, "step": 6}
    changes: list[dict[str, int]] = [{}, *({name: value - 1} for name, value in base.items() if value)]
    draws = []
    for change in [*changes, {"attempt": 1}, {"canvas": 6, "step": 5}]:
        at = base | change
        noise = Noise(at["seed"], at["row"], at["canvas"], 2**32 - 1, at["attempt"])
        uniforms, fresh = noise.draw(at["step"], 64)
        draws += [uniforms, fresh / 2**32]
    assert len(np.unique(np.round(draws, 9))) == 7 * 128


def test_start_is_no_step_of_its_canvas() -> None:
    noise = Noise(0, 1, 0, 1000)
    start = noise.start(8, 32)
    assert all((noise.draw(n, 32)[1] != start).mean() > 0.9 for n in range(1, 9))


@pytest.mark.parametrize("vocab", [2, 197, 262144])
def test_uniform(vocab: int) -> None:
    """Tokens cover the vocabulary evenly, its two ends included, and uniforms the unit interval."""
    uniforms, fresh = Noise(1, 0, 0, vocab).draw(1, 200_000)
    buckets = np.bincount(fresh.ravel() * 10 // vocab, minlength=10)[: min(vocab * 5, 10)]
    used = buckets[buckets > 0]
    assert len(used) == min(vocab, 10)
    np.testing.assert_allclose(used / fresh.size, 1 / len(used), rtol=0.05)
    np.testing.assert_allclose(np.histogram(uniforms, 10, (0, 1))[0] / uniforms.size, 0.1, rtol=0.05)
    assert fresh.min() < vocab * 1e-3 + 1 and fresh.max() > vocab * 0.999 - 2


EXTREME = [(0, 0), (0, 2**63), (0, 2**63 + 1), (2**63, 0), (2**63 + 1, 0), (2**64 - 1, 1), (2**64 - 2, 1)]


def test_extreme_keys() -> None:
    """Seeds and ids are 64-bit; a negative one is the same 64 bits."""
    distinct = [Noise(seed, row, 0, 2**20).draw(1, 4)[1].tolist() for seed, row in EXTREME]
    assert len({str(draw) for draw in distinct}) == len(EXTREME)
    low, high = Noise(-1, -1, 0, 100).draw(1, 8), Noise(2**64 - 1, 2**64 - 1, 0, 100).draw(1, 8)
    np.testing.assert_array_equal(low[0], high[0])


def test_row_ids() -> None:
    prompts = [[1, 2, 3], [1, 2], [1, 2, 3], [3, 2, 1], [1, 2, 3]]
    ids = row_ids(prompts)
    assert len(set(ids)) == 5 and all(0 <= i < 2**64 for i in ids)
    assert ids[:1] == row_ids(prompts[:1])
    assert ids[1:2] == row_ids(prompts[1:2])
    assert ids[3:4] == row_ids([np.array([3, 2, 1], np.int32).tolist()])


# ---- the entropy bound --------------------------------------------------------------------------

# Multiples of 1/64, so that sums are exact and ties frequent.
ENTROPIES = st.lists(st.integers(0, 40).map(lambda n: n / 64), min_size=1, max_size=24)


# Sums of such float32 numbers are exact in float64.
ANY_ENTROPY = st.just(0.0) | st.floats(2.0**-20, 12, width=32)


def brute_force(row: list[float], bound: float) -> list[bool]:
    """A position is accepted if those before it in order of (entropy, place) sum to at most the bound."""
    places = sorted(range(len(row)), key=lambda place: (row[place], place))
    accepted = [False] * len(row)
    for rank, place in enumerate(places):
        accepted[place] = rank == 0 or sum(row[other] for other in places[:rank]) <= bound
    return accepted


@given(row=ENTROPIES, bound=st.integers(0, 200).map(lambda n: n / 64), dtype=st.sampled_from(["f4", "f8"]))
@example(row=[0.5] * 6, bound=1.0, dtype="f4")
@example(row=[0.0, 0.0, 0.0], bound=0.0, dtype="f4")
@settings(max_examples=300, deadline=None)
def test_accept(row: list[float], bound: float, dtype: str) -> None:
    accepted = accept(np.array([row], dtype), bound)
    assert accepted.dtype == bool and accepted.shape == (1, len(row))
    assert accepted[0].tolist() == brute_force(row, bound)


@given(rows=st.lists(st.lists(ANY_ENTROPY, min_size=9, max_size=9), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_accept_takes_the_surest(rows: list[list[float]]) -> None:
    """Any entropies: nothing accepted is less sure than what is refused, and a larger bound only adds."""
    entropy = np.array(rows, np.float32)
    before = np.zeros(entropy.shape, bool)
    for bound in (0.0, 0.1, 3.0, 1000.0):
        accepted = accept(entropy, bound)
        for row, chosen, one in zip(entropy, accepted, entropy[:, None], strict=True):
            np.testing.assert_array_equal(accept(one, bound)[0], chosen)
            assert chosen.any()
            if not chosen.all():
                assert row[chosen].max() <= row[~chosen].min()
        assert (accepted >= before).all()
        before = accepted
    assert before.all()


def test_accept_ties_from_the_left() -> None:
    assert accept(np.array([[0.5, 0.5, 0.5, 0.5]]), 0.5).tolist() == [[True, True, False, False]]
    assert accept(np.array([[0.5, 0.2, 0.5, 0.5]]), 0.2).tolist() == [[True, True, False, False]]


def test_accept_at_bound_zero() -> None:
    """The surest position alone, unless some are certain."""
    assert accept(np.array([[0.3, 0.1, 0.2]]), 0.0).tolist() == [[False, True, False]]
    assert accept(np.array([[0.3, 0.0, 0.0]]), 0.0).tolist() == [[True, True, True]]
    assert accept(np.array([[0.3, 0.0, 0.4]]), 0.0).tolist() == [[True, True, False]]
    assert accept(np.array([[2.0]]), 0.0).tolist() == [[True]]


# ---- choices that are off by default ------------------------------------------------------------

CONFIG = GenerationConfig(48, 0.8, 0.4, 0.1, 1, 0.005, 256, (1, 7))
STOP = np.array([4, 5, 7, 8, 9, 1])
SURE = np.zeros(6, np.float32)
ALL = np.ones(6, bool)


@given(best=st.lists(st.sampled_from([0.1, 0.5, 0.7, 0.9, 1.0]), min_size=1, max_size=12))
@example(best=[0.5, 0.1, 0.5])  # none reaches it: the surest is accepted, the first of equals
@settings(max_examples=60, deadline=None)
def test_threshold(best: list[float]) -> None:
    accepted = kept(CONFIG.override(threshold=0.7), np.zeros(len(best)), np.array(best))
    wanted = [p >= 0.7 for p in best]
    wanted[best.index(max(best))] = True
    assert accepted.tolist() == wanted


def test_without_a_threshold_the_entropy_bound_decides() -> None:
    entropy, best = np.array([0.3, 0.02, 0.2, 0.09], np.float32), np.array([0.9, 0.1, 0.9, 0.9])
    for bound in (0.0, 0.1, 9.0):
        settings = CONFIG.override(entropy_bound=bound)
        assert kept(settings, entropy, best).tolist() == accept(entropy[None], bound)[0].tolist()


def test_few_tokens_are_none_of_the_defaults() -> None:
    assert few(CONFIG) is None
    assert few(CONFIG.override(top_k=5)) == Few(5, 1.0) and few(CONFIG.override(top_p=0.9)) == Few(0, 0.9)


@given(
    canvases=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=7),
)
@settings(max_examples=100, deadline=None)
def test_majority(canvases: list[list[int]]) -> None:
    """The most frequent token of each place; of equals the one that came latest."""
    chosen = majority([np.array(canvas) for canvas in canvases])
    for place, token in enumerate(chosen):
        votes = [canvas[place] for canvas in canvases]
        latest = {vote: index for index, vote in enumerate(votes)}
        assert token == max(latest, key=lambda vote: (votes.count(vote), latest[vote]))


def stops(stop: Stop, *steps: tuple[np.ndarray, np.ndarray]) -> list[bool]:
    return [stop(argmax, entropy, ALL) for argmax, entropy in steps]


@pytest.mark.parametrize("early, behind", [(False, False), (True, True)])
def test_early_stop(early: bool, behind: bool) -> None:
    """What lies behind the first stop id need be neither stable nor sure; what lies before it must."""
    settings = CONFIG.override(early_stop=early)
    other, unsure = STOP.copy(), SURE.copy()
    other[4], unsure[3] = 3, 5.0  # behind the stop id 7
    assert stops(Stop(settings), (STOP, SURE), (other, SURE)) == [False, behind]
    assert stops(Stop(settings), (STOP, unsure), (STOP, unsure)) == [False, behind]
    before, unsure = STOP.copy(), SURE.copy()
    before[0], unsure[2] = 3, 5.0  # the stop id itself must be sure, too
    assert stops(Stop(settings), (STOP, SURE), (before, SURE), (before, SURE)) == [False, False, True]
    assert stops(Stop(settings), (STOP, unsure), (STOP, unsure)) == [False, False]
    late = np.array([4, 5, 6, 8, 9, 1])  # the first stop id has moved to the end
    assert stops(Stop(settings), (STOP, SURE), (late, SURE), (late, SURE)) == [False, False, True]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_an_early_stop_is_never_later(data: st.DataObject) -> None:
    """And without a stop id it is the reference's."""
    config = CONFIG.override(stability=data.draw(st.integers(0, 2)), confidence=1.0)
    early, plain = Stop(config.override(early_stop=True)), Stop(config)
    for _ in range(8):
        argmax = np.array(data.draw(st.lists(st.sampled_from([2, 3, 3, 3, 7]), min_size=6, max_size=6)))
        entropy = np.array(data.draw(st.lists(st.floats(0, 2, width=32), min_size=6, max_size=6)), "f4")
        free = np.array([False, *[True] * 5])
        if plain(argmax, entropy, free):
            assert early(argmax, entropy, free)
        elif early(argmax, entropy, free):
            assert 7 in argmax
