"""One canvas with gaps: candidates of their lengths run as rows behind one context, and the best is kept.

The best is the row whose final canvas has the highest mean log-probability: of all tokens of the text, pinned
ones too, as it is the text behind a hole of the wrong length that protests. Padding does not count.

L canvas positions  V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dgemma.engine import sampler
from dgemma.engine.candidates import Lengths, search
from dgemma.engine.engine import Engine
from dgemma.engine.events import Done, Draft
from dgemma.engine.handle import Handle
from dgemma.engine.request import FREE, Request
from dgemma.engine.sampler import row_id
from dgemma.engine.window import Laid, Window
from dgemma.errors import PromptError
from dgemma.network.config import Config
from dgemma.network.context import Context
from dgemma.settings import GenerationConfig
from dgemma.text.holes import Gap, Seams

Watch = Callable[[int, int, str], None]  # how much is done, of how much, and of what

ROWS = 16  # candidates that run together at most
# Candidates that have not settled after so many times the steps of the first that did are taken as they
# stand, and a few steps more are free. Most lengths that do not fit never settle.
PATIENCE, GRACE = 2, 4
# What a candidate loses in the comparison if a hole has tokens that are no text.
_NO_TEXT = 1e6


@dataclass(frozen=True)
class Cost:
    """How many candidates ran, and the denoising steps of all of them."""

    candidates: int = 0
    row_steps: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.candidates + other.candidates, self.row_steps + other.row_steps)


@dataclass(frozen=True)
class Filled:
    """The best candidate of a window: the ids of each gap with its edges, the mean log-probability of its
    canvas in nats, its denoising steps, and the cost of all candidates."""

    ids: list[list[int]]
    score: float
    steps: int
    cost: Cost


class _Written:
    """The constraint of one canvas: gaps are written in text, and their edges keep what stands outside."""

    def __init__(self, classes: np.ndarray, values: np.ndarray):
        self._bias = classes, values

    def bias(self, canvas: int, last: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return self._bias

    def commit(self, canvas: int, tokens: np.ndarray) -> np.ndarray:
        return tokens


class Filler:
    """Fills windows on an engine, which may have other rows at the same time."""

    def __init__(
        self, engine: Engine, seams: Seams, settings: GenerationConfig, seed: int, watch: Watch | None = None
    ):
        self.engine, self.seams, self.seed, self.watch = engine, seams, seed, watch
        self.config = engine.runner.config
        self.settings = settings.override(max_new_tokens=self.config.canvas_length)
        self._padding: int | None = None
        self.attempt = 0  # another one draws other noise
        self.stop = seams.turn_end(settings.stop_ids)

    def context(self, ids: Sequence[int]) -> Context:
        """The context of these ids, encoded once for all that begins with them."""
        with self.engine.alone():
            found = self.engine.prefixes.find(ids)
            known = found.length if found else 0
            if found is None or known < len(ids):
                watch = self.watch
                tell = (lambda done, total: watch(done, total, "reading the prompt")) if watch else None
                (found,) = self.engine.runner.encode([ids[known:]], [found] if found else None, tell)
                self.engine.prefixes.keep(ids, found)
            return found

    def judge(
        self, window: Window, canvases: Sequence[np.ndarray], tokens: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `Runner.judge` says of canvases [L] in a window, each as large as `tokens`, at a second look.

        Without self-conditioning the model is unsure of much that is right, and sure of much that is wrong.
        """
        contexts, runner = [self.context(window.context)] * len(canvases), self.engine.runner
        canvas = np.stack(canvases)
        middle = np.full(canvas.shape, 0.5)  # of the samples, which nobody reads
        with self.engine.alone():
            soft = runner.see(contexts, canvas, None, self.settings.t_min, middle).soft
            return runner.judge(contexts, canvas, None if tokens is None else np.stack(tokens), soft)

    def padding(self, context: Sequence[int]) -> int:
        """The token that the model itself writes behind the end of a reply."""
        if self._padding is None:
            pad, L = self.config.pad_id, self.config.canvas_length
            window = Window(list(context), [], [], [], 0, True)
            canvas = np.array([*self.stop, *[pad] * L][:L])
            last = int(self.judge(window, [canvas])[1][0, -1])
            self._padding = pad if self.seams.written[last] else last
        return self._padding

    def _ended(self, window: Window, scored: int, canvas: np.ndarray) -> np.ndarray:
        """A canvas [L] as the model itself would pad it."""
        if not window.ends:
            return canvas
        return np.where(np.arange(len(canvas)) < scored, canvas, self.padding(window.context))

    def fill(self, window: Window) -> Filled:
        """The best candidate of a window. PromptError if the model has no room for its context."""
        kinds = _Kinds(self.seams, window.gaps)
        check_room(self.config, len(window.context) + self.config.canvas_length)
        pad = self.config.pad_id
        done: dict[Lengths, Filled] = {}
        known = [gap.hole.length for gap in window.gaps]
        # A canvas that is the only one has all steps, and candidates half of them while none has settled.
        patience = [self.settings.steps if None not in known else -(-self.settings.steps // 2)]

        def score(candidates: list[Lengths]) -> list[float]:
            L = self.config.canvas_length
            laid = {lengths: window.laid(lengths, L, pad) for lengths in candidates}
            fits = [lengths for lengths in candidates if laid[lengths].scored <= L]
            row = (row_id(window.context) + self.attempt) % 2**64
            requests = [
                Request(
                    window.context,
                    self._settings(one),
                    self.seed,
                    row,
                    pins=one.pins,
                    draft=one.draft,
                    constraint=kinds.constraint(one, L),
                )
                for one in map(laid.__getitem__, fits)
            ]
            if not fits:
                return [-np.inf] * len(candidates)
            for request in requests:
                self.engine.check(request)
            self.context(window.context)
            handles = [self.engine.submit(request) for request in requests]
            drafts, patience[0] = _settled(handles, patience[0], self._tell)
            # A canvas without anything free makes no step.
            canvases = [
                steps[-1] if steps else np.array(laid[lengths].pins)
                for lengths, steps in zip(fits, drafts, strict=True)
            ]
            judged = [self._ended(window, laid[n].scored, c) for n, c in zip(fits, canvases, strict=True)]
            for lengths, canvas, steps, logs in zip(
                fits, canvases, drafts, self.judge(window, judged)[0], strict=True
            ):
                one = laid[lengths]
                ids = [canvas[place].tolist() for place in one.places]
                texts = [self.seams.text(gap, its) for gap, its in zip(window.gaps, ids, strict=True)]
                mean = float(logs[: one.scored].mean())
                mean -= 0 if all(map(self.seams.is_text, texts)) else _NO_TEXT
                done[lengths] = Filled(ids, mean, len(steps), Cost(1, len(steps)))
            return [done[lengths].score if lengths in done else -np.inf for lengths in candidates]

        around, before = [len(gap.draft) for gap in window.gaps], Cost()
        if len(known) > 1 and None in known:
            around, before = self._one_by_one(window)
        found = done[search(known, window.most, around, score)]
        return replace(found, cost=before + sum((one.cost for one in done.values()), Cost()))

    def _one_by_one(self, window: Window) -> tuple[list[int], Cost]:
        """A length for each gap, and what they cost: found while nothing stands behind the next gap.

        A gap of the wrong length would make all that is behind it protest, whatever the others' lengths.
        """
        lengths, cost, ids = [], Cost(), list(window.pieces[0])
        for at, gap in enumerate(window.gaps):
            last = window.pieces[at + 1]
            more = window.gaps[at + 1 : at + 2]
            behind = last + [one.left for one in more if one.left is not None]
            one = replace(
                window, pieces=[ids, behind], gaps=[gap], most=[window.most[at]],
                reach=len(behind) if more else window.reach, ends=window.ends and not more,
            )  # fmt: skip
            found = self.fill(one)
            lengths.append(len(found.ids[0]) - gap.edges)
            cost += found.cost
            ids = [*ids, *found.ids[0], *last]
        return lengths, cost

    def _settings(self, laid: Laid) -> GenerationConfig:
        """The settings of a canvas. What is pinned has no doubt, so the others may have all of a canvas's."""
        free = self.config.canvas_length - sum(id != FREE for id in laid.pins)
        return self.settings.override(
            confidence=self.settings.confidence * self.config.canvas_length / max(1, free)
        )

    def _tell(self, step: int) -> None:
        if self.watch:
            self.watch(step, self.settings.steps, "filling")


class _Kinds:
    """Tokens by which positions of a window's canvases they may stand at."""

    def __init__(self, seams: Seams, gaps: Sequence[Gap]):
        edges = {("left", gap.left) for gap in gaps} | {("right", gap.right) for gap in gaps}
        self._edges = sorted((side, id) for side, id in edges if id is not None)
        sets = [seams.written, *(seams.allowed(id, side) for side, id in self._edges)]
        kinds, self._classes = np.unique(np.stack(sets).astype(np.int64), axis=1, return_inverse=True)
        self._values = np.where(kinds > 0, 0.0, sampler.FORBIDDEN).astype(np.float32)  # [sets, classes]
        self._classes = self._classes.reshape(-1)

    def constraint(self, laid: Laid, size: int) -> _Written:
        """That of a canvas [size]."""
        which = np.zeros(size, np.int64)
        for place, edge in laid.edges:
            which[place] = 1 + self._edges.index(edge)
        return _Written(self._classes, self._values[which])


def _settled(
    handles: Sequence[Handle], most: int, tell: Callable[[int], None]
) -> tuple[list[list[np.ndarray]], int]:
    """The canvases of each request, step by step: of `most` steps, or as many as patience allows.

    That is the other number, for those that run later.
    """
    drafts: list[list[np.ndarray]] = [[] for _ in handles]
    ended = [False] * len(handles)
    while not all(ended):
        waits = ended.index(False)
        news = [(waits, next(iter(handles[waits])))]
        news += [(at, event) for at, handle in enumerate(handles) for event in handle.taken()]
        for at, event in news:
            if isinstance(event, Draft):
                drafts[at].append(event.tokens)
                tell(event.step)
            if isinstance(event, Done):
                ended[at] = True
                if event.finish_reason != "cancelled" and (steps := len(drafts[at])):
                    most = min(most, PATIENCE * steps + GRACE)
        for at, handle in enumerate(handles):
            if not ended[at] and len(drafts[at]) >= most:
                handle.cancel()
    # Which of them were still running when the first was done is left to chance, and must not matter.
    return [steps[:most] for steps in drafts], most


def check_room(config: Config, positions: int) -> None:
    """PromptError if a text and its prompt need more positions than the model has."""
    if positions > config.max_positions:
        raise PromptError(
            f"the text and its prompt need {positions} positions, the model has {config.max_positions}; "
            "give a part of the text"
        )
