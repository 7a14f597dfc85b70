"""Progress of long work on a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich import progress as rich
from rich.console import Console

from dgemma.commands.process import cursor_shown
from dgemma.commands.streams import note
from dgemma.network.ops import Notices

PATIENCE = 1.0  # seconds of work before the first word about it
AGAIN = 10.0  # seconds between two lines after that


class _Console(Console):
    """A console that says whether the cursor is hidden, for whoever ends the process."""

    def show_cursor(self, show: bool = True) -> bool:
        if self.is_terminal:
            cursor_shown(show)
        return super().show_cursor(show)


def stderr_console() -> Console:
    return _Console(stderr=True, highlight=False)


class Update(Protocol):
    """Takes how far some work is; `label` names it if it is no longer what it was."""

    def __call__(self, done: int, total: int, label: str = ...) -> None: ...


@contextmanager
def progress_bar(console: Console, label: str, in_bytes: bool = False) -> Iterator[Update]:
    """A bar on a terminal, once the work has taken a second; it goes when the work is done.

    A terminal that cannot move its cursor gets a line every ten seconds.
    """
    began = told = time.monotonic()
    amount = (rich.DownloadColumn(), rich.TransferSpeedColumn()) if in_bytes else (rich.TaskProgressColumn(),)
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *amount, rich.TimeRemainingColumn())
    bar = rich.Progress(*columns, console=console, transient=True)
    task = bar.add_task(label, total=None)

    def update(done: int, total: int, label: str = label) -> None:
        nonlocal told
        if not bar.live.is_started:
            now = time.monotonic()
            if now - began < PATIENCE or done >= total or not console.is_terminal:
                return
            if console.is_dumb_terminal:
                if told == began or now - told >= AGAIN:
                    told = now
                    console.print(f"dgemma: {label}, {done / total:.0%}")
                return
            bar.start()
        bar.update(task, completed=done, total=total, description=label)

    try:
        yield update
    finally:
        if bar.live.is_started:  # `stop` would print an empty line otherwise
            bar.stop()


class TerminalNotices(Notices):
    """Prints a backend's notices on stderr."""

    def __init__(self, console: Console):
        self._console = console

    def say(self, text: str) -> None:
        note(f"dgemma: {text}")

    def working(self, what: str, progress: Callable[[], str]) -> AbstractContextManager[None]:
        return _announced(self._console, progress, what)


@contextmanager
def _announced(console: Console, progress: Callable[[], str], what: str) -> Iterator[None]:
    """Prints a line on a terminal once the work has taken a second, then its progress every ten.

    A thread prints, as the work is a single call. There is no bar, as a live canvas may be on the screen.
    """
    if not console.is_terminal:
        yield
        return
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        if over.wait(PATIENCE):
            return
        console.print(f"dgemma: {what} …")
        while not over.wait(AGAIN):
            console.print(f"dgemma: … {time.monotonic() - began:.0f} s{progress()}", highlight=False)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
