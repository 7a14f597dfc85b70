"""The sampler's small arrays: counter-based noise, row ids, and the entropy bound against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dgemma.engine.sampler import Noise, accept, row_ids, temperature
from dgemma.settings import read_generation_config

# ---- noise --------------------------------------------------------------------------------------


def test_golden_numbers() -> None:
    """Spelled out: a seed must mean the same on every machine and in every release."""
    uniforms, noise = Noise(seed=1234, rows=(5, 7), canvas=2, vocab_size=262144).draw(step=3, length=4)
    expected = [
        [0.96649402, 0.65131605, 0.2988578, 0.31848023],
        [0.51163813, 0.72622392, 0.39139826, 0.95487977],
    ]
    np.testing.assert_allclose(uniforms, expected, atol=5e-9)
    assert noise.tolist() == [[85232, 169279, 243337, 26787], [63478, 65428, 259648, 65919]]
    assert Noise(0, (0,), 0, 197).start(steps=48, length=6).tolist() == [[93, 71, 58, 10, 176, 117]]
    large = 16445330854941881837
    assert row_ids([[2, 105], [1], [2, 105]]) == [large, 18232024504446223411, large + 1]
    # Ids of 64 bits next to a small seed: NumPy would make such a pair float64, where these two are one.
    noise = Noise(0, (large, large + 1), 0, 1000).draw(1, 8)[1]
    assert noise.tolist() == [
        [639, 862, 222, 634, 522, 329, 58, 785],
        [998, 173, 182, 152, 130, 816, 948, 752],
    ]


@given(
    seed=st.integers(0, 2**64 - 1),
    rows=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    canvas=st.integers(0, 1000),
    step=st.integers(1, 1000),
    length=st.integers(1, 40),
    vocab=st.integers(2, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_draw(seed: int, rows: list[int], canvas: int, step: int, length: int, vocab: int) -> None:
    """In range, repeatable, and each row's own: whatever batch it is in and wherever it stands there."""
    noise = Noise(seed, tuple(rows), canvas, vocab)
    uniforms, fresh = noise.draw(step, length)
    assert uniforms.shape == fresh.shape == (len(rows), length)
    assert uniforms.dtype == np.float64 and fresh.dtype == np.int64
    assert (uniforms >= 0).all() and (uniforms < 1).all()
    assert (fresh >= 0).all() and (fresh < vocab).all()
    for index, row in enumerate(rows):
        again = Noise(seed, (row,), canvas, vocab).draw(step, length)
        np.testing.assert_array_equal(again[0][0], uniforms[index])
        np.testing.assert_array_equal(again[1][0], fresh[index])


def test_every_coordinate_matters() -> None:
    """Seed, row, canvas and step each change every number; none is used twice."""
    base = {"seed": 3, "row": 4, "canvas": 5, "step": 6}
    draws = []
    for change in ({}, {"seed": 4}, {"row": 3}, {"canvas": 6}, {"step": 5}, {"canvas": 6, "step": 5}):
        at = base | change
        uniforms, fresh = Noise(at["seed"], (at["row"],), at["canvas"], 2**32 - 1).draw(at["step"], 64)
        draws += [uniforms[0], fresh[0] / 2**32]
    assert len(np.unique(np.round(draws, 9))) == 6 * 128


def test_start_is_no_step_of_its_canvas() -> None:
    noise = Noise(0, (1,), 0, 1000)
    start = noise.start(8, 32)
    assert all((noise.draw(n, 32)[1] != start).mean() > 0.9 for n in range(1, 9))


@pytest.mark.parametrize("vocab", [2, 197, 262144])
def test_uniform(vocab: int) -> None:
    """Tokens cover the vocabulary evenly, its two ends included, and uniforms the unit interval."""
    uniforms, fresh = Noise(1, (0, 1, 2, 3), 0, vocab).draw(1, 50_000)
    buckets = np.bincount(fresh.ravel() * 10 // vocab, minlength=10)[: min(vocab * 5, 10)]
    used = buckets[buckets > 0]
    assert len(used) == min(vocab, 10)
    np.testing.assert_allclose(used / fresh.size, 1 / len(used), rtol=0.05)
    np.testing.assert_allclose(np.histogram(uniforms, 10, (0, 1))[0] / uniforms.size, 0.1, rtol=0.05)
    assert fresh.min() < vocab * 1e-3 + 1 and fresh.max() > vocab * 0.999 - 2


EXTREME = [(0, 0), (0, 2**63), (0, 2**63 + 1), (2**63, 0), (2**63 + 1, 0), (2**64 - 1, 1), (2**64 - 2, 1)]


def test_extreme_keys() -> None:
    """Seeds and ids are 64-bit; a negative one is the same 64 bits."""
    distinct = [Noise(seed, (row,), 0, 2**20).draw(1, 4)[1].tolist() for seed, row in EXTREME]
    assert len({str(draw) for draw in distinct}) == len(EXTREME)
    low, high = Noise(-1, (-1,), 0, 100).draw(1, 8), Noise(2**64 - 1, (2**64 - 1,), 0, 100).draw(1, 8)
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


def test_rows_at_canvases_and_steps_of_their_own() -> None:
    """A row draws what it draws alone, wherever its neighbours are."""
    uniforms, fresh = Noise(1, (5, 7, 5), (0, 3, 1), 1000).draw((4, 1, 4), 8)
    for row, (id, canvas, step) in enumerate([(5, 0, 4), (7, 3, 1), (5, 1, 4)]):
        alone = Noise(1, (id,), canvas, 1000).draw(step, 8)
        assert np.array_equal(uniforms[row], alone[0][0]) and np.array_equal(fresh[row], alone[1][0])
    config = read_generation_config(None, 1000)
    heat = temperature(config, np.array([4, 1]))
    assert heat.tolist() == [temperature(config, 4), temperature(config, 1)]
