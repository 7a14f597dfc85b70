"""Conversations and tools from options, files and stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import IO, Any

import click

from dgemma.errors import PromptError
from dgemma.text.chat import check_messages


def read_request(
    prompts: Sequence[str], messages: IO[str] | None, system: str | None, tools: IO[str] | None
) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]] | None]:
    """Conversations, one for each row, and the tools, from the given options."""
    if prompts and messages:
        raise click.UsageError("--prompt and --messages exclude each other.", click.get_current_context())
    if messages and tools and messages.name == tools.name == "<stdin>":
        raise click.UsageError("--messages and --tools cannot both be stdin.", click.get_current_context())
    given = None
    if messages:
        conversation, given = _conversation(messages)
        conversations = [conversation]
    else:
        conversations = [[{"role": "user", "content": text}] for text in prompts or [_stdin()]]
    if tools and given is not None:
        raise PromptError(
            f"tools are given twice, in {tools.name} and in {messages.name if messages else ''}"
        )
    if system is not None:
        conversations = [_with_system(conversation, system) for conversation in conversations]
    return conversations, _check_tools(_json(tools), tools.name) if tools else given


def _stdin() -> str:
    ctx = click.get_current_context()
    if sys.stdin is None or sys.stdin.isatty():  # None without a console, as under pythonw
        raise click.UsageError("Nothing to answer: give --prompt or --messages, or pipe a text in.", ctx)
    try:
        text = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin is not text: {error}") from None
    except OSError as error:
        raise PromptError(f"stdin is not readable: {error.strerror or error}") from None
    if not text.strip():
        raise PromptError("stdin is empty; give --prompt or --messages, or pipe a text in")
    return text


def _json(file: IO[str]) -> Any:
    try:
        return json.loads(file.read())
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError, too
        raise PromptError(f"{file.name}: not readable as JSON ({error})") from None


def _conversation(file: IO[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages and tools of a file."""
    data, tools = _json(file), None
    if isinstance(data, dict):
        if unknown := sorted(set(data) - {"messages", "tools"}):
            raise PromptError(f"{file.name}: unknown key {unknown[0]!r}; known: messages, tools")
        if data.get("tools") is not None:
            tools = _check_tools(data["tools"], file.name)
        data = data.get("messages")
    try:
        check_messages(data)
    except PromptError as error:
        raise PromptError(f"{file.name}: {error}") from None
    return data, tools


def _check_tools(tools: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PromptError(f"{name}: tools must be a list of objects")
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            form = '{"type": "function", "function": {"name": …, "parameters": …}}'
            raise PromptError(f"{name}: tool {index} must have the form {form}")
    return tools


def _with_system(messages: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    if messages[0]["role"] in ("system", "developer"):
        raise PromptError("--system is given, and the conversation has a system message of its own")
    return [{"role": "system", "content": system}, *messages]
