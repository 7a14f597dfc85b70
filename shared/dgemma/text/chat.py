"""Prompts in, replies out: the checkpoint's own chat template, and the channels of a raw reply.

jinja2's sandbox renders the template, which is never hard-coded. BOS comes from the template, not from the
tokenizer. A reply is split at the turn, channel and tool tokens of the Gemma 4 format (model.md, "Prompts").
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dgemma.errors import PromptError

Message = dict[str, Any]

# The released template writes any role into the prompt as it is, but was made for these.
ROLES = ("system", "developer", "user", "assistant", "model", "tool")

TURN_END, CHANNEL, CHANNEL_END = "<turn|>", "<|channel>", "<channel|>"
CALL, CALL_END, RESPONSE, QUOTE = "<|tool_call>", "<tool_call|>", "<|tool_response>", '<|"|>'


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # jinja2's own filter escapes HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


class ChatTemplate:
    """A compiled chat_template.jinja. `specials` are the template's variables such as bos_token."""

    def __init__(self, source: str, specials: dict[str, str]):
        # transformers renders with the same settings: one more blank would change the prompt.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._specials = specials
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise PromptError(f"the chat template does not compile: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation, special tokens included; PromptError if the template refuses."""
        check_messages(messages)
        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                enable_thinking=thinking,
                add_generation_prompt=add_generation_prompt,
                **self._specials,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(f"the chat template refused these messages: {error}") from None


def check_messages(messages: object) -> None:
    """PromptError unless `messages` is a non-empty list of {"role": …, "content": …} objects."""
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError("messages must be a non-empty list of objects with 'role' and 'content'")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise PromptError(f"message {index}: expected an object with a 'role'")
        if message["role"] not in ROLES:
            raise PromptError(f"message {index}: unknown role {message['role']!r}; known: {', '.join(ROLES)}")
        if not isinstance(message.get("content", ""), str | list | type(None)):
            raise PromptError(f"message {index}: 'content' must be a string or a list of parts")


@dataclass(frozen=True)
class ToolCall:
    """A parsed call of a tool."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """The parts of a raw reply. The user sees `text`; `thinking` is the thought channel's text."""

    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]


def parse_reply(raw: str) -> Reply:
    """Split raw model text (special tokens included) into visible text, thought and tool calls.

    The text ends at the first turn end or tool response. A thought channel that the token limit cut open is
    all thought; an empty one, which the model may emit unasked, goes. A call that does not parse stays in
    the text, so that nothing the model said is lost.
    """
    raw = re.split(f"{re.escape(TURN_END)}|{re.escape(RESPONSE)}", raw, maxsplit=1)[0]
    raw = re.sub(r"<(?:eos|bos|pad)>", "", raw)  # they are decoded as text
    thoughts: list[str] = []

    def keep_thought(match: re.Match[str]) -> str:
        thoughts.append(match[1].strip())
        return ""

    text = re.sub(
        rf"{re.escape(CHANNEL)}(?:thought\n?)?(.*?)(?:{re.escape(CHANNEL_END)}|\Z)",
        keep_thought,
        raw,
        flags=re.S,
    )
    calls: list[ToolCall] = []

    def keep_call(match: re.Match[str]) -> str:
        call = _parse_call(match[1])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    text = re.sub(rf"{re.escape(CALL)}(.*?){re.escape(CALL_END)}", keep_call, text, flags=re.S)
    return Reply(text.strip(), "\n".join(t for t in thoughts if t), tuple(calls))


def _parse_call(text: str) -> ToolCall | None:
    match = re.fullmatch(r"call:([\w.-]+)(\{.*\})", text.strip(), flags=re.S)
    if match is None:
        return None
    try:  # the model may write anything, brackets a thousand deep included
        value, end = _parse_value(match[2], 0)
    except (ValueError, IndexError, RecursionError):
        return None
    return ToolCall(match[1], value) if end == len(match[2]) and isinstance(value, dict) else None


def _parse_value(s: str, at: int) -> tuple[Any, int]:
    """One value of Gemma's argument notation: {key:value,…}, [value,…], <|"|>text<|"|> or a literal."""
    if s.startswith(QUOTE, at):
        end = s.index(QUOTE, at + len(QUOTE))
        return s[at + len(QUOTE) : end], end + len(QUOTE)
    if s[at] in "{[":
        return _parse_collection(s, at)
    end = min((i for i in (s.find(c, at) for c in ",}]") if i >= 0), default=len(s))
    return json.loads(s[at:end]), end


def _parse_collection(s: str, at: int) -> tuple[Any, int]:
    mapping = s[at] == "{"
    close, items, keys = "}" if mapping else "]", [], []
    at += 1
    while s[at] != close:
        if mapping:
            if s.startswith(QUOTE, at):
                key, at = _parse_value(s, at)
            else:
                end = s.index(":", at)
                key, at = s[at:end], end
            keys.append(key)
            at = s.index(":", at) + 1
        item, at = _parse_value(s, at)
        items.append(item)
        if s[at] == ",":
            at += 1
        elif s[at] != close:
            raise ValueError(s[at])
    return (dict(zip(keys, items, strict=True)) if mapping else items), at + 1
