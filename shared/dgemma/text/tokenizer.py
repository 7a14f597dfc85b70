"""A checkpoint's tokenizer and chat template as one object: messages to ids, ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dgemma.errors import CheckpointError, PromptError
from dgemma.files import load_json
from dgemma.text.chat import ChatTemplate, Message
from dgemma.text.reply import Reply, ReplyParser, joined


class Tokenizer:
    """tokenizer.json with the template of chat_template.jinja (or of tokenizer_config.json)."""

    def __init__(self, raw: tokenizers.Tokenizer, template: ChatTemplate | None, where: str):
        self.raw, self.template, self._where = raw, template, where

    @classmethod
    def open(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint folder, None without a file; CheckpointError for a broken one."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            raw = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception, whatever is wrong with the file
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from None
        return cls(raw, _template(folder), str(folder))

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, ready for `Model.encode`."""
        if self.template is None:
            raise PromptError(f"{self._where}: no chat template; give token ids or add chat_template.jinja")
        return self.encode(self.template.render(messages, tools, thinking, add_generation_prompt))

    def encode(self, text: str) -> list[int]:
        """Token ids of text whose special tokens are written out. Nothing is added, not even BOS."""
        # The template has written BOS already; a second one changes the answers.
        return self.raw.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, with special tokens written out."""
        return self.raw.decode(list(ids), skip_special_tokens=False)

    def reply(self, ids: Sequence[int]) -> Reply:
        """The text, thinking and tool calls of a generated reply: what `ReplyParser` makes of it."""
        parser = ReplyParser(self.raw)
        return joined([parser.feed(ids), parser.close()])


def _template(folder: Path) -> ChatTemplate | None:
    config = (
        load_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    )
    path = folder / "chat_template.jinja"
    source: object = config.get("chat_template")
    if path.exists():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not readable ({error})") from None
    if not isinstance(source, str):
        return None
    specials = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        specials[name] = token.get("content", "") if isinstance(token, dict) else token or ""
    return ChatTemplate(source, specials)
