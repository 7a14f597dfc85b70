"""One call of a kernel under ThreadSanitizer or AddressSanitizer.

A Python that was built without them cannot load their libraries, so the same translated text becomes a
program of its own, which reads its buffers from a file. To ThreadSanitizer every lane of every threadgroup is
a thread, and barriers are all that orders them: simdgroup operations are not, which is stricter than
hardware and what the language promises.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import build
from .buffers import in_order, input_buffers, outputs
from .call import Call
from .errors import SimulatorError
from .launch import compile_error, requested
from .source import signature, translate

Finding = tuple[int, str]  # line of the generated source, and what is wrong there

_FLAGS = {
    "thread": ["-fsanitize=thread", "-DSIMULATOR_THREAD"],
    "address": [
        "-fsanitize=address,bounds,alignment,shift,integer-divide-by-zero",
        "-fsanitize-recover=all",
        "-DSIMULATOR_ADDRESS",
    ],
}
_PROGRAM = ["-O1", "-g", "-DSIMULATOR_PROGRAM"]
_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=0:exitcode=0:history_size=2:report_bugs=1",
    "ASAN_OPTIONS": "halt_on_error=0:detect_leaks=0:detect_stack_use_after_return=0:exitcode=0",
    "UBSAN_OPTIONS": "halt_on_error=0",
}
_FINISHED = re.compile(r"^simulated (\d+) (.*)$", re.MULTILINE)


def sanitize(call: Call, kind: str) -> list[Finding]:
    """Run `call` under the sanitizer `kind`, "thread" or "address"; no finding means that it is clean.

    "address" finds accesses out of bounds of buffers, threadgroup and local variables, misaligned vectors,
    and shifts and divisions that are undefined; "thread" finds data races within and between threadgroups.
    Errors of the kernel that a launch reports are findings, too. SimulatorError says that the sanitizer could
    not do its work on this machine.
    """
    if kind not in _FLAGS:
        raise ValueError(f"kind is 'thread' or 'address', not {kind!r}")
    try:
        program = build.build(translate(call.source), _PROGRAM + _FLAGS[kind], f".{kind}")
    except SimulatorError as error:
        raise compile_error(call, error) from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "call"
        file.write_bytes(_serialized(call))
        printed, reported = _run(call, program, file)
    findings = list(dict.fromkeys(_findings(reported)))
    return findings + [(int(line), text) for line, text in printed if text]


def _run(call: Call, program: Path, file: Path) -> tuple[list[tuple[str, str]], str]:
    """What the program prints when it has run, and the sanitizer's reports."""
    command = [str(program), str(file)]
    # Where addresses are random, ThreadSanitizer may find its own taken.
    tries = [[setarch, "-R", *command]] if (setarch := shutil.which("setarch")) else []
    for attempt in [*tries, command]:
        done = subprocess.run(attempt, capture_output=True, text=True, env=os.environ | _OPTIONS)
        printed = _FINISHED.findall(done.stdout)
        if printed or _REPORT.search(done.stderr):
            return printed, done.stderr
    words = done.stderr.strip() or f"it exited with status {done.returncode}"
    raise call.error(f"the program for the sanitizer did not run to its end:\n{words}")


# ---- The program's input; metal/entry.h reads it.


def _extent(array: np.ndarray) -> tuple[bytes, int]:
    """The memory that a strided array spans, and where in it the first element lies, in bytes."""
    if array.size == 0:
        return b"", 0
    spans = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    first = -sum(span for span in spans if span < 0)
    length = first + sum(span for span in spans if span > 0) + array.itemsize
    return ctypes.string_at(array.ctypes.data - first, length), first


def _serialized(call: Call) -> bytes:
    made = {name: each.array for name, each in outputs(call).items()}
    arrays = in_order(signature(call.source), input_buffers(call) | made)
    parts = [bytes(requested(call)), struct.pack("Q", len(arrays))]
    for array in arrays:
        memory, first = _extent(array)
        parts += [struct.pack("QQ", len(memory), first), memory]
    return b"".join(parts)


# ---- The sanitizers' reports.

_REPORT = re.compile(r"^(?:WARNING: ThreadSanitizer|==\d+==ERROR: AddressSanitizer): ", re.MULTILINE)
_BEHAVIOUR = re.compile(r"^kernel\.metal:(\d+):\d+: runtime error: (.*)$", re.MULTILINE)
_FRAME = re.compile(r"^\s*#\d+ .*\bkernel\.metal:(\d+)")
_ACCESS = re.compile(r"^\s*(?:Previous |Atomic )*(atomic )?(write|read) of size (\d+)", re.IGNORECASE)


def _first_line(lines: list[str]) -> int:
    """The kernel's innermost line in the stack that comes first; 0 if it has none."""
    stack = itertools.takewhile(str.strip, lines)
    return next((int(found[1]) for line in stack if (found := _FRAME.search(line))), 0)


def _race(lines: list[str]) -> Finding:
    """A report of ThreadSanitizer: two accesses, each with its stack."""
    at = [number for number, line in enumerate(lines) if _ACCESS.match(line)] + [len(lines)]
    accesses = []
    for start, end in itertools.pairwise(at):
        found = _ACCESS.match(lines[start])
        assert found
        accesses.append((found[2].lower(), int(found[3]), _first_line(lines[start:end])))
    what = " against ".join(f"a {kind} of {size} bytes in line {line}" for kind, size, line in accesses)
    return accesses[0][2] if accesses else _first_line(lines), f"data race: {what or lines[0]}"


def _bad_access(lines: list[str]) -> Finding:
    """A report of AddressSanitizer: what, and in which direction."""
    what = lines[0].split(" ")[0]
    access = next((found for line in lines if (found := _ACCESS.match(line))), None)
    text = f"{what}: {access[2].lower()} of {access[3]} bytes" if access else lines[0]
    return _first_line(lines), text


def _findings(reported: str) -> Iterator[Finding]:
    for line, text in _BEHAVIOUR.findall(reported):
        yield int(line), text
    kinds = _REPORT.findall(reported)
    for kind, report in zip(kinds, _REPORT.split(reported)[1:], strict=True):
        yield (_race if "Thread" in kind else _bad_access)(report.splitlines())
