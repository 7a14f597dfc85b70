"""Text of token ids that come piece by piece: the pieces joined are the text of the whole.

A tokenizer's decoder reads its ids together. Byte tokens (`<0xE2>`) are a character only as a run, a
byte-level token may end inside a character, and the first token of a text may lose its blank. So ids are
released only at places where nothing that follows can change their text, and each id is decoded once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

_BROKEN = "\ufffd"  # what decoders write for bytes of no character


class Decoder:
    """A tokenizer's decoder, and where a sequence of its ids may be cut."""

    def __init__(self, raw: tokenizers.Tokenizer):
        self._raw = raw
        self._kinds: dict[int, tuple[bool, bool, bool]] = {}
        self._anchor = self._find_anchor() if _works_by_token(raw) else None
        self._anchor_size = len(self.text([self._anchor])) if self._anchor is not None else 0

    def text(self, ids: Sequence[int]) -> str:
        """Text of ids that begin a text, with special tokens written out."""
        return self._raw.decode(list(ids), skip_special_tokens=False)

    def text_inside(self, ids: Sequence[int]) -> str:
        """Text of ids that follow other text, with special tokens written out."""
        if self._anchor is None:
            return self.text(ids)
        # Only a first token is decoded in a way of its own, and here the anchor is the first.
        return self.text([self._anchor, *ids])[self._anchor_size :] if ids else ""

    def texts_inside(self, ids: Sequence[int]) -> list[str]:
        """`text_inside` of each id alone; thousands are decoded together."""
        before = [] if self._anchor is None else [self._anchor]
        known = self.known(ids)
        texts = self._raw.decode_batch([[*before, id] for id in known], skip_special_tokens=False)
        found = dict(zip(known, texts, strict=True))
        return [found.get(id, "")[self._anchor_size :] for id in ids]

    def known(self, ids: Sequence[int]) -> list[int]:
        """The ids that the vocabulary has. A decoder passes over others, and they keep nothing apart."""
        return [id for id in ids if self._raw.id_to_token(id) is not None]

    def is_blank(self, id: int) -> bool:
        """Whether an id has no text but white space."""
        return self._kind(id)[2]

    def is_byte(self, id: int) -> bool:
        """Whether an id is a byte by name, which is a character only with its neighbours."""
        token = self._raw.id_to_token(id) or ""
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def cut(self, ids: Sequence[int], start: int) -> int:
        """The last place from `start` on where ids may be cut, 0 if there is none.

        Later ids then change nothing of the text before it. A decoder that needs all of its ids has no
        such place.
        """
        if self._anchor is None:
            return 0
        fresh = False
        for place in range(len(ids), max(start, 1) - 1, -1):
            begins, is_open, _ = self._kind(ids[place - 1])
            if fresh or not is_open:
                return place
            fresh = begins
        return 0

    def _kind(self, id: int) -> tuple[bool, bool, bool]:
        """Whether an id surely begins a character, may leave one open, and is blank."""
        kind = self._kinds.get(id)
        if kind is None:
            text, is_byte = self.text([id]), self.is_byte(id)
            begins = not is_byte and not text.startswith(_BROKEN)
            is_open = is_byte or text.endswith(_BROKEN)
            kind = self._kinds[id] = (begins, is_open, not text.strip())
        return kind

    def _find_anchor(self) -> int | None:
        """An id of plain letters or digits, to stand before ids that are inside a text."""
        for id in range(self._raw.get_vocab_size()):
            token = self._raw.id_to_token(id)
            if token is not None and self.text([id]).isalnum() and self._kind(id) == (True, False, False):
                return id
        return None


class TextStream:
    """The text of one sequence of ids, piece by piece."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._held: list[int] = []
        self._blanks = 0  # ids held that begin the text and show nothing
        self._begun = False

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these ids settle."""
        start = len(self._held)
        self._held += self._decoder.known(ids)
        if not self._begun:
            # A decoder may take blanks from the beginning of a text, so that ids are inside it only after
            # the first one that shows something.
            if self._blanks == start:
                self._blanks += self._leading_blanks(start)
            start = max(start, self._blanks + 1)
        place = self._decoder.cut(self._held, start)
        return self._release(place) if place else ""

    def close(self) -> str:
        """The rest of the text."""
        return self._release(len(self._held))

    def _leading_blanks(self, start: int) -> int:
        count = 0
        while start + count < len(self._held) and self._decoder.is_blank(self._held[start + count]):
            count += 1
        return count

    def _release(self, place: int) -> str:
        ready, self._held = self._held[:place], self._held[place:]
        text = self._decoder.text_inside(ready) if self._begun else self._decoder.text(ready)
        self._begun = True
        return text


def _works_by_token(raw: tokenizers.Tokenizer) -> bool:
    """Whether the text of a token depends on its neighbours only where it is a part of a character.

    Other decoders drop repeated tokens (CTC), look for the last token (BPEDecoder) or search the whole text.
    """
    if raw.decoder is None:
        return True  # tokens with a blank between them
    fused = False
    for step in steps(json.loads(raw.decoder.__getstate__()), "decoders"):
        kind = step["type"]
        if kind == "Strip":
            if fused and step["stop"]:
                return False
        elif kind == "Fuse":
            fused = True
        elif fused or kind not in ("Replace", "ByteFallback", "Metaspace", "WordPiece", "ByteLevel"):
            return False
        fused = fused or kind == "ByteLevel"
    return True


def steps(node: dict[str, Any], inner: str) -> Iterator[dict[str, Any]]:
    """The steps of a part of a tokenizer, as the library writes it; a sequence has them under `inner`."""
    if node["type"] != "Sequence":
        yield node
        return
    for one in node[inner]:
        yield from steps(one, inner)
