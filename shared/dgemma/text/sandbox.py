"""Runs a checkpoint's chat template, which is a program of a stranger, within bounds.

jinja2's sandbox keeps a template from files and the interpreter, but not from running for ever or from
filling the memory. So everything that can make a large value out of a small one is counted here: operators,
filters, methods of strings, and the joins in jinja2's own generated code. A clock is looked at in every turn
of a loop, at every call and filter, and inside the few filters that are long loops themselves. What stays
unbounded is a single call of C code over values within the bounds.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType, FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0  # of this thread's own time
SECONDS_A_MESSAGE = 0.01  # on top; the released template takes time that grows with their square
MOST_CHARACTERS = 1 << 24  # of one text; a context of 256k tokens has a million
MOST_ENTRIES = 1 << 19  # of lists within lists, each counted as often as it stands there
MOST_MADE = 1 << 29  # characters, and 16 for an entry of a list, in a whole render
MOST_BITS = 1 << 16  # of an integer
MOST_WIDTH = 1 << 20  # what a filter or a method of text may be asked to fill

# Filters of our own: around what a loop runs over, and around both sides of a comparison.
_TURNS, _LIGHT = "_turns", "_light"

# Filters that pass values on: they make no text of them and do not compare them.
_PASSING = {
    "abs", "attr", "count", "d", "default", "dictsort", "first", "int", "items", "last", "length", "list",
    "map", "random", "reject", "rejectattr", "reverse", "select", "selectattr",
}  # fmt: skip
# Filters that are loops of Python over the letters of a text.
_SLOW = {"indent", "pprint", "striptags", "title", "urlize", "wordwrap", "xmlattr"}


class Stopped(BaseException):
    """A template went beyond a bound. No `except Exception` of jinja2's own may swallow it."""


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # transformers renders with the same settings: one more blank would change the prompt.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._shown
        )
        self._start()
        self.filters["tojson"] = _tojson
        tests: dict[str, Any] = self.tests
        self.filters = {name: self._filter(name, one) for name, one in self.filters.items()}
        self.filters |= {_TURNS: self._turns, _LIGHT: self._shown}
        self.tests = {name: self._filter(name, one) for name, one in tests.items()}
        self.globals["lipsum"] = self._timed(jinja2.utils.generate_lorem_ipsum)
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.concat = self._joining("".join)  # type: ignore[method-assign]

    def compile_template(self, source: str) -> tuple[jinja2.Template, nodes.Template]:
        """The template and its tree; any exception, or `Stopped`, for a source that is none."""
        self._start()
        tree = self._timed(self.parse)(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = _through(_TURNS, loop.iter)
        for comparison in tree.find_all(nodes.Compare):
            comparison.expr = _through(_LIGHT, comparison.expr)
            for operand in comparison.ops:
                operand.expr = _through(_LIGHT, operand.expr)
        template = self._timed(self.from_string)(tree)
        # The generated code finds these in its own module.
        names = template.root_render_func.__globals__
        names["str_join"], names["markup_join"] = self._joining(str_join), self._joining(markup_join)
        return template, tree

    def run(self, template: jinja2.Template, variables: dict[str, Any], messages: int = 0) -> str:
        """The text of a render; any exception that a template may raise, or `Stopped`."""
        self._start(SECONDS_A_MESSAGE * messages)
        return template.render(variables)

    # ---- time -----------------------------------------------------------------------------------

    def _start(self, more: float = 0.0) -> None:
        self._made, self._ticks, self._seconds = 0, 0, SECONDS + more
        self._end = time.thread_time() + self._seconds

    def _tick(self) -> None:
        self._ticks += 1
        if not self._ticks % 16:  # the clock costs more than a turn
            self._look()

    def _look(self) -> None:
        if time.thread_time() > self._end:
            raise Stopped(f"it takes more than {self._seconds:g} s")

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._tick()
            yield value

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of Python that is stopped at its next call of another when the time is over."""

        def trace(frame: FrameType, event: str, arg: Any) -> None:
            self._look()

        @wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                return function(*args, **options)
            finally:
                sys.settrace(before)

        return timed

    # ---- what makes values ----------------------------------------------------------------------

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MOST_BITS:
                raise Stopped("it makes an integer of too many digits")
        elif operator == "*":
            size = max(_size(left), _size(right))
            times = next((n for n in (left, right) if isinstance(n, int)), 1)
            self._count(size * max(0, times))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, [right])
            self._weigh(right)
        return self._kept(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        self._tick()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps `str.format`
        if isinstance(method, BuiltinMethodType):
            values, own = (*args, *options.values()), method.__self__
            if isinstance(own, str):
                self._check_text(own, method.__name__, values)
            elif method.__name__ in ("index", "count"):  # they compare
                self._weigh([own, *values])
        return self._kept(super().call(context, function, *args, **options))

    def _check_text(self, own: str, name: str, values: tuple[Any, ...]) -> None:
        """What a method of a text, or the filter of its name, makes of it."""
        _check_widths(values)
        for value in values:
            self._weigh(value)
        first, second = (*values, "", "")[:2]
        if "format" in name:
            _check_format(own, values)
        elif name == "replace":
            self._count(own.count(str(first)) * len(str(second)))
        elif name == "join" and isinstance(first, list | tuple | range):
            self._count(len(own) * len(first))
        elif name == "expandtabs":
            self._count(own.count("\t") * (first if isinstance(first, int) else 8))
        elif name == "translate" and isinstance(first, dict):
            self._count(len(own) * max((_size(value) for value in first.values()), default=0))

    def _filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and result are counted."""
        passes = name in _PASSING
        work = self._timed(function) if name in _SLOW else function

        @wraps(function)  # also the mark that makes jinja2 pass the context
        def bounded(*args: Any, **options: Any) -> Any:
            self._tick()
            values = (*args, *options.values())
            if not passes:
                own = hasattr(function, "jinja_pass_arg")  # the context, or the environment, comes first
                given = values[1:] if own else values
                for value in given:
                    self._weigh(value)
                if name == "join":
                    given = ("".join(map(str, given[1:2])), given[0], *given[2:])
                if given and isinstance(given[0], str):
                    self._check_text(given[0], name, given[1:])
                _check_widths(given[1:])
            return self._kept(work(*args, **options))

        return bounded

    def _joining(self, join: Callable[[Iterable[Any]], Any]) -> Callable[[Iterable[Any]], Any]:
        def bounded(parts: Iterable[Any]) -> Any:
            known, size = [], 0
            for part in parts:
                size += _size(part) if isinstance(part, str) else self._weigh(part)
                if size > MOST_CHARACTERS:
                    raise Stopped("it makes a text that is too long")
                known.append(part)
            self._made_of(size)
            return join(known)

        return bounded

    def _shown(self, value: Any) -> Any:
        """A value of which text is made, or which is compared."""
        self._weigh(value)
        return value

    # ---- counting -------------------------------------------------------------------------------

    def _kept(self, value: Any) -> Any:
        """A result, counted."""
        self._count(_size(value))
        return value

    def _count(self, size: int) -> None:
        if size > MOST_CHARACTERS:
            raise Stopped("it makes a value that is too large")
        self._made_of(size)

    def _made_of(self, size: int) -> None:
        self._made += size
        if self._made > MOST_MADE:
            raise Stopped("it makes too many values")

    def _weigh(self, value: Any) -> int:
        """The characters that a value makes as text, roughly; an entry counts as often as it is shown."""
        if not isinstance(value, list | tuple | dict):
            return _size(value)
        size, count, rest = 0, 0, [value]
        while rest:
            one = rest.pop()
            size += _size(one) if not isinstance(one, list | tuple | dict) else 2
            count += 1
            if size > MOST_CHARACTERS or count + len(rest) > MOST_ENTRIES:
                raise Stopped("it makes a text that is too long")
            if isinstance(one, dict):
                rest += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple):
                rest += one
        return size


def _through(name: str, node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else nodes.Filter(node, name, [], [], None, None)


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return 16 * len(value) if isinstance(value, list | tuple | dict) else 16


def _check_widths(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > MOST_WIDTH for value in values):
        raise Stopped("it asks for a text that is too wide")


def _check_format(form: str, values: Iterable[Any]) -> None:
    """Widths in a format, or beside it for a "*" or a nested field."""
    if re.search(r"\d{7}", form):
        raise Stopped("it asks for a text that is too wide")
    flat = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
    if "*" in form or re.search(r"\{[^}]*\{", form):
        _check_widths(flat)


# ---- what transformers offers a template ---------------------------------------------------------


class _Generation(Extension):
    """{% generation %}…{% endgeneration %} marks the answers for trainers. It shows what is in it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which would change the prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
