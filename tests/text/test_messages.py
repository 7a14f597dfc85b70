"""Messages and tools as other programs write them; what cannot be said to the model is refused."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.errors import DgemmaError, PromptError
from dgemma.text.messages import MAX_DEPTH, read_messages, read_tools
from dgemma.text.tokenizer import Tokenizer
from dgemma.tiny import MODEL_DIR

USER = {"role": "user", "content": "a"}


def one(message: Any) -> dict[str, Any]:
    return read_messages([USER, message])[1]


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}


def refused(message: Any, match: str) -> None:
    with pytest.raises(PromptError, match=match) as caught:
        one(message)
    assert str(caught.value).startswith("message 1") and "\n" not in str(caught.value)


# ---- contents -----------------------------------------------------------------------------------------

PARTS = {
    "image": {"type": "image", "url": "cat.png"},
    "image_url": {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    "input_image": {"type": "input_image", "image_url": "x"},
    "audio": {"type": "audio", "audio": "x.wav"},
    "input_audio": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    "video": {"type": "video", "url": "x.mp4"},
    "file": {"type": "file", "file": {"file_id": "1"}},
    "document": {"type": "document", "source": {}},
    "refusal": {"type": "refusal", "refusal": "no"},
    "tool_use": {"type": "tool_use", "name": "f", "input": {}},
    "an image without a type": {"image_url": {"url": "x"}},
    "text null": {"type": "text", "text": None},
    "text a number": {"type": "text", "text": 5},
    "no text": {"type": "text"},
    "type null": {"type": None, "text": "a"},
    "type a number": {"type": 5, "text": "a"},
    "nothing": {},
    "null": None,
    "a number": 5,
    "a list": ["a"],
}


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_no_text_is_refused(part: str, role: str) -> None:
    """Never dropped: a model that has not seen a picture describes it all the same."""
    refused({"role": role, "content": [{"type": "text", "text": "a"}, PARTS[part]]}, "content: part 1")


@pytest.mark.parametrize("part", [
    {"type": "text", "text": "b"}, {"type": "input_text", "text": "b"}, {"type": "output_text", "text": "b"},
    {"text": "b"}, "b", {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}, "annotations": []},
])  # fmt: skip
def test_forms_of_a_part_of_text(part: Any) -> None:
    (read,) = one({"role": "user", "content": [part]})["content"]
    assert (read["type"], read["text"]) == ("text", "b")


@pytest.mark.parametrize(
    "key", ["images", "audio", "videos", "files", "attachments", "function_call", "refusal"]
)
def test_what_stands_beside_the_content_is_refused(key: str) -> None:
    refused({"role": "user", "content": "a", key: ["x"]}, f"'{key}' cannot be given")
    assert key not in one({"role": "user", "content": "a", key: None})


@pytest.mark.parametrize("content", [5, 5.5, True, {"a": 1}, {"type": "text", "text": "a"}])
def test_contents_that_are_no_text(content: Any) -> None:
    refused({"role": "user", "content": content}, "content must be text, null or a list of parts")


@pytest.mark.parametrize("content", [5, 5.5, True, False, 0, "", "x", {"a": [1, None]}, "5"])
def test_the_result_of_a_tool_may_be_any_value(content: Any) -> None:
    tokenizer = Tokenizer.open(MODEL_DIR)
    assert tokenizer is not None
    messages = [USER, call(name="f", arguments={}), {"role": "tool", "tool_call_id": "1", "content": content}]
    assert (
        json.dumps(content)[1:-1] in tokenizer.decode(tokenizer.encode_chat(messages)).replace('<|"|>', '"')
        or content
    )


def test_lists_that_are_results() -> None:
    assert one({"role": "tool", "content": [1, {"a": "é"}]})["content"] == '[1, {"a": "é"}]'
    assert one({"role": "tool", "content": []})["content"] == "[]"
    assert one({"role": "tool", "content": [{"type": "text", "text": "x"}]})["content"][0]["text"] == "x"


def test_null_is_as_if_it_were_not_there() -> None:
    given = {
        "role": "assistant",
        "content": None,
        "tool_calls": None,
        "name": None,
        "reasoning": None,
        "x": None,
    }
    assert one(given) == {"role": "assistant"}


# ---- calls --------------------------------------------------------------------------------------------

ARGUMENTS = [
    {"city": "Paris", "n": 3},
    {},
    {"q": 'say "hi"', "deep": {"l": [1, None, True]}},
    {"é": "漢字🙂"},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_may_be_json_in_a_string(arguments: dict[str, Any]) -> None:
    for form in (arguments, json.dumps(arguments), json.dumps(arguments, ensure_ascii=False, indent=1)):
        (read,) = one(call(name="f", arguments=form))["tool_calls"]
        assert read["function"] == {"name": "f", "arguments": arguments} and read["id"] == "1"
    own = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}
    assert one(own)["tool_calls"][0]["function"] == {"name": "f", "arguments": arguments}


@pytest.mark.parametrize("arguments", ["", None])
def test_no_arguments(arguments: Any) -> None:
    assert one(call(name="f", arguments=arguments))["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("arguments", [
    "x", "[1]", "5", "null", '{"a": 1', "{'a': 1}", [], [1], 5, True, '{"a": NaN}', '{"a": 1e999}', "[" * 10**5,
    '{"a": ' + "[" * 200 + "]" * 200 + "}", {"a": float("nan")}, {"a": float("-inf")}, '"{}"',
])  # fmt: skip
def test_arguments_that_are_no_object(arguments: Any) -> None:
    refused(call(name="f", arguments=arguments), "message 1")


@pytest.mark.parametrize("calls", [
    "f", 5, {}, ["f"], [None], [{}], [{"name": 5}], [{"function": None}], [{"function": {}}],
    [{"function": {"name": None}}], [{"function": {"arguments": {}}}], [[]], {"name": "f"},
])  # fmt: skip
def test_calls_that_are_none(calls: Any) -> None:
    refused({"role": "assistant", "content": "", "tool_calls": calls}, "tool_calls")


# ---- roles, types, characters ---------------------------------------------------------------------------


@pytest.mark.parametrize("message", [
    None, 5, "a", [], {}, {"content": "a"}, {"role": None}, {"role": 5, "content": "a"}, {"role": "bot", "content": "a"},
    {"role": "USER", "content": "a"}, {"role": "function", "name": "f", "content": "1"}, {"role": "user", "name": 5},
    {"role": "assistant", "reasoning": ["a"]}, {5: "a", "role": "user"}, {"role": "user", "content": {1, 2}},
    {"role": "user", "content": b"a"}, {"role": "user", "x": object()}, {"role": "user", "x": float("nan")},
    {"role": "user", "x": 10**5000},
])  # fmt: skip
def test_messages_that_are_none(message: Any) -> None:
    refused(message, "message 1")


@pytest.mark.parametrize("messages", [None, [], (), {}, "a", 5, {"role": "user", "content": "a"}])
def test_conversations_that_are_none(messages: Any) -> None:
    with pytest.raises(PromptError, match="non-empty list"):
        read_messages(messages)


HALF = "Reverse \ud83d"


@pytest.mark.parametrize("message", [
    {"role": "user", "content": HALF}, {"role": "user", "content": [{"type": "text", "text": HALF}]},
    {"role": "tool", "content": HALF}, {"role": "user", "content": "a", "name": HALF},
    {"role": "user", "content": "a", HALF: 1}, call(name=HALF, arguments={}), call(name="f", arguments={HALF: 1}),
    call(name="f", arguments={"a": [HALF]}), call(name="f", arguments='{"a": "\\ud83d"}'),
    {"role": "assistant", "content": "a", "reasoning": "\udcff"},
])  # fmt: skip
def test_half_a_character_is_refused(message: Any) -> None:
    refused(message, r"U\+D(83D|CFF)")


def test_half_a_character_in_a_tool() -> None:
    with pytest.raises(PromptError, match=r"tool 0.*U\+DE00"):
        read_tools([{"type": "function", "function": {"name": "f", "description": "\ude00"}}])


def test_depth_has_an_end() -> None:
    deep: Any = "x"
    for _ in range(MAX_DEPTH - 8):
        deep = [deep]
    assert one(call(name="f", arguments={"a": deep}))
    for _ in range(100000):
        deep = [deep]
    refused(call(name="f", arguments={"a": deep}), "nested more than")


class Role(str, enum.Enum):  # noqa: UP042 (StrEnum's own text is its value)
    USER = "user"


@dataclass
class Answer:
    role: str = "assistant"
    content: str = "b"
    tool_calls: list[Any] = field(default_factory=list)


class Model:
    """As pydantic's models, which OpenAI's client returns."""

    def model_dump(self) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": None,
            "audio": None,
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        }


def test_objects_of_python() -> None:
    read = read_messages([{"role": Role.USER, "content": np.str_("a")}, Answer(), Model()])
    assert [type(message["role"]) for message in read] == [str] * 3
    assert read[0] == USER and read[2]["tool_calls"][0]["function"]["arguments"] == {}
    assert one(call(name="f", arguments={"n": np.int64(3), "t": (1, np.float32(0.5))}))["tool_calls"][0][
        "function"
    ]["arguments"] == {"n": 3, "t": [1, 0.5]}


# ---- tools --------------------------------------------------------------------------------------------


def test_forms_of_a_tool() -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    want = [{"type": "function", "function": function}]
    assert read_tools(want) == want
    assert read_tools([function]) == read_tools([{"type": "function", **function}]) == want


@pytest.mark.parametrize("tools", [{}, "x", 5, [None], ["f"], [{}], [{"type": "web_search"}], [{"function": {}}], [{"function": {"name": 5}}], [len]])  # fmt: skip
def test_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(PromptError, match="tool"):
        read_tools(tools)


# ---- anything at all ------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "tool", "text", "assistant", "\ud800", b"x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "name", "arguments", "id", "x", "reasoning", "tool_call_id", "image"]) | st.integers(),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "model"]) | JUNK},
        optional={key: JUNK | st.text(max_size=5) for key in ("content", "tool_calls", "reasoning", "tool_call_id", "name")},
    )
    | JUNK,
    max_size=4,
)  # fmt: skip
TOKENIZER = Tokenizer.open(MODEL_DIR)


@settings(max_examples=1000, deadline=None)
@given(MESSAGES, JUNK)
def test_anything_is_read_or_refused_in_one_line(messages: Any, tools: Any) -> None:
    assert TOKENIZER is not None
    try:
        read = read_messages(messages)
        assert read_messages(read) == read  # what is read once reads the same again
        ids = TOKENIZER.encode_chat(messages, tools)
    except DgemmaError as error:
        assert "\n" not in str(error)
    else:
        assert ids[0] == 2
