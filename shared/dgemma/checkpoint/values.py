"""What stored values must not be: not finite, zero as a scale, or zero by the thousand after a lost download.

Nothing is decoded: bit patterns are tested, in chunks, so that memory does not grow with a tensor.
`dgemma verify` looks at every value (`examine`). A load looks at a few places of each tensor, and examines
only where those look wrong (`samples.check_samples`). So whatever a load refuses here, verify finds.

Zeros in a row are what a hole in a file leaves: a download that reserved its place, or lost a part. They are
a flaw from an eighth of a tensor or 64 KiB on. Not so in a bias, which training may begin with zero, nor in a
few rows of a table of tokens, which may be padding. In the matrices that end a branch (attention's o, the
MLP's, experts' and self-conditioning's down) a load says zeros instead of refusing them: layers that were
added to a model begin with zeros there, and compute nothing wrong.

    n values of a chunk
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from dgemma.checkpoint.layouts.base import Piece, Source
from dgemma.checkpoint.safetensors import DTYPES, Entry, check_file
from dgemma.errors import CheckpointError
from dgemma.files import reason
from dgemma.formats.quantized import Form
from dgemma.network.spec import is_skipped

CHUNK = 1 << 22  # values looked at at once
HOLE = 1 << 16  # bytes of zeros in a row that no weights have
GROUP = 16  # words that are looked at together


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
_E2M1, _PACKED = (
    Bits("u1", 0, 0x88),
    Bits("u1", 0, 0),
)  # two codes a byte; codes of any width: all are numbers


@dataclass(frozen=True)
class Subject:
    """A tensor to look at: its bytes as words of `bits`, and the `kinds` of flaw to look for.

    `codes` belong to NVFP4 block scales. A scale of zero over codes of zero is no damage: MLX writes one for
    a block of zeros, or of weights that round to zero.
    """

    entry: Entry
    bits: Bits
    kinds: tuple[str, ...]
    codes: Entry | None = None
    closes: bool = False  # whether it belongs to a matrix that ends a branch

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in words: a stored word may hold four codes of 8 bits."""
        stored = np.dtype(DTYPES[self.entry.dtype]).itemsize
        per_word = stored // np.dtype(self.bits.word).itemsize
        *lead, last = self.entry.shape or (1,)
        return (*lead, last * per_word)

    @property
    def size(self) -> int:
        """Number of words."""
        return prod(self.shape)


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a tensor, in one line: `count` values, the first at index `first`.

    `kind` is "non-finite", "zero", "negative" or "dead". `grave` is False for what may be meant.
    """

    kind: str
    text: str
    entry: Entry
    count: int
    first: tuple[int, ...]
    grave: bool = True


def subjects(source: Source, entries: Mapping[str, Entry], wrong: Collection[str] = ()) -> Iterator[Subject]:
    """What to look for in the tensors of a parameter, but for those that are `wrong` in type or shape."""
    param, codes = source.param, None
    for piece in source.pieces:  # codes come before their scales in every layout
        entry = None if piece.name in wrong else entries.get(piece.name)
        if piece.role == "codes" and source.form and source.form.fits(param.shape[-1]):
            codes = entry
        if entry:
            closes = bool(param.path) and param.path[-1] in ("o", "down")
            yield subject(entry, piece, source.form, codes, closes)


def subject(
    entry: Entry,
    piece: Piece | None = None,
    form: Form | None = None,
    codes: Entry | None = None,
    closes: bool = False,
) -> Subject:
    """What to look for in a tensor; `piece` is None if its role is unknown.

    Scales of affine groups have either sign, but MLX writes none below 1e-7 in size, so zero is damage.
    """
    dtype, kinds = entry.dtype, []
    role = piece.role if piece else ""
    stored = {"scales": form and form.scale_type, "codes": form and form.code_type}.get(role)
    if stored:
        dtype = f"F8_{stored}"
    small = role == "scales" and stored == "E4M3"  # NVFP4's: the other scales have no sign, or no zero
    if dtype in BITS:
        kinds.append("non-finite")
    if role == "factor" or small:
        kinds += ["zero", "negative"]
    elif role == "scales" and form and form.is_affine:
        kinds += ["zero"]
    # Where the role is unknown a small tensor may be anything.
    meant = role == "unused" if piece else is_skipped(entry.name) or prod(entry.shape) <= GROUP
    if not meant and not re.search(r"(\.|_)bias$", entry.name):
        kinds.append("dead")
    bits = _E2M1 if dtype == "F8_E2M1" else BITS.get(dtype, _PACKED)
    return Subject(entry, bits, tuple(kinds), codes if small else None, closes)


# ---- every value --------------------------------------------------------------------------------


def examine(subject: Subject) -> list[Flaw]:
    """The flaws of one tensor, one for each kind; CheckpointError if its file cannot be read."""
    count: dict[str, int] = {}
    first: dict[str, int] = {}
    runs = _Runs(subject)
    for start, words in chunks(subject.entry, subject.bits.word):
        for kind, mask in _masks(subject, start, words):
            if found := int(np.count_nonzero(mask)):
                count[kind] = count.get(kind, 0) + found
                first.setdefault(kind, start + int(mask.argmax()))
        if "dead" in subject.kinds:
            runs.take(start, words)
    flaws = [_of_values(subject, kind, count[kind], at) for kind, at in first.items()]
    length, at = runs.longest()
    # A scale of zero is said once.
    if "dead" in subject.kinds and length >= _limit(subject) and count.get("zero", 0) < length:
        flaws.append(_of_zeros(subject, length, at))
    return flaws


def _masks(subject: Subject, start: int, words: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each kind with a mask [n] bool of the chunk's `words` [n], which begin at place `start`."""
    bits, number = subject.bits, words.dtype.type
    if "non-finite" not in subject.kinds:
        return
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


class _Runs:
    """The longest run of zeros in a tensor, of either sign, over chunks; short runs may be overlooked."""

    SHORT = 1024  # words: no run below it is looked for where the limit is above

    def __init__(self, subject: Subject):
        self.total, self.alive = subject.size, ~np.dtype(subject.bits.word).type(subject.bits.sign)
        self.sieve = _limit(subject) > self.SHORT
        self.best, self.at, self.begin = 0, 0, 0

    def take(self, start: int, words: np.ndarray) -> None:
        """Go on with a chunk's `words` [n], which begin at place `start`."""
        if self.sieve and len(words) >= self.SHORT and not self._may_hold_zeros(words):
            ends = words[: self.SHORT], words[-self.SHORT :]
            head, tail = (np.flatnonzero(part & self.alive) for part in ends)
            self._close(start + head[:1])
            self.begin = start + len(words) - self.SHORT + int(tail[-1]) + 1
        else:
            self._close(start + np.flatnonzero(words & self.alive))

    def _may_hold_zeros(self, words: np.ndarray) -> bool:
        """Whether 8 words in a row are zero at a multiple of 256: every run of 512 holds such a place."""
        rows = words[: len(words) // 256 * 256].reshape(-1, 256)[:, :8]
        return not (rows & self.alive).any(-1).all()

    def _close(self, places: np.ndarray) -> None:
        """End the run at each of the `places` [k] that are not zero."""
        if not len(places):
            return
        gaps = np.diff(places, prepend=self.begin - 1) - 1
        widest = int(gaps.argmax())
        self._offer(int(gaps[widest]), int(places[widest] - gaps[widest]))
        self.begin = int(places[-1]) + 1

    def _offer(self, length: int, at: int) -> None:
        if length > self.best:
            self.best, self.at = length, at

    def longest(self) -> tuple[int, int]:
        """Its length and its place."""
        self._offer(self.total - self.begin, self.begin)
        return self.best, self.at


def _limit(subject: Subject) -> int:
    """Zeros in a row that are a flaw in this tensor."""
    size, name = subject.size, subject.entry.name
    if size <= GROUP or name.endswith(
        "position_embedding_table"
    ):  # of images: places that none was large for
        return max(1, size)
    if ".embed_tokens." in name:  # rows that no token uses
        return max(GROUP, size // 8)
    return max(GROUP, min(size // 8, HOLE // np.dtype(subject.bits.word).itemsize))


_PHRASES = {"non-finite": "not finite", "zero": "zero", "negative": "negative"}


def _of_values(subject: Subject, kind: str, count: int, at: int) -> Flaw:
    entry, first = subject.entry, _index(subject, at)
    where = f", first at {list(first)}" if first else ""
    text = f"{entry.name!r}: {count:,} of {subject.size:,} {_PHRASES[kind]}{where}, in {entry.file.name}"
    return Flaw(kind, text, entry, count, first, kind == "non-finite" or count == subject.size)


def _of_zeros(subject: Subject, count: int, at: int) -> Flaw:
    entry, first = subject.entry, _index(subject, at)
    found = f"{count:,} of {subject.size:,} in a row zero, first at {list(first)}"
    found = "nothing but zeros" if count == subject.size else found
    grave = count >= max(1, subject.size // 8) and not subject.closes
    return Flaw("dead", f"{entry.name!r}: {found}, in {entry.file.name}", entry, count, first, grave)


def _index(subject: Subject, at: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(at, subject.shape)) if subject.entry.shape else ()


def chunks(entry: Entry, kind: str | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor as flat arrays [n] of CHUNK values of a NumPy type, each with its place.

    It is read, not mapped: pages of a map count as the process's memory, and a file that becomes shorter
    under a map kills the process.
    """
    dtype = np.dtype(kind or DTYPES[entry.dtype])
    total = entry.nbytes // dtype.itemsize
    check_file(entry.file)
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
        raise CheckpointError(f"{entry.file}: cannot be read ({reason(error)})") from None
