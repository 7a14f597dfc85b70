"""Prompts in, replies out: the checkpoint's own chat template, and the channels of a raw reply.

jinja2's sandbox renders the template, which is never hard-coded. BOS comes from the template, not from the
tokenizer. A reply is split at the turn, channel and tool tokens of the Gemma 4 format (model.md, "Prompts").
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

TURN_END, CHANNEL, CHANNEL_END = "<turn|>", "<|channel>", "<channel|>"
CALL, CALL_END, RESPONSE, QUOTE = "<|tool_call>", "<tool_call|>", "<|tool_response>", '<|"|>'


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
