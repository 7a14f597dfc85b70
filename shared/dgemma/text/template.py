"""The checkpoint's own chat template, never a hard-coded one: messages to the text of a prompt.

BOS comes from the template, not from the tokenizer. A text that a message brings is told from what the
template writes: see `Prompt`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import meta, nodes

from dgemma.errors import CheckpointError, PromptError
from dgemma.text.messages import (
    MODEL_ROLES,
    Message,
    last_is_answer,
    map_texts,
    read_messages,
    read_tools,
    texts,
)
from dgemma.text.sandbox import Sandbox, Stopped

MOST_SOURCE = 1 << 20  # characters; the released template has 17,000
_PRIVATE = range(0xF0000, 0xFFFFE)  # code points that mean nothing, for marks
# A reply as the model wrote it begins with its thoughts. Templates cut them out by these marks.
_THOUGHTS = re.compile(r"(?:\s*<\|channel>.*?<channel\|>)+", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. A first character of a control token that came from a message, not from the
    template, is replaced by its mark; `marks` gives the character of each."""

    text: str
    marks: Mapping[str, str]

    def plain(self) -> str:
        """The text without marks, as transformers renders it."""
        return self.text.translate({ord(mark): char for mark, char in self.marks.items()})


class ChatTemplate:
    """A compiled chat template. `specials` are its variables such as bos_token; `where` is for errors."""

    def __init__(self, source: str, specials: Mapping[str, str], where: str = "the chat template"):
        self._specials, self._where = dict(specials), where
        if len(source) > MOST_SOURCE:
            raise CheckpointError(f"{where}: {len(source):,} characters are too many for a chat template")
        self._sandbox = Sandbox()
        # A stranger's program raises what it likes, and the compiler of Python may, too.
        try:
            self._template, tree = self._sandbox.compile_template(source)
            self.variables = meta.find_undeclared_variables(tree)
        except (Exception, Stopped) as error:
            raise CheckpointError(f"{where}: the chat template does not compile: {_said(error)}") from None
        literals = [node.data for node in tree.find_all(nodes.TemplateData)]
        literals += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self.literals = "\0".join(literals)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text of a conversation, special tokens included; PromptError if the template refuses."""
        return self.prompt(messages, tools, thinking, add_generation_prompt, continue_final_message).plain()

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        control: Collection[str] = (),
    ) -> Prompt:
        """The prompt of a conversation, in which no message can write one of the `control` tokens.

        `continue_final_message` ends the prompt within the last message, which must be the model's.
        """
        chat = read_messages(messages)
        functions = read_tools(tools) if tools else None
        if continue_final_message and not last_is_answer(chat):
            raise PromptError(
                "only a last message of the model, with text and without calls, can be continued"
            )

        def text(chat: Any, functions: Any) -> str:
            if continue_final_message:
                return self._continued(chat, functions, thinking)
            return self._render(chat, functions, thinking, add_generation_prompt)

        plain = text(chat, functions)
        marks = _marks(control, plain)
        mark = str.maketrans({char: mark for mark, char in marks.items()})
        marked_chat = [_marked(message, mark) for message in chat]
        marked_functions = map_texts(functions, lambda one: one.translate(mark))
        if (marked_chat, marked_functions) == (chat, functions):
            return Prompt(plain, {})
        marked = Prompt(text(marked_chat, marked_functions), marks)
        # A template may look at the characters themselves, to sort by them or to escape them. It is given
        # them bare where nothing is spelled.
        find = pattern(control)
        spelled = any(find.search(text) for text in texts([chat, functions]))
        if marked.plain() != plain and not spelled and find.findall(marked.text) == find.findall(plain):
            return Prompt(plain, {})
        return marked

    def _render(self, messages: Any, tools: Any, thinking: bool, add_generation_prompt: bool) -> str:
        variables = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "enable_thinking": thinking,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._sandbox.run(self._template, self._specials | variables, len(messages))
            text.encode()  # a template can write half a character
            return text
        except Stopped as error:
            raise PromptError(f"{self._where}: the chat template was stopped: {error}") from None
        except UnicodeEncodeError:
            raise PromptError(f"{self._where}: the chat template writes what is no character") from None
        except Exception as error:
            raise PromptError(
                f"{self._where}: the chat template refused these messages: {_said(error)}"
            ) from None

    def _continued(self, messages: Any, tools: Any, thinking: bool) -> str:
        """The prompt up to the end of the last message's text."""
        known = json.dumps(messages, ensure_ascii=False)
        sign = next(chr(code) for code in reversed(_PRIVATE) if chr(code) not in known)
        *before, last = messages
        content = last["content"]
        if isinstance(content, str):
            content = content + sign + " "
        else:
            content = [*content[:-1], content[-1] | {"text": content[-1]["text"] + sign + " "}]
        text = self._render([*before, last | {"content": content}], tools, thinking, False)
        at = text.rfind(sign)
        if at < 0:
            raise PromptError(f"{self._where}: the chat template leaves the last message out")
        # As in transformers: a template that trims the end of a message would have trimmed this one's.
        return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()


class ChatTemplates:
    """The templates of a checkpoint by name.

    As in transformers, "tool_use" is taken where there are tools, else "default".
    """

    def __init__(self, named: Mapping[str, ChatTemplate], where: str):
        self._named, self._where = dict(named), where
        self.literals = "\0".join(template.literals for template in named.values())
        self.variables = {name for template in named.values() for name in template.variables}

    def _for(self, tools: object) -> ChatTemplate:
        names = ("tool_use", "default") if tools else ("default",)
        chosen = next((self._named[name] for name in names if name in self._named), None)
        if chosen is None:
            raise PromptError(
                f"{self._where}: no chat template by the name default; known: {', '.join(self._named)}"
            )
        return chosen

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, **how: bool
    ) -> str:
        """`ChatTemplate.render` of the template that the tools ask for."""
        return self._for(tools).render(messages, tools, **how)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, **how: Any
    ) -> Prompt:
        """`ChatTemplate.prompt` of the template that the tools ask for."""
        return self._for(tools).prompt(messages, tools, **how)


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, jinja2.TemplateError | Stopped) else f"{type(error).__name__} "
    return f"{name}{text[:200]}".strip() or type(error).__name__


def pattern(control: Collection[str]) -> re.Pattern[str]:
    """Finds control tokens as a tokenizer does: the first, and of those the longest."""
    longest = sorted(control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def _marks(control: Collection[str], text: str) -> dict[str, str]:
    """A mark that does not occur in the text, for each sign that a control token begins with.

    No known control token begins with a letter, and names of roles and keys must stay what they are.
    """
    free = (chr(code) for code in _PRIVATE if chr(code) not in text)
    return dict(zip(free, sorted({token[0] for token in control if not token[0].isalnum()}), strict=False))


def _marked(message: Message, mark: Mapping[int, str]) -> Message:
    """A message with marks. Its role is the template's word, and the thoughts before an answer its marks."""

    def change(text: str) -> str:
        return text.translate(mark)

    def change_said(text: str) -> str:
        thoughts = _THOUGHTS.match(text) if message["role"] in MODEL_ROLES else None
        start = thoughts.end() if thoughts else 0
        return text[:start] + change(text[start:])

    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    own = {key: message[key] for key in ("role", "content") if key in message}
    return {"role": own.pop("role"), **map_texts(own, change_said), **map_texts(rest, change)}
