"""Where a command's words go: the answer to stdout, everything else to stderr.

Every command writes its answer through `answer` or `answer_json`. Only stdout's failures are errors. What
stderr cannot take is lost, and the answer is not.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from typing import IO, Any

import click

from dgemma.errors import DgemmaError

# JSON itself escapes those below 0x20.
_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}


def answer(text: str) -> None:
    """Write a line or more to stdout at once, as they are.

    Characters that its encoding lacks are replaced. DgemmaError if it is closed or cannot be written, on a
    full disk for example. A reader that went away (`| head -1`) ends the command quietly with exit code 1.
    """
    check_stdout()
    with _written(sys.stdout) as out:
        out.write(_encodable(text, out) + "\n")


def answer_exactly(text: str) -> None:
    """Write a text to stdout in UTF-8 and nothing else: not an end of a line, and none of another kind.

    A terminal gets it as a reader wants it, without what the terminal would obey. Errors are those of `answer`.
    """
    check_stdout()
    if sys.stdout.isatty():
        shown = safe(text.replace("\r\n", "\n"), sys.stdout).removesuffix("\n")
        return answer(shown)
    with _written(sys.stdout) as out:
        out.flush()
        out.buffer.write(text.encode())


@contextmanager
def _written(out: Any) -> Iterator[Any]:
    """Whatever is written in here is flushed, and its failures are errors in one line."""
    try:
        yield out
        out.flush()
    except BrokenPipeError:
        _discard(out)
        raise click.exceptions.Exit(1) from None
    except OSError as error:
        _discard(out)
        raise _unwritable(error) from None


def answer_json(data: Any) -> None:
    """Write an object on one line to stdout, as `answer` does; where characters lack, as \\uXXXX.

    So are those that a terminal would obey. A float that is no number is null, as JSON has no word for it.
    """
    data = _finite(data)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).translate(_CONTROLS)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:  # half a surrogate pair, too, is no character of any encoding
        text = json.dumps(data)
    answer(text)


def safe(text: str, stream: IO[str] | None) -> str:
    """Text unchanged, but without control characters on a terminal, which would obey them."""
    if stream is None or not stream.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 0x9F else "\ufffd" for c in text)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def check_stdout() -> None:
    """DgemmaError if stdout is closed or read-only; a command asks before minutes of work."""
    if sys.stdout is None or sys.stdout.closed:
        raise DgemmaError("stdout is closed, so the answer has nowhere to go")
    try:
        os.write(sys.stdout.fileno(), b"")
    except io.UnsupportedOperation:  # a stream in memory
        return
    except OSError as error:
        _discard(sys.stdout)
        raise _unwritable(error) from None


def note(text: str, **style: Any) -> None:
    """Write a line to stderr, on a terminal in click's `style`. Nothing happens if it cannot be written."""
    if sys.stderr is None:  # print would take stdout
        return
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    with suppress(OSError, ValueError):
        styled = click.style(text, **style) if sys.stderr.isatty() and not plain else text
        print(styled, file=sys.stderr, flush=True)


def _unwritable(error: OSError) -> DgemmaError:
    return DgemmaError(f"the answer cannot be written to stdout: {error.strerror or error}")


def _encodable(text: str, out: Any) -> str:
    encoding = getattr(out, "encoding", None) or "utf-8"
    try:
        text.encode(encoding, getattr(out, "errors", None) or "strict")
        return text
    except (UnicodeError, LookupError):  # Python looks a handler up when it is needed first
        return text.encode(encoding, "replace").decode(encoding)


def _discard(out: Any) -> None:
    """Let what is left in the buffer go nowhere: Python would try, and complain, once more when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


# ---- the process's own streams ------------------------------------------------------------------------


class _Lossy(io.FileIO):
    """A descriptor whose failures are nobody's: what it cannot take is dropped."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def prepare() -> None:
    """Make a process's streams fit for a command. A second call changes nothing.

    stderr never fails: progress bars, log messages and warnings of libraries go there, too. A closed stdin
    is an empty one. Bytes that are no UTF-8 are an error on stdin in every locale.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, it stays open
    elif isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "surrogateescape":  # the C locale
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    old = sys.stderr
    if old is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(old, io.TextIOWrapper) and sys.platform != "win32":  # a Windows console has its own class
        with suppress(OSError):
            if not isinstance(getattr(old.buffer, "raw", None), _Lossy):
                raw = _Lossy(old.fileno(), "wb", closefd=False)
                sys.stderr = io.TextIOWrapper(
                    io.BufferedWriter(raw), old.encoding, old.errors, line_buffering=True
                )
