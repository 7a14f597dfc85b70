"""Files of text that a command completes or changes: read as they are, written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from dgemma.errors import PromptError
from dgemma.files import TEXT_BYTES, reason
from dgemma.text.holes import Hole, at, lines

BACKUP = "~"  # behind a file's name, as editors write it


class Place(click.ParamType):
    """LINE:COL, counted from 1."""

    name = "place"
    pattern, example = re.compile("([0-9]{1,9}):([0-9]{1,9})"), "LINE:COL, such as 12:5"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        match = self.pattern.fullmatch(value)
        if not match:
            self.fail(f"{value!r} is not {self.example}.", param, ctx)
        return int(match[1]), int(match[2])


class Lines(Place):
    """A-B, counted from 1, or one line."""

    name = "lines"
    pattern, example = re.compile("([0-9]{1,9})(?:-([0-9]{1,9}))?"), "A-B, such as 3-7, or one line"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        match = self.pattern.fullmatch(value)
        if not match:
            self.fail(f"{value!r} is not {self.example}.", param, ctx)
        return int(match[1]), int(match[2] or match[1])


def read_document(name: str) -> str:
    """The text of a file, or of stdin for "-", with its byte order mark and its ends of lines."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(TEXT_BYTES + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(TEXT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise PromptError(f"{title(name)}: cannot be read ({reason(error)})") from None
    if len(data) > TEXT_BYTES:
        raise PromptError(f"{title(name)}: more than {TEXT_BYTES:,} bytes are too many")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{title(name)}: not text in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    if not text.removeprefix("\ufeff"):
        raise PromptError(f"{title(name)}: is empty")
    return text


def title(name: str) -> str:
    """A file's name in a sentence."""
    return "stdin" if name == "-" else name


@contextmanager
def about(name: str) -> Iterator[None]:
    """Errors in here are about a file, and name it."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"{title(name)}: {error}") from None


def spans(text: str, places: list[tuple[int, int]], ranges: list[tuple[int, int]]) -> list[Hole]:
    """The holes that --at and --lines name."""
    return [at(text, *place) for place in places] + [lines(text, *some) for some in ranges]


def write_document(name: str, old: str, new: str) -> Path:
    """Put a new text in a file's place, all of it or nothing; returns the file that has the old one.

    PromptError if the file has changed since `old` was read, or cannot be written.
    """
    path = Path(os.path.realpath(name))  # a link stays a link
    backup = path.with_name(path.name + BACKUP)
    try:
        if path.read_bytes() != old.encode():
            raise PromptError(f"{name}: has changed while the edit was made; nothing is written")
        for target, data in ((backup, old), (path, new)):
            _replace(target, data.encode(), path)
    except OSError as error:
        raise PromptError(f"{name}: cannot be written ({reason(error)})") from None
    return backup


def _replace(target: Path, data: bytes, like: Path) -> None:
    """Write a file beside its place, with the mode of another one, and move it there."""
    number, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(like, temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
