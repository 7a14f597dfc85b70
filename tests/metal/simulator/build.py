"""Compiling translated kernels, and keeping what was compiled.

The key of what is kept is a hash of the text, the headers, the compiler and the flags, so nothing is ever
stale; and a file appears under its name only when it is complete, so several processes may compile at once.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .errors import SimulatorError

HEADERS = Path(__file__).parent / "metal"

# Metal has no double, and contracts nothing in its safe mode. Fast compiling counts for more than fast code.
_FLAGS = [
    "-std=c++20",
    "-w",
    "-fsingle-precision-constant",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-iquote",
    str(HEADERS),
]
# The last: a frame larger than the stack touches the page below it, and is not another lane's memory.
_LIBRARY = ["-O1", "-shared", "-fPIC", "-fstack-clash-protection"]


def compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, g++, c++ or clang++; None if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    return None


def available() -> str | None:
    """None if kernels can be simulated on this machine, else one sentence why not."""
    if compiler() is None:
        named = os.environ.get("CXX")
        wanted = f"$CXX names {named!r}, which is not there" if named else "install g++, or name one in $CXX"
        return f"the Metal simulator needs a C++ compiler: {wanted}"
    command = _command([])
    if words := _refusal(tuple(command)):
        return f"the Metal simulator needs GCC 11 or newer, and {command[0]} does not compile for it: {words}"
    return None


def _command(flags: list[str]) -> list[str]:
    named = compiler()
    if named is None:
        raise SimulatorError(available() or "the C++ compiler has gone")
    return [*named, *_FLAGS, *flags]


@cache
def _refusal(command: tuple[str, ...]) -> str:
    """The first words of a compiler that does not know the flags or the headers; none from one that does."""
    probe = "#include <concepts>\n#include <source_location>\n_Float16 x; std::source_location y;"
    done = subprocess.run(
        [*command, "-fsyntax-only", "-x", "c++", "-"], input=probe, capture_output=True, text=True
    )
    return (done.stderr.strip() or "it fails").splitlines()[0] if done.returncode else ""


@cache
def folder() -> Path:
    """Where compiled kernels are kept: the user's cache, or else a private folder for temporary files."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for place in [home / "dgemma" / "metal", Path(tempfile.gettempdir()) / f"dgemma-metal-{os.getuid()}"]:
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        # What lies here is loaded and run, so it must be nobody else's.
        if place.stat().st_uid == os.getuid() and os.access(place, os.W_OK):
            return place
    raise SimulatorError("no folder for compiled kernels: name a writable one in $XDG_CACHE_HOME")


@cache
def _headers() -> str:
    return "".join(path.read_text() for path in sorted(HEADERS.glob("*.h")))


def _compile(command: list[str], code: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        source, made = Path(place) / "kernel.cpp", Path(place) / target.name
        source.write_text(code)
        done = subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise SimulatorError(done.stderr)
        os.replace(made, target)


def build(code: str, flags: list[str], suffix: str) -> Path:
    """The file that the compiler makes of `code`; SimulatorError with the compiler's words if it fails."""
    command = _command(flags)
    key = hashlib.sha256("\0".join([*command, _headers(), code]).encode()).hexdigest()[:32]
    target = folder() / f"{key}{suffix}"
    if not target.exists():
        _compile(command, code, target)
    return target


def library(code: str) -> Path:
    """A shared library with the entry point `simulate`."""
    return build(code, _LIBRARY, ".so")
