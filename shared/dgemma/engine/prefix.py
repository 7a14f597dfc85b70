"""Encoded prefixes that later prompts begin with, kept by their exact tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from dgemma.network.context import Context


class Prefixes:
    """Contexts by their tokens, within `limit` bytes; the least recently used goes first.

    Contexts share the arrays of what they have in common, which are counted once. A context also serves
    prompts that leave it earlier, as far back as its sliding layers reach. One is dropped if another serves
    whatever it does. All are compared with a prompt, one after the other: a hundred of 32k tokens take less
    time than a step.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: OrderedDict[bytes, tuple[np.ndarray, Context]] = OrderedDict()

    def find(self, tokens: Sequence[int] | np.ndarray) -> Context | None:
        """A context of the longest prefix of `tokens` that is at hand, to be grown; None without any."""
        wanted = np.asarray(tokens, np.int64)
        best, best_length = None, 0
        for key, (kept, context) in self._kept.items():
            common = _common(kept, wanted)
            if common > best_length and len(kept) - common <= context.spare:
                best, best_length = key, common
        if best is None:
            return None
        self._kept.move_to_end(best)
        kept, context = self._kept[best]
        return context.trim(len(kept) - best_length)

    def keep(self, tokens: Sequence[int], context: Context) -> None:
        """Keep what is encoded of `tokens`, all of them, as `context` holds it now."""
        if not self.limit:
            return
        kept = np.asarray(tokens, np.int64)
        assert len(kept) == context.length
        for key, (old, other) in list(self._kept.items()):
            served = len(kept) - context.spare <= len(old) - other.spare and len(old) <= len(kept)
            if served and _common(old, kept) == len(old):
                del self._kept[key]
        self._kept[kept.tobytes()] = kept, context.fork()
        while self.bytes > self.limit:
            self._kept.popitem(last=False)

    def refresh(self, tokens: Sequence[int]) -> None:
        """Count what is kept of exactly these tokens as used just now."""
        key = np.asarray(tokens, np.int64).tobytes()
        if key in self._kept:
            self._kept.move_to_end(key)

    @property
    def bytes(self) -> int:
        """Bytes of all arrays that are kept."""
        arrays: dict[int, int] = {}
        for _, context in self._kept.values():
            arrays |= context.arrays()
        return sum(arrays.values())

    def __len__(self) -> int:
        return len(self._kept)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens of a [n] and b [m] are equal."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
