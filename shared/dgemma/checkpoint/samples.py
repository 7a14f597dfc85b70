"""A few values of each tensor, for a load that has no time to look at all (`dgemma.checkpoint.values`)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dgemma.checkpoint.layouts.base import Source
from dgemma.checkpoint.safetensors import Entry, check_file
from dgemma.checkpoint.values import GROUP, Subject, examine, subjects
from dgemma.errors import CheckpointError
from dgemma.files import reason

PLACES = 17  # of a sample: an eighth of a tensor always holds one whole group of `GROUP` words


def check_samples(source: Source, entries: Mapping[str, Entry]) -> list[str]:
    """Look at a few places of each tensor of a parameter, and at all of one that looks wrong.

    CheckpointError for a tensor with values that are not finite, or with zeros instead of values. The result
    are sentences on zeros that may be meant. It reads a few kilobytes, at best where a load has just been.
    """
    odd = []
    with ExitStack() as opened:
        streams: dict[Path, BinaryIO] = {}
        for own in subjects(source, entries):
            if not own.kinds or not own.size or not _looks_wrong(own, _sample(own, streams, opened)):
                continue
            for flaw in examine(own):
                if flaw.grave:
                    raise CheckpointError(
                        f"{own.entry.file}: damaged: {flaw.text}; `dgemma verify` lists everything; "
                        "download the file again"
                    )
                if flaw.kind == "dead":
                    odd.append(
                        f"{flaw.text}: a lost part of the file, unless it is meant; see `dgemma verify`"
                    )
    return odd


def _sample(subject: Subject, streams: dict[Path, BinaryIO], opened: ExitStack) -> np.ndarray:
    """All words [1, n] of a small tensor, else groups [PLACES, GROUP] at even distances from end to end."""
    entry, word = subject.entry, np.dtype(subject.bits.word)
    whole = subject.size <= GROUP * PLACES
    length = subject.size if whole else GROUP
    last = subject.size - length
    places = [0] if whole else [last * i // (PLACES - 1) for i in range(PLACES)]
    try:
        if entry.file not in streams:
            check_file(entry.file)
            streams[entry.file] = opened.enter_context(entry.file.open("rb", buffering=0))
        stream, parts = streams[entry.file], []
        for place in places:
            stream.seek(entry.offset + place * word.itemsize)
            parts.append(stream.read(length * word.itemsize))
    except OSError as error:
        raise CheckpointError(f"{entry.file}: cannot be read ({reason(error)})") from None
    data = b"".join(parts)
    if len(data) < len(places) * length * word.itemsize:
        raise CheckpointError(f"{entry.file}: tensor {entry.name!r} cannot be read: the file became shorter")
    return np.frombuffer(data, word).reshape(len(places), length)


def _looks_wrong(subject: Subject, groups: np.ndarray) -> bool:
    """Whether sampled words [k, n] hold one that is not finite, or a group of nothing but zeros."""
    bits, number = subject.bits, groups.dtype.type
    if "non-finite" in subject.kinds and ((groups & number(bits.special)) == bits.special).any():
        return True
    if not {"zero", "dead"} & set(subject.kinds):
        return False
    zeros = np.count_nonzero((groups & ~number(bits.sign)) == 0, axis=-1)
    return bool((zeros >= min(GROUP, groups.shape[-1])).any())
