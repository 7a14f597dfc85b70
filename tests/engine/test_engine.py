"""The loop above the graph, on small random models and token ids: what is yielded, when, and what it costs.

Random models never settle, so where a stop is needed `Script` puts the argmax canvases in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from dgemma import Committed, ConfigError, Done, Draft, Prefill, PromptError
from dgemma.engine import sampler
from dgemma.engine.events import Event
from dgemma.model import Model
from dgemma.network import graph
from dgemma.network.context import Context
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.runner import Seen
from tests.compare import backends, make
from tests.oracle import oracle, our_model, tokens

CANVAS = 16
PROMPTS = [tokens(seed, length).tolist() for seed, length in enumerate((21, 4, 13))]
CONFIDENT = {"confidence": 1e9}  # every canvas counts as confident: stability alone decides


@pytest.fixture(params=backends("float32", reference=True))
def model(request: pytest.FixtureRequest) -> Model:
    return our_model(make(request.param), oracle("window"), steps=5)


@pytest.fixture
def exact() -> Model:
    return our_model(NumpyOps(), oracle("window"), steps=5)


def replies(model: Model, prompts: Any, **options: Any) -> list[Done]:
    """The `Done` of every row, by row."""
    events = model.generate(prompts, **({"seed": 3} | options))
    return sorted((event for event in events if isinstance(event, Done)), key=lambda done: done.row)


def of_row(events: list[Event], row: int) -> list[Any]:
    return [event for event in events if not isinstance(event, Prefill) and event.row == row]


@dataclass
class Script:
    """Stands in for `model.see`: a row's argmax canvas settles from a given call of each canvas on.

    Rows are told apart by their length, which a commit changes by one canvas. Counts what it is asked.
    """

    model: Model
    settles: dict[int, int]  # len(prompt) % CANVAS -> first call with the final canvas, from 1
    rows: list[int] = field(default_factory=list)  # rows of every call
    calls: dict[int, int] = field(default_factory=dict)  # on a row's canvas

    def __post_init__(self) -> None:
        self.see: Callable[..., Seen] = self.model.see
        self.model.see = self  # type: ignore[method-assign]

    def __call__(self, contexts: list[Context], canvas: np.ndarray, soft: list[Any], *rest: Any) -> Seen:
        self.rows.append(len(canvas))
        seen = self.see(contexts, canvas, soft, *rest)
        argmax = seen.argmax.copy()
        for row, (context, signal) in enumerate(zip(contexts, soft, strict=True)):
            key = context.length % CANVAS
            self.calls[key] = 1 if signal is None else self.calls[key] + 1
            argmax[row] = self.canvas(context.length)
            if self.calls[key] < self.settles[key]:
                argmax[row, 0] = 100 + self.calls[key]
        return replace(seen, argmax=argmax)

    @staticmethod
    def canvas(length: int) -> np.ndarray:
        """The canvas that follows a context of this length."""
        return (length + np.arange(CANVAS)) % 90


# ---- events -------------------------------------------------------------------------------------


def check_row(events: list[Event], row: int, steps: int) -> list[int]:
    """Drafts 1…n of a canvas, its commit, the next canvas, one `Done` at the end; returns the tokens."""
    mine, canvas, step, collected = of_row(events, row), 0, 0, []
    for event in mine[:-1]:
        assert event.canvas == canvas
        if isinstance(event, Draft):
            step += 1
            assert event.step == step <= steps
            assert event.tokens.shape == event.accepted.shape == event.entropy.shape == (CANVAS,)
            assert event.accepted.dtype == bool and event.accepted.any()
            last = event.tokens
        else:
            assert isinstance(event, Committed) and step > 0
            assert event.tokens == last[: len(event.tokens)].tolist()
            assert event.text == ""
            collected += event.tokens
            canvas, step = canvas + 1, 0
    done = mine[-1]
    assert isinstance(done, Done) and done.tokens == collected and step == 0
    assert done.stats.canvases == canvas
    return collected


def test_event_order(model: Model) -> None:
    events = list(model.generate(PROMPTS, seed=1, max_new_tokens=40))
    prefill = [event for event in events if isinstance(event, Prefill)]
    assert prefill == [Prefill(row, len(prompt), len(prompt)) for row, prompt in enumerate(PROMPTS)]
    for row in range(3):
        assert len(check_row(events, row, steps=5)) == 40
    steps = [(event.canvas, event.step, event.row) for event in events if isinstance(event, Draft)]
    assert steps == sorted(steps)
    assert len(steps) == 3 * 3 * 5


def test_stats(model: Model) -> None:
    for done in replies(model, PROMPTS, max_new_tokens=20):
        stats = done.stats
        assert stats.prompt_tokens == len(PROMPTS[done.row])
        assert (stats.tokens, stats.canvases, stats.steps) == (20, 2, 10)
        assert (stats.steps_per_canvas, stats.tokens_per_forward) == (5, 2)
        assert 0 < stats.prefill_seconds <= stats.seconds_to_first_token <= stats.seconds
        assert stats.ms_per_step > 0 and stats.peak_memory > 0
        assert (stats.seed, stats.backend) == (3, model.ops.name)
        flat = done.json()
        assert flat["token_ids"] == done.tokens and flat["steps"] == 10 and flat["seed"] == 3


def test_soft_embeddings_that_leave_something_out(model: Model) -> None:
    model.ops.soft_tokens = 32
    for done in replies(model, PROMPTS, max_new_tokens=20, soft_bound=0.999):
        assert 0 < done.stats.soft_missing <= 0.999 and done.stats.soft_dense == 0
        assert done.json()["soft_missing"] == done.stats.soft_missing
    for bound in (None, 1e-12):  # less than a random model's rows leave out
        (done,) = replies(model, PROMPTS[:1], soft_bound=bound)
        assert (done.stats.soft_missing, done.stats.soft_dense) == (0, 1)


@pytest.mark.parametrize("dense, expected", [(0.4, [0.1] * 5), (0.6, [0.1, 0, 0.1, 0, 0.1])])
def test_sparse_rows_are_not_looked_for_after_most_were_dense(
    exact: Model, dense: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds, see = [], exact.see

    def scripted(*args: Any) -> Seen:
        soft_bound = args[5]
        bounds.append(soft_bound)
        missing = np.where(np.arange(CANVAS) < dense * CANVAS, 0, 0.05)[None] if soft_bound else None
        return replace(see(*args), missing=missing)

    monkeypatch.setattr(exact, "see", scripted)
    (done,) = replies(exact, PROMPTS[:1], max_new_tokens=CANVAS, soft_bound=0.1)
    assert bounds == expected
    share = np.ceil(dense * CANVAS) / CANVAS
    assert done.stats.soft_dense == pytest.approx(np.mean([share if bound else 1 for bound in bounds]))
    assert done.stats.soft_missing == 0.05


def test_prompt_forms(exact: Model) -> None:
    """One row of ids, a batch of one, tuples: the same reply."""
    ids = PROMPTS[1]
    expected = replies(exact, [ids])[0].tokens
    for prompt in (ids, tuple(ids), [tuple(ids)], [np.array(ids)], np.array(ids).tolist()):
        assert replies(exact, prompt)[0].tokens == expected


# ---- the loop, by hand --------------------------------------------------------------------------


def test_loop_by_hand(exact: Model) -> None:
    """One row: temperatures, noise, self-conditioning and commits as the model's description has them."""
    config = exact.generation.override(max_new_tokens=3 * CANVAS)
    drafts = [e for e in exact.generate([PROMPTS[0]], seed=9, max_new_tokens=48) if isinstance(e, Draft)]
    contexts, at = exact.encode([PROMPTS[0]]), 0
    for canvas_number in range(3):
        noise = sampler.Noise(9, sampler.row_id(PROMPTS[0]), canvas_number, exact.config.vocab_size)
        canvas, soft = noise.start(5, CANVAS)[None], None
        for n in (5, 4, 3, 2, 1):
            tau = config.t_min + (config.t_max - config.t_min) * n / 5
            uniforms, fresh = noise.draw(n, CANVAS)
            step = exact.refine(contexts, canvas, soft, tau, uniforms[None], fresh[None])
            canvas, soft = step.canvas, step.soft
            np.testing.assert_array_equal(drafts[at].tokens, step.argmax[0], f"draft {at}")
            np.testing.assert_array_equal(drafts[at].accepted, step.accepted[0], f"draft {at}")
            np.testing.assert_allclose(drafts[at].entropy, step.entropy[0], rtol=1e-6)
            at += 1
        contexts = exact.encode(step.argmax.tolist(), contexts)
    assert at == len(drafts) == 15


def test_entropy_bound_of_the_call(exact: Model) -> None:
    """A setting of the call reaches the sampler: with a bound without limit everything is accepted."""
    for bound, expected in ((1e9, CANVAS), (0.0, 1)):
        drafts = [e for e in exact.generate(PROMPTS[0], seed=0, entropy_bound=bound) if isinstance(e, Draft)]
        assert {int(draft.accepted.sum()) for draft in drafts} == {expected}


# ---- where a reply ends -------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 15, 16, 17, 31, 32, 40])
def test_max_new_tokens(model: Model, limit: int) -> None:
    """Cuts inside a canvas; a canvas begun is a canvas counted."""
    events = list(model.generate(PROMPTS, seed=2, max_new_tokens=limit))
    for row in range(3):
        assert len(check_row(events, row, steps=5)) == limit
        done = of_row(events, row)[-1]
        assert done.finish_reason == "length"
        assert done.stats.canvases == -(-limit // CANVAS)


@pytest.mark.parametrize("place", [0, 7, 15, 16, 25, 31])
def test_stop_id(model: Model, place: int) -> None:
    """The reply ends with the first stop id, wherever in a canvas it stands; the rest is dropped."""
    Script(model, {len(PROMPTS[0]) % CANVAS: 1})
    whole = replies(model, [PROMPTS[0]], max_new_tokens=48)[0].tokens
    stop = whole[place]
    assert whole.index(stop) == place
    (done,) = replies(model, [PROMPTS[0]], max_new_tokens=48, stop_ids=(199, stop))
    assert done.tokens == whole[: place + 1]
    assert (done.finish_reason, done.stats.canvases) == ("stop", place // CANVAS + 1)
    (done,) = replies(model, [PROMPTS[0]], max_new_tokens=place + 1, stop_ids=(stop,))
    assert (done.tokens, done.finish_reason) == (whole[: place + 1], "stop")
    if place:
        (done,) = replies(model, [PROMPTS[0]], max_new_tokens=place, stop_ids=(stop,))
        assert (done.tokens, done.finish_reason) == (whole[:place], "length")


def test_rows_stop_apart(model: Model) -> None:
    """Each row's canvas stops when it is stable; a row that stopped costs no step more."""
    settles = {21 % CANVAS: 1, 4: 4, 13: 6}
    script = Script(model, settles)
    events = list(model.generate(PROMPTS, seed=0, steps=10, max_new_tokens=CANVAS, **CONFIDENT))
    expected = {0: 2, 1: 5, 2: 7}  # settled, and seen once more
    for row, steps in expected.items():
        assert check_row(events, row, steps=10) == Script.canvas(len(PROMPTS[row])).tolist()
        assert of_row(events, row)[-1].stats.steps == steps
    assert script.rows == [3, 3, 2, 2, 2, 1, 1]


def test_rows_of_unequal_canvases_go_on_together(model: Model) -> None:
    """No row waits for another, so that they are on different canvases of one pass."""
    script = Script(model, {21 % CANVAS: 3, 4: 1, 13: 2})
    events = list(model.generate(PROMPTS, seed=0, steps=10, max_new_tokens=40, **CONFIDENT))
    for row, prompt in enumerate(PROMPTS):
        whole = np.concatenate([Script.canvas(len(prompt) + CANVAS * n) for n in range(3)])
        assert check_row(events, row, steps=10) == whole[:40].tolist()
    # 4, 2 and 3 steps a canvas, three canvases each.
    assert script.rows == [3] * 6 + [2] * 3 + [1] * 3


def test_replies_end_apart(model: Model) -> None:
    """A row whose reply ended takes no part in later canvases."""
    script = Script(model, {21 % CANVAS: 1, 4: 1, 13: 1})
    stop = int(Script.canvas(4)[3])  # the short row's first canvas, and no other row's
    assert stop not in np.concatenate([Script.canvas(n) for n in (21, 13, 29, 37)])
    events = list(model.generate(PROMPTS, seed=0, steps=10, max_new_tokens=32, stop_ids=(stop,), **CONFIDENT))
    for row, (length, reason) in enumerate(((32, "length"), (4, "stop"), (32, "length"))):
        assert len(check_row(events, row, steps=10)) == length
        assert of_row(events, row)[-1].finish_reason == reason
    assert script.rows == [3, 3, 2, 2]
    order = [event.row for event in events if isinstance(event, Done)]
    assert order == [1, 0, 2]


def test_steps_end_a_canvas(model: Model) -> None:
    """A canvas that never settles is committed as its last step has it."""
    (done,) = replies(model, [PROMPTS[0]], steps=3, max_new_tokens=CANVAS, confidence=1e-9)
    assert done.stats.steps == 3


def test_last_canvas_is_not_encoded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would read it: two canvases cost the prompt's pass and one more."""
    # Of the model, not of the graph: a compiled pass runs no Python of the graph a second time.
    extend, passes = Model.extend, []

    def count(self: Model, contexts: list[Context], rows: list[np.ndarray]) -> None:
        passes.append([len(row) for row in rows])
        extend(self, contexts, rows)

    monkeypatch.setattr(Model, "extend", count)
    replies(model, PROMPTS[:2], max_new_tokens=CANVAS)
    assert passes == [[21, 4]]
    passes.clear()
    replies(model, PROMPTS[:2], max_new_tokens=CANVAS + 1)
    assert passes == [[21, 4], [CANVAS, CANVAS]]


def test_a_reply_never_has_its_context_twice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canvases are added in place: nobody forks, which would keep what was there before."""

    def fork(self: Any) -> Any:
        raise AssertionError("the context was copied")

    monkeypatch.setattr(Context, "fork", fork)
    (done,) = replies(model, PROMPTS[:1], max_new_tokens=3 * CANVAS)
    assert done.stats.canvases > 1


# ---- randomness ---------------------------------------------------------------------------------


def test_same_seed(model: Model) -> None:
    first, second, other = (replies(model, PROMPTS, seed=seed) for seed in (5, 5, 6))
    assert [done.tokens for done in first] == [done.tokens for done in second]
    assert all(a.tokens != b.tokens for a, b in zip(first, other, strict=True))


def test_seed_is_drawn_and_reported(exact: Model) -> None:
    drawn = [replies(exact, [PROMPTS[0]], seed=None)[0] for _ in range(2)]
    assert drawn[0].stats.seed != drawn[1].stats.seed
    assert replies(exact, [PROMPTS[0]], seed=drawn[0].stats.seed)[0].tokens == drawn[0].tokens


def test_seed_zero_is_a_seed(exact: Model) -> None:
    assert {replies(exact, [PROMPTS[0]], seed=0)[0].stats.seed for _ in range(3)} == {0}


def test_batch_row_is_the_row_alone(exact: Model) -> None:
    """In float64 a row's whole reply does not notice its batch, nor where in it the row stands."""
    together = replies(exact, PROMPTS, max_new_tokens=40)
    turned = replies(exact, PROMPTS[::-1], max_new_tokens=40)
    for row, prompt in enumerate(PROMPTS):
        (alone,) = replies(exact, [prompt], max_new_tokens=40)
        assert together[row].tokens == alone.tokens == turned[2 - row].tokens


def test_batch_row_is_the_row_alone_when_rows_stop(exact: Model) -> None:
    """Also where canvases stop early: with stability 0 all that are confident do, at steps of their own."""
    settings = {"max_new_tokens": 40, "stability": 0, "confidence": 0.45, "steps": 8}
    together = replies(exact, PROMPTS, **settings)
    assert len({done.stats.steps for done in together}) > 1
    for row, prompt in enumerate(PROMPTS):
        (alone,) = replies(exact, [prompt], **settings)
        assert (alone.tokens, alone.stats.steps) == (together[row].tokens, together[row].stats.steps)


@pytest.mark.parametrize("prompt", PROMPTS + [[2, 105]], ids=len)
def test_repeated_prompts_differ(exact: Model, prompt: list[int]) -> None:
    """Copies of a prompt in one batch are samples of their own, the first of them the prompt's own."""
    first, second, third = (done.tokens for done in replies(exact, [prompt] * 3, max_new_tokens=CANVAS))
    assert first == replies(exact, [prompt], max_new_tokens=CANVAS)[0].tokens
    assert first != second != third != first


def test_row_ids(exact: Model) -> None:
    """The caller may say which noise a row draws."""
    ids = [[7, 8, 7], [8, 7, 7]]
    one, other = ([done.tokens for done in replies(exact, [PROMPTS[0]] * 3, row_ids=i)] for i in ids)
    assert one[0] == one[2] == other[1] == other[2]
    assert one[1] == other[0] != one[0]


# ---- what is refused, before the first event ----------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"max_new_tokens": 0},
        {"entropy_bound": -0.1},
        {"entropy_bound": float("nan")},
        {"t_min": 0.0},
        {"t_min": 0.9},
        {"t_max": float("nan")},
        {"t_max": float("inf")},
        {"stability": -1},
        {"confidence": 0.0},
        {"temperature": 1.0},
        {"steps": 2.5},
        {"max_new_tokens": 1.5},
        {"soft_bound": 1.0},
        {"soft_bound": -0.1},
        {"steps": "8"},
    ],
    ids=str,
)
def test_unusable_settings(exact: Model, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        exact.generate(PROMPTS[0], **settings)


def test_none_means_unchanged(exact: Model) -> None:
    assert exact.generation.override(steps=None, t_min=None) == exact.generation


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        "text",
        5,
        None,
        [[]],
        [[1], []],
        [200],
        [-1],
        [0.5],
        ["a"],
        [[1], 5],
        [1, [2]],
        [[1, [2]]],
        [[[1]]],
        [[1], [200]],
        [{"role": "user", "content": "x"}],
        [[{"role": "user", "content": "x"}]],
    ],
    ids=repr,
)
def test_unusable_prompts(exact: Model, prompt: Any) -> None:
    with pytest.raises(PromptError):
        exact.generate(prompt)


def test_other_number_of_row_ids(exact: Model) -> None:
    with pytest.raises(PromptError, match="2 row ids for 3 prompts"):
        exact.generate(PROMPTS, row_ids=[1, 2])


def test_more_tokens_than_positions() -> None:
    model = our_model(NumpyOps(), oracle("window", max_position_embeddings=40), steps=1)
    with pytest.raises(PromptError, match="41 positions"):
        model.generate(PROMPTS, max_new_tokens=20)
    assert len(replies(model, PROMPTS, max_new_tokens=19)[0].tokens) == 19


# ---- closing ------------------------------------------------------------------------------------


def test_closing_early(model: Model) -> None:
    """Wherever the consumer leaves, the model is as good as new, and runs may take turns."""
    expected = replies(model, PROMPTS[:2])
    for count in (0, 1, 4, 9):
        events = model.generate(PROMPTS[:2], seed=3)
        for _ in range(count):
            next(events)
        events.close()  # type: ignore[attr-defined]
        with pytest.raises(StopIteration):
            next(events)
        assert [done.tokens for done in replies(model, PROMPTS[:2])] == [done.tokens for done in expected]
    first, second = model.generate(PROMPTS[:1], seed=3), model.generate(PROMPTS[1:2], seed=3)
    pairs = list(zip(first, second, strict=True))
    for row in range(2):
        done = pairs[-1][row]
        assert isinstance(done, Done) and done.tokens == replies(model, [PROMPTS[row]])[0].tokens


def test_nothing_runs_before_the_first_event(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` checks at once, and computes only when asked for an event."""
    calls: list[int] = []
    monkeypatch.setattr(graph, "encode", lambda *_, **__: calls.append(1))
    exact.generate(PROMPTS)
    assert not calls
