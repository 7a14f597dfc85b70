"""safetensors files: their checked headers, and tensors as maps of their file.

This module reads headers itself, without the safetensors library: its NumPy side has no bfloat16, and its
errors name neither file nor tensor. The price is a hundred lines of checks. They also keep a damaged download
from the model.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from dgemma.errors import CheckpointError, ConfigError
from dgemma.files import file_size, quoted, reason
from dgemma.formats.stored import Stored

# The NumPy type of each type of the format. Types that NumPy lacks are raw integers of their width.
DTYPES = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
    "BOOL": "u1",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
}

_WIDTHS = {name: np.dtype(kind).itemsize for name, kind in DTYPES.items()}  # bytes

MAX_HEADER = 100_000_000  # bytes, the format's own limit
# The released model has 50,000 if each matrix of an expert is a record of its own. As objects of Python take
# thirty times the bytes of their text, their number is limited, too.
MAX_TENSORS = 200_000
MAX_NAME = 1000  # letters


class TruncatedError(CheckpointError):
    """A file that ends before its tensors do."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `offset` in bytes from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _WIDTHS[self.dtype]

    def read(self) -> Stored:
        """The tensor over its own memory map, which is released with it; nothing is copied.

        CheckpointError if the file is gone or has become shorter. If the file is cut, or its disk fails,
        while the map is in use, the system ends the process (SIGBUS), which Python cannot catch.
        """
        kind = np.dtype(DTYPES[self.dtype])
        check_file(self.file)
        try:
            # The operating system refuses a map of no bytes.
            data = (
                np.memmap(self.file, kind, "r", self.offset, self.shape)
                if self.nbytes
                else np.empty(self.shape, kind)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} cannot be read ({error})") from None
        return Stored(self.name, self.dtype, self.shape, np.asarray(data), self.file)


def check_file(file: Path) -> None:
    """CheckpointError unless this is a regular file: whoever opens a pipe waits for ever."""
    try:
        file_size(file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def read_header(file: Path) -> list[Entry]:
    """The tensors of a safetensors file in file order; CheckpointError names the file and the tensor.

    The format: 8 bytes of little-endian header length, the header as JSON, the data. Offsets count from
    the start of the data, which the tensors fill without a hole.
    """
    header, start, size = _header(file)
    entries = [_entry(file, name, fact, start) for name, fact in header.items() if name != "__metadata__"]
    # An empty tensor shares its offset with the next one and must come first.
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_layout(file, entries, start, size)
    return entries


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the start of the data, and the file's size."""
    check_file(file)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = _header_length(file, prefix, size)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({reason(error)})") from None
    if raw.count(b"{") > MAX_TENSORS or raw.count(b"[") > 2 * MAX_TENSORS:
        raise CheckpointError(f"{file}: not a safetensors file of a model: more than {MAX_TENSORS:,} tensors")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: unreadable header ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: not a safetensors file: its header is not an object")
    return header, 8 + length, size


def _header_length(file: Path, prefix: bytes, size: int) -> int:
    if prefix == b"version ":
        raise CheckpointError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise TruncatedError(f"{file}: truncated, or not a safetensors file: {size} bytes end in its header")
    if length > MAX_HEADER:
        raise CheckpointError(f"{file}: not a safetensors file: a header of {length} bytes")
    return length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key that occurs twice, as `json` would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{quoted(twice)} occurs twice")
    return found


def _entry(file: Path, name: str, fact: Any, start: int) -> Entry:
    if len(name) > MAX_NAME:
        raise CheckpointError(f"{file}: a tensor with a name of {len(name):,} letters: {quoted(name)}")
    if not isinstance(fact, dict):
        raise _unusable(file, name, f"unreadable entry {reprlib.repr(fact)}")
    dtype, shape, offsets = fact.get("dtype"), fact.get("shape"), fact.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _unusable(file, name, f"unknown dtype {reprlib.repr(dtype)}")
    if not _are_sizes(shape):
        raise _unusable(file, name, f"unusable shape {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _unusable(file, name, f"unusable data_offsets {reprlib.repr(offsets)}")
    entry = Entry(name, dtype, tuple(shape), file, start + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        takes = f"{dtype} {shape} takes {entry.nbytes} bytes"
        raise _unusable(file, name, f"{takes}, data_offsets {offsets} hold another number")
    return entry


def _unusable(file: Path, name: str, fault: str) -> CheckpointError:
    return CheckpointError(f"{file}: tensor {name!r}: {fault}")


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of a few non-negative integers; True is none."""
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all([type(n) is int and 0 <= n < 2**63 for n in value])  # a list: quicker than a generator


def _check_layout(file: Path, entries: list[Entry], start: int, size: int) -> None:
    """Raise unless tensors in file order fill the file without overlap or hole, to its end."""
    end = start
    for entry in entries:
        if entry.offset != end:
            fault = "overlaps the one before it" if entry.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{file}: tensor {entry.name!r} {fault}")
        end += entry.nbytes
        if end > size:
            raise TruncatedError(
                f"{file}: truncated: tensor {entry.name!r} ends at byte {end} of {size}; download it again"
            )
    if end < size:
        last = entries[-1].name if entries else ""
        raise CheckpointError(
            f"{file}: {size - end} bytes follow its last tensor {last!r}; download it again"
        )
