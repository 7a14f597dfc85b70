"""The live view of a canvas while it settles.

Every position is in one of three states, which differ in form as well as in colour. Settled text is plain,
an uncertain guess is underlined. Noise shows a dot for each character of the guess, so that words keep their
place. This module has no threshold of its own: the states follow from the positions that the sampler accepted
and from the guess of the previous step.

A thread of its own draws one step in each frame, so that the steps of a small model can be seen at all. The
engine never waits for it and its clock never sees a pause. The price: the last frames of a fast model come a
second or two after its reply.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from dgemma.engine.events import Committed, Done, Draft, Event, Prefill
from dgemma.settings import GenerationConfig
from dgemma.text.tokenizer import Tokenizer
from dgemma.view.pieces import NEWLINE, Mark, Piece, Spelling, marks, plain

FRAME = 0.06  # seconds between two frames, which is the pace of a fast model's steps
BACKLOG = 24  # steps that may wait before a frame takes more than one
STYLES = {Mark.NOISE: "dim", Mark.UNCERTAIN: "underline yellow", Mark.SETTLED: ""}


def styled(pieces: Iterable[Piece]) -> Text:
    """Pieces as rich text. Only a settled newline breaks the line; others are shown as a sign."""
    text = Text()
    for piece in pieces:
        word = piece.text.lstrip(" ")
        text.append(" " * (len(piece.text) - len(word)))
        faint = piece.special or (piece.newline and piece.text == NEWLINE)
        text.append(word, f"dim {STYLES[piece.mark]}" if faint else STYLES[piece.mark])
        if piece.newline and piece.mark == Mark.SETTLED:
            text.append("\n")
    return text


# ---- the view -----------------------------------------------------------------------------------


@dataclass
class _Row:
    committed: Text = field(default_factory=Text)
    pieces: list[Piece] = field(default_factory=list)
    guess: np.ndarray | None = None
    canvas: int = 0
    step: int = 0
    tokens: int = 0  # committed
    steps: int = 0
    timed: int = 0  # of the steps, those behind a canvas's first
    prefill: str = ""
    finished: str = ""

    @property
    def _sure(self) -> int:
        return sum(piece.mark == Mark.SETTLED for piece in self.pieces)

    @property
    def settled(self) -> float:
        """Share of the canvas that is settled, without the filler after the stop token."""
        return self._sure / max(1, len(self.pieces))

    @property
    def tokens_per_forward(self) -> float:
        """Tokens for each step so far; those of the canvas count once they are settled."""
        return (self.tokens + self._sure) / max(1, self.steps)


class View:
    """The picture of the events so far: a rich renderable no larger than the terminal."""

    def __init__(self, tokenizer: Tokenizer, config: GenerationConfig, rows: int = 1):
        self._spelling = Spelling(tokenizer, config.stop_ids)
        self._steps = config.steps
        self._rows = [_Row() for _ in range(rows)]
        self._spent = 0.0

    def update(self, event: Event, seconds: float = 0.0) -> None:
        """Take in an event, for which the engine needed `seconds`."""
        if isinstance(event, Prefill):
            self._rows[event.row].prefill = f" {event.done}/{event.total}"
        elif isinstance(event, Draft):
            self._time(event, seconds)
            self._draft(self._rows[event.row], event)
        elif isinstance(event, Committed):
            row = self._rows[event.row]
            pieces = self._spelling.pieces(event.tokens, [Mark.SETTLED] * len(event.tokens))
            row.committed.append_text(styled(pieces))
            row.tokens += len(event.tokens)
            row.pieces, row.guess = [], None
        else:
            self._rows[event.row].finished = event.finish_reason

    def _draft(self, row: _Row, draft: Draft) -> None:
        mark = marks(draft, row.guess)
        row.pieces = self._spelling.pieces(draft.tokens, mark)
        row.guess, row.canvas, row.step = draft.tokens, draft.canvas, draft.step
        row.steps += 1

    def _time(self, draft: Draft, seconds: float) -> None:
        # The first step of a canvas is not timed: it includes the encoding of the canvas before.
        if draft.step > 1:
            self._spent += seconds
            self._rows[draft.row].timed += 1

    def line(self, row: int) -> str:
        """A row's canvas on one line without escape codes, for logs and pipes."""
        r = self._rows[row]
        head = f"row {row + 1} " if len(self._rows) > 1 else ""
        return f"{head}canvas {r.canvas + 1} step {r.step}/{self._steps} {r.settled:4.0%}  {plain(r.pieces)}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._lines(console, options.max_width, console.height - 1)

    def _lines(self, console: Console, width: int, height: int) -> Iterator[Text]:
        count = len(self._rows)
        share = max(2, height // count)
        shown = count if share * count <= height else max(1, (height - 1) // share)
        for index in range(shown):
            yield from self._block(console, index, width, share)
        if shown < count and height > share:
            yield Text(f"… and {count - shown} more rows", "dim", no_wrap=True, overflow="ellipsis")

    def _block(self, console: Console, index: int, width: int, height: int) -> list[Text]:
        """The end of a row's text, with its status below."""
        row = self._rows[index]
        # A screen of text is all that shows. Wrapping all of it would take longer with every canvas.
        start = max(0, len(row.committed) - width * height)
        text = (row.committed[start:] if start else row.committed.copy()).append_text(styled(row.pieces))
        lines = list(text.wrap(console, width)) if text.plain else []
        status = Text(self._status(index, width), "dim", no_wrap=True, overflow="ellipsis")
        return [*lines[max(0, len(lines) - height + 1) :], status]

    def _status(self, index: int, width: int) -> str:
        row = self._rows[index]
        head = [f"row {index + 1}"] if len(self._rows) > 1 else []
        if not row.steps:
            return " · ".join([*head, f"reading the prompt{row.prefill}"])
        rate = f"{row.tokens_per_forward:.1f} tokens/forward"
        if row.finished:
            return " · ".join([*head, f"done ({row.finished})", f"{row.tokens} tokens", rate])
        parts = [*head, f"canvas {row.canvas + 1}", f"step {row.step}/{self._steps}", rate]
        if self._spent:
            # Rows that run together share a step: the first of their drafts has its time.
            ms = 1000 * self._spent / max(row.timed for row in self._rows)
            parts.append(f"{ms:.0f} ms/step" if ms >= 10 else f"{ms:.1f} ms/step")
        status, done = " · ".join(parts), round(10 * row.settled)
        bar = "━" * done + "─" * (10 - done) if len(status) + 24 <= width else ""
        return f"{bar} {row.settled:4.0%} settled · {status}".lstrip()


# ---- where it is drawn --------------------------------------------------------------------------


class Screen(Protocol):
    """Takes events inside a `with` block, each with the seconds that it took."""

    def feed(self, event: Event, seconds: float) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class TerminalScreen:
    """Draws a view in place and erases it at the end, so that the terminal is as before."""

    def __init__(self, view: View, console: Console):
        self._view = view
        self._live = Live(view, console=console, auto_refresh=False, transient=True)
        self._waiting: deque[tuple[Event, float]] = deque()
        self._closing, self._abort = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._draw, name="dgemma-live", daemon=True)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        self._thread.start()
        return self

    def feed(self, event: Event, seconds: float) -> None:
        """Queue an event; never waits. What was cancelled is not drawn any more."""
        self._waiting.append((event, seconds))
        if isinstance(event, Done) and event.finish_reason == "cancelled":
            self._abort.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A finished run shows its last frames, an interrupted one none.
        (self._closing if kind is None else self._abort).set()
        try:
            self._thread.join()
        finally:  # an interrupt may come during the last frames
            self._abort.set()
            self._thread.join()
            self._live.stop()

    def _draw(self) -> None:
        size = self._live.console.size
        while not self._abort.wait(FRAME):
            if self._waiting:
                self._take()
            elif self._closing.is_set():
                break
            elif size == self._live.console.size:  # a resized terminal is redrawn without news
                continue
            size = self._live.console.size
            self._live.refresh()

    def _take(self) -> None:
        """Advance the view by one step of each row, by several if the engine is far ahead."""
        for _ in range(1 + len(self._waiting) // BACKLOG):
            seen: set[int] = set()
            while self._waiting:
                event = self._waiting[0][0]
                if isinstance(event, Draft):
                    if event.row in seen:  # this row's next step waits for the next frame
                        break
                    seen.add(event.row)
                self._view.update(*self._waiting.popleft())


class PlainScreen:
    """Prints a line for each step: for logs, pipes and terminals that cannot move their cursor."""

    def __init__(self, view: View, console: Console):
        self._view, self._file = view, console.file

    def __enter__(self) -> Self:
        return self

    def feed(self, event: Event, seconds: float) -> None:
        """Print a draft's line at once."""
        self._view.update(event, seconds)
        if isinstance(event, Draft):
            print(self._view.line(event.row), file=self._file, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def moves_cursor(console: Console) -> bool:
    """Whether this console can redraw a view in place."""
    return console.is_terminal and not console.is_dumb_terminal


def screen(view: View, console: Console) -> Screen:
    """The screen that fits the console."""
    return TerminalScreen(view, console) if moves_cursor(console) else PlainScreen(view, console)


def follow(events: Iterable[Event], screen: Screen) -> list[Done]:
    """Show a generation on a screen and return its replies, in the order of their rows."""
    replies = []
    with screen:
        before = perf_counter()
        for event in events:
            screen.feed(event, perf_counter() - before)
            if isinstance(event, Done):
                replies.append(event)
            before = perf_counter()
    return sorted(replies, key=lambda done: done.row)
