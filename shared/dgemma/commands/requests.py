"""Conversations and tools from options, files and stdin, and into files."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn

import click

from dgemma.errors import PromptError
from dgemma.text.messages import Message, read_messages, read_tools

# What a request for OpenAI's chat API may ask for besides its conversation, and the option for it.
_SETTINGS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "seed": "seed",
    "stop": "stop",
    "top_p": "top_p",
}
# What would make another answer: it is refused unless it asks for what is done anyway.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "response_format": (None, {"type": "text"}),
    "n": (None, 1),
    "tool_choice": (None, "auto"),
    "functions": (None, []),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
}


@dataclass(frozen=True)
class Request:
    """Conversations, one for each row, the tools, and the `settings` that a file of a whole request brings.

    `ignored` are the keys of that file that change nothing here.
    """

    conversations: list[list[Message]]
    tools: list[dict[str, Any]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def read_request(
    prompts: Sequence[str], messages: IO[str] | None, system: str | None, tools: IO[str] | None
) -> Request:
    """The request of the given options. PromptError names the file and the message."""
    if prompts and messages:
        raise click.UsageError("--prompt and --messages exclude each other.", click.get_current_context())
    if messages and tools and messages.name == tools.name == "<stdin>":
        raise click.UsageError("--messages and --tools cannot both be stdin.", click.get_current_context())
    if messages:
        request = read_file(messages)
    else:
        texts = prompts or [_stdin()]
        request = Request([read_messages([{"role": "user", "content": text}]) for text in texts])
    if tools and request.tools is not None:
        raise PromptError(
            f"tools are given twice, in {tools.name} and in {messages.name if messages else ''}"
        )
    conversations = request.conversations
    if system is not None:
        conversations = [_with_system(conversation, system) for conversation in conversations]
    functions = read_tools_file(tools) if tools else request.tools
    return Request(conversations, functions, request.settings, request.ignored)


def read_tools_file(file: IO[str]) -> list[dict[str, Any]]:
    """The tools in a file; PromptError names the file and the tool."""
    tools: list[dict[str, Any]] = _named(file.name, read_tools, _json(file))
    return tools


def _stdin() -> str:
    ctx = click.get_current_context()
    if (
        sys.stdin is None or sys.stdin.closed or sys.stdin.isatty()
    ):  # None without a console, as under pythonw
        raise click.UsageError("Nothing to answer: give --prompt or --messages, or pipe a text in.", ctx)
    text = _read(sys.stdin.read).rstrip("\n")
    if not text.strip():
        raise PromptError("stdin is empty; give --prompt or --messages, or pipe a text in")
    return text.removeprefix("\ufeff")


def read_line() -> str | None:
    """The next line of stdin, and those after it while they end with a backslash; None at its end."""
    lines: list[str] = []
    while line := _read(sys.stdin.readline):
        lines.append(line.removesuffix("\n").removesuffix("\r"))
        if not lines[-1].endswith("\\"):
            break
        lines[-1] = lines[-1].removesuffix("\\")
    return "\n".join(lines).removeprefix("\ufeff") if lines else None


def _read(read: Callable[[], str]) -> str:
    """What comes from stdin; PromptError if it cannot be read."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin is not text: {error}") from None
    except OSError as error:
        raise PromptError(f"stdin is not readable: {error.strerror or error}") from None


def open_text(path: str) -> IO[str]:
    """A file of text that a user names, to be read; PromptError if it cannot be opened."""
    try:
        return open(os.path.expanduser(path), encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PromptError(f"{path}: cannot be read ({reason})") from None


def write_json(path: str, data: Any) -> None:
    """Write a file that is there whole or not at all; PromptError if it cannot be written."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    place = os.path.realpath(os.path.expanduser(path))
    part = None
    try:
        if os.path.exists(place) and not os.path.isfile(place):
            raise OSError("not a regular file")
        with tempfile.NamedTemporaryFile(
            "w", dir=os.path.dirname(place), encoding="utf-8", delete=False
        ) as file:
            part = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, place)
    except (OSError, ValueError) as error:
        raise PromptError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})"
        ) from None
    finally:
        if part:
            with suppress(OSError):
                os.unlink(part)


def _json(file: IO[str]) -> Any:
    try:
        return json.loads(file.read().removeprefix("\ufeff"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError, too
        raise PromptError(f"{file.name}: not readable as JSON ({error})") from None
    except OSError as error:
        raise PromptError(f"{file.name}: cannot be read ({error.strerror})") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def read_file(file: IO[str]) -> Request:
    """The request in a file: a list of messages, or an object with "messages".

    A whole request for OpenAI's chat API will do. PromptError names the file and the message.
    """
    data = _json(file)
    if not isinstance(data, dict):
        return Request([_named(file.name, read_messages, data)])
    if "messages" not in data:
        raise PromptError(f"{file.name}: has no 'messages'")
    conversation = _named(file.name, read_messages, data["messages"])
    tools = None if data.get("tools") is None else _named(file.name, read_tools, data["tools"])
    if data.get("tool_choice") == "none":
        tools, data = None, data | {"tool_choice": None}
    for key, harmless in _REFUSED.items():
        if key in data and data[key] not in harmless:
            shown = json.dumps(data[key], ensure_ascii=False)[:60]
            raise PromptError(f"{file.name}: {key!r} {shown} is not supported; leave it out")
    settings = {option: data[key] for key, option in _SETTINGS.items() if data.get(key) is not None}
    if "stop" in settings:
        settings["stop"] = _stop_texts(file.name, settings["stop"])
    known = {"messages", "tools", *_REFUSED, *_SETTINGS}
    ignored = tuple(key for key in sorted(set(data) - known) if data[key] is not None)
    return Request([conversation], tools, settings, ignored)


def _stop_texts(name: str, stop: Any) -> tuple[str, ...]:
    """Texts before which a reply ends, from one or a list; an empty one, or none, stands for none."""
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise PromptError(f"{name}: 'stop' must be a text or a list of texts")
    return tuple(text for text in texts if text)


def _named(name: str, read: Any, data: Any) -> Any:
    """What `read` makes of the data; its errors name the file."""
    try:
        return read(data)
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from None


def _with_system(messages: list[Message], system: str) -> list[Message]:
    if messages[0]["role"] in ("system", "developer"):
        raise PromptError("--system is given, and the conversation has a system message of its own")
    return [*read_messages([{"role": "system", "content": system}]), *messages]
