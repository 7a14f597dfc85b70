"""The process of a command: descriptors that are there, and signals that leave the terminal as it was.

The first SIGINT, SIGTERM or SIGHUP unwinds a running command like Ctrl-C, so that a live view is erased. A
command that has not ended a second later (a download waits, a framework loads), and one that gets another
signal, is ended on the spot. So is a process whose command does not run yet or any more, in which Python
would print a traceback. Work on disk is safe either way: it gets its name when it is whole.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE = 1.0  # seconds that a command has for its unwinding
MOST_COLUMNS = 10_000
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
_ENDS = {getattr(signal, name): word for name, word in _WORDS.items() if hasattr(signal, name)}
_SHOW, _HIDE = b"\x1b[?25h", b"\x1b[?25l"

_running = False  # a command, which can be unwound
_caught: int | None = None  # the first signal
_hidden = False  # the terminal's cursor
_dying = _thread.allocate_lock()


def take_over() -> None:
    """Prepare the whole process for a command. A second call changes nothing.

    A signal that is ignored (nohup) or that has another handler keeps its meaning.
    """
    _fill_descriptors()
    check_sizes()
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _ENDS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)
    if hasattr(signal, "SIGTSTP") and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
        signal.signal(signal.SIGTSTP, _pause)


def check_sizes() -> None:
    """Forget a size of the terminal that is none: rich and click would end in a traceback."""
    for name in ("COLUMNS", "LINES"):
        value = os.environ.get(name, "1")
        if not (value.isascii() and value.isdecimal() and len(value) < 9 and 0 < int(value) <= MOST_COLUMNS):
            del os.environ[name]


def _fill_descriptors() -> None:
    """Open what the caller closed: the next file would get that number, and with it a stream's text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
        if number and hasattr(os, "set_blocking"):
            with suppress(OSError):
                os.set_blocking(number, True)  # a pipe that does not wait would lose what it has no room for


@contextmanager
def unwinding() -> Iterator[None]:
    """Surrounds a command; after a signal the process ends here, whatever the command made of it."""
    global _running
    _running = True
    try:
        yield
    finally:
        _running = False
        if _caught is not None:
            _die()


@contextmanager
def interrupts(act: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C calls `act` in here and ends nothing, unless it comes again when `act` had a second."""
    began: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal began
        if began is not None and time.monotonic() - began > GRACE:
            _end(number, frame)
        began = began or time.monotonic()
        act()

    if signal.getsignal(signal.SIGINT) is not _end:  # it is ignored, or none of ours
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def cursor_shown(shown: bool) -> None:
    """Note whether the terminal's cursor is to be seen."""
    global _hidden
    _hidden = not shown


def _end(number: int, frame: FrameType | None) -> None:
    global _caught
    again, _caught = _caught is not None, _caught or number
    if again or not _running:
        _die()
    with suppress(RuntimeError):  # no thread is to be had
        _thread.start_new_thread(_wait_and_die, ())
    raise KeyboardInterrupt


def _wait_and_die() -> None:
    time.sleep(GRACE)
    _die()


def _die() -> None:
    """End the process. Threads that still download or compute are not waited for."""
    number = _caught or signal.SIGINT
    text = b""
    if _dying.acquire(blocking=False):
        open_line = b"\n" if os.isatty(2) else b""  # ends the terminal's ^C, or a view's last line
        text = open_line + f"dgemma: {_ENDS[number]}\n".encode()
    _tell((_SHOW if _hidden else b"") + text)
    os._exit(128 + number)


def _pause(number: int, frame: FrameType | None) -> None:
    """Ctrl-Z: stop with the cursor as it was, and hide it again afterwards."""
    hidden = _hidden
    if hidden:
        _tell(_SHOW)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # returns when the process is continued
    signal.signal(number, _pause)
    if hidden:
        _tell(_HIDE)


def _tell(data: bytes) -> None:
    """Write to stderr, unless that would fail or wait (a terminal after Ctrl-S)."""
    with suppress(OSError, ValueError):
        if sys.platform == "win32" or select.select([], [2], [], 0)[1]:
            os.write(2, data)
