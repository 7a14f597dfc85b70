"""Canvases: what a mask changes, replies that would be empty, canvases that say nothing, and other choices.

Where a canvas must say something in particular, `scripted` puts it in the place of what a random model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from dgemma import Committed, Done, Draft
from dgemma.engine import sampler
from dgemma.engine.canvas import is_degenerate
from dgemma.engine.engine import Engine
from dgemma.engine.request import Request
from dgemma.engine.sampler import FORBIDDEN
from dgemma.model import Model
from dgemma.network.bias import KEPT, Biases
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops.few import Few
from dgemma.network.runner import Seen
from tests.compare import backends, close, make, rounding
from tests.oracle import oracle, our_model, softmax, tokens

CANVAS, STOP = 16, 7
PROMPT = tokens(0, 12).tolist()


@pytest.fixture
def exact() -> Model:
    return our_model(NumpyOps(), oracle("window"), steps=4, stop_ids=(STOP,))


@pytest.fixture(params=backends("float32", "bfloat16", reference=True))
def model(request: pytest.FixtureRequest) -> Model:
    return our_model(make(request.param), oracle("window"), steps=4)


def events(model: Model, prompt: list[int] = PROMPT, draft: Sequence[int] = (), **settings: Any) -> list[Any]:
    own = model.generation.override(**({"max_new_tokens": CANVAS} | settings))
    return list(Engine(model, None).submit(Request(prompt, own, seed=5, draft=draft)))


def end(model: Model, **settings: Any) -> Done:
    done = events(model, **settings)[-1]
    assert isinstance(done, Done)
    return done


def scripted(model: Model, monkeypatch: pytest.MonkeyPatch, *canvases: Sequence[int]) -> list[np.ndarray]:
    """Canvases that the model is sure of, one a canvas begun; returns the noise that each began with."""
    begun: list[np.ndarray] = []
    see = partial(Model.see, model)

    def looked(contexts: Any, canvas: np.ndarray, soft: Any, *rest: Any) -> Seen:
        if soft[0] is None:
            begun.append(canvas[0])
        seen = see(contexts, canvas, soft, *rest)
        return replace(seen, argmax=np.array([canvases[len(begun) - 1]]), entropy=seen.entropy * 0)

    monkeypatch.setattr(model, "see", looked)
    return begun


# ---- what a mask changes ------------------------------------------------------------------------


def test_whatever_the_model_says_of_a_canvas_knows_the_mask(model: Model) -> None:
    """Argmax, samples, entropies, probabilities and soft embeddings are those of softmax(z + bias)."""
    rng, V = np.random.default_rng(0), model.config.vocab_size
    contexts, canvas = model.encode([PROMPT, PROMPT[:5], PROMPT[:3]]), tokens(1, 3, CANVAS)
    uniforms, heat = rng.random((3, CANVAS)), np.array([0.5, 0.7, 0.9])
    tables = [rng.integers(0, 6, V), rng.integers(0, 3, V)]
    values = [rng.normal(0, 3, (CANVAS, 6)), rng.normal(0, 3, (CANVAS, 3))]
    values[0][:, 2], values[1][4:, :2] = FORBIDDEN, FORBIDDEN
    z = model.logits(contexts, canvas).astype(np.float64) / heat[:, None, None]
    for row, table, own in zip((0, 2), tables, values, strict=True):
        z[row] += own[:, table]
    p, off = softmax(z), 60 * rounding(model.ops) + 1e-5
    bias = [(tables[0], values[0]), None, (tables[1], values[1])]
    seen = model.see(contexts, canvas, None, heat, uniforms, bias=bias)
    assert seen.best is not None
    at = (np.arange(3)[:, None], np.arange(CANVAS))
    assert (p[*at, seen.argmax] >= p.max(-1) * (1 - off)).all()
    assert (p[*at, seen.sample] > 0).all()
    reach = np.cumsum(p, -1)[*at, seen.sample]
    assert ((reach >= uniforms - off) & (reach - p[*at, seen.sample] <= uniforms + off)).all()
    close(seen.best, p.max(-1), off, "probability of the best")
    close(seen.entropy, -(p * np.log(np.maximum(p, 1e-300))).sum(-1), off, "entropy")
    table = model.ops.to_numpy(model.weights.embed)
    close(model.ops.to_numpy(seen.soft), p @ table, off, "soft embedding")


def test_a_bias_has_few_shapes_and_its_tables_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a recorded step is recorded for few of them; and a table is sent once."""
    ops, sent = NumpyOps(), []
    monkeypatch.setattr(ops, "asclasses", lambda x: sent.append(x.shape) or NumpyOps.asclasses(ops, x))
    biases, rng, V = Biases(ops), np.random.default_rng(0), 50
    rows = [(rng.integers(0, c, V), rng.normal(size=(4, c)).astype(np.float32)) for c in (2, 6, 3)]
    given = [rows[0], None, rows[1], rows[2], rows[1]]
    for _ in range(2):
        bias = biases.of(given, 4)
        assert bias is not None and bias.classes.dtype == np.int16
        assert bias.classes.shape == (4, V) and bias.values.shape == (20, 8)
        for n, row in enumerate(np.repeat(np.arange(5), 4)):
            own = given[row]
            wanted = 0 if own is None else own[1][n % 4][own[0]]
            np.testing.assert_array_equal(bias.values[n, bias.classes[bias.which[n]]], wanted * np.ones(V))
    assert sent == [(1, V)] * 3
    for _ in range(3 * KEPT):
        biases.of([(rng.integers(0, 2, V), rows[0][1]), rows[0]], 4)
    assert len(sent) == 3 + 3 * KEPT and len(biases._tables) <= KEPT + 2
    assert biases.of([None, None], 4) is None


@pytest.mark.parametrize("wanted", [1, 60])
def test_a_reply_does_not_begin_with_a_stop_id(model: Model, wanted: int) -> None:
    """However much the model wants one: its most probable first tokens are the stop ids."""
    soft, n = None, model.generation.steps
    noise = sampler.Noise(5, sampler.row_id(PROMPT), 0, model.config.vocab_size)
    logits = model.logits(model.encode([PROMPT]), noise.start(n, CANVAS)[None], soft)[0, 0]
    stops = tuple(int(token) for token in np.argsort(-logits)[:wanted])
    first = next(e for e in events(model, stop_ids=stops, allow_empty=True) if isinstance(e, Draft))
    assert first.tokens[0] in stops
    drafts = [e for e in events(model, stop_ids=stops) if isinstance(e, Draft)]
    assert drafts and all(draft.tokens[0] not in stops for draft in drafts)
    assert all(draft.entropy[0] > 0 for draft in drafts)


def test_an_empty_reply_may_be_allowed(exact: Model) -> None:
    """It is the reference's sampler then: drafts are bit-equal to a loop that knows of no bias."""
    settings = {"stop_ids": tuple(range(40)), "max_new_tokens": 3 * CANVAS}
    drafts = [e for e in events(exact, allow_empty=True, **settings) if isinstance(e, Draft)]
    contexts, at, ended = exact.encode([PROMPT]), 0, False
    while not ended and at < len(drafts):
        noise = sampler.Noise(5, sampler.row_id(PROMPT), at // 4, exact.config.vocab_size)
        canvas, soft = noise.start(4, CANVAS)[None], None
        for n in (4, 3, 2, 1):
            uniforms, fresh = noise.draw(n, CANVAS)
            heat = sampler.temperature(exact.generation, n)
            step = exact.refine(contexts, canvas, soft, heat, uniforms[None], fresh[None])
            canvas, soft = step.canvas, step.soft
            np.testing.assert_array_equal(drafts[at].tokens, step.argmax[0])
            np.testing.assert_array_equal(drafts[at].accepted, step.accepted[0])
            np.testing.assert_array_equal(drafts[at].entropy, step.entropy[0])
            at += 1
        contexts = exact.encode(step.argmax.tolist(), contexts)
        ended = bool((step.argmax < 40).any())
    assert at == len(drafts)
    masked = [e for e in events(exact, **settings) if isinstance(e, Draft)]
    assert masked[0].entropy[0] != drafts[0].entropy[0]
    np.testing.assert_array_equal(masked[0].entropy[1:], drafts[0].entropy[1:])


# ---- canvases that say nothing ------------------------------------------------------------------

PAD, TEXT = [0] * CANVAS, list(range(20, 20 + CANVAS))


@pytest.mark.parametrize(
    "canvas, ended, expected",
    [
        ([0] * 20, False, True),  # padding
        ([0] * 3, True, True),  # padding before a stop id
        ([], True, False),  # nothing before a stop id: the mask has that
        ([9] * 8, False, True),
        ([9] * 7, False, False),
        ([9] * 8, True, False),  # a reply that ends
        ([9] * 15 + [8], False, False),
        ([5, 6, 8] * 8, False, True),
        ([5, 6, 8] * 7 + [5, 6], False, False),  # seven times and a bit
        ([5, 6, 8] * 8 + [5], False, True),
        ([4] + [5, 6, 8] * 20, False, False),
        (list(range(64)), False, False),
    ],
)
def test_which_canvases_say_nothing(canvas: list[int], ended: bool, expected: bool) -> None:
    assert is_degenerate(np.array(canvas, np.int64), 0, ended) == expected


@pytest.mark.parametrize("nothing", [PAD, [9] * CANVAS, [8, 9] * 8, [*[0] * 9, STOP, *TEXT[:6]]], ids=str)
def test_a_canvas_that_says_nothing_is_begun_again_once(
    exact: Model, monkeypatch: pytest.MonkeyPatch, nothing: list[int]
) -> None:
    """With other noise, in place of a draft, too; only the second such canvas ends the reply, and says so."""
    begun = scripted(exact, monkeypatch, nothing, TEXT)
    done = end(exact, draft=[3] * 4)
    assert (done.tokens, done.finish_reason, done.stats.canvases) == (TEXT, "length", 1)
    assert begun[0][:4].tolist() == [3] * 4
    assert (begun[0] != begun[1]).mean() > 0.8 and begun[1][:4].tolist() != [3] * 4
    scripted(exact, monkeypatch, nothing, nothing)
    got = events(exact)
    commits = [event for event in got if isinstance(event, Committed)]
    assert len(commits) == 1 and got[-1].tokens == commits[0].tokens == nothing[: len(got[-1].tokens)]
    assert got[-1].finish_reason == "degenerate" and got[-1].stats.canvases == 1
    begun = scripted(exact, monkeypatch, nothing)
    done = end(exact, allow_empty=True)
    assert done.finish_reason in ("stop", "length") and len(begun) == 1


def test_each_canvas_may_be_begun_again_once(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = scripted(exact, monkeypatch, PAD, TEXT, PAD, TEXT)
    done = end(exact, max_new_tokens=2 * CANVAS)
    assert done.tokens == TEXT * 2 and done.stats.canvases == 2
    assert len({canvas.tobytes() for canvas in begun}) == 4


@pytest.mark.parametrize(
    "legitimate", [[9] * 7 + TEXT[:9], [9] * 12 + [STOP] * 4, [8, 9, 8] * 5 + [8]], ids=str
)
def test_a_run_may_be_what_is_meant(
    exact: Model, monkeypatch: pytest.MonkeyPatch, legitimate: list[int]
) -> None:
    begun = scripted(exact, monkeypatch, legitimate)
    done = end(exact)
    assert done.tokens == legitimate[: len(done.tokens)] and len(begun) == 1
    assert done.finish_reason == ("stop" if STOP in legitimate else "length")


# ---- choices of a call --------------------------------------------------------------------------


def test_choices_reach_the_step(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass: of few tokens a row samples only its own, and a threshold accepts what it says."""
    seen: list[Seen] = []

    def looked(*args: Any) -> Seen:
        seen.append(Model.see(exact, *args))
        return seen[-1]

    monkeypatch.setattr(exact, "see", looked)
    settings, engine = exact.generation.override(max_new_tokens=CANVAS), Engine(exact, None)
    asked = settings.override(top_k=1), settings, settings.override(threshold=0.6)
    handles = [engine.submit(Request(PROMPT, own, seed=5, row_id=3)) for own in asked]
    drafts = [[event for event in handle if isinstance(event, Draft)] for handle in handles]
    assert [len(row) for row in drafts] == [4] * 3 == [len(seen)] * 3
    for step, (few, _, sure) in zip(seen, zip(*drafts, strict=True), strict=True):
        np.testing.assert_array_equal(step.sample[0], few.tokens)
        assert (step.sample[1] != step.argmax[1]).any() and step.best is not None
        wanted = step.best[2] >= 0.6
        wanted[step.best[2].argmax()] = True
        np.testing.assert_array_equal(sure.accepted, wanted)
    assert 4 < sum(draft.accepted.sum() for draft in drafts[2]) < 4 * CANVAS


def test_most_of_the_last_canvases_are_committed(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    said, see = iter([[1] * CANVAS, [2] * CANVAS, TEXT, [2] * CANVAS, TEXT]), exact.see
    monkeypatch.setattr(exact, "see", lambda *args: replace(see(*args), argmax=np.array([next(said)])))
    got = events(exact, steps=5, majority=4, confidence=1e-9, stability=5, allow_empty=True)
    last = [event for event in got if isinstance(event, Draft)][-1]
    # Two of the last four have 2, and two have the text, the latest among them.
    assert got[-1].tokens == last.tokens.tolist() == TEXT


def test_few_is_none_for_rows_that_do_not_ask(model: Model) -> None:
    """Nothing but the sample of a row that asks changes."""
    contexts, canvas = model.encode([PROMPT, PROMPT[:5]]), tokens(1, 2, CANVAS)
    uniforms = np.random.default_rng(1).random((2, CANVAS))
    whole = model.see(contexts, canvas, None, 0.7, uniforms)
    some = model.see(contexts, canvas, None, 0.7, uniforms, few=[None, Few(1, 1.0)])
    for name in ("argmax", "entropy", "best"):
        close(getattr(some, name), getattr(whole, name), 1e-5, name)
    np.testing.assert_array_equal(some.sample[0], whole.sample[0])
    np.testing.assert_array_equal(some.sample[1], whole.argmax[1])
    assert (whole.sample[1] != whole.argmax[1]).any()
