"""Conversations turn by turn on one engine: what is encoded, what is kept, what an early end leaves."""

from __future__ import annotations

import threading
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma
from dgemma import Committed, Done, Draft, PromptError
from dgemma.engine.conversation import Conversation, user
from dgemma.engine.engine import Engine
from dgemma.engine.request import Request
from dgemma.engine.row import Row
from dgemma.model import Model
from dgemma.network.runner import Seen
from dgemma.settings import GenerationConfig
from dgemma.text.calls import ToolCall
from dgemma.text.messages import read_messages
from dgemma.text.reply import Reply, ReplyParser, joined
from tests.text.test_reply import draws
from tests.text.vocabularies import TINY, ids_of, spelled

ROOM = 1 << 30
LETTERS = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnop"
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather in a city"}}


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma.load(backend="numpy")


def ask(engine: Engine, model: Model, conversation: Conversation, seed: int = 1) -> Done:
    request = conversation.request(model.tokenizer, model.generation, seed)
    return engine.submit(request).result()


def said(text: str = "", calls: tuple[ToolCall, ...] = (), thinking: str = "") -> Any:
    return SimpleNamespace(text=text, tool_calls=calls, thinking=thinking)


# ---- turns on an engine ---------------------------------------------------------------------------


def test_a_turn_encodes_what_is_new_and_says_what_a_fresh_engine_says(model: Model) -> None:
    conversation = Conversation(thinking=True)
    with Engine(model, model.tokenizer, max_rows=1, prefixes=ROOM) as engine:
        before: list[int] = []
        for text in ("Hi!", "What is 47 + 85?"):
            asked = conversation.extended(user(text))
            prompt = list(asked.request(model.tokenizer, model.generation, 1).prompt)
            done = ask(engine, model, asked)
            with Engine(model, model.tokenizer, max_rows=1) as fresh:
                anew = ask(fresh, model, asked)
            assert (done.tokens, done.text, done.thinking) == (anew.tokens, anew.text, anew.thinking)
            pairs = zip(before, prompt, strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            assert (done.stats.cached_tokens, anew.stats.cached_tokens) == (common, 0)
            assert common > 0 or not before
            conversation, before = asked.answered(done) or conversation, prompt
        again = conversation.question()
        assert again and ask(engine, model, again).tokens == done.tokens
        undone = conversation.undone()
        assert undone and undone.messages == conversation.messages[:-2]
        assert ask(engine, model, undone.extended(user("Add 3 and 4."))).stats.cached_tokens > common / 2


def scripted(model: Model, words: np.ndarray) -> Any:
    """Stands in for `model.see`: every canvas [L] is `words`, settled at once."""

    def see(contexts: list[Any], canvas: np.ndarray, *rest: Any) -> Seen:
        tokens = np.broadcast_to(words, canvas.shape).copy()
        soft = model.ops.asarray(np.zeros((*canvas.shape, model.config.hidden_size)))
        return Seen(tokens, tokens, np.zeros(canvas.shape, np.float32), soft)

    return see


def test_the_prompt_outlives_the_canvases_of_its_reply(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that leaves a long reply out, as its thoughts, finds the prompt encoded in little memory."""
    L = model.config.canvas_length
    monkeypatch.setattr(model, "see", scripted(model, np.array(spelled(LETTERS[:L]))))
    prompt = (200 + np.arange(10 * L) % 97).tolist()
    first = Request(prompt, model.generation.override(max_new_tokens=8 * L), 1)
    engine = Engine(model, model.tokenizer, max_rows=1)
    engine.prefixes.limit = 3 * sum(model.encode([prompt])[0].arrays().values())
    with engine:
        assert engine.submit(first).result().stats.canvases == 8
        assert len(engine.prefixes) < 8
        second = Request([*prompt[:-2], 5, 5, 5], model.generation.override(max_new_tokens=1), 1)
        assert engine.submit(second).result().stats.cached_tokens == len(prompt) - 2


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_a_cancelled_reply_leaves_what_it_committed(
    steps: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled from another thread when it has made some steps: two make a canvas here."""
    text = LETTERS[: model.config.canvas_length]
    engine = Engine(model, model.tokenizer, max_rows=1, prefixes=ROOM)
    asked = Conversation().extended(user("Go on."))
    with engine:
        with monkeypatch.context() as patch:
            patch.setattr(model, "see", scripted(model, np.array(spelled(text))))
            handle = engine.submit(
                asked.request(model.tokenizer, model.generation.override(max_new_tokens=1000), 1)
            )
            texts, drafts = [], 0
            if not steps:
                handle.cancel()
            for event in handle:
                drafts += isinstance(event, Draft)
                texts += [event.text] if isinstance(event, Committed) else []
                if isinstance(event, Draft) and drafts == steps:
                    other = threading.Thread(target=handle.cancel)
                    other.start()
                    other.join()
        assert isinstance(event, Done) and event.finish_reason == "cancelled"
        assert drafts == steps and event.text == "".join(texts) == text * (steps // 2)
        assert (engine.running, engine.waiting, engine.reserved) == (0, 0, 0)
        answered = asked.answered(event)
        assert (answered is None) == (not texts)
        follow = (answered or Conversation()).extended(user("What is 47 + 85?"))
        with Engine(model, model.tokenizer) as fresh:
            assert ask(engine, model, follow).tokens == ask(fresh, model, follow).tokens


def test_a_call_its_result_and_the_answer(model: Model) -> None:
    conversation = Conversation((), (WEATHER,)).extended(user("What is the weather in Paris?"))
    call = conversation.answered(said("", (ToolCall("weather", {"city": "Paris"}),)))
    assert call and call.open_calls[0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    with pytest.raises(PromptError, match="no call"):
        conversation.with_result("sunny")
    given = call.with_result("sunny")
    assert not given.open_calls
    with Engine(model, model.tokenizer) as engine:
        assert "Paris" in ask(engine, model, given).text


# ---- the value ------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_their_calls() -> None:
    asked = Conversation().extended(user("both"))
    calls = asked.answered(said("hm", (ToolCall("f", {"x": 1}), ToolCall("g", {})), "think"))
    assert calls and read_messages(calls.messages)[1]["thinking"] == "think"
    one = calls.with_result("1")
    assert [call["function"]["name"] for call in one.open_calls] == ["g"]
    assert one.question() == calls.question() == asked
    both = one.with_result("2")
    results = [message for message in both.messages if message["role"] == "tool"]
    assert [m["tool_call_id"] for m in results] == [c["id"] for c in calls.messages[-1]["tool_calls"]]
    assert [(m["name"], m["content"]) for m in results] == [("f", "1"), ("g", "2")]
    assert both.question() == both
    answered = both.answered(said("done"))
    assert answered and answered.question() == both and answered.undone() == Conversation()


def test_calls_of_other_programs_need_no_id() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    given = Conversation((user("a"), {"role": "assistant", "tool_calls": [call]})).with_result("1")
    assert given.messages[-1] == {"role": "tool", "name": "f", "content": "1"}


def test_a_reply_that_says_nothing_is_no_turn() -> None:
    asked = Conversation().extended(user("a"))
    assert asked.answered(said(thinking="hm")) is None
    assert asked.undone() == Conversation() and Conversation().undone() is None
    assert Conversation().question() is None and Conversation().with_system("b").question() is None


def test_there_is_one_system_message() -> None:
    talk = Conversation().extended(user("a"))
    first = talk.with_system("one")
    assert [m["role"] for m in first.messages] == ["system", "user"]
    assert first.with_system("two").messages[0]["content"] == "two"
    assert first.with_system("") == talk == talk.with_system("")


# ---- what a front end is told ---------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 2999), min_size=1, max_size=40),
    whole=st.booleans(),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    cancel=st.booleans(),
)
def test_commits_are_the_reply_in_order(
    numbers: list[int], whole: bool, sizes: list[int], cancel: bool
) -> None:
    """Wherever canvases cut a reply: thoughts, calls, characters."""
    call = ids_of("<|channel>", "thought\nhm", "<channel|>", "<|tool_call>", "call:f{x:1}", "<tool_call|>")
    ids = [*(call if whole else []), *draws("tiny", numbers)]
    limits = GenerationConfig(4, 0.8, 0.4, 0.1, 1, 0.005, len(ids), (1, 106, 50), allow_empty=True)
    runner: Any = SimpleNamespace(
        config=SimpleNamespace(canvas_length=9, pad_id=0),
        ops=SimpleNamespace(peak_memory=lambda: 0, name="none"),
    )
    row = Row(Request([2], limits, 0), runner, ReplyParser(TINY, limits.stop_ids), 0.0)
    commits: list[Committed] = []
    reason, place = None, 0
    while reason is None and not (cancel and len(commits) == len(sizes)):
        part = ids[place : place + sizes[len(commits) % len(sizes)]]
        place += len(part)
        row.canvas = SimpleNamespace(done=True, argmax=np.array(part), free=np.ones(1, bool))  # type: ignore[assignment]
        ((event, reason),) = row.commit(1.0)
        assert isinstance(event, Committed)
        commits.append(event)
    done = row.done(reason or "cancelled", 2.0)
    told = joined(Reply(event.text, event.thinking, event.tool_calls) for event in commits)
    assert [id for event in commits for id in event.tokens] == done.tokens
    assert done.thinking.startswith(told.thinking) and done.text.startswith(told.text)
    assert done.tool_calls[: len(told.tool_calls)] == told.tool_calls
    if reason:
        assert (told.text, told.thinking, told.tool_calls) == (done.text, done.thinking, done.tool_calls)
    parser = ReplyParser(TINY, limits.stop_ids)
    assert joined([parser.feed(done.tokens), parser.close()]) == Reply(
        done.text, done.thinking, done.tool_calls, done.unread
    )
