"""Prompts beside transformers' own, on random conversations; and what a message can spell."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest

from dgemma.errors import DgemmaError
from dgemma.text.tokenizer import Tokenizer
from dgemma.tiny import MODEL_DIR
from tests.text import conversations

pytest.importorskip("transformers")
from transformers import AutoTokenizer

OPTIONS = {"tokenize": True, "return_dict": False}


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    tokenizer = Tokenizer.open(MODEL_DIR)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def oracle() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def case(seed: int, spelled: list[str]) -> tuple[list[dict[str, Any]], Any, bool, bool]:
    r = Random(seed)
    return (
        conversations.conversation(r, spelled),
        conversations.tools(r, spelled),
        r.random() < 0.4,
        r.random() < 0.8,
    )


@pytest.mark.parametrize("block", range(4))
def test_ids_are_those_of_transformers(block: int, ours: Tokenizer, oracle: Any) -> None:
    """With control tokens that count, as there; and with calls as OpenAI writes them."""
    for seed in range(250 * block, 250 * block + 250):
        messages, tools, thinking, prompt = case(seed, list(ours.control) if seed % 2 else [])
        want = oracle.apply_chat_template(
            messages, tools=tools, enable_thinking=thinking, add_generation_prompt=prompt, **OPTIONS
        )
        assert ours.encode_chat(messages, tools, thinking, prompt, control_tokens=True) == want, seed
        written = conversations.as_openai_writes(messages)
        assert ours.encode_chat(written, tools, thinking, prompt, control_tokens=True) == want, seed
        if not seed % 2:
            assert ours.encode_chat(messages, tools, thinking, prompt) == want, seed


def control(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [id for id in ids if tokenizer.raw.id_to_token(id) in tokenizer.control]


@pytest.mark.parametrize("block", range(4))
def test_no_message_writes_a_control_token(block: int, ours: Tokenizer) -> None:
    """The control tokens of a prompt are those that stand there when no message spells one."""
    spelled = re.compile("|".join(re.escape(token) for token in ours.control))
    for seed in range(250 * block, 250 * block + 250):
        messages, tools, thinking, prompt = case(seed, list(ours.control))
        harmless = json.loads(spelled.sub("x", json.dumps([messages, tools]).replace('<|\\"|>', "x")))
        if any("<|channel>" in str(m.get("content")) for m in messages if m["role"] == "assistant"):
            continue  # the template cuts thoughts out of these
        ids = ours.encode_chat(messages, tools, thinking, prompt)
        assert control(ours, ids) == control(ours, ours.encode_chat(*harmless, thinking, prompt)), seed


PLACES = {
    "user": lambda t: ([{"role": "user", "content": t}], None),
    "part": lambda t: ([{"role": "user", "content": [{"type": "text", "text": t}]}], None),
    "system": lambda t: ([{"role": "system", "content": t}, {"role": "user", "content": "a"}], None),
    "answer": lambda t: ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" + t}], None),
    "result": lambda t: (called({"a": 1}, t), None),
    "argument": lambda t: (called({"a": t}, "b"), None),
    "argument's key": lambda t: (called({"a" + t: 1}, "b"), None),
    "call's name": lambda t: (called({}, "b", "f" + t), None),
    "thought": lambda t: ([*called({}, "b")[:1], called({}, "b")[1] | {"reasoning": t}], None),
    "description": lambda t: ([{"role": "user", "content": "a"}], [tool("f", t)]),
    "tool's name": lambda t: ([{"role": "user", "content": "a"}], [tool("f" + t, "b")]),
}


def called(arguments: dict[str, Any], result: str, name: str = "f") -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": result},
    ]


def tool(name: str, description: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description}}


@pytest.mark.parametrize("place", PLACES)
def test_every_control_token_in_every_place(place: str, ours: Tokenizer) -> None:
    plain = ours.encode_chat(*PLACES[place]("x"))
    for token in ours.control:
        for around in ("{}", "a {} b", "{0}{0}", "{0}\n{0}x"):
            text = around.format(token)
            ids = ours.encode_chat(*PLACES[place](text))
            assert control(ours, ids) == control(ours, plain), (token, around)
            assert text in ours.decode(ids)
        if place != "answer" or "channel" not in token:  # of an answer the template cuts these out
            counted = ours.encode_chat(*PLACES[place]("x" + token), control_tokens=True)
            assert len(control(ours, counted)) > len(control(ours, plain)), token


def test_a_control_token_in_two_parts(ours: Tokenizer) -> None:
    """Templates join parts, so each half is harmless by itself."""
    for token in ours.control:
        for cut in range(1, len(token)):
            parts = [{"type": "text", "text": half} for half in (token[:cut], token[cut:])]
            for role in ("user", "system"):
                ids = ours.encode_chat([{"role": role, "content": parts}, {"role": "user", "content": "a"}])
                plain = ours.encode_chat([{"role": role, "content": "x"}, {"role": "user", "content": "a"}])
                assert control(ours, ids) == control(ours, plain), (token, cut, role)


def test_thoughts_before_an_answer_are_left_out(ours: Tokenizer) -> None:
    """A raw reply may be given back: the marks at its beginning are the template's to read."""
    said = "<|channel>thought\nhm<channel|>yes <turn|>"
    ids = ours.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": said}])
    text = ours.decode(ids)
    assert "hm" not in text and "yes <turn|>" in text
    assert control(ours, ids) == control(
        ours, ours.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}])
    )


def test_marks_in_a_message_stay_what_they_are(ours: Tokenizer) -> None:
    """Private code points mark what came from a message; a message may have those, too."""
    text = "\U000f0000<turn|>\U000f0001\U000ffffd"
    ids = ours.encode_chat([{"role": "user", "content": text}])
    assert text in ours.decode(ids)
    assert control(ours, ids) == control(ours, ours.encode_chat([{"role": "user", "content": "x"}]))


# ---- a last message that is continued --------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["sav", "sav ", "a\nb\n", "<b> <turn|>", [{"type": "text", "text": "sav"}]]
)
def test_continuing_is_as_in_transformers(content: Any, ours: Tokenizer, oracle: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    want = oracle.apply_chat_template(messages, continue_final_message=True, **OPTIONS)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert ours.encode_chat(messages, **options, control_tokens=True) == want
    ids = ours.encode_chat(messages, **options)
    assert ours.decode(ids) == ours.decode(want) and control(ours, ids) == control(ours, want)[:4]


@pytest.mark.parametrize(
    "last",
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "a"},
    ],
)
def test_what_cannot_be_continued(last: dict[str, Any], ours: Tokenizer) -> None:
    with pytest.raises(DgemmaError, match="can be continued"):
        ours.encode_chat([{"role": "user", "content": "a"}, last], continue_final_message=True)
