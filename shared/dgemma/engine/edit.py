"""A text is changed as an instruction asks: what the model is least sure of settles anew, the rest is pinned.

The text stands on the canvas as if it were the reply to the instruction, and the model is asked how likely each of
its tokens is there. Unlikely ones become holes that begin with what they held, and are filled as in `infill`. That
is done again while it makes the text more likely.

L canvas positions
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dgemma.engine.fill import Filler, Window
from dgemma.engine.sampler import Noise, row_id
from dgemma.engine.request import FREE
from dgemma.engine.infill import SHARE, Infilled, infill
from dgemma.text.holes import MARK_OF_ORDER, Hole, in_order

# A token with a lower probability is not sure.
HIDDEN = 4
LEVELS = ((0.5, 0), (0.9, 2), (0.97, 4))


@dataclass(frozen=True)
class Edited:
    """A text after an edit, and what it took: `surveys` are looks at a canvas as it stood, `steps` denoising steps
    of the canvases that were kept, `row_steps` those of all `candidates`. `score` is the text's mean
    log-probability in nats before and after."""

    text: str
    rounds: int
    score: tuple[float, float]
    surveys: int
    canvases: int
    steps: int
    candidates: int
    row_steps: int
    seconds: float
    seed: int
    backend: str

    def json(self) -> dict[str, Any]:
        """All of it as one dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Survey:
    """How likely a text's tokens are, in nats, which would be the likeliest, and each one's characters from and to.
    The stop token is the last."""

    logs: np.ndarray
    best: list[int]
    places: list[tuple[int, int]]
    canvases: int

    @property
    def score(self) -> float:
        return float(self.logs.mean())


def survey(filler: Filler, text: str, prompt: list[int]) -> Survey:
    """A look at all of a text as the reply to a prompt, canvas by canvas."""
    L, pad = filler.config.canvas_length, filler.config.pad_id
    start = text.startswith(MARK_OF_ORDER)
    body = text[start:].rstrip("\r\n")
    ids, places = filler.seams.tokenizer.encode_text(body)
    places = [(a + start, b + start) for a, b in places] + [(start + len(body),) * 2] * len(filler.stop)
    tokens, logs, best, canvases = [*ids, *filler.stop], [], [], 0
    while len(logs) < len(tokens):
        begin = len(logs)
        canvas = tokens[begin : begin + L]
        # A quarter of a canvas is seen for the sake of what stands before it, unless it is the last.
        count = len(canvas) if begin + L >= len(tokens) else L - L // SHARE
        window = Window([*prompt, *tokens[:begin]], [canvas], [], [], len(canvas), True)
        whole = np.array(canvas + [pad] * (L - len(canvas)))
        noise = Noise(filler.seed, row_id(window.context), 0, filler.config.vocab_size).start(1, L)
        rows = np.arange(L) % HIDDEN
        hidden = [np.where(rows == row, noise, whole) for row in range(HIDDEN)]
        own, likeliest = filler.judge(window, hidden, [whole] * HIDDEN)
        logs += own[rows[:count], np.arange(count)].tolist()
        best += likeliest[rows[:count], np.arange(count)].tolist()
        canvases += 1
    return Survey(np.array(logs), best, places, canvases)


def doubted(filler: Filler, seen: Survey, sure: float, width: int, regions: Sequence[Hole] = ()) -> list[Hole]:
    """Holes in the place of the tokens below the probability `sure` and `width` more on either side, within `regions` if there are any."""
    last = len(seen.logs)
    unsure = np.zeros(last, bool)
    for at in np.flatnonzero(seen.logs < np.log(sure)):
        unsure[max(0, at - width) : at + width + 1] = True
    for at, (a, b) in enumerate(seen.places):
        if regions and not any(region.start <= a and b <= region.stop for region in regions):
            unsure[at] = False
    found: list[tuple[int, int]] = []  # tokens, from and to
    for at in np.flatnonzero(unsure):
        # A single token between two is as little known as they are.
        if found and (at - found[-1][1] <= 1 or seen.places[at][0] <= seen.places[found[-1][1] - 1][1]):
            found[-1] = found[-1][0], int(at) + 1
        else:
            found.append((int(at), int(at) + 1))
    longest = filler.config.canvas_length // 2
    found = [(a, min(b, a + longest)) for a, b in found]
    written, end = filler.seams.written, seen.places[-1][1]
    return [
        Hole(seen.places[a][0], seen.places[b - 1][1], None,
             tuple(id if written[id] else FREE for id, place in zip(seen.best[a:b], seen.places[a:b], strict=True) if place[0] < end))
        for a, b in found
    ]


def edit(
    filler: Filler, text: str, prompt: list[int], regions: Sequence[Hole] = (), most: int | None = None
) -> Edited:
    """The text as the prompt asks for it; outside of `regions`, if there are any, nothing changes."""
    began = time.perf_counter()
    regions = in_order(text, regions) if regions else []
    seen = survey(filler, text, prompt)
    first, surveys, done = seen, [seen], []
    for sure, width in LEVELS:
        holes = doubted(filler, seen, sure, width, regions)
        if not holes:
            continue
        new = infill(filler, text, holes, lambda _: prompt, most)
        done.append(new)
        if new.text == text:
            continue
        after = survey(filler, new.text, prompt)
        surveys.append(after)
        if after.score > seen.score:
            text, seen = new.text, after
    def total(name: str) -> int:
        return sum(getattr(one, name) for one in done)
    return Edited(text, len(done), (first.score, seen.score), sum(s.canvases for s in surveys), total("canvases"), total("steps"), total("candidates"), total("row_steps"), time.perf_counter()-began, filler.seed, filler.engine.runner.ops.name)
