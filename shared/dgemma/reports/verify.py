"""Whether a checkpoint is whole: every name, type, shape and stored value of it.

A load checks names, types and shapes. `inspect` also looks at the values. It reads every tensor of numbers
once, in file order and in chunks, and tests bit patterns: nothing is decoded, and memory does not grow with
the checkpoint. Packed codes of affine and 4-bit forms stay unread, as any of them is a number.
The price: a wrong value that is finite passes. Only a comparison with another checkpoint shows it
(`dgemma.reports.against`).

    n values of a chunk
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import read_shard, shards
from dgemma.checkpoint.layouts.base import FLOATS, Piece
from dgemma.checkpoint.safetensors import DTYPES, Entry
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.files import Progress
from dgemma.formats.quantized import Form
from dgemma.formats.stored import Stored
from dgemma.network.spec import GROUPS, is_skipped
from dgemma.reports import against, tables

CHUNK = 1 << 22  # values looked at at once


@dataclass(frozen=True)
class Finding:
    """One fault; `text` is its description in one line.

    `kind`: "file" or "checkpoint" if it cannot be read; "quantization" for tensors that contradict the
    announcement; "missing", "unknown", "of the wrong type", "of the wrong shape"; "non-finite", "zero",
    "negative" for values; "tied" for a copy that differs. `count` values are wrong, the first at index
    `first`.
    """

    kind: str
    text: str
    tensor: str | None = None
    file: str | None = None
    count: int | None = None
    first: tuple[int, ...] | None = None


# ---- what a value must not be -------------------------------------------------------------------


@dataclass(frozen=True)
class Bits:
    """A number type as words of bits: not finite if all of `special` are set; `sign` is the sign's bit."""

    word: str
    special: int
    sign: int


BITS = {
    "BF16": Bits("<u2", 0x7F80, 0x8000),
    "F16": Bits("<u2", 0x7C00, 0x8000),
    "F32": Bits("<u4", 0x7F80_0000, 0x8000_0000),
    "F64": Bits("<u8", 0x7FF0_0000_0000_0000, 0x8000_0000_0000_0000),
    "F8_E5M2": Bits("u1", 0x7C, 0x80),
    "F8_E4M3": Bits("u1", 0x7F, 0x80),  # no infinity: one NaN of each sign
    "F8_E8M0": Bits("u1", 0xFF, 0),  # powers of two: one NaN, no zero, no sign
}
_PHRASES = {"non-finite": "not finite", "zero": "zero", "negative": "negative"}


@dataclass(frozen=True)
class Subject:
    """A tensor to look at: the number type of its bytes, and the `kinds` of finding to look for.

    `codes` belong to NVFP4 block scales. A scale of zero over codes of zero is no damage: MLX writes one for
    a block of zeros, or of weights that round to zero.
    """

    entry: Entry
    dtype: str
    kinds: tuple[str, ...]
    codes: Entry | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in numbers of this type: a stored word may hold four codes of 8 bits."""
        stored = np.dtype(DTYPES[self.entry.dtype]).itemsize
        per_word = stored // np.dtype(BITS[self.dtype].word).itemsize
        *lead, last = self.entry.shape or (1,)
        return (*lead, last * per_word)


def _subject(entry: Entry, piece: Piece | None, form: Form | None, codes: Entry | None) -> Subject | None:
    """What to look for in a tensor, None for nothing; `piece` is None if its role is unknown.

    Scales of affine groups have either sign, but MLX writes none below 1e-7 in size, so zero is damage.
    """
    dtype, kinds = entry.dtype, ["non-finite"]
    role = piece and piece.role
    stored = {"scales": form and form.scale_type, "codes": form and form.code_type}.get(role or "")
    if stored:
        dtype = f"F8_{stored}"
    small = role == "scales" and stored == "E4M3"  # NVFP4's: the other scales have no sign, or no zero
    if role == "factor" or small:
        kinds += ["zero", "negative"]
    elif role == "scales" and form and form.is_affine:
        kinds += ["zero"]
    if dtype not in BITS:  # every 4-bit code is a number
        return None
    return Subject(entry, dtype, tuple(kinds), codes if small else None)


def _scan(subject: Subject) -> list[Finding]:
    """The findings of one tensor, one for each kind."""
    count = dict.fromkeys(subject.kinds, 0)
    first: dict[str, int] = {}
    for start, words in _chunks(subject.entry, BITS[subject.dtype].word):
        for kind, mask in _masks(subject, start, words):
            if found := int(np.count_nonzero(mask)):
                count[kind] += found
                first.setdefault(kind, start + int(mask.argmax()))
    return [_of_values(subject.entry, subject.shape, kind, count[kind], at) for kind, at in first.items()]


def _masks(subject: Subject, start: int, words: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each kind with a mask [n] bool of the chunk's `words` [n], which begin at place `start`."""
    bits, number = BITS[subject.dtype], words.dtype.type
    special = (words & number(bits.special)) == bits.special
    yield "non-finite", special
    if "zero" not in subject.kinds:
        return
    zero = (words & ~number(bits.sign)) == 0
    if "negative" in subject.kinds:
        yield "negative", ((words & number(bits.sign)) != 0) & ~zero & ~special
    if subject.codes:
        places = np.flatnonzero(zero)
        zero[places] = _has_codes(subject.codes, start + places)
    yield "zero", zero


def _has_codes(codes: Entry, blocks: np.ndarray) -> np.ndarray:
    """Whether the blocks [k] of 16 4-bit codes, 8 bytes each, hold a code other than ±0, [k] bool."""
    octets = codes.read().data.reshape(-1).view(np.uint8).reshape(-1, 8)
    return (octets[blocks] & 0x77).any(-1)


def _of_values(entry: Entry, shape: tuple[int, ...], kind: str, count: int, at: int) -> Finding:
    first = tuple(int(i) for i in np.unravel_index(at, shape)) if entry.shape else ()
    where = f", first at {list(first)}" if first else ""
    text = f"{entry.name!r}: {count:,} of {prod(shape):,} {_PHRASES[kind]}{where}, in {entry.file.name}"
    return Finding(kind, text, entry.name, entry.file.name, count, first)


def _chunks(entry: Entry, kind: str | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor as flat arrays [n] of CHUNK values of a NumPy type, each with its place.

    It is read, not mapped: pages of a map count as the process's memory, and a file that becomes shorter
    under a map kills the process.
    """
    dtype = np.dtype(kind or DTYPES[entry.dtype])
    total = entry.nbytes // dtype.itemsize
    try:
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            for start in range(0, total, CHUNK):
                values = np.fromfile(stream, dtype, min(CHUNK, total - start))
                if len(values) < min(CHUNK, total - start):
                    raise CheckpointError(
                        f"{entry.file}: became shorter while tensor {entry.name!r} was read"
                    )
                yield start, values
    except OSError as error:
        raise CheckpointError(f"{entry.file}: cannot be read ({error.strerror})") from None


# ---- tied copies --------------------------------------------------------------------------------


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


def _tied(copy: Entry, own: Entry) -> Finding | None:
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
        for (start, x), (_, y) in zip(_chunks(copy, word), _chunks(own, word), strict=True):
            yield start, x != y
        return
    for (start, x), (_, y) in zip(_chunks(copy), _chunks(own), strict=True):
        yield start, _values(copy, x) != _values(own, y)


def _values(entry: Entry, data: np.ndarray) -> np.ndarray:
    """Stored `data` [n] as float32."""
    return Stored(entry.name, entry.dtype, data.shape, data, entry.file).to_float32()


# ---- a checkpoint's report ----------------------------------------------------------------------


def inspect(folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Everything that is wrong with a checkpoint's folder, as `findings`, and its contents; for JSON.

    An error that keeps the checkpoint from opening is a finding too. Values are checked even then, but by
    their types alone, as the roles of the tensors are unknown: `complete` is false.
    `progress(done, total)` counts stored bytes. CheckpointError if a file goes away meanwhile.
    """
    checkpoint, findings = _opened(folder)
    if checkpoint:
        entries = list(checkpoint.entries.values())
        findings += _table_findings(checkpoint)
    else:
        entries, broken = _readable(folder)
        # A broken file is also why the checkpoint did not open: say it once.
        said = tuple(f"{folder / file}: " for finding in broken if (file := finding.file))
        findings = broken + [finding for finding in findings if not finding.text.startswith(said)]
    entries.sort(key=lambda entry: (entry.file, entry.offset))
    ties = _ties(entries)
    findings += _value_findings(entries, _roles(checkpoint) if checkpoint else {}, ties, progress)
    return {
        "ok": not findings,
        "complete": checkpoint is not None,
        "format": checkpoint.layout.name if checkpoint else None,
        "files": len({entry.file for entry in entries}),
        "tensors": len(entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "by_class": by_class(checkpoint) if checkpoint else {},
        "tied_copies": len(ties),
        "findings": [asdict(finding) for finding in findings],
    }


def _opened(folder: Path) -> tuple[Checkpoint | None, list[Finding]]:
    try:
        return Checkpoint.open(folder, check=False), []
    except DgemmaError as error:
        return None, [Finding("checkpoint", " ".join(str(error).split()))]


def _readable(folder: Path) -> tuple[list[Entry], list[Finding]]:
    """The tensors of every file that can be read, and what is wrong with the other files."""
    entries: list[Entry] = []
    findings = []
    try:
        files = shards(folder)
    except CheckpointError:  # an unusable index, which is a finding already
        files = []
    for file in files:
        try:
            entries += read_shard(file)
        except CheckpointError as error:
            findings.append(Finding("file", " ".join(str(error).split()), file=file.name))
    return entries, findings


def _table_findings(checkpoint: Checkpoint) -> list[Finding]:
    contradictions = [Finding("quantization", text) for text in checkpoint.contradictions()]
    return contradictions + [
        Finding(
            fault.kind,
            f"{fault.kind}: {fault.text}",
            fault.name,
            fault.file.name if fault.file else None,
        )
        for fault in checkpoint.faults()
    ]


Role = tuple[Piece, Form | None, Entry | None]  # the tensor, its form, the codes that a scale belongs to


def _roles(checkpoint: Checkpoint) -> dict[str, Role]:
    """The role of every tensor by name, without tensors of the wrong type or shape."""
    wrong = {fault.name for fault in checkpoint.faults()}
    roles: dict[str, Role] = {}
    for source in checkpoint.sources.values():
        codes = None
        for piece in source.pieces:  # codes come before their scales in every layout
            if piece.role == "codes" and source.form and source.form.fits(source.param.shape[-1]):
                codes = None if piece.name in wrong else checkpoint.entries[piece.name]
            if piece.name not in wrong:
                roles[piece.name] = (piece, source.form, codes)
    return roles


def _ties(entries: list[Entry]) -> dict[str, Entry]:
    """Tied copies by name, each with the tensor that it repeats, if the two can be compared."""
    known = {entry.name: entry for entry in entries}
    pairs = ((entry, known.get(twin(entry.name) or "")) for entry in entries)
    return {entry.name: own for entry, own in pairs if own and _is_comparable(entry, own)}


def _value_findings(
    entries: list[Entry], roles: Mapping[str, Role], ties: Mapping[str, Entry], progress: Progress | None
) -> list[Finding]:
    findings: list[Finding] = []
    total, done = sum(entry.nbytes for entry in entries), 0
    for entry in entries:
        subject = _subject(entry, *roles.get(entry.name, (None, None, None)))
        if subject:
            findings += _scan(subject)
        if entry.name in ties and (finding := _tied(entry, ties[entry.name])):
            findings.append(finding)
        done += entry.nbytes
        if progress:
            progress(done, total)
    return findings


def scale_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The findings in scales, biases and factors alone: a ninth of a quantized checkpoint, or less."""
    for name, (piece, form, codes) in _roles(checkpoint).items():
        if piece.role in ("scales", "biases", "factor"):
            subject = _subject(checkpoint.entries[name], piece, form, codes)
            yield from _scan(subject) if subject else ()


def by_class(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Parameters, stored bytes and forms (as `parse_form` names them, or a type) of each class."""
    found: dict[str, dict[str, Any]] = {}
    for source in checkpoint.sources.values():
        entries = [checkpoint.entries[p.name] for p in source.pieces if p.name in checkpoint.entries]
        if entries:
            own = found.setdefault(source.param.group, {"parameters": 0, "bytes": 0, "forms": []})
            own["parameters"] += source.param.size
            own["bytes"] += sum(entry.nbytes for entry in entries)
            form = str(source.form or entries[0].dtype.lower())
            if form not in own["forms"]:
                own["forms"].append(form)
    return {group: found[group] for group in GROUPS if group in found}


# ---- as text ------------------------------------------------------------------------------------


def text(report: dict[str, Any]) -> str:
    """The report of `inspect`, with its "model" and the comparison "against" another, as text."""
    parts = [_contents_text(report)]
    if found := report.get("against"):
        parts.append(against.text(found))
    parts.append(_findings_text(report))
    return "\n\n".join("\n".join(part) for part in parts)


def _contents_text(report: dict[str, Any]) -> list[str]:
    head = [report["model"], f"  format   {report['format'] or 'unknown'}"]
    tensors = f"{report['tensors']:,} in {_number(report['files'], 'file')}, {tables.amount(report['bytes'])}"
    head.append(f"  tensors  {tensors}")
    if report["tied_copies"]:
        head.append(f"  copies   {report['tied_copies']:,} of tied tensors, held against them")
    if not report["by_class"]:
        return head
    rows = [["parameters", "", "on disk", "as"]]
    for group, own in report["by_class"].items():
        row = [
            f"  {group}",
            tables.count(own["parameters"]),
            tables.amount(own["bytes"]),
            ", ".join(own["forms"]),
        ]
        rows.append(row)
    return [*head, "", *tables.columns(rows)]


def _findings_text(report: dict[str, Any]) -> list[str]:
    lines = []
    if not report["complete"]:
        lines.append("The checkpoint does not open, so values were checked by their types alone.")
    found = report["findings"]
    if not found:
        return ["nothing wrong: names, types, shapes, values and tied copies are as they should be"]
    return [*lines, _number(len(found), "finding"), *(f"  {finding['text']}" for finding in found)]


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"
