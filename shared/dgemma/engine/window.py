"""A canvas of a longer text: what is pinned on it, where its gaps are, and what stands before it."""

from __future__ import annotations

from dataclasses import dataclass

from dgemma.engine.candidates import Lengths
from dgemma.engine.request import FREE
from dgemma.text.holes import Gap


@dataclass(frozen=True)
class Window:
    """A canvas of a text with gaps, and what stands before it.

    `context` are the ids of the prompt and of the text before the canvas. `pieces` are ids that stand, one
    list more than `gaps`; `reach` ids of the last one count for the score. The text `ends` with it, or goes
    on. `most` bounds the gaps' lengths.
    """

    context: list[int]
    pieces: list[list[int]]
    gaps: list[Gap]
    most: list[int]
    reach: int
    ends: bool

    def laid(self, lengths: Lengths, size: int, pad: int) -> Laid:
        """The canvas [size] for gaps of these lengths, none of them beyond `most`."""
        pins, draft = list(self.pieces[0]), list(self.pieces[0])
        places: list[slice] = []
        edges: list[tuple[int, tuple[str, int]]] = []
        for gap, piece, n in zip(self.gaps, self.pieces[1:], lengths, strict=True):
            start = len(pins)
            left = [] if gap.left is None else [gap.left]
            right = [] if gap.right is None else [gap.right]
            edges += [(start, ("left", id)) for id in left]
            edges += [(start + len(left) + n, ("right", id)) for id in right]
            draft += [*left, *(gap.draft if n == len(gap.draft) else [FREE] * n), *right, *piece]
            pins += [FREE] * (n + gap.edges) + piece
            places.append(slice(start, start + n + gap.edges))
        if self.ends:
            pins += [pad] * (size - len(pins))
        scored = len(draft) - len(self.pieces[-1]) + self.reach
        return Laid(pins[:size], draft[:size], places, edges, scored)


@dataclass(frozen=True)
class Laid:
    """One candidate's canvas: its gaps' places, with their edges, and how many of its first tokens count."""

    pins: list[int]
    draft: list[int]
    places: list[slice]
    edges: list[tuple[int, tuple[str, int]]]  # position; side and token, as `Seams.allowed` takes them
    scored: int
