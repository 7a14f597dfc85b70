"""Tool calls as the model writes them: `call:name{key:value,…}`.

Strings stand between two quote tokens, keys are bare, and the rest is as Python or JSON writes it. What is
read, besides what the released template writes: blanks and line breaks between the parts; keys and strings
in JSON's double quotes, or in single quotes without a backslash; bare words, as strings; `key=` before a
quoted string; one pair of braces too many, which the template makes of arguments that were a JSON string; a
comma that is missing behind a string in quote tokens, or one too many at the end.

A value is a number only if it is one in JSON: `007`, `+5`, `.5`, `1_000` and `0x10` are strings. What could
be read in two ways, or is no JSON, is refused with a reason: a key that stands twice, NaN and infinities,
half of a surrogate pair, integers beyond Python's limit of digits, brackets nested deeper than `DEPTH`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

# Stands for a quote token in a call's text. Decoded text is valid Unicode and never has it.
QUOTE = "\ud800"
PREFIX = "call:"
DEPTH = 64  # brackets within brackets; whoever copies or prints the arguments may recurse

_QUOTES = (QUOTE, '"', "'")
_CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_NO_JSON = {"NaN", "Infinity", "-Infinity", "nan", "inf", "-inf"}
_BLANKS = re.compile(r"\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_BARE_KEY = re.compile(rf'[^:=,{{}}\[\]"{QUOTE}]*')
_BARE_VALUE = re.compile(rf'[^,{{}}\[\]"{QUOTE}]*')
_QUOTED = re.compile(f"{QUOTE}([^{QUOTE}]*){QUOTE}")
_SINGLE_QUOTED = re.compile(rf"'([^'\\{QUOTE}]*)'")
_KEY_INSIDE = re.compile(r"\n|\s[^\W\d][\w.-]*\s*[:=](?!//)")  # a comma may be missing before it
_SURROGATE = re.compile("[\ud800-\udfff]")
_STRINGS = json.JSONDecoder(strict=False)  # line breaks inside a string are fine


class UnreadableCall(ValueError):
    """The reason why a call cannot be read, as a sentence."""


@dataclass(frozen=True)
class ToolCall:
    """A parsed call of a tool. `arguments` is what `json.dumps(…, allow_nan=False)` takes."""

    name: str
    arguments: dict[str, Any]


def read_call(text: str) -> ToolCall:
    """The call that `text` says, with `QUOTE` for each quote token; UnreadableCall with the reason."""
    text = text.strip()
    name, brace, _ = text.partition("{")
    if not name.startswith(PREFIX) or not brace:
        raise UnreadableCall("no arguments in braces follow its name")
    name = name[len(PREFIX) :].strip()
    if not name or not name.isprintable() or re.search('[}()"]', name):
        raise UnreadableCall(f"{_shown(name)} is no name of a tool")
    return ToolCall(name, _Reader(text, text.index("{")).arguments())


class _Reader:
    """Reads values at a place that moves forward through a text."""

    def __init__(self, text: str, place: int):
        self._text, self._place = text, place
        self._quoted_end = -1  # behind the last string in quote tokens

    def arguments(self) -> dict[str, Any]:
        """The mapping that is the rest of the text."""
        outer = self._place
        self._place += 1
        twice = self._next() == "{"
        if not twice:
            self._place = outer
        arguments = self._mapping(1)
        if twice:
            self._take("}")
        if self._next():
            raise UnreadableCall(f"{_shown(self._text[self._place :])} follows its arguments")
        return arguments

    def _next(self) -> str:
        """The next character that is no blank, "" at the end. The place moves to it."""
        match = _BLANKS.match(self._text, self._place)
        self._place = match.end() if match else self._place
        return self._text[self._place : self._place + 1]

    def _take(self, char: str) -> None:
        if self._next() != char:
            raise self._unexpected(repr(char))
        self._place += 1

    def _unexpected(self, wanted: str) -> UnreadableCall:
        found = _shown(self._text[self._place :]) if self._next() else "the end"
        return UnreadableCall(f"{found} where {wanted} should be")

    def _value(self, depth: int) -> Any:
        char = self._next()
        if char == "{":
            return self._mapping(depth)
        if char == "[":
            return self._list(depth)
        return self._string() if char in _QUOTES else self._bare()

    def _mapping(self, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        more = self._open("}", depth)
        while more:
            key = self._key()
            if key in mapping:
                raise UnreadableCall(f"the key {_shown(key)} stands twice")
            mapping[key] = self._value(depth + 1)
            more = self._more("}")
        return mapping

    def _list(self, depth: int) -> list[Any]:
        values = []
        more = self._open("]", depth)
        while more:
            values.append(self._value(depth + 1))
            more = self._more("]")
        return values

    def _open(self, close: str, depth: int) -> bool:
        """Step behind an opening bracket; whether anything is before the closing one."""
        if depth > DEPTH:
            raise UnreadableCall(f"its brackets are nested deeper than {DEPTH}")
        self._place += 1
        return not self._closes(close)

    def _more(self, close: str) -> bool:
        """Step behind a value's comma, or behind the closing bracket; whether another value follows."""
        quoted = self._place == self._quoted_end
        if self._closes(close):
            return False
        if self._next() == ",":
            self._place += 1
            return not self._closes(close)
        if quoted and self._next():
            return True
        raise self._unexpected(f"',' or {close!r}")

    def _closes(self, close: str) -> bool:
        if self._next() != close:
            return False
        self._place += 1
        return True

    def _key(self) -> str:
        if self._next() in _QUOTES:
            key = self._string()
        else:
            key = self._match(_BARE_KEY).strip()
            if not key or "\n" in key:
                raise self._unexpected("a key")
        if self._next() == "=":
            self._place += 1
            if self._next() not in _QUOTES:
                raise self._unexpected("a quoted string")
        else:
            self._take(":")
        return key

    def _match(self, pattern: re.Pattern[str]) -> str:
        """What a pattern that matches anywhere finds at the place."""
        match = pattern.match(self._text, self._place)
        assert match
        self._place = match.end()
        return match[0]

    def _string(self) -> str:
        """A string in quote tokens, as it is, or in JSON's or Python's quotes."""
        if self._text[self._place] == '"':
            try:
                string, self._place = _STRINGS.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                raise UnreadableCall(f"a string is no JSON: {error.msg}") from None
        else:
            pattern = _QUOTED if self._text[self._place] == QUOTE else _SINGLE_QUOTED
            match = pattern.match(self._text, self._place)
            if match is None:
                raise UnreadableCall(f"{_shown(self._text[self._place :])} begins a string without an end")
            string, self._place = match[1], match.end()
            if pattern is _QUOTED:
                self._quoted_end = self._place
        if _SURROGATE.search(string):
            raise UnreadableCall("a JSON string holds a quote token or half of a surrogate pair")
        return string

    def _bare(self) -> Any:
        """A constant, a number, or a word without quotes."""
        word = self._match(_BARE_VALUE).strip()
        if not word:
            raise self._unexpected("a value")
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        if number := _NUMBER.fullmatch(word):
            return _number(word, is_float=any(number.groups()))
        if word in _NO_JSON:
            raise UnreadableCall(f"{word} is no number of JSON")
        if _KEY_INSIDE.search(word):
            raise UnreadableCall(f"{_shown(word)} may be more than one argument")
        return word


def _number(word: str, is_float: bool) -> int | float:
    if is_float:
        value = float(word)
        if math.isinf(value):
            raise UnreadableCall(f"{_shown(word)} is beyond every number of JSON")
        return value
    try:
        return int(word)
    except ValueError:
        raise UnreadableCall(f"a number has {len(word)} digits, which is beyond Python's limit") from None


def _shown(text: str) -> str:
    text = text.replace(QUOTE, '<|"|>')
    return repr(text if len(text) <= 40 else text[:39] + "…")
