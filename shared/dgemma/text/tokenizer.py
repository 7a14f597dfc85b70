"""A checkpoint's tokenizer and chat template as one object: messages to ids, ids to text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from dgemma.errors import PromptError
from dgemma.text import folder as stored
from dgemma.text.messages import Message
from dgemma.text.reply import Reply, ReplyParser, joined
from dgemma.text.template import ChatTemplates, Prompt, pattern


def needed(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a checkpoint; PromptError if it has none."""
    if tokenizer is None:
        raise PromptError("this checkpoint has no tokenizer.json: only token ids can be given")
    return tokenizer


class Tokenizer:
    """tokenizer.json with the tokens and the chat templates that stand beside it.

    `control` are the tokens that only a template may write: special ones, and those that the template names.
    """

    def __init__(self, raw: tokenizers.Tokenizer, template: ChatTemplates | None, where: str):
        self.raw, self.template, self._where = raw, template, where
        literals = template.literals if template else ""
        self.control = tuple(
            token.content
            for token in raw.get_added_tokens_decoder().values()
            if token.special or (token.content in literals and not token.content.isspace())
        )

    @classmethod
    def open(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint folder, None without a file; CheckpointError for a broken one."""
        found = stored.read(folder)
        if found is None:
            return None
        raw, templates = found
        return cls(raw, ChatTemplates(templates, str(folder)) if templates else None, str(folder))

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        control_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation, ready for `Model.encode`.

        A control token that a message spells is text, so that no text of a user or of a tool can end a turn
        or forge one. `control_tokens` lets it count, as in transformers. `continue_final_message` ends the
        prompt within the last message, which must be the model's. PromptError if a message cannot be read.
        """
        if self.template is None:
            raise PromptError(f"{self._where}: no chat template; give token ids or add chat_template.jinja")
        prompt = self.template.prompt(
            messages,
            tools,
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            control=() if control_tokens else self.control,
        )
        return self._encode_prompt(prompt)

    def encode(self, text: str) -> list[int]:
        """Token ids of text whose special tokens are written out. Nothing is added, not even BOS."""
        return self._encoding(text).ids

    def _encoding(self, text: str) -> tokenizers.Encoding:
        # The template has written BOS already; a second one changes the answers.
        with self._named("cannot encode this text"):
            return self.raw.encode(text, add_special_tokens=False)

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: its own control tokens as such, those that a message spells as text."""
        spelled = pattern(self.control)
        plain = {ord(mark): char for mark, char in prompt.marks.items()}
        ids: list[int] = []
        ready, end = "", 0  # text without a spelled token is encoded in one piece, as transformers does
        for match in [*spelled.finditer(prompt.text), None] if prompt.marks else [None]:
            stop = match.start() if match else len(prompt.text)
            piece = prompt.text[end:stop].translate(plain)
            if prompt.marks and spelled.search(piece):
                ids += self.encode(ready) + self.encode_text(piece)[0]
                ready = ""
            else:
                ready += piece
            if match:
                ready, end = ready + match[0], match.end()
        return ids + self.encode(ready)

    def encode_text(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of text in which nothing is a control token, and the characters of each, from and to.

        Tokens that are bytes of one character have its place together. PromptError if the text spells a token
        that this tokenizer cannot write in letters.
        """
        before = self.raw.encode_special_tokens
        self.raw.encode_special_tokens = True  # special ones are text to the library then
        try:
            whole = self._encoding(text)
        finally:
            self.raw.encode_special_tokens = before
        if self._control_ids.isdisjoint(whole.ids):
            return whole.ids, whole.offsets
        # A token that is not marked as special, or a vocabulary that has it as a word: it is cut in two.
        cuts = [0, *(match.start() + 1 for match in pattern(self.control).finditer(text)), len(text)]
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        for start, stop in pairwise(cuts):
            part = self._encoding(text[start:stop])
            ids += part.ids
            places += [(start + a, start + b) for a, b in part.offsets]
        if self._control_ids.isdisjoint(ids):
            return ids, places
        raise PromptError(f"{self._where}: a text spells a control token, which this tokenizer cannot write")

    @property
    def _control_ids(self) -> set[int | None]:
        return {self.raw.token_to_id(token) for token in self.control}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, with special tokens written out."""
        return self.raw.decode(list(ids), skip_special_tokens=False)

    def reply(self, ids: Sequence[int]) -> Reply:
        """The text, thinking and tool calls of a generated reply: what `ReplyParser` makes of it."""
        parser = ReplyParser(self.raw)
        return joined([parser.feed(ids), parser.close()])

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """The library raises bare `Exception`, and a panic of Rust is not even that."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise PromptError(f"{self._where}: the tokenizer {what} ({stored.said(error)})") from None
