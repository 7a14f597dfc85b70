"""Holes in a text are filled: what stands around them is pinned on the canvas as the model's reply.

A text that is longer than a canvas goes through a window: what precedes is encoded as context, what follows
is pinned behind the hole as far as it reaches, and the rest of it stands in the prompt. Holes that are near
share a canvas. Others get one each, from left to right, and what was filled is text for the next.

L canvas positions
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dgemma.engine.candidates import DOUBT
from dgemma.engine.fill import Cost, Filled, Filler, check_room
from dgemma.engine.window import Window
from dgemma.errors import PromptError
from dgemma.network.config import Config
from dgemma.text.holes import Gap, Hole, in_order
from dgemma.text.messages import Message
from dgemma.text.tokenizer import Tokenizer
from dgemma.text.wording import ELSEWHERE

Prompt = Callable[
    [str], list[int]
]  # ids of the prompt, given the end of the text that no canvas has room for

# Tokens of a hole at most, if nothing else is said: a canvas divided by it. As many must stand behind a hole
# before another one shares its canvas.
SHARE = 4
# At which sides of holes the token beside them is spelled in letters, one after the other, while no candidate
# is to be believed: a whole token may be one that never stands beside the right text.
_CUTS: tuple[tuple[str, ...], ...] = ((), ("left",), ("right",), ("left", "right"))


@dataclass(frozen=True)
class Filling:
    """What a hole became: from `start` of the new text on stands `text`, of so many tokens. `score` is the
    mean log-probability, in nats, of the canvas it stands on."""

    start: int
    text: str
    tokens: int
    score: float


@dataclass(frozen=True)
class Infilled:
    """A text whose holes are filled, and what it took.

    `steps` are the denoising steps of the canvases that were kept, `row_steps` those of all `candidates`.
    """

    text: str
    holes: tuple[Filling, ...]
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


def check_holes(
    config: Config, tokenizer: Tokenizer, text: str, holes: Sequence[Hole], prompt: Sequence[Message]
) -> None:
    """PromptError for holes that surely cannot be filled; the model's weights are not needed for it."""
    L = config.canvas_length
    for hole in in_order(text, holes):
        if (hole.length or 0) >= L:
            raise PromptError(f"a hole of {hole.length} tokens does not fit on a canvas of {L}")
    check_text(config, tokenizer, text, prompt)


def check_text(config: Config, tokenizer: Tokenizer, text: str, prompt: Sequence[Message]) -> None:
    """PromptError for a text that surely is too long for the model, behind its prompt."""
    own = len(tokenizer.encode_text(text)[0])
    check_room(config, len(tokenizer.encode_chat(prompt)) + max(config.canvas_length, own))


def infill(
    filler: Filler, text: str, holes: Sequence[Hole], prompt: Prompt, most: int | None = None
) -> Infilled:
    """The text with its holes filled, each with at most `most` tokens; outside of them nothing changes.

    PromptError for holes that are none, that overlap or that are too long for a canvas, and for a text that
    is too long for the model.
    """
    began, left, L = time.perf_counter(), in_order(text, holes), filler.config.canvas_length
    most = L // SHARE if most is None else min(most, L - L // SHARE)
    done: list[Filling] = []
    canvases: list[Filled] = []
    while left:
        window, found = _believed(filler, text, left, prompt, most)
        canvases.append(found)
        for gap, ids in zip(window.gaps, found.ids, strict=True):
            hole = left.pop(0)
            new = filler.seams.text(gap, ids, first=hole.start == 0)
            text = text[: hole.start] + new + text[hole.stop :]
            shift = len(new) - (hole.stop - hole.start)
            left = [replace(one, start=one.start + shift, stop=one.stop + shift) for one in left]
            done.append(Filling(hole.start, new, len(ids) - gap.edges, found.score))
    return Infilled(
        text=text,
        holes=tuple(done),
        canvases=len(canvases),
        steps=sum(one.steps for one in canvases),
        candidates=sum(one.cost.candidates for one in canvases),
        row_steps=sum(one.cost.row_steps for one in canvases),
        seconds=time.perf_counter() - began,
        seed=filler.seed,
        backend=filler.engine.runner.ops.name,
    )


def _believed(
    filler: Filler, text: str, holes: list[Hole], prompt: Prompt, most: int
) -> tuple[Window, Filled]:
    """The first window and the best that fills it; other cuts of its edges are tried while it is in doubt."""
    tried: list[Window] = []
    found: list[Filled] = []
    for sides in _CUTS:
        pieces, gaps = filler.seams.cut(text, holes, sides)
        window = plan(filler, text, pieces, gaps, prompt, most)
        if window not in tried:
            tried.append(window)
            found.append(filler.fill(window))
        if found[-1].score >= DOUBT:
            break
    best = max(range(len(found)), key=lambda at: found[at].score)
    return tried[best], replace(found[best], cost=sum((one.cost for one in found), Cost()))


def plan(
    filler: Filler, text: str, pieces: list[list[int]], gaps: list[Gap], prompt: Prompt, most: int
) -> Window:
    """The window of the first hole, and of those behind it that have room on its canvas, too."""
    L, stop = filler.config.canvas_length, filler.stop
    fixed = (
        sum(map(len, pieces))
        + sum(gap.edges + (gap.hole.length or len(gap.draft)) for gap in gaps)
        + len(stop)
    )
    if fixed + most <= L:  # all of the text; holes share what room there is
        return Window(
            prompt(""),
            [*pieces[:-1], pieces[-1] + stop],
            gaps,
            _most(gaps, most),
            len(pieces[-1] + stop),
            True,
        )
    taken, used = 1, _size(gaps[0], most)
    if used >= L:
        edges = gaps[0].edges
        raise PromptError(
            f"a hole of {used - edges} tokens, and {edges} beside it, does not fit on a canvas of {L}"
        )
    while taken < len(gaps):
        wider = used + len(pieces[taken]) + _size(gaps[taken], most)
        if wider > L - L // SHARE:
            break
        taken, used = taken + 1, wider
    more = gaps[taken:]
    last = pieces[taken] + [gap.left for gap in more[:1] if gap.left is not None]
    text_end = len(last)
    last += [] if more else stop
    reach = min(len(last), L - used)
    split = max(0, len(pieces[0]) - (L - used - reach))
    ends = [*(gap.hole.start for gap in more[1:]), len(text)]
    rest = [filler.seams.spelled(last[min(reach, text_end) : text_end])]
    rest += [text[gap.hole.stop : end] for gap, end in zip(more, ends, strict=False)]
    return Window(
        context=prompt(ELSEWHERE.join(rest)) + pieces[0][:split],
        pieces=[pieces[0][split:], *pieces[1:taken], last],
        gaps=gaps[:taken],
        most=_most(gaps[:taken], most),
        reach=reach,
        ends=not more and reach == len(last),
    )


def _most(gaps: Sequence[Gap], most: int) -> list[int]:
    """The most tokens of each gap: its length if that is known, else `most` more than it had."""
    return [len(gap.draft) + most if gap.hole.length is None else gap.hole.length for gap in gaps]


def _size(gap: Gap, most: int) -> int:
    """Positions that a gap may take."""
    return gap.edges + _most([gap], most)[0]
