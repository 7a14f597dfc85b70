"""A text is changed as an instruction asks: what the model is least sure of settles anew, the rest is pinned.

The text stands on the canvas as if it were the reply to the instruction, and a survey asks how likely each of
its tokens is there. Unlikely ones become holes, which begin with what the survey found likelier, and are
filled as in `infill`. A token that is seen vouches for itself: so the survey asks again while tokens are
hidden, and what is unlikely then is tried, too, with other noise and wider holes. A try is kept only if it
makes the text likelier.

L canvas positions
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from dgemma.engine.fill import Filler
from dgemma.engine.infill import SHARE, Infilled, infill
from dgemma.engine.request import FREE
from dgemma.engine.sampler import Noise, row_id
from dgemma.engine.window import Window
from dgemma.text.holes import MARK_OF_ORDER, Hole, in_order

# A token with a lower probability is not sure.
SURE = 0.5
# Tokens on either side of those that are not sure which may change, too, try by try.
WIDTHS = (0, 1, 3)
# A survey hides the tokens behind noise in so many shares, one a row.
HIDDEN = 4


@dataclass(frozen=True)
class Edited:
    """A text after an edit, and what it took.

    `before` and `after` are the texts' scores: the mean log-probability of their tokens in nats. `surveys`
    are the passes that found them, `steps` the denoising steps of the canvases that were kept, and
    `row_steps` those of all `candidates`.
    """

    text: str
    before: float
    after: float
    surveys: int
    tries: int
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
    """How likely a text's tokens are, in nats, as they stand and while they are `hidden`, and each one's
    characters, from and to. The stop token is the last. `best` are the likeliest tokens there and behind."""

    logs: np.ndarray
    hidden: np.ndarray
    best: list[int]
    places: list[tuple[int, int]]
    canvases: int

    @property
    def score(self) -> float:
        return float(self.logs.mean())


def survey(filler: Filler, text: str, prompt: list[int]) -> Survey:
    """A look at all of a text as the reply to a prompt, canvas by canvas."""
    L, pad = filler.config.canvas_length, filler.padding(prompt)
    start = text.startswith(MARK_OF_ORDER)
    body = text[start:].rstrip("\r\n")
    ids, places = filler.seams.tokenizer.encode_text(body)
    places = [(a + start, b + start) for a, b in places] + [(start + len(body),) * 2] * len(filler.stop)
    tokens, canvases = [*ids, *filler.stop], 0
    logs: list[float] = []
    hidden: list[float] = []
    best: list[int] = []
    while len(logs) < len(tokens):
        begin = len(logs)
        part = tokens[begin : begin + L]
        # A quarter of a canvas is seen for the sake of what stands before it, unless it is the last.
        count = len(part) if begin + L >= len(tokens) else L - L // SHARE
        window = Window([*prompt, *tokens[:begin]], [part], [], [], len(part), True)
        canvas = np.array(part + [pad] * (L - len(part)))
        noise = Noise(filler.seed, row_id(window.context), 0, filler.config.vocab_size).start(1, L)
        share = np.arange(L) % HIDDEN
        rows = [np.where(share == row, noise, canvas) for row in range(HIDDEN)]
        own, likeliest = filler.judge(window, [canvas, *rows], [canvas] * (1 + HIDDEN))
        logs += own[0, :count].tolist()
        hidden += own[1 + share[:count], np.arange(count)].tolist()
        best += likeliest[0, : L if begin + count == len(tokens) else count].tolist()
        canvases += 1
    return Survey(np.array(logs), np.array(hidden), best, places, canvases)


def doubted(filler: Filler, seen: Survey, attempt: int = 0, regions: Sequence[Hole] = ()) -> list[Hole]:
    """Holes in the place of the tokens that are not sure; later attempts take more of them, and wider.

    If there are `regions`, no token outside of them is in a hole. A hole has at most half of a canvas's
    tokens.
    """
    unsure, width = np.zeros(len(seen.logs), bool), WIDTHS[attempt]
    logs = np.minimum(seen.logs, seen.hidden) if attempt else seen.logs
    for at in np.flatnonzero(logs < np.log(SURE)).tolist():
        unsure[max(0, at - width) : at + width + 1] = True
    for at, (start, stop) in enumerate(seen.places):
        if regions and not any(one.start <= start and stop <= one.stop for one in regions):
            unsure[at] = False
    found: list[tuple[int, int]] = []  # tokens, from and to
    for at in np.flatnonzero(unsure).tolist():
        # A single token between two is as little known as they are. Bytes of a character have one place.
        if found and (at - found[-1][1] <= 1 or seen.places[at][0] <= seen.places[found[-1][1] - 1][1]):
            found[-1] = found[-1][0], at + 1
        else:
            found.append((at, at + 1))
    longest = filler.config.canvas_length // 2
    holes = [_hole(filler, seen, start, min(stop, start + longest)) for start, stop in found]
    return [replace(hole, draft=None) for hole in holes] if attempt else holes


def _hole(filler: Filler, seen: Survey, start: int, stop: int) -> Hole:
    """A hole in the place of tokens `start` to `stop`, with what is likeliest there as its draft."""
    end, written = seen.places[-1][1], filler.seams.written
    inside = [at for at in range(start, stop) if seen.places[at][0] < end]  # the stop token has no text
    draft = [seen.best[at] if written[seen.best[at]] else FREE for at in inside]
    if len(inside) < stop - start:  # it is not sure that the text ends here: how it would go on
        draft += takewhile(lambda id: written[id], seen.best[stop - 1 :])
    return Hole(seen.places[start][0], seen.places[stop - 1][1], None, tuple(draft))


def edit(
    filler: Filler, text: str, prompt: list[int], regions: Sequence[Hole] = (), most: int | None = None
) -> Edited:
    """The text as the prompt asks for it, or as it was.

    Outside of `regions`, if there are any, nothing changes. A hole may get `most` tokens more than it had,
    a quarter of a canvas at most.
    PromptError for regions that are none, and for a text that is too long for the model.
    """
    began = time.perf_counter()
    quarter = filler.config.canvas_length // SHARE
    most = quarter if most is None else min(most, quarter)
    regions = in_order(text, regions) if regions else []
    seen = survey(filler, text, prompt)
    surveys, done, steps = [seen], [], 0
    for filler.attempt in range(len(WIDTHS)):
        holes = doubted(filler, seen, filler.attempt, regions)
        if not holes:
            continue
        done.append(infill(filler, text, holes, lambda _: prompt, most))
        if done[-1].text != text:
            surveys.append(survey(filler, done[-1].text, prompt))
            if surveys[-1].score > seen.score:
                text, seen, steps = done[-1].text, surveys[-1], steps + done[-1].steps
                regions = _moved(regions, done[-1], holes)
    return Edited(
        text=text,
        before=surveys[0].score,
        after=seen.score,
        surveys=sum(one.canvases for one in surveys),
        tries=len(done),
        steps=steps,
        candidates=sum(one.candidates for one in done),
        row_steps=sum(one.row_steps for one in done),
        seconds=time.perf_counter() - began,
        seed=filler.seed,
        backend=filler.engine.runner.ops.name,
    )


def _moved(regions: Sequence[Hole], new: Infilled, holes: Sequence[Hole]) -> list[Hole]:
    """The regions of a text in which `holes` were filled, each of them inside a region."""

    def shift(place: int, after: bool) -> int:
        gone = [
            h
            for h in zip(holes, new.holes, strict=True)
            if h[0].stop < place or (after and h[0].stop == place)
        ]
        return place + sum(len(filled.text) - (hole.stop - hole.start) for hole, filled in gone)

    return [Hole(shift(one.start, False), shift(one.stop, True)) for one in regions]
