"""Holes are filled: what stands stays, lengths are found, and texts may be longer than a canvas."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgemma.engine.candidates import DOUBT, ladder, search
from dgemma.engine.engine import Engine
from dgemma.engine.fill import Filler
from dgemma.engine.infill import infill
from dgemma.errors import ConfigError, PromptError
from dgemma.loading import load
from dgemma.model import Model
from dgemma.text.holes import Hole, emptied, marked
from dgemma.text.tokenizer import Tokenizer
from tests.text.vocabularies import TINY

ADA = "Extract as JSON: name Ada, age 41"


@pytest.fixture(scope="module")
def model() -> Model:
    return load(backend="numpy")


def outside(text: str, holes: list[Hole]) -> list[str]:
    """What stands before, between and behind holes."""
    edges = [0, *(place for hole in holes for place in (hole.start, hole.stop)), len(text)]
    return [text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


# ---- candidates ---------------------------------------------------------------------------------


def test_the_ladder() -> None:
    assert ladder(20) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert ladder(9, 5) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert ladder(0) == [0]


@pytest.mark.parametrize("wanted", [0, 1, 5, 11, 29, 63, 64])
def test_a_length_is_found_between_the_rungs(wanted: int) -> None:
    asked: list[int] = []

    def score(candidates: list[tuple[int, ...]]) -> list[float]:
        asked.extend(n for (n,) in candidates)
        return [-abs(n - wanted) / 10 for (n,) in candidates]

    assert search([None], [64], [0], score) == (wanted,)
    assert len(asked) == len(set(asked)) < 24


def test_a_search_goes_on_while_its_best_is_to_be_doubted() -> None:
    """A length between rungs that no neighbour hints at is found where nothing else is believed."""

    def score(candidates: list[tuple[int, ...]]) -> list[float]:
        return [0.0 if n == 7 else DOUBT - 1 - n for (n,) in candidates]

    assert search([None], [8], [0], score) == (7,)


def test_several_holes_take_turns_and_known_ones_stay() -> None:
    def score(candidates: list[tuple[int, ...]]) -> list[float]:
        assert all(b == 5 for _, b, _ in candidates)
        return [-abs(a - 3.0) - abs(c - 9) for a, _, c in candidates]

    assert search([None, 5, None], [16, 5, 16], [0, 0, 0], score) == (3, 5, 9)


# ---- the embedded model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"name": "<<>>", "age": 41}', '{"name": "Ada", "age": 41}'),
        ('{"name": "<<3>>", "age": <<2>>}', '{"name": "Ada", "age": 41}'),
        ('\ufeff{"name": "A<<>>", "age": 41}\r\n', '\ufeff{"name": "Ada", "age": 41}\r\n'),
    ],
)
def test_holes_are_filled(model: Model, text: str, expected: str) -> None:
    done = model.infill(text, instruction=ADA, seed=0)
    assert done.text == expected
    for hole in done.holes:
        assert done.text[hole.start :].startswith(hole.text) and hole.tokens and hole.score > DOUBT
    assert (done.seed, done.backend, done.canvases) == (0, "numpy", 1)
    assert done.steps <= done.row_steps and done.candidates >= 1


def test_the_seed_decides_and_the_company_does_not(model: Model) -> None:
    """An engine with a thread of its own and another row gives the same text as one that is driven by
    hand."""
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": ADA}])
    text, holes = marked('{"name": "<<>>", "age": 41}')
    alone = model.infill(text, holes, prompt=prompt, seed=5)
    with Engine(model, None, max_rows=3, prefixes=1 << 30).thread() as engine:
        filler = Filler(engine, model.seams, model.generation, 5)
        together: list[Any] = []
        other = threading.Thread(
            target=lambda: together.append(infill(filler, text, holes, lambda _: prompt))
        )
        other.start()
        mine = infill(filler, text, holes, lambda _: prompt)
        other.join()
    assert mine.holes == together[0].holes == alone.holes


def test_the_prompt_is_encoded_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    extend = model.extend

    def counted(contexts: Any, rows: Any) -> None:
        encoded.extend(len(row) for row in rows)
        extend(contexts, rows)

    monkeypatch.setattr(model, "extend", counted)
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": ADA}])
    done = model.infill('{"name": "<<>>", "age": 41}', prompt=prompt, seed=0)
    assert done.candidates > 5 and sum(encoded) == len(prompt)


def test_a_text_longer_than_a_canvas(model: Model) -> None:
    """What precedes is context, what follows is pinned, and its rest is in the prompt; each hole has its
    canvas."""
    text = " ".join(map(str, range(3, 45)))
    holes = [Hole(text.index(" 12"), text.index(" 12") + 3), Hole(text.index(" 40"), text.index(" 40") + 3)]
    done = model.infill(text, holes, instruction="Count from 3 to 44.", prompt=None, seed=1)
    assert outside(done.text, [Hole(h.start, h.start + len(h.text)) for h in done.holes]) == outside(
        text, holes
    )
    prompts: list[str] = []

    def prompt(rest: str) -> list[int]:
        prompts.append(rest)
        return model.tokenizer.encode_chat([{"role": "user", "content": "Count from 3 to 44."}])

    with Engine(model, None, prefixes=1 << 30) as engine:
        filler = Filler(engine, model.seams, model.generation, 1)
        done = infill(filler, *emptied(text, holes), prompt)
    assert done.text == text and done.canvases == 2
    # A hole in what the canvas has no room for is to be seen, and no number is told twice or left out.
    first = prompts[0]
    assert first.endswith("42 43 44") and "[…]" in first and text.index(first.partition("[…]")[0])
    assert prompts[-1] == "" or text.endswith(prompts[-1])


# ---- random texts -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random() -> Model:
    """A random model of a canvas of 8 tokens with the embedded model's tokenizer."""
    from dgemma.network.numpy_ops import NumpyOps
    from tests.oracle import oracle, our_model

    made = our_model(NumpyOps(), oracle("odd", canvas=8, vocab_size=480), steps=2, stop_ids=(1, 106))
    made._tokenizer = Tokenizer(TINY, None, "here")
    return made


TEXTS = st.text(st.sampled_from("the cat\n\r\t é漢🙂▁<|turn>{}1") | st.characters(codec="utf-8"), max_size=24)


@given(TEXTS, st.sets(st.integers(0, 24), min_size=1, max_size=4), st.integers(1, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_stands_outside_holes_stays(random: Model, text: str, ends: set[int], length: int) -> None:
    """A model that knows nothing writes what it likes in holes, over several canvases, and nothing beside
    them."""
    places = sorted({min(end, len(text)) for end in ends})
    holes = [Hole(a, b, length) for a, b in zip(places[::2], places[1::2], strict=False)]
    holes = holes or [Hole(places[0], places[0])]
    done = random.infill(text, holes, prompt=[2, 105, 7], seed=0, max_new_tokens=2)
    filled = [Hole(hole.start, hole.start + len(hole.text)) for hole in done.holes]
    assert outside(done.text, filled) == outside(text, holes)
    assert not any(token in hole.text for hole in done.holes for token in ("<turn|>", "<pad>", "<eos>"))
    assert all(hole.length in (None, made.tokens) for hole, made in zip(holes, done.holes, strict=True))


@pytest.mark.parametrize(
    "text, options, said",
    [
        ("abc", {}, "no hole"),
        ("a<<0>>b", {}, "nothing to fill"),
        ("a<<32>>b", {}, "does not fit on a canvas of 32"),
        ("<<>><<>>", {}, "overlap or touch"),
        ("a<<>>" + "the cat " * 3000, {}, "positions, the model has 4096"),
        ("the cat " * 3000 + "<<>>", {}, "positions, the model has 4096"),
        ("a<<>>", {"max_new_tokens": 0}, "max_new_tokens"),
        ("a<<>>", {"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_filled(model: Model, text: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises((PromptError, ConfigError), match=said):
        model.infill(text, **options)
