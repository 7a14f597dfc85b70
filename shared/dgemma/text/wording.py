"""What a model is told of a text that it completes or changes: the user's turn. The text is its reply."""

from __future__ import annotations

from dgemma.text.holes import MARK_OF_ORDER
from dgemma.text.messages import Message

COMPLETE = "Write this text in full."
_REST = "The text goes on like this:"
_TEXT = "The text:"
ELSEWHERE = "[…]"  # a hole in what stands in the prompt


def to_infill(instruction: str | None, rest: str) -> list[Message]:
    """The turn before a text with holes. `rest` is the end of the text, as far as the canvas has no room for it."""
    asked = instruction if instruction is not None else COMPLETE
    return [{"role": "user", "content": f"{asked}\n\n{_REST}\n\n{rest}" if rest else asked}]


def to_edit(instruction: str, text: str) -> list[Message]:
    """The turn before an edited text. An instruction that quotes the whole text says all by itself."""
    quoted = text.strip(f"{MARK_OF_ORDER} \t\r\n") in instruction
    return [{"role": "user", "content": instruction if quoted else f"{instruction}\n\n{_TEXT}\n\n{text}"}]
