"""A type check with Metal's address spaces, by libclang from PyPI.

The simulator's C++ has one kind of pointer and Metal has four, of which none converts to another. libclang
brings the compiler's front end without its headers, so `metal/declarations.h` declares what a kernel may use.
Where clang's C++ differs from Metal's, a right kernel is complained of: methods of structures in threadgroup
memory and copies of whole ones, and comparisons of vectors that are kept in bool2 to bool4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from .build import HEADERS
from .call import Call
from .errors import SimulatorError
from .source import INSTANCE, Variable, replace_variables, without_comments

Complaint = tuple[int, str]  # line of the generated source, and what is wrong there

_FILE = "kernel.metal"
_ARGUMENTS = [
    *("-x", "c++", "-std=c++14", "-Wno-everything", "-ferror-limit=20"),
    *("-Xclang", "-cl-single-precision-constant"),
    *("-include", str(HEADERS / "declarations.h")),
]
# In C++ and not in Metal.
_FORBIDDEN = re.compile(
    r"\b(double|new|delete|goto|throw|try|catch|dynamic_cast|typeid|thread_local|virtual)\b"
)
# Literals of half and bfloat; clang lets no program define the second suffix.
_SHORT_LITERAL = re.compile(
    r"(?<![\w.])((?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?)(bf|h)\b", re.IGNORECASE
)
_SPACES = {"device", "constant", "threadgroup", "thread", "auto"}


def typecheck(call: Call) -> list[Complaint]:
    """What Metal's compiler would not accept in the source of `call`, as far as types tell; empty if nothing.

    SimulatorError if libclang is not installed.
    """
    try:
        cindex = import_module("clang.cindex")
    except ModuleNotFoundError as error:
        raise SimulatorError("the type check needs libclang: pip install libclang") from error
    code = _prepared(call.source)
    unit = cindex.Index.create().parse(_FILE, args=_ARGUMENTS, unsaved_files=[(_FILE, code)])
    errors = [(_line(d), d.spelling) for d in unit.diagnostics if d.severity >= cindex.Diagnostic.Error]
    forbidden = [
        (code.count("\n", 0, found.start()) + 1, f"Metal has no `{found[0]}`")
        for found in _FORBIDDEN.finditer(code)
    ]
    return list(dict.fromkeys([*errors, *forbidden, *_without_space(unit.cursor, code)]))


def _prepared(source: str) -> str:
    """The source as clang accepts it; lines keep their numbers."""

    def as_static(variable: Variable) -> str:
        # Local variables have no address space, but static ones may have any.
        return f"static threadgroup {variable.type} {variable.name}{variable.extents};"

    code = INSTANCE.sub(r"template decltype(\1) \1;", without_comments(source))
    # A vector type from a template's arguments has no name that the header could make a macro of.
    code = re.sub(r"\b(?:metal::)?(vec\s*<[^<>;()]*>)\s*\(", r"make<\1>(", code)
    code = _SHORT_LITERAL.sub(_as_cast, code)
    return replace_variables(code, as_static)


def _as_cast(literal: re.Match[str]) -> str:
    return f"{'half' if literal[2] in 'hH' else 'bfloat'}({literal[1]}f)"


def _line(diagnostic: Any) -> int:
    """The kernel's line: of the error, or of what made the compiler look at a header; 0 if there is none."""
    places = [each.location for each in (diagnostic, *diagnostic.children)]
    return next((place.line for place in places if place.file and place.file.name == _FILE), 0)


def _without_space(cursor: Any, code: str) -> Iterator[Complaint]:
    """Pointers and references of the kernel's file whose declaration names no address space."""
    for child in cursor.get_children():
        if child.location.file is None or child.location.file.name != _FILE:
            continue
        if _points(child):
            declared = _declared(child, code)
            if not _SPACES & set(re.findall(r"\w+", declared)):
                text = f"{declared.strip()} {child.spelling}"
                yield child.location.line, f"a pointer or reference without address space: `{text}`"
        yield from _without_space(child, code)


def _points(cursor: Any) -> bool:
    kinds = ("PARM_DECL", "VAR_DECL", "FIELD_DECL")
    pointing = ("POINTER", "LVALUEREFERENCE", "RVALUEREFERENCE")
    return cursor.kind.name in kinds and cursor.type.kind.name in pointing


def _declared(cursor: Any, code: str) -> str:
    """The text before the name: back to the parameter's comma, or to where the statement begins."""
    ends = "(,;{}" if cursor.kind.name == "PARM_DECL" else "(;{}"
    end = start = cursor.location.offset
    depth = 0
    while start and (depth or code[start - 1] not in ends):
        start -= 1
        depth += (code[start] in ")]>") - (code[start] in "([<")
    return code[start:end]
