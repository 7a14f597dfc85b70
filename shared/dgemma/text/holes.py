"""Holes in a text: where they are, which tokens stand around them, and what text fills them.

A hole is a span of characters. What stands outside is never decoded from tokens: the result is the source's own
text with the holes' new text in it. So no tokenizer, whatever it normalizes, changes a character of it.

V vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from dgemma.errors import PromptError
from dgemma.text.decoding import Decoder
from dgemma.text.tokenizer import Tokenizer

MARK = "<<>>"  # a hole; <<5>> is one of five tokens
MARK_OF_ORDER = "\ufeff"
_MARKS = re.compile(r"<<([0-9]{0,9})>>")
_TURN_END = "<turn|>"
_BROKEN = "\ufffd"  # what decoders write for bytes of no character


@dataclass(frozen=True)
class Hole:
    """Characters `start` to `stop` of a text, to be written anew; `length` is in tokens, None if unknown.

    `draft` are ids to begin with, by default those of the old text; -1 is noise.
    """

    start: int
    stop: int
    length: int | None = None
    draft: tuple[int, ...] | None = None


# ---- where -----------------------------------------------------------------------------------------


def marked(text: str, mark: str | None = None) -> tuple[str, list[Hole]]:
    """The text without its marks, and a hole in each one's place. A `mark` of one's own has no length."""
    marks = _MARKS if mark is None else re.compile(re.escape(mark))
    found, parts, end, size = [], [], 0, 0
    for match in marks.finditer(text):
        parts.append(text[end : match.start()])
        size, end = size + len(parts[-1]), match.end()
        length = int(match[1]) if mark is None and match[1] else None
        found.append(Hole(size, size, length))
    return "".join([*parts, text[end:]]), found


def at(text: str, line: int, column: int) -> Hole:
    """A hole before a column of a line, both counted from 1; PromptError if the text has no such place."""
    start, stop = _line(text, line)
    if not 1 <= column <= stop - start + 1:
        raise PromptError(f"line {line} has {stop - start} columns, so a hole cannot be at column {column}")
    return Hole(start + column - 1, start + column - 1)


def lines(text: str, first: int, last: int) -> Hole:
    """A hole in the place of lines `first` to `last`, counted from 1, without the end of the last one."""
    if first > last:
        raise PromptError(f"lines {first}-{last} are in the wrong order")
    return Hole(_line(text, first)[0], _line(text, last)[1])


def _line(text: str, number: int) -> tuple[int, int]:
    """Where a line's characters are, without its end, which is \\n or \\r\\n. A byte order mark is none."""
    edges = [0, *(match.end() for match in re.finditer("\n", text))]
    count = len(edges) - (edges[-1] == len(text))
    if not 1 <= number <= count:
        raise PromptError(f"line {number} is beyond the text, which has {count} line{'s' * (count != 1)}")
    start, stop = edges[number - 1], edges[number] if number < len(edges) else len(text)
    line = text[start:stop].removesuffix("\n").removesuffix("\r")
    return start + (number == 1 and line.startswith(MARK_OF_ORDER)), start + len(line)


def in_order(text: str, holes: Sequence[Hole]) -> list[Hole]:
    """The holes of a text by place; PromptError for none, for one that is not in it, and for an overlap."""
    if not holes:
        raise PromptError("there is no hole to fill")
    found = sorted(holes, key=lambda hole: (hole.start, hole.stop))
    for hole in found:
        if not 0 <= hole.start <= hole.stop <= len(text):
            raise PromptError(f"a hole from {hole.start} to {hole.stop} is not in {len(text)} characters")
        if hole.length is not None and hole.length < 1:
            raise PromptError(f"a hole of {hole.length} tokens has nothing to fill")
    for one, other in pairwise(found):
        if other.start <= one.stop:
            raise PromptError(
                f"two holes overlap or touch at character {other.start}: text must stand between them"
            )
    return found


def emptied(text: str, holes: Sequence[Hole]) -> tuple[str, list[Hole]]:
    """The text without what its holes hold, and the holes in it."""
    gone, parts, end, found = 0, [], 0, []
    for hole in in_order(text, holes):
        parts.append(text[end : hole.start])
        found.append(replace(hole, start=hole.start - gone, stop=hole.start - gone))
        gone, end = gone + hole.stop - hole.start, hole.stop
    return "".join([*parts, text[end:]]), found


# ---- tokens ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """A hole among tokens.

    `left` and `right` are the tokens at its edges, where another token might reach into the hole and still
    spell the same text outside; None where the edge stands. `draft` are the ids of its old text.
    """

    hole: Hole
    left: int | None = None
    right: int | None = None
    draft: tuple[int, ...] = ()

    @property
    def edges(self) -> int:
        """Tokens on a canvas beside those of the hole."""
        return (self.left is not None) + (self.right is not None)


class Seams:
    """A tokenizer's tokens by what they may stand for at the edge of a hole."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, never: Sequence[int] = ()):
        self.tokenizer, raw = tokenizer, tokenizer.raw
        self._decoder = decoder = Decoder(raw)
        self.texts = decoder.texts_inside(range(vocab_size))
        special = [id for id, token in raw.get_added_tokens_decoder().items() if token.special]
        control = [raw.token_to_id(token) for token in tokenizer.control]
        # [V] bool: no text is written with a control token, or with one that has no text.
        self.written = np.array([bool(text) for text in self.texts])
        self.written[[id for id in (*special, *control, *never) if id is not None and id < vocab_size]] = (
            False
        )
        # [V] bool: a byte by name, even that of a letter, is the letter only among bytes that make characters.
        self._whole = np.array([not decoder.is_byte(id) for id in range(vocab_size)])
        self._sets: dict[tuple[str, int], np.ndarray] = {}

    def cut(
        self, text: str, holes: Sequence[Hole], letters: Sequence[str] = ()
    ) -> tuple[list[list[int]], list[Gap]]:
        """The ids of the pieces that stand, one more than holes, and the gaps between them.

        On the sides of holes, "left" or "right", that `letters` names, the token beside a hole is written letter
        by letter.
        """
        holes = in_order(text, holes)
        edges = [0, *(place for hole in holes for place in (hole.start, hole.stop)), len(text)]
        parts = [text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        # A reply has no byte order mark, and does not end with an end of a line.
        parts[0], parts[-1] = parts[0].removeprefix(MARK_OF_ORDER), parts[-1].rstrip("\r\n")
        pieces = [list(self._ids(part)) for part in parts]
        for before, after in pairwise(pieces):
            if "left" in letters and before:
                before[-1:] = self._letters(before[-1])
            if "right" in letters and after:
                after[:1] = self._letters(after[0])
        gaps = [
            Gap(hole, draft=self._ids(text[hole.start : hole.stop]) if hole.draft is None else hole.draft)
            for hole in holes
        ]
        for at, gap in enumerate(gaps):
            # A piece gives one token to an edge at most, and keeps one between two holes.
            before, after = pieces[at], pieces[at + 1]
            if len(before) > (at > 0) and self._grows(before[-1], parts[at], "left"):
                gap = replace(gap, left=before.pop())
            if len(after) > (at + 1 < len(gaps)) and self._grows(after[0], parts[at + 1], "right"):
                gap = replace(gap, right=after.pop(0))
            gaps[at] = gap
        return pieces, gaps

    def _letters(self, id: int) -> list[int]:
        """The ids of a token's text, letter by letter; the token itself where they are not its text."""
        ids = [letter for char in self.texts[id] for letter in self._ids(char)]
        return ids if self.spelled(ids) == self.texts[id] else [id]

    def spelled(self, ids: Sequence[int]) -> str:
        """The text of ids that follow other text."""
        return self._decoder.text_inside(ids)

    def turn_end(self, stop_ids: Sequence[int]) -> list[int]:
        """The stop token behind a whole text; none if the model has no stop tokens."""
        usual = self.tokenizer.raw.token_to_id(_TURN_END)
        return [usual] if usual in stop_ids else list(stop_ids[:1])

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode_text(text)[0])

    def _grows(self, id: int, text: str, side: str) -> bool:
        own = self.texts[id]
        stands = text.endswith(own) if side == "left" else text.startswith(own)
        return (
            bool(self._whole[id] and own)
            and _BROKEN not in own
            and stands
            and self.allowed(id, side).sum() > 1
        )

    def allowed(self, id: int, side: str) -> np.ndarray:
        """Which tokens [V] bool may stand in the place of the one at an edge: on the left those that begin with
        its text, on the right those that end with it."""
        key = side, id
        if key not in self._sets:
            own = self.texts[id]
            found = [t.startswith(own) if side == "left" else t.endswith(own) for t in self.texts]
            self._sets[key] = np.array(found) & self.written & self._whole
            self._sets[key][id] = True
        return self._sets[key]

    def text(self, gap: Gap, ids: Sequence[int], first: bool = False) -> str:
        """The text in a gap whose ids, those of its edges included, are these.

        `first` is whether the gap begins the text.
        """
        whole = self._decoder.text(ids) if first and gap.left is None else self.spelled(ids)
        before = "" if gap.left is None else self.texts[gap.left]
        after = "" if gap.right is None else self.texts[gap.right]
        assert whole.startswith(before) and whole.endswith(after), (before, whole, after)
        return whole[len(before) : len(whole) - len(after)]

    def is_text(self, text: str) -> bool:
        """Whether a hole's text is whole: tokens of bytes may be no character together."""
        return _BROKEN not in text
