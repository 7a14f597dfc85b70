"""The Metal source that MLX generates for a call, and its translation into C++.

MLX generates a kernel's signature from the arguments, so the text of a kernel is not yet what is compiled.
Exporting a function traces the call without a device and, asked to be verbose, prints the complete source:
the text that a Mac would compile. The translation changes as little as it can: threadgroup variables are
looked up, because all lanes share them, and a launcher fills the parameters. Lines keep their numbers.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import SimulatorError

# ---- What MLX generates.

_printing = threading.Lock()


@contextmanager
def _standard_output_to(file: Any) -> Iterator[None]:
    """Send file descriptor 1, on which MLX prints, to `file`."""
    if sys.stdout is not None:
        sys.stdout.flush()
    if file.fileno() == 1:  # a daemon has closed it, and `file` was the next to be opened
        yield
        return
    try:
        kept = os.dup(1)
    except OSError:
        kept = None
    os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        if kept is None:
            os.close(1)
        else:
            os.dup2(kept, 1)
            os.close(kept)


def generated(name: str, call: Callable[..., Any], inputs: list[mx.array]) -> str:
    """The source that MLX prints while it traces `call(*inputs)`, a verbose launch of the kernel `name`."""
    with tempfile.TemporaryDirectory() as folder, _printing, (Path(folder) / "printed").open("w+b") as file:
        with _standard_output_to(file):
            mx.export_function(str(Path(folder) / "call.mlxfn"), call, *inputs)
        file.seek(0)
        printed = file.read().decode()
    opening = f"Generated source code for `{name}`:\n```\n"
    if opening not in printed:
        raise SimulatorError(f"kernel {name}: MLX {version('mlx')} did not print the source it generates")
    return printed.split(opening, 1)[1].rsplit("\n```", 1)[0]


# ---- Its parts.


@dataclass(frozen=True)
class Parameter:
    """`const device float* x [[buffer(0)]]`: type "const device float*", name "x", attribute "buffer"."""

    type: str
    name: str
    attribute: str


@dataclass(frozen=True)
class Signature:
    """The kernel function: `function` names it, with its template arguments if it has any."""

    function: str
    parameters: tuple[Parameter, ...]


_SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.DOTALL)
_PARAMETER = re.compile(r"(?P<type>.*?)\s*\b(?P<name>\w+) \[\[(?P<attribute>\w+)(?:\(\d+\))?\]\]")
INSTANCE = re.compile(r"\btemplate \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\((.*?)\) .*?;", re.DOTALL)
_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>", re.MULTILINE)


def signature(source: str) -> Signature:
    """The kernel's parameters, in order."""
    found = _SIGNATURE.search(source)
    parameters = [_PARAMETER.fullmatch(text.strip()) for text in found[2].split(",\n")] if found else [None]
    if found is None or not all(parameters):
        raise SimulatorError(f"cannot read the signature that MLX {version('mlx')} generated:\n{source}")
    instance = INSTANCE.search(source)
    return Signature(
        function=instance[1] if instance else found[1],
        parameters=tuple(Parameter(**match.groupdict()) for match in parameters if match),
    )


def without_comments(source: str) -> str:
    """The source with every comment blank and every line where it was."""

    def blank(match: re.Match[str]) -> str:
        text = match[0]
        return text if text.startswith('"') else " " + "\n" * text.count("\n")

    return _INCLUDE.sub("", _COMMENT.sub(blank, source))


# ---- Threadgroup variables.


@dataclass(frozen=True)
class Variable:
    """One declarator of `threadgroup float a[N], b;`: type "float", name "a", extents "[N]"."""

    type: str
    name: str
    extents: str


_DECLARATOR = re.compile(r"(?P<type>.*?)\b(?P<name>[A-Za-z_]\w*)\s*(?P<extents>(?:\[.*\]\s*)?)", re.DOTALL)


def _depths(text: str) -> Iterator[tuple[str, int]]:
    """Each character of code, and how deep it lies in brackets and template arguments.

    Within [] a < compares; elsewhere in a declaration it opens template arguments.
    """
    depth = extents = 0
    for c in text:
        extents += (c == "[") - (c == "]")
        if not extents or c not in "<>":
            depth += (c in "([{<") - (c in ")]}>")
        yield c, depth


def _declaration(code: str) -> str | None:
    """What stands between `threadgroup` and its semicolon, in code that begins after the word.

    None if the word belongs to a pointer, a reference or a template argument, which need no rewriting.
    """
    for at, (c, depth) in enumerate(_depths(code)):
        if depth < 0 or (depth == 0 and c in "*&"):
            return None
        if depth == 0 and c == ";":
            return code[:at]
    return None


def _split(text: str) -> list[str]:
    """`text` at its commas, but not within brackets or template arguments."""
    parts = [""]
    for c, depth in _depths(text):
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _variables(declaration: str) -> list[Variable]:
    """The declarators of a statement without its `threadgroup` and semicolon."""
    first, *others = (_DECLARATOR.fullmatch(part.strip()) for part in _split(declaration))
    if first is None or None in others or not first["type"].strip():
        raise SimulatorError(f"cannot read the declaration `threadgroup {declaration.strip()};`")
    kind = first["type"].strip()
    return [Variable(kind, match["name"], match["extents"].strip()) for match in [first, *others] if match]


def replace_variables(code: str, replacement: Callable[[Variable], str]) -> str:
    """`code`, without comments, with `replacement` for threadgroup variables; lines keep their numbers."""
    done, pieces = 0, []
    for word in re.finditer(r"\bthreadgroup\b", code):
        declaration = _declaration(code[word.end() :])
        if declaration is None:
            continue
        pieces += [code[done : word.start()], *map(replacement, _variables(declaration))]
        pieces.append("\n" * declaration.count("\n"))
        done = word.end() + len(declaration) + 1
    return "".join([*pieces, code[done:]])


# ---- C++.


def _argument(parameter: Parameter, buffer: int) -> str:
    """What the launcher passes for a parameter, which is the `buffer`-th if it is one."""
    if parameter.attribute != "buffer":
        return f"simulator::attribute::{parameter.attribute}()"
    kind = re.sub(r"\b(const|device|constant)\b", "", parameter.type).strip()
    if kind.endswith("&"):
        return f"*static_cast<{kind[:-1].strip()}*>(buffers[{buffer}])"
    return f"static_cast<{kind}>(buffers[{buffer}])"


def _launcher(called: Signature) -> str:
    buffers = 0
    arguments = []
    for parameter in called.parameters:
        arguments.append(_argument(parameter, buffers))
        buffers += parameter.attribute == "buffer"
    passed = ",\n      ".join(arguments)
    return f"static void run_kernel(void** buffers) {{\n  {called.function}(\n      {passed});\n}}\n"


def translate(source: str) -> str:
    """C++ for a shared library with the entry point `simulate`, or for a program (see metal/entry.h)."""
    numbers = iter(range(len(source)))

    def look_up(variable: Variable) -> str:
        kind = f"{variable.type} {variable.extents}".strip()
        return f"auto& {variable.name} = simulator::shared<{kind}>({next(numbers)});"

    code = replace_variables(INSTANCE.sub("", without_comments(source)), look_up)
    return (
        '#include "kernel.h"\n'
        f'#line 1 "kernel.metal"\n{code}\n'
        f'#line 1 "launcher"\n{_launcher(signature(source))}'
        '#include "entry.h"\n'
    )
