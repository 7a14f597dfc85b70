"""Holes in a text are filled: the text stands on the canvas as pinned tokens, and the holes settle.

A hole's length is found by candidates, lengths as rows of one batch behind one context. The row wins whose final
canvas has the highest mean log-probability: of all tokens of the text, pinned ones too, as it is the text behind
a hole of the wrong length that protests. Padding does not count.

L canvas positions  V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dgemma.engine import sampler
from dgemma.engine.candidates import Lengths, search
from dgemma.engine.engine import Engine
from dgemma.engine.events import Draft
from dgemma.engine.request import FREE, Request
from dgemma.settings import GenerationConfig
from dgemma.text.holes import Gap, Seams

Watch = Callable[[int, int], None]  # of how many steps so many are made


@dataclass(frozen=True)
class Window:
    """A canvas of a text with gaps, and what stands before it.

    `context` are the ids of the prompt and of the text before the canvas. `pieces` are ids that stand, one list
    more than `gaps`; `reach` of the last ones count for the score, the text's stop token among them. What the
    last piece leaves free is padding if the text `ends` there. `most` bounds each gap's length.
    """

    context: list[int]
    pieces: list[list[int]]
    gaps: list[Gap]
    most: list[int]
    reach: int
    ends: bool

    def laid(self, lengths: Lengths, size: int, pad: int) -> Laid:
        """The canvas [size] for gaps of these lengths."""
        pins: list[int] = []
        draft: list[int] = []
        places: list[slice] = []
        edges: list[tuple[int, int, str]] = []
        for piece, gap, n in zip(self.pieces, self.gaps, lengths, strict=False):
            pins += piece
            start = len(pins)
            left = [] if gap.left is None else [gap.left]
            right = [] if gap.right is None else [gap.right]
            edges += [(start, id, "left") for id in left]
            edges += [(start + len(left) + n, id, "right") for id in right]
            old = [*gap.draft[:n], *[FREE] * (n - len(gap.draft))]
            draft += [FREE] * (start - len(draft)) + left + old + right
            pins += [FREE] * (n + gap.edges)
            places.append(slice(start, len(pins)))
        scored = len(pins) + self.reach
        pins += self.pieces[-1]
        if self.ends:
            pins += [pad] * (size - len(pins))
        return Laid(pins[:size], draft, places, edges, scored)


@dataclass(frozen=True)
class Laid:
    """One candidate's canvas: pins, draft, where its gaps are with their edges, and how many tokens count."""

    pins: list[int]
    draft: list[int]
    places: list[slice]
    edges: list[tuple[int, int, str]]  # position, token, side
    scored: int


class Edges:
    """The constraint of one canvas: holes are written in text, and their edges keep what stands outside."""

    def __init__(self, classes: np.ndarray, values: np.ndarray):
        self._bias = classes, values

    def bias(self, canvas: int, last: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return self._bias

    def commit(self, canvas: int, tokens: np.ndarray) -> np.ndarray:
        return tokens


@dataclass
class Tally:
    """What filling took. `steps` are those of the candidates that were chosen, `rows` counts all candidates."""

    steps: int = 0
    rows: int = 0
    row_steps: int = 0
    scores: list[float] = field(default_factory=list)


def fill(
    engine: Engine, seams: Seams, window: Window, settings: GenerationConfig, seed: int, tally: Tally,
    watch: Watch | None = None,
) -> tuple[list[list[int]], float]:
    """The ids of each gap, its edges included, and the score of the canvas they stand on."""
    L, pad = engine.runner.config.canvas_length, engine.runner.config.pad_id
    edges = sorted({(id, side) for gap in window.gaps
                    for id, side in ((gap.left, "left"), (gap.right, "right")) if id is not None})
    sets = [seams.written, *(seams.allowed(id, side) for id, side in edges)]
    kinds, classes = np.unique(np.stack(sets).astype(np.int64), axis=1, return_inverse=True)
    classes = np.asarray(classes).reshape(-1)
    done: dict[Lengths, tuple[list[list[int]], int, float]] = {}

    def score(candidates: list[Lengths]) -> list[float]:
        laid = [window.laid(lengths, L, pad) for lengths in candidates]
        handles = []
        for one in laid:
            which = np.zeros(L, np.int64)
            for at, id, side in one.edges:
                which[at] = 1 + edges.index((id, side))
            values = np.where(kinds[which] > 0, 0.0, sampler.FORBIDDEN).astype(np.float32)
            request = Request(window.context, settings, seed, pins=one.pins, draft=[],
                              constraint=Edges(classes, values))
            handles.append(engine.submit(request))
        canvases, steps = [], []
        for handle in handles:
            last = None
            for event in handle:
                if isinstance(event, Draft):
                    last = event
                    if watch: watch(event.step, settings.steps)
            canvases.append(last.tokens if last is not None else None)
            steps.append(0 if last is None else last.step)
        for at, one in enumerate(laid):
            if canvases[at] is None:
                canvases[at] = np.array(one.pins)
        own = np.concatenate([engine.runner.score([context] * 1, np.stack([c])) for c in canvases])
        scores = []
        for lengths, one, tokens, n, logp in zip(candidates, laid, canvases, steps, own, strict=True):
            mean = float(logp[: one.scored].mean())
            ids = [tokens[place].tolist() for place in one.places]
            texts = [seams.text(gap, x) for gap, x in zip(window.gaps, ids)]
            if None in texts: mean -= 1e6
            done[lengths] = ids, n, mean
            scores.append(mean)
            tally.rows += 1
            tally.row_steps += n
        return scores

    context = engine.prefixes.find(window.context)
    known = [gap.hole.length for gap in window.gaps]
    lengths = search(known, window.most, [len(gap.draft) for gap in window.gaps], score)
    ids, steps, mean = done[lengths]
    tally.steps += steps
    return ids, mean
