"""Encoded prefixes that are used again: the same numbers, fewer tokens, within a limit in bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import Done, Prefill
from dgemma.engine.engine import Engine
from dgemma.engine.prefix import Prefixes
from dgemma.engine.request import Request
from dgemma.model import Model
from dgemma.network.context import Context
from dgemma.network.numpy_ops import NumpyOps
from tests.compare import backends, close, make
from tests.oracle import oracle, our_model, tokens

LONG = tokens(1, 90).tolist()  # the window is 12, a canvas 16: a context goes back by 16
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def exact() -> Model:
    return our_model(NumpyOps(), oracle("window"), steps=2)


def ask(engine: Engine, prompt: list[int], **options: Any) -> tuple[Done, list[Prefill]]:
    own = engine.runner.generation.override(**({"max_new_tokens": 40} | options))  # type: ignore[attr-defined]
    events = list(engine.submit(Request(prompt, own, 1)))
    done = events[-1]
    assert isinstance(done, Done)
    return done, [event for event in events if isinstance(event, Prefill)]


@pytest.mark.parametrize("backend", backends("float32", reference=True))
@pytest.mark.parametrize("common", [90, 89, 75, 74, 0])
def test_reused_and_fresh_give_the_same_logits(backend: Any, common: int) -> None:
    """Back by up to a canvas, from a context in one piece and in many."""
    model = our_model(make(backend), oracle("window"), steps=1)
    prompt = [*LONG[:common], (LONG[common % 90] + 1) % 200, *tokens(2, 25).tolist()]
    canvas = tokens(3, 16)[None]
    expected = model.logits(model.encode([prompt]), canvas)
    for pieces in (PLENTY, 7):
        model.ops.piece_slots = pieces
        prefixes = Prefixes(PLENTY)
        prefixes.keep(LONG, model.encode([LONG])[0])
        found = prefixes.find(prompt)
        if common < 74:
            assert found is None
            continue
        assert found is not None and found.length == common
        close(model.logits(model.encode([prompt[common:]], [found]), canvas), expected, 1e-5, "logits")


def test_the_longest_prefix_at_hand(exact: Model) -> None:
    prefixes = Prefixes(PLENTY)
    contexts = {n: exact.encode([LONG[:n]])[0] for n in (30, 60, 90)}
    for n, context in contexts.items():
        prefixes.keep(LONG[:n], context)
    assert len(prefixes) == 3

    def length(prompt: list[int]) -> int:
        found = prefixes.find(prompt)
        return found.length if found else 0

    assert length([*LONG, 1]) == length(LONG) == 90
    assert length(LONG[:80]) == 80  # taken back from 90
    assert length(LONG[:70]) == 60  # 90 does not reach so far back
    assert length([*LONG[:50], 1, 2]) == 50
    assert length([*LONG[:40], 1, 2]) == 30
    assert length([1, 2]) == 0
    assert prefixes.find([]) is None


def test_a_context_that_another_serves_is_dropped(exact: Model) -> None:
    """Short contexts go back to any length, so that one stands for all of its beginnings."""
    prefixes = Prefixes(PLENTY)
    for n in (5, 9, 12):
        prefixes.keep(LONG[:n], exact.encode([LONG[:n]])[0])
    assert len(prefixes) == 1
    prefixes.keep(LONG[:12], exact.encode([LONG[:12]])[0])
    assert len(prefixes) == 1
    prefixes.keep(LONG[:60], exact.encode([LONG[:60]])[0])
    assert len(prefixes) == 2  # 60 goes back to 44


def test_the_least_recently_used_goes_first(exact: Model) -> None:
    prompts = [[n, *LONG] for n in range(4)]
    one = sum(exact.encode([prompts[0]])[0].arrays().values())
    prefixes = Prefixes(3 * one)
    for prompt in prompts[:3]:
        prefixes.keep(prompt, exact.encode([prompt])[0])
    assert prefixes.bytes == 3 * one
    assert prefixes.find(prompts[0]) is not None
    prefixes.keep(prompts[3], exact.encode([prompts[3]])[0])
    assert [prefixes.find(prompt) is not None for prompt in prompts] == [True, False, True, True]
    assert prefixes.bytes <= prefixes.limit


def test_what_contexts_share_counts_once(exact: Model) -> None:
    """Full layers of a long prefix exist once, however many go on from it. Without room nothing is kept."""
    first = exact.encode([tokens(5, 1500).tolist()])[0]
    prefixes = Prefixes(PLENTY)
    prefixes.keep(tokens(5, 1500).tolist(), first)
    alone = prefixes.bytes
    for n in range(4):
        grown = exact.encode([[n] * 30], [first])[0]
        prefixes.keep([*tokens(5, 1500).tolist(), *[n] * 30], grown)
    assert len(prefixes) == 5
    (small,) = exact.encode([LONG[:30]])
    assert prefixes.bytes - alone < 4 * 2 * sum(small.arrays().values())
    none = Prefixes(0)
    none.keep(LONG[:30], small)
    assert len(none) == 0 and none.find(LONG) is None


def test_growth_leaves_what_is_kept_alone(exact: Model) -> None:
    """Rows grow from a kept context, one after the other, and it stays what it was."""
    prefixes = Prefixes(PLENTY)
    context = exact.encode([LONG])[0]
    prefixes.keep(LONG, context)
    before = {id: array.copy() for id, array in enumerate(_arrays(prefixes.find(LONG)))}
    exact.extend([context], [np.array(LONG)])
    for _ in range(3):
        found = prefixes.find(LONG)
        assert found is not None
        exact.extend([found], [np.array([1, 2, 3])])
    for id, array in enumerate(_arrays(prefixes.find(LONG))):
        np.testing.assert_array_equal(array, before[id])


def _arrays(context: Context | None) -> list[np.ndarray]:
    assert context is not None
    return [x for pieces in context.read() for kv in pieces for x in kv]


# ---- in the engine ------------------------------------------------------------------------------


def test_a_second_turn_encodes_what_is_new(exact: Model) -> None:
    """The prompt of a turn has the turn before, and the reply's committed canvases."""
    engine = Engine(exact, None, prefixes=PLENTY)
    first, read = ask(engine, LONG)
    assert (first.stats.cached_tokens, read[-1].done) == (0, 90)
    prompt = [*LONG, *first.tokens, *tokens(4, 10).tolist()]
    second, read = ask(engine, prompt)
    # The last of three canvases was not encoded.
    assert second.stats.cached_tokens == 90 + 32
    assert [(event.done, event.total) for event in read] == [(122, 140), (140, 140)]
    assert second.tokens == ask(Engine(exact, None), prompt)[0].tokens
    again, read = ask(engine, prompt)
    assert again.stats.cached_tokens == 140 and [event.done for event in read] == [140]
    assert again.tokens == second.tokens


def test_rewritten_history_is_used_up_to_the_first_difference(exact: Model) -> None:
    """A template leaves a thought out: the state at the end of the prompt is at hand, whatever came after."""
    engine = Engine(exact, None, prefixes=PLENTY)
    first, _ = ask(engine, LONG)
    rewritten = [*LONG, *first.tokens[20:], 5, 6]
    second, _ = ask(engine, rewritten)
    assert second.stats.cached_tokens == 90
    assert second.tokens == ask(Engine(exact, None), rewritten)[0].tokens
    shorter = [*LONG[:80], 5, 6]
    third, _ = ask(engine, shorter)
    assert third.stats.cached_tokens == 80
    assert third.tokens == ask(Engine(exact, None), shorter)[0].tokens


def test_a_reply_of_many_canvases_edited_in_the_middle(exact: Model) -> None:
    engine = Engine(exact, None, prefixes=PLENTY)
    first, _ = ask(engine, LONG, max_new_tokens=160)
    edited = [*LONG, *first.tokens[:70], 5, 6, 7]
    second, _ = ask(engine, edited)
    assert second.stats.cached_tokens == 90 + 70
    assert second.tokens == ask(Engine(exact, None), edited)[0].tokens


def test_a_chat_with_the_embedded_model() -> None:
    """By its own template and tokenizer: the second turn encodes the reply's rest and the new message."""
    model = dgemma.load(backend="numpy")
    engine = Engine(model, model.tokenizer, prefixes=PLENTY)
    messages = [{"role": "user", "content": 'Reverse "canvas".'}]
    prompt = model.tokenizer.encode_chat(messages)
    first, _ = ask(engine, prompt)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is 7 + 8?"}]
    second, _ = ask(engine, model.tokenizer.encode_chat(messages))
    assert first.text == "savnac" and second.stats.cached_tokens == len(prompt)
