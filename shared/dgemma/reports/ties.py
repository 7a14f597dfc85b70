"""Findings, and those in tied copies: tensors that repeat another one, as some exports store them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from dgemma.checkpoint.layouts.base import FLOATS
from dgemma.checkpoint.safetensors import DTYPES, Entry
from dgemma.checkpoint.values import chunks
from dgemma.formats.stored import Stored
from dgemma.network.spec import is_skipped


@dataclass(frozen=True)
class Finding:
    """One fault; `text` is its description in one line.

    `kind`: "file" or "checkpoint" if it cannot be read; "quantization" for tensors that contradict the
    announcement; "missing", "unknown", "of the wrong type", "of the wrong shape"; "non-finite", "zero",
    "negative" for values; "dead" for zeros in a row; "tied" for a copy that differs. `count`
    values are wrong, the first at index `first`.
    """

    kind: str
    text: str
    tensor: str | None = None
    file: str | None = None
    count: int | None = None
    first: tuple[int, ...] | None = None


def find_ties(entries: list[Entry]) -> dict[str, Entry]:
    """Tied copies by name, each with the tensor that it repeats, if the two can be compared."""
    known = {entry.name: entry for entry in entries}
    pairs = ((entry, known.get(twin(entry.name) or "")) for entry in entries)
    return {entry.name: own for entry, own in pairs if own and _is_comparable(entry, own)}


def twin(name: str) -> str | None:
    """The tensor that a tied copy of this name repeats; None if it is no copy."""
    if is_skipped(name):
        for prefix, own in (
            ("lm_head.", "model.decoder.embed_tokens."),
            ("model.encoder.language_model.", "model.decoder."),
        ):
            if name.startswith(prefix):
                return own + name.removeprefix(prefix)
    return None


def _is_comparable(copy: Entry, own: Entry) -> bool:
    """Whether two tensors hold the same kind of thing: one may be packed, or stored apart."""
    return copy.dtype == own.dtype or {copy.dtype, own.dtype} <= set(FLOATS)


def tied(copy: Entry, own: Entry) -> Finding | None:
    """What is wrong with a tied copy: bytes that differ, or values if it is of another type."""
    place = f"in {copy.file.name}"
    if copy.shape != own.shape:
        text = f"{copy.name!r} is {copy.shape}, but repeats {own.name!r}, which is {own.shape}, {place}"
        return Finding("tied", text, copy.name, copy.file.name)
    count, at = 0, 0
    for start, differs in _differences(copy, own):
        if found := int(np.count_nonzero(differs)):
            at = at if count else start + int(differs.argmax())
            count += found
    if not count:
        return None
    first = tuple(int(i) for i in np.unravel_index(at, copy.shape)) if copy.shape else ()
    text = (
        f"{copy.name!r}: {count:,} of {prod(copy.shape):,} differ from {own.name!r}, which it repeats, "
        f"first at {list(first)}, {place}"
    )
    return Finding("tied", text, copy.name, copy.file.name, count, first)


def _differences(copy: Entry, own: Entry) -> Iterator[tuple[int, np.ndarray]]:
    """Places of chunks, and masks [n] bool of the values that differ."""
    if copy.dtype == own.dtype:
        word = f"<u{np.dtype(DTYPES[own.dtype]).itemsize}"  # bits: a NaN equals itself
        for (start, x), (_, y) in zip(chunks(copy, word), chunks(own, word), strict=True):
            yield start, x != y
        return
    for (start, x), (_, y) in zip(chunks(copy), chunks(own), strict=True):
        yield start, _values(copy, x) != _values(own, y)


def _values(entry: Entry, data: np.ndarray) -> np.ndarray:
    """Stored `data` [n] as float32."""
    return Stored(entry.name, entry.dtype, data.shape, data, entry.file).to_float32()
