"""JSON files of a checkpoint. Errors name the file and the key."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dgemma.errors import ConfigError

Progress = Callable[[int, int], None]  # done and total, in bytes or tokens

# No size of a model comes near it. Arithmetic on larger integers of a broken file would overflow.
MAX_SIZE = 2**31 - 1


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


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ConfigError in one line if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return data
