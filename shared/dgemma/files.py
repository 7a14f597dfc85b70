"""Text and JSON files of a checkpoint. Errors name the file and the key."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dgemma.errors import ConfigError

Progress = Callable[[int, int], None]  # done and total, in bytes or tokens

# No size of a model comes near it. Arithmetic on larger integers of a broken file would overflow.
MAX_SIZE = 2**31 - 1
# Bytes of a file of text; the largest of a released checkpoint, but for its tokenizer, has 4 MB.
TEXT_BYTES = 1 << 26

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200  # letters; no name of a tensor has as many

_POINTER = "version https://git-lfs.github.com/spec/"


def whole(value: Any) -> Any:
    """A float without a fraction as the integer that it is, as writers of JSON spell 256.0; else `value`."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Reader:
    """Typed access to a dictionary of a file. Errors name the file and the key."""

    def __init__(self, data: Any, where: str):
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected a JSON object, found {type(data).__name__}")
        self.data, self.where = data, where

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of `key`, checked to be of this kind; a bool does not pass for a number."""
        if key not in self.data:
            if default is ...:
                raise ConfigError(f"{self.where}: missing key {key!r}")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        value = whole(self.data[key]) if int in kinds and float not in kinds else self.data[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
            raise self.unusable(key)
        return value

    def unusable(self, key: str) -> ConfigError:
        """The error for a senseless value of `key`; a long value is cut."""
        return ConfigError(f"{self.where}: {key!r} has the unusable value {reprlib.repr(self.data[key])}")

    def size(self, key: str, most: int = MAX_SIZE) -> int:
        """A positive integer."""
        value = self.get(key, int)
        if not 1 <= value <= most:
            raise self.unusable(key)
        return value

    def number(self, key: str, default: Any = ...) -> float:
        """A finite number. Python's JSON reader accepts NaN and Infinity, too."""
        value = self.get(key, (int, float), default)
        if not abs(value) < 1e30:
            raise self.unusable(key)
        return float(value)

    def positive(self, key: str, default: Any = ...) -> float:
        """A finite number above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self.unusable(key)
        return value

    def optional(self, key: str) -> Any:
        """The object at `key`, or None if it is missing, null or empty."""
        return self.get(key, (Mapping, type(None)), None) or None

    def sub(self, key: str) -> Reader:
        return Reader(self.get(key, Mapping), f"{self.where}: {key}")


def exists(path: Path) -> bool:
    """Whether there is a file or a folder of this name.

    ConfigError where that cannot be known: for a folder that may not be searched or a name that no file
    system takes; and for a link that leads nowhere, which is no absence.
    """
    return _status(path) is not None


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name; ConfigError where `exists` raises it."""
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise ConfigError(f"{path}: a link to {os.readlink(path)}, which is not there") from None
        return None
    except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
        raise ConfigError(f"{path}: cannot be read ({reason(error)})") from None


def file_size(path: Path) -> int:
    """The bytes of a regular file; ConfigError if it is none, as to open a pipe would wait for ever."""
    status = _status(path)
    if status is None:
        raise ConfigError(f"{path}: no such file")
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: not a regular file but {_kind(status.st_mode)}")
    return status.st_size


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def names(folder: Path) -> list[str]:
    """The names in a folder, in order, hidden ones left out; ConfigError if it cannot be listed."""
    try:
        # macOS leaves hidden files such as ._model.safetensors beside copies.
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: cannot be read ({reason(error)})") from None


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """The text of a file in UTF-8, of `most` bytes; ConfigError in one line for anything else.

    A byte order mark is left out. Only a regular file is opened: a pipe would wait for ever.
    """
    if (found := file_size(path)) > most:
        raise ConfigError(f"{path}: {found:,} bytes are too many for this file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None
    if text.startswith(_POINTER):
        raise ConfigError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    # A download that broke off leaves an empty file, or zeros where it had reserved room.
    if "\0" in text or not text.strip():
        fault = "holds zero bytes, which no text has" if "\0" in text else "is empty"
        raise ConfigError(f"{path}: {fault}; download it again")
    return text


def quoted(value: Any) -> str:
    """A value of a file as an error shows it: as Python writes it, cut in the middle if it is long."""
    return _SHORT.repr(value)


def reason(error: OSError | ValueError) -> str:
    """Why the system refuses, without the name of the file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ConfigError in one line if there is none."""
    text = read_text(path)
    try:
        data = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return data
