"""Conversations and tools as others write them, in the one form that a chat template is given.

The form is that of OpenAI's chat API, as transformers hands it to a template: plain JSON values, keys without
null, arguments of a call as an object. What cannot be said to the model is an error and never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

import numpy as np

from dgemma.errors import PromptError

Message = dict[str, Any]

# The released template writes any role into the prompt as it is, but was made for these.
ROLES = ("system", "developer", "user", "assistant", "model", "tool")
MODEL_ROLES = ("assistant", "model")

MAX_DEPTH = 64  # a template recurses once a level; Python's stack ends near 1,000

# Names under which parts of text come: OpenAI's chat and its responses.
_TEXT = ("text", "input_text", "output_text")
# Beside `content`, other programs put things here that no prompt would hold.
_BESIDE = (
    "images", "audio", "videos", "files", "attachments", "experimental_attachments", "refusal",
    "function_call",
)  # fmt: skip
# transformers fills the first two from the first of these that is there.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CALL_FORM = '{"function": {"name": …, "arguments": {…}}}'
_TOOL_FORM = '{"type": "function", "function": {"name": …, "parameters": {…}}}'


def read_messages(messages: Any) -> list[Message]:
    """A conversation in the form that templates take; PromptError names the message that cannot be read.

    Messages are objects with a role and content; dataclasses, and models of pydantic as OpenAI's client
    returns them, will do. Content is text, null or a list of parts of text. A call's arguments may be JSON in
    a string, and a call may stand without its "function" object, as `dgemma generate --json` prints it. The
    result of a tool may be any JSON value.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError("messages must be a non-empty list of objects with 'role' and 'content'")
    return [_message(message, f"message {index}") for index, message in enumerate(messages)]


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools as objects with a "function"; a bare one, as in OpenAI's responses, gets one around it."""
    if not isinstance(tools, list | tuple):
        raise PromptError("tools must be a list of objects")
    return [_tool(plain(tool, f"tool {index}"), f"tool {index}") for index, tool in enumerate(tools)]


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """`value` as plain JSON values; PromptError for what JSON or UTF-8 cannot say.

    A template sees nothing else: an object of the caller's has methods that no sandbox knows.
    """
    if depth > MAX_DEPTH:
        raise PromptError(f"{where}: nested more than {MAX_DEPTH} deep")
    if isinstance(value, np.generic):
        value = value.item()
    elif callable(getattr(value, "model_dump", None)):
        value = value.model_dump()
    elif is_dataclass(value) and not isinstance(value, type):  # our own `ToolCall`, too
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, str):
        return _text(str.__str__(value), where)  # an enum's own `str` says another thing
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) >= 10**1000:  # Python itself writes no integer of 4,300 digits
            raise PromptError(f"{where}: an integer of more than 1,000 digits")
        return int(value)
    if isinstance(value, float):
        if not isfinite(value):
            raise PromptError(f"{where}: {value} is no number in JSON")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise PromptError(f"{where}: a key must be text, not {type(key).__name__}")
        return {_text(key, where): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    raise PromptError(f"{where}: {type(value).__name__} is no JSON value")


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise PromptError(
            f"{where}: the text holds {code}, which is no character; a string was cut inside one, or its "
            "bytes are no UTF-8"
        ) from None
    return text


# ---- messages -----------------------------------------------------------------------------------


def _message(given: Any, where: str) -> Message:
    message = plain(given, where)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise PromptError(f"{where}: expected an object with a 'role'")
    if (role := message["role"]) not in ROLES:
        raise PromptError(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    # transformers leaves out what is null, as templates would write "None".
    message = {key: value for key, value in message.items() if value is not None}
    if beside := next((key for key in _BESIDE if message.get(key)), None):
        raise PromptError(f"{where}: {beside!r} cannot be given to the model{_instead(beside)}")
    if "content" in message:
        message["content"] = _content(message["content"], role, f"{where}: content")
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _calls(message["tool_calls"], where)
    for key in (*_REASONING, "name"):
        if not isinstance(message.get(key, ""), str):
            raise PromptError(f"{where}: {key!r} must be text")
    thought = next((message[key] for key in _REASONING if key in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _instead(beside: str) -> str:
    return "; write it as 'tool_calls'" if beside == "function_call" else ": text is all that it reads so far"


def _content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and not (role == "tool" and not any(_is_part(part) for part in content)):
        return [_part(part, f"{where}: part {index}") for index, part in enumerate(content)]
    if role == "tool":  # any JSON value is a result
        return json.dumps(content, ensure_ascii=False) if isinstance(content, list | dict) else content
    raise PromptError(f"{where} must be text, null or a list of parts, not {json.dumps(content)[:40]}")


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and ("type" in part or "text" in part)


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise PromptError(f"{where}: expected an object with 'type' and 'text'")
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in _TEXT:
        raise PromptError(
            f"{where} is of type {json.dumps(kind, ensure_ascii=False)[:40]}; the model reads text only "
            "so far, in parts of type 'text'"
        )
    if not isinstance(part.get("text"), str):
        raise PromptError(f"{where}: 'text' must be text")
    return part | {"type": "text"}


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise PromptError(f"{where}: tool_calls must be a list of {_CALL_FORM}")
    return [_call(call, f"{where}: tool_calls: {index}") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    own = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("name"), str):
        raise PromptError(f"{where} must have the form {_CALL_FORM}")
    function = {key: value for key, value in own.items() if key != "id"}
    function["arguments"] = _arguments(own.get("arguments"), where)
    around = call if "function" in call else {key: call[key] for key in ("id", "type") if key in call}
    return {"type": "function", **around, "function": function}


def _arguments(given: Any, where: str) -> dict[str, Any]:
    """The arguments of a call. OpenAI writes them as JSON in a string; the template would paste that."""
    if given is None or given == "":
        return {}
    value = given
    if isinstance(given, str):
        try:
            value = plain(json.loads(given), where)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        shown = json.dumps(given, ensure_ascii=False)
        raise PromptError(f"{where}: arguments must be a JSON object, not {shown[:60]}")
    return value


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
        tool = {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise PromptError(f"{where} must have the form {_TOOL_FORM}")
    return tool


# ---- the texts of a conversation ------------------------------------------------------------------


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of plain JSON values with each string, keys included, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_texts(item, change) for key, item in value.items()}
    return [map_texts(item, change) for item in value] if isinstance(value, list) else value


def texts(value: Any) -> Iterator[str]:
    """Each string of plain JSON values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from texts(item)


def is_conversation(prompt: Any) -> bool:
    """Whether a row of a prompt is a list of messages and not of token ids."""
    numbers = int | float | np.number
    return isinstance(prompt, list | tuple) and bool(prompt) and not isinstance(prompt[0], numbers)


def last_is_answer(messages: Sequence[Message]) -> bool:
    """Whether the last message can be continued: the model's own, with text and without calls."""
    last = messages[-1]
    return last["role"] in MODEL_ROLES and bool(last.get("content")) and not last.get("tool_calls")
