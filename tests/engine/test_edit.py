"""Edits: what is unlikely under the prompt may change, and nothing else does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dgemma.engine.edit import doubted, survey
from dgemma.engine.engine import Engine
from dgemma.engine.events import Draft
from dgemma.engine.request import FREE, Request
from dgemma.errors import PromptError
from dgemma.loading import load
from dgemma.model import Model
from dgemma.text.holes import Hole
from tests.compare import backends, make
from tests.oracle import oracle, our_model, tokens


@pytest.fixture(scope="module")
def model() -> Model:
    return load(backend="numpy")


def prompt_of(model: Model, question: str) -> list[int]:
    return model.tokenizer.encode_chat([{"role": "user", "content": question}])


@pytest.mark.parametrize(
    "text, question, expected",
    [
        ('{"name": "Ada", "year": 1990', None, '{"name": "Ada", "year": 1990}'),
        ('\ufeff{"name": "Ada", "year": 1990\r\n', None, '\ufeff{"name": "Ada", "year": 1990}\r\n'),
        ("kbca", 'Sort "kbca".', "abck"),
        ("abck", 'Sort "kbca".', "abck"),
        ("the cat sat on the mat", "Replace cat with dog: the cat sat on the mat", "the dog sat on the mat"),
    ],
)
def test_a_text_becomes_what_is_asked_for(
    model: Model, text: str, question: str | None, expected: str
) -> None:
    asked = question or 'Repair this JSON: {"name": "Ada", "year": 1990'
    done = model.edit(text, prompt=[{"role": "user", "content": asked}], seed=0)
    assert done.text == expected
    assert (done.text == text) == (done.tries == 0) and done.after >= done.before
    assert done.surveys == 1 + (done.text != text) and done.seed == 0


def test_a_survey_sees_what_does_not_belong(model: Model) -> None:
    """Also on later canvases: the rest of a long answer is likely, and has the places of its characters."""
    numbers = [str(n) for n in range(3, 45)]
    text = " ".join([*numbers[:30], "cat", *numbers[31:]])
    with model._filler(0, None, {}) as filler:
        seen = survey(filler, text, prompt_of(model, "Count from 3 to 44."))
        assert seen.canvases > 2 and len(seen.logs) == len(seen.places) <= len(seen.best)
        (hole,) = doubted(filler, seen)
        assert text[hole.start : hole.stop].strip().startswith("cat")
        assert doubted(filler, seen, regions=[Hole(0, hole.start)]) == []
        wide = doubted(filler, seen, 1, [Hole(hole.start, len(text))])
    assert wide[0].start == hole.start and wide[0].draft is None


def test_nothing_outside_of_regions_changes(model: Model) -> None:
    text, question = "kbxa", 'Sort "kbca".'
    for region in (Hole(0, 2), Hole(2, 4)):
        done = model.edit(text, question, regions=[region], seed=0, max_new_tokens=2)
        assert done.text != text and done.tries
        assert done.text.startswith(text[: region.start]) and done.text.endswith(text[region.stop :])


@pytest.mark.parametrize("name", backends("float32", reference=True))
def test_tokens_are_judged_tile_by_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = our_model(make(name), oracle("window"))
    monkeypatch.setattr(type(model.ops), "vocab_tile", 64)
    monkeypatch.setattr(type(model.ops), "vocab_rows", 24)
    contexts = model.encode([tokens(0, 9).tolist(), tokens(1, 5).tolist()])
    canvas, other = tokens(2, 32).reshape(2, 16), tokens(3, 32).reshape(2, 16)
    z = model.logits(contexts, canvas).astype(np.float64)
    plane = z - np.log(np.exp(z).sum(-1, keepdims=True))
    for wanted in (None, other):
        logs, best = model.judge(contexts, canvas, wanted)
        ids = canvas if wanted is None else other
        np.testing.assert_allclose(logs, np.take_along_axis(plane, ids[..., None], -1)[..., 0], atol=1e-3)
        np.testing.assert_array_equal(best, z.argmax(-1))


def test_a_whole_draft_that_the_first_step_confirms_is_done(model: Model) -> None:
    prompt = prompt_of(model, 'Sort "kbca".')
    sure, end = model.generation.override(confidence=9.0), model.tokenizer.encode("abck<turn|>")
    whole = end + [1] * (model.config.canvas_length - len(end))
    for draft, steps in ((whole, 1), (end, 2), ([FREE, *whole[1:]], 2)):
        with Engine(model, None) as engine:
            events = list(engine.submit(Request(prompt, sure, 0, draft=draft)))
        assert sum(isinstance(event, Draft) for event in events) == steps, draft


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "an instruction or a prompt"),
        ({"instruction": "a", "prompt": [1]}, "and not both"),
        ({"instruction": "a", "regions": [Hole(0, 9)]}, "not in 3 characters"),
        ({"instruction": "the cat " * 5000}, "positions"),
    ],
)
def test_what_cannot_be_edited(model: Model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        model.edit("abc", **options)
