"""Prompts by the checkpoint's own chat template.

jinja2's sandbox renders the template, which is never hard-coded. BOS comes from the template, not from the
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dgemma.errors import PromptError

Message = dict[str, Any]

# The released template writes any role into the prompt as it is, but was made for these.
ROLES = ("system", "developer", "user", "assistant", "model", "tool")


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
