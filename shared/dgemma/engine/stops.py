"""Texts before which a reply ends, wherever canvases cut them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dgemma.text.reply import Reply


class StopTexts:
    """Cuts a reply, piece by piece, before the first of some texts; `found` says that it came.

    A piece's end that may be the beginning of such a text is held back. Thoughts and calls are not searched;
    calls that come behind the text in the same piece are left out with it.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts = texts
        self._held = ""
        self.found = False

    def feed(self, piece: Reply) -> Reply:
        """The part of a piece that can be shown."""
        if not self._texts:
            return piece
        if self.found:
            return Reply()
        text = self._held + piece.text
        places = [place for stop in self._texts if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return Reply(text[: min(places)], piece.thinking)
        held = max(_begun(text, stop) for stop in self._texts)
        self._held = text[len(text) - held :]
        return replace(piece, text=text[: len(text) - held])

    def close(self) -> Reply:
        """What is held back, at the end of the reply."""
        held, self._held = self._held, ""
        return Reply(held)


def _begun(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
