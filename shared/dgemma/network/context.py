"""Keys and values of one row of encoded tokens.

Full layers keep all of them, in pieces that contexts share: a fork costs nothing, and a prefix that several
rows, turns or candidates have in common exists once. No array is ever written in place. A last piece that
nobody else holds grows, by being replaced, up to `Ops.piece_slots`; behind a shared one a new piece begins.
Sliding layers keep their last window − 1 tokens and `slack` more, in one piece; `trim` can take back the
slack.

    G KV heads  n new tokens  C head size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dgemma.network.config import Config
from dgemma.network.ops import KV, Ops, Past

# A shared piece below so many tokens is copied when its holder grows: attention pays for every piece.
LEAST = 1024


class Pieces(list[KV]):
    """The pieces of one layer. A backend may note what it makes of them: they stay as they are."""

    note: Any = None


class Context:
    """The keys and values of one row in every layer, [G, tokens, C] each; `length` counts its tokens."""

    def __init__(self, ops: Ops, config: Config):
        self.ops, self.config = ops, config
        self.length = 0
        self.slack = config.canvas_length
        self._layers: list[list[KV]] = [[] for _ in config.layers]  # pieces
        self._shared = False  # whether another context may hold the last piece of full layers
        self._read: list[Past] | None = None  # the result of `read`, until something is appended

    def append(self, new: Sequence[KV]) -> None:
        """Copy each layer's keys and values [G, n, C] behind the old ones.

        Layers go one by one, so memory holds one layer's last piece twice.
        """
        assert len(new) == len(self._layers), (len(new), len(self._layers))
        self._read = None
        n = new[0][0].shape[1]
        self.length += n
        for layer, pieces, kv in zip(self.config.layers, self._layers, new, strict=True):
            if layer.past is None:
                self._grow(pieces, kv)
            else:
                kept = layer.past + self.slack
                pieces[:] = [self._joined([last(x, max(0, kept - n)) for x in pieces], last(kv, kept))]
            self.ops.settle(pieces)  # lazy arrays would wait for each other
        self._shared = False

    def _grow(self, pieces: list[KV], new: KV) -> None:
        """Add keys and values [G, n, C] of a full layer to its pieces."""
        most, n = self.ops.piece_slots, new[0].shape[1]
        room = most - pieces[-1][0].shape[1] if pieces else 0
        if room > 0 and self._shared and most - room >= LEAST:
            room = 0
        if room > 0:
            pieces[-1] = self._joined(pieces[-1:], cut(new, 0, min(n, room)))
        for start in range(max(0, room), n, most):
            pieces.append(self._joined([], cut(new, start, min(n, start + most))))

    def _joined(self, pieces: Sequence[KV], new: KV) -> KV:
        """Pieces and new keys and values [G, n, C] as one piece.

        It has memory of its own: a view would hold all that it is cut from. So something is always joined, as
        no backend need copy a single part.
        """
        k, v = zip(cut(new, 0, 0), *pieces, new, strict=True)
        return self.ops.concat(k, 1), self.ops.concat(v, 1)

    def read(self) -> list[Past]:
        """What canvases and later tokens see, by layer: all on full layers, window − 1 on sliding ones.

        window − 1, as the query itself takes one place of the window.
        """
        if self._read is None:
            self._read = [
                Pieces(pieces if layer.past is None else [last(kv, layer.past) for kv in pieces])
                for layer, pieces in zip(self.config.layers, self._layers, strict=True)
            ]
        return self._read

    def fork(self) -> Context:
        """The same context again, which grows on its own; nothing is copied."""
        other = Context(self.ops, self.config)
        other.length, other._layers = self.length, [list(pieces) for pieces in self._layers]
        self._shared = other._shared = True
        return other

    @property
    def spare(self) -> int:
        """Tokens that `trim` can take back."""
        kept = [
            pieces[0][0].shape[1] - layer.past
            for layer, pieces in zip(self.config.layers, self._layers, strict=True)
            if layer.past is not None and pieces and pieces[0][0].shape[1] < self.length
        ]
        return min([self.length, *kept])

    def trim(self, count: int) -> Context:
        """A fork without the last `count` tokens; ValueError if a sliding layer no longer holds enough."""
        if not 0 <= count <= self.spare:
            raise ValueError(f"cannot take back {count} of {self.length} tokens; at most {self.spare}")
        other = self.fork()
        other.length -= count
        for pieces in other._layers:
            left = count
            while pieces and left >= (size := pieces[-1][0].shape[1]):
                pieces.pop()
                left -= size
            if left:
                pieces[-1] = cut(pieces[-1], 0, size - left)
        return other

    def arrays(self) -> dict[int, int]:
        """Bytes of each array that this context holds, by the array's id: contexts may share some."""
        return {id(x): x.nbytes for pieces in self._layers for kv in pieces for x in kv}


def cut(kv: KV, start: int, stop: int) -> KV:
    """Tokens `start` to `stop` of keys and values [G, n, C]."""
    return kv[0][:, start:stop], kv[1][:, start:stop]


def last(kv: KV, count: int) -> KV:
    """The last `count` tokens of keys and values [G, n, C], all of them if there are fewer."""
    size = kv[0].shape[1]
    return kv if size <= count else cut(kv, size - count, size)
