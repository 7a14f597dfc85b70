"""The text of each position of a canvas, without a terminal.

L canvas positions
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from dgemma.engine.events import Draft
from dgemma.text.tokenizer import Tokenizer

NEWLINE, TAB, END, UNREADABLE, DOT = "↵", "⇥", "∎", "\ufffd", "·"


class Mark(IntEnum):
    """How sure a position is."""

    NOISE = 0
    UNCERTAIN = 1
    SETTLED = 2


def marks(draft: Draft, before: np.ndarray | None) -> np.ndarray:
    """A `Mark` for each position, [L] int: one point if its sample was accepted, one if the guess held.

    `before` [L] int64 is the guess of the canvas's previous step, None on its first.
    """
    held = draft.tokens == before if before is not None else np.zeros(len(draft.tokens), bool)
    return draft.accepted.astype(int) + held


@dataclass(frozen=True)
class Piece:
    """The text of one position, without any line break."""

    text: str
    mark: Mark
    special: bool = False
    newline: bool = False


class Spelling:
    """Each token id's own text. The text of several ids decoded together could not be cut by position."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]):
        self._token = tokenizer.raw.id_to_token
        added = tokenizer.raw.get_added_tokens_decoder()
        self._special = {id for id, token in added.items() if token.special} | set(stop_ids)
        self._stop_ids = list(stop_ids)

    def pieces(self, tokens: Sequence[int] | np.ndarray, mark: Sequence[int] | np.ndarray) -> list[Piece]:
        """A piece for each position of `tokens` [L], up to the first stop token that is more than noise.

        Positions after it are filler. The first of several byte tokens shows their common character. `mark`
        [L] has the positions' marks.
        """
        stop = np.flatnonzero(np.isin(tokens, self._stop_ids) & (np.asarray(mark) > Mark.NOISE))
        end = stop[0] if len(stop) else len(tokens)
        ids = [int(id) for id in tokens[:end]]
        pieces = [
            self._piece(id, text, Mark(m)) for id, text, m in zip(ids, self._texts(ids), mark, strict=False)
        ]
        return [*pieces, Piece(END, Mark(mark[end]), special=True)] if len(stop) else pieces

    def _piece(self, id: int, text: str, mark: Mark) -> Piece:
        special = id in self._special
        shown = printable(text)
        if mark == Mark.NOISE:
            shown = DOT if special else re.sub(r"\S", DOT, shown)
        return Piece(shown, mark, special, newline=text.endswith("\n") and not special)

    def _texts(self, ids: list[int]) -> list[str]:
        # SentencePiece writes a space as ▁, and rare characters as one token for each byte: <0xE2>.
        texts = [(self._token(id) or UNREADABLE).replace("▁", " ") for id in ids]
        start = 0
        while start < len(texts):
            end = start
            while end < len(texts) and (byte := re.fullmatch("<0x([0-9A-F]{2})>", texts[end])):
                texts[end] = byte[1]
                end += 1
            if end > start:
                texts[start:end] = _characters(bytes.fromhex("".join(texts[start:end])))
            start = end + 1
        return texts


def _characters(data: bytes) -> list[str]:
    """One text for each byte: the character for its first byte, nothing for its other bytes."""
    texts = []
    for char in data.decode("utf-8", "surrogateescape"):  # bytes of no character become surrogates
        size = len(char.encode("utf-8", "surrogateescape"))
        texts += [char, *[""] * (size - 1)]
    return texts


def printable(text: str) -> str:
    """Text on one line, without characters that a terminal would obey."""
    return "".join(_PRINTABLE.get(char) or _visible(char) for char in text)


_PRINTABLE = {"\n": NEWLINE, "\t": TAB}


def _visible(char: str) -> str:
    if char.isprintable():
        return char
    kind = unicodedata.category(char)
    # Format characters (joiners, direction marks) have no width; other spaces are as wide as a space.
    return {"Cf": "", "Zs": " "}.get(kind, UNREADABLE)


def plain(pieces: Iterable[Piece]) -> str:
    """Pieces on one line of bare text, uncertain ones between ‹ and ›."""
    line, before = "", Mark.SETTLED
    for piece in pieces:
        if piece.mark != before and before == Mark.UNCERTAIN:
            line += "›"
        gap = len(piece.text) - len(piece.text.lstrip())
        opens = piece.mark != before and piece.mark == Mark.UNCERTAIN
        line += piece.text[:gap] + "‹" + piece.text[gap:] if opens else piece.text
        before = piece.mark
    return line + "›" * (before == Mark.UNCERTAIN)
