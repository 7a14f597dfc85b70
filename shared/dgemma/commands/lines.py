"""What a user types on a terminal: lines that can be edited, with those of earlier sessions to go back to.

The prompt goes to stderr, so that stdout has the answers alone.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.output.vt100 import Vt100_Output

from dgemma.commands.streams import note


def terminal_lines() -> Callable[[], str]:
    """A function that asks for a line, or several; EOFError at Ctrl-D.

    Alt-Enter, and Enter behind a backslash, begin a new line. Pasted text keeps its lines. Ctrl-C clears
    what was typed.
    """
    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    output = create_output(sys.stderr)
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False  # nothing here needs the cursor's place, and not every terminal tells it
    session: PromptSession[str] = PromptSession(
        "> ",
        prompt_continuation="  ",
        multiline=True,
        key_bindings=keys,
        history=_history(),
        output=output,
        enable_suspend=True,
    )
    return session.prompt


# ---- history --------------------------------------------------------------------------------------


class _Kept(FileHistory):
    """A file that nothing depends on: what cannot be read is not there, what cannot be written is lost."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return super().load_history_strings()
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def history_file() -> Path | None:
    """Where lines are kept: $DGEMMA_HISTORY, nowhere if that is empty.

    Without it the file is dgemma/history in $XDG_STATE_HOME, which is ~/.local/state by default.
    """
    if (named := os.environ.get("DGEMMA_HISTORY")) is not None:
        return Path(named) if named else None
    home = os.path.expanduser("~/.local/state")
    state = next(
        (path for path in (os.environ.get("XDG_STATE_HOME"), home) if path and os.path.isabs(path)), ""
    )
    return Path(state, "dgemma", "history") if state else None


def _history() -> History:
    path = history_file()
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A pipe would wait for its other side; without O_NONBLOCK to open it would, too.
        number = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR | getattr(os, "O_NONBLOCK", 0), 0o600)
        try:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise OSError("not a regular file")
            os.chmod(path, 0o600)  # what is typed here is nobody else's business
        finally:
            os.close(number)
    except (OSError, ValueError) as error:
        note(f"dgemma: {path}: lines are not kept ({getattr(error, 'strerror', None) or error})")
        return InMemoryHistory()
    return _Kept(path)
