"""A conversation as a value: what was said, what the model may call, and the request for the next reply.

    asked = conversation.extended(user(text))
    done = engine.submit(asked.request(tokenizer, settings, seed)).result()
    conversation = asked.answered(done) or conversation

Nothing changes in place, so a turn that fails or is taken back leaves nothing behind. What a turn shares with
the one before is encoded once where the engine keeps prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dgemma.engine.events import Done
from dgemma.engine.request import Request
from dgemma.errors import PromptError
from dgemma.settings import GenerationConfig
from dgemma.text.messages import MODEL_ROLES, Message
from dgemma.text.tokenizer import Tokenizer

_SYSTEM_ROLES = ("system", "developer")


def user(text: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": text}


@dataclass(frozen=True)
class Conversation:
    """Messages and tools as `read_messages` and `read_tools` return them, and whether the model thinks."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool = False

    def request(self, tokenizer: Tokenizer, settings: GenerationConfig, seed: int, **options: Any) -> Request:
        """The request for the model's next message, with `options` as further fields.

        PromptError if the template refuses the conversation.
        """
        ids = tokenizer.encode_chat(self.messages, self.tools or None, self.thinking)
        return Request(ids, settings, seed, **options)

    def extended(self, *messages: Message) -> Conversation:
        """The conversation with these messages at its end."""
        return replace(self, messages=(*self.messages, *messages))

    def answered(self, done: Done) -> Conversation | None:
        """The conversation with a reply at its end; None for one that has neither text nor calls.

        A reply that was cut or cancelled counts as far as it goes. Its calls have ids of their own here, so
        that results can name them. The template decides which thoughts later prompts have.
        """
        if not done.text and not done.tool_calls:
            return None
        message: Message = {"role": "assistant", "content": done.text}
        if done.thinking:
            message["reasoning_content"] = done.thinking
        if done.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{len(self.messages)}_{index}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(done.tool_calls)
            ]
        return self.extended(message)

    # ---- tools ----------------------------------------------------------------------------------

    @property
    def open_calls(self) -> Sequence[dict[str, Any]]:
        """The calls of the last reply that have no result yet. Results come in the order of the calls."""
        said, results = self._without_results()
        calls: list[dict[str, Any]] = (said[-1].get("tool_calls") or []) if said else []
        return calls[results:]

    def with_result(self, content: Any) -> Conversation:
        """The conversation with the result of the first open call; PromptError if none is open."""
        if not self.open_calls:
            raise PromptError("no call of a tool waits for a result")
        call = self.open_calls[0]
        id = {"tool_call_id": call["id"]} if "id" in call else {}
        return self.extended({"role": "tool", "name": call["function"]["name"], **id, "content": content})

    def _without_results(self) -> tuple[tuple[Message, ...], int]:
        """The messages up to the last that is no tool's, and how many follow."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == "tool":
            end -= 1
        return self.messages[:end], len(self.messages) - end

    # ---- going back -----------------------------------------------------------------------------

    def question(self) -> Conversation | None:
        """The conversation as it was before its last reply, None where there is nothing to answer.

        Results of some of a reply's calls belong to that reply.
        """
        messages = self._without_results()[0] if self.open_calls else self.messages
        while messages and messages[-1]["role"] in MODEL_ROLES:
            messages = messages[:-1]
        asked = messages and messages[-1]["role"] not in _SYSTEM_ROLES
        return replace(self, messages=messages) if asked else None

    def undone(self) -> Conversation | None:
        """The conversation without its last turn, which the user's last message begins; None without one."""
        turns = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        return replace(self, messages=self.messages[: turns[-1]]) if turns else None

    # ---- the system message ---------------------------------------------------------------------

    def with_system(self, text: str) -> Conversation:
        """The conversation with this system message, or without one for an empty text."""
        own = self.messages[1:] if self.has_system else self.messages
        first = ({"role": "system", "content": text},) if text else ()
        return replace(self, messages=(*first, *own))

    @property
    def has_system(self) -> bool:
        """Whether it begins with a system message."""
        return bool(self.messages) and self.messages[0]["role"] in _SYSTEM_ROLES
