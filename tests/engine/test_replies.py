"""The text of events: what the canvases of a row add, joined, is what its `Done` says.

The embedded model stands behind a script of its replies, so that any reply can be had.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import Committed, Done
from dgemma.model import Model
from dgemma.network.context import Context
from dgemma.network.runner import Seen
from dgemma.text.calls import ToolCall
from tests.text.vocabularies import TINY, ids_of, spelled

Q, CALL, CALL_END, RESPONSE = '<|"|>', "<|tool_call>", "<tool_call|>", "<|tool_response>"
CHANNEL, CHANNEL_END, END = "<|channel>", "<channel|>", "<turn|>"


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma.load(backend="numpy")


def run(
    model: Model, monkeypatch: pytest.MonkeyPatch, replies: list[list[int]], **options: Any
) -> tuple[list[list[Committed]], list[Done]]:
    """The commits and the end of each row, where row i writes `replies[i]`, then <eos>."""
    L = model.config.canvas_length

    def see(contexts: list[Context], canvas: np.ndarray, *rest: Any) -> Seen:
        said = []
        for context in contexts:  # a row's prompt has one id more than the row before
            row, at = (context.length - 1) % L, (context.length - 1) // L * L
            said.append([*replies[row][at : at + L], *[1] * L][:L])
        entropy = np.zeros(canvas.shape, np.float32)
        soft = model.ops.asarray(np.zeros((*canvas.shape, model.config.hidden_size)))
        return Seen(np.array(said), np.array(said), entropy, soft)

    monkeypatch.setattr(model, "see", see)
    prompts = [[2] * (row + 1) for row in range(len(replies))]
    events = list(
        model.generate(prompts, seed=0, **({"max_new_tokens": 1000, "allow_empty": True} | options))
    )
    commits: list[list[Committed]] = [[] for _ in replies]
    for event in events:
        if isinstance(event, Committed):
            commits[event.row].append(event)
    done = sorted((event for event in events if isinstance(event, Done)), key=lambda done: done.row)
    for row, end in enumerate(done):
        assert "".join(event.text for event in commits[row]) == end.text
        assert "".join(event.thinking for event in commits[row]) == end.thinking
        assert [id for event in commits[row] for id in event.tokens] == end.tokens
        assert json.loads(json.dumps(end.json(), allow_nan=False))["text"] == end.text
    return commits, done


def test_pieces_of_a_batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters, thoughts and calls across canvas edges, rows that end apart."""
    L = model.config.canvas_length
    call = [CALL, "call:f{x:", Q, "🙂" * L, Q, "}", CALL_END]
    replies = [
        ids_of("a" * (L - 2) + "🙂b", END),
        ids_of(CHANNEL, "thought\n" + "hm " * L, CHANNEL_END, "b " * L, END),
        ids_of("a ", *call, " b", *call, RESPONSE),
        ids_of("a" * (L - 3), *call[:-1], END),
        ids_of(END),
    ]
    commits, done = run(model, monkeypatch, replies)
    assert done[0].text == "a" * (L - 2) + "🙂b" and commits[0][0].text == "a" * (L - 2)
    assert done[1].thinking == ("hm " * L).strip() and done[1].text == ("b " * L).strip()
    assert all(event.text or event.thinking for event in commits[1])
    assert done[2].tool_calls == 2 * (ToolCall("f", {"x": "🙂" * L}),) and done[2].text == "a  b"
    assert done[3].unread[0].text == done[3].text.lstrip("a")
    assert [reply.finish_reason for reply in done] == ["stop", "stop", "tool_calls", "stop", "stop"]
    for reply in done:
        again = model.tokenizer.reply(reply.tokens)
        assert (reply.text, reply.thinking) == (again.text, again.thinking)
        assert (reply.tool_calls, reply.unread) == (again.tool_calls, again.unread)


def test_what_was_held_back_comes_with_the_last_canvas(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    L = model.config.canvas_length
    for limit in (L - 1, L, L + 1):
        whole = "a" * (limit - 2) + "🙂"
        commits, (done,) = run(model, monkeypatch, [spelled(whole)], max_new_tokens=limit)
        assert done.finish_reason == "length"
        assert done.text == TINY.decode(spelled(whole)[:limit]) == "a" * (limit - 2) + "��"
        assert [len(event.tokens) for event in commits[0]] == ([limit] if limit <= L else [L, 1])


@pytest.mark.parametrize("rest", [[], [CALL_END]])
def test_a_reply_that_the_limit_cut_is_cut(
    model: Model, monkeypatch: pytest.MonkeyPatch, rest: list[str]
) -> None:
    ids = ids_of(CALL, "call:f{x:1}", *rest)
    _, (done,) = run(model, monkeypatch, [ids], max_new_tokens=len(ids))
    assert done.finish_reason == "length"
    assert (done.tool_calls, len(done.unread)) == (((ToolCall("f", {"x": 1}),), 0) if rest else ((), 1))


def test_a_spelled_end_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Use <turn|>, <eos> or <|tool_call>call:f{}<tool_call|><|tool_response>."
    _, (done,) = run(model, monkeypatch, [[*spelled(text), *ids_of(END)]])
    assert (done.text, done.tool_calls, done.finish_reason) == (text, (), "stop")


def test_a_stop_id_of_the_call_is_no_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (stop,) = spelled("X")
    _, (done,) = run(model, monkeypatch, [spelled("abXcd")], stop_ids=(stop,))
    assert (done.text, done.tokens[-1], done.finish_reason) == ("ab", stop, "stop")


def test_the_record_says_why_a_call_is_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (done,) = run(model, monkeypatch, [ids_of(CALL, "call:f{x:NaN}", CALL_END, RESPONSE)])
    text = "<|tool_call>call:f{x:NaN}<tool_call|>"
    assert done.json()["unread"] == [{"text": text, "reason": "NaN is no number of JSON"}]
    assert (done.json()["text"], done.json()["tool_calls"], done.finish_reason) == (text, [], "stop")
