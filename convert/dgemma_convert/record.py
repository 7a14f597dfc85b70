"""What a finished conversion records of itself, and whether a folder still is that conversion.

The record stands in the index's metadata, which readers of checkpoints leave alone. It has a hash of the
plan, a digest of the source's tensors, and the size and the digest of every file that was written. Names of
folders and times are not in it, so a copy of the source counts as the source, and a copy of the output as the
output.

Digests of large tensors and files are samples: blocks spread evenly over each tensor of the source, and over
each file of the output. So a second run takes seconds. A change that falls between all blocks, such as a
single weight of a large tensor, is not seen. Sizes and headers are seen whole, and so are small tensors and
files.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import INDEX
from dgemma.errors import CheckpointError, ConfigError
from dgemma.files import load_json

from .plan import Plan
from .source import weight_files

BLOCK = 1 << 14  # bytes read at one place
SOURCE_BLOCKS = 8192  # of all tensors of a source together, and at least one of each
SHARD_BLOCKS = 1024  # of a shard's header, and of its data: 16 MB each
FILE_BLOCKS = 16384  # of any other file: 256 MB
FOREIGN = "exists and is not this conversion"
_Span = tuple[int, int]  # offset and bytes


# ---- digests ------------------------------------------------------------------------------------


def source_digest(checkpoint: Checkpoint) -> str:
    """The identity of a source's tensors, whatever files they lie in: names, types, shapes and samples."""
    digests = {}
    blocks = max(1, SOURCE_BLOCKS // len(checkpoint.entries))
    for file in weight_files(checkpoint):
        own = sorted((e for e in checkpoint.entries.values() if e.file == file), key=lambda e: e.offset)
        for entry, digest in zip(
            own, _sampled(file, [(e.offset, e.nbytes) for e in own], blocks), strict=True
        ):
            digests[entry.name] = [entry.dtype, entry.shape, digest]
    return _hash(digests)


def facts(path: Path) -> dict[str, Any]:
    """Size and digest of a written file; CheckpointError if it cannot be read."""
    try:
        size = path.stat().st_size
        if not path.name.endswith(".safetensors"):
            return {"bytes": size, "digest": _hash(list(_sampled(path, [(0, size)], FILE_BLOCKS)))}
        with path.open("rb") as stream:
            head = min(size, 8 + int.from_bytes(stream.read(8), "little"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    spans = [(0, head), (head, size - head)]
    return {"bytes": size, "digest": _hash(list(_sampled(path, spans, SHARD_BLOCKS)))}


def _sampled(path: Path, spans: Iterable[_Span], blocks: int) -> Iterator[str]:
    """A digest of each span, from blocks spread evenly over it, or all of it if that is no more."""
    try:
        with path.open("rb", buffering=0) as stream:
            for span in spans:
                digest = hashlib.sha256()
                for offset, size in _blocks(span, blocks):
                    stream.seek(offset)
                    digest.update(stream.read(size))
                yield digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _blocks(span: _Span, blocks: int) -> Iterator[_Span]:
    start, size = span
    if size <= blocks * BLOCK:
        return (yield start, size)
    for i in range(blocks):  # the first begins the span, the last ends it
        yield start + (size - BLOCK) * i // max(1, blocks - 1), BLOCK


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


# ---- the record ---------------------------------------------------------------------------------


def plan_hash(plan: Plan, source: str) -> str:
    """A hash of all that makes the output what it is, from a source with this digest but any name."""
    outputs = [[o.name, o.dtype, o.shape] for job in plan.jobs for o in job.outputs]
    shards = [name for name, _ in plan.shards()]
    return _hash([_nameless(plan.config), plan.files, outputs, shards, source])


def state_hash(plan: Plan, source: str, checkpoint: Checkpoint) -> str:
    """What a half-finished output must share with a run that goes on with it: the files' times as well.

    A source that was changed between two samples must not end up in one output with what it was before.
    """
    stamps = [[file.name, file.stat().st_mtime_ns] for file in weight_files(checkpoint)]
    return _hash([plan_hash(plan, source), stamps])


def names(plan: Plan, sides: Sequence[Path]) -> set[str]:
    """The files of the output but for the index."""
    shards = {name for name, _ in plan.shards()}
    return shards | {"config.json", *plan.files, *(path.name for path in sides)}


def index(plan: Plan, source: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """model.safetensors.index.json of the output, record included; `files` holds `facts` by name."""
    weight_map = {o.name: name for name, jobs in plan.shards() for job in jobs for o in job.outputs}
    record = {"plan": plan_hash(plan, source), "source": source, "files": dict(sorted(files.items()))}
    metadata = {"total_size": plan.nbytes, "dgemma": record}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def fault(plan: Plan, source: str, folder: Path, sides: Sequence[Path]) -> str | None:
    """Why a folder is not this very conversion as it was written, None if it is. The words follow its name.

    Sizes and digests of all files are held against the record. Files that the conversion did not write do not
    count.
    """
    config, own = _object(folder / "config.json"), _object(folder / INDEX)
    made = config.get("dgemma")
    if not isinstance(made, dict) or _unsourced(made) != _unsourced(plan.config["dgemma"]):
        return FOREIGN
    metadata = own.get("metadata")
    record = metadata.get("dgemma") if isinstance(metadata, dict) else None
    if not isinstance(record, dict) or not isinstance(files := record.get("files"), dict):
        return f"{INDEX} has no record of the files that were written"
    if record.get("source") != source:
        return "was made from other weights than the source's"
    if record.get("plan") != plan_hash(plan, source):
        return "was made by another plan, or while the source's config.json was another"
    written = names(plan, sides)
    if odd := sorted(written ^ files.keys()):
        return f"{odd[0]} is in the source or in the conversion, and not in the other"
    for path in sides:
        if facts(path) != files[path.name]:
            return f"{path.name} in the source is not what it was"
    if own != index(plan, source, files):
        return f"{INDEX} is not what was written"
    return next(filter(None, (_changed(folder / name, files[name]) for name in sorted(written))), None)


def _changed(path: Path, fact: Any) -> str | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return f"{path.name} is not a file"
    if isinstance(fact, dict) and isinstance(wanted := fact.get("bytes"), int) and found.st_size != wanted:
        return f"{path.name} has {found.st_size:,} bytes and not {wanted:,}"
    return None if facts(path) == fact else f"{path.name} is not what was written"


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of the output; an empty one if there is none."""
    try:
        return load_json(path) if os.path.isfile(path) else {}
    except ConfigError:
        return {}


def _nameless(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "dgemma": _unsourced(config["dgemma"])}


def _unsourced(made: Mapping[str, Any]) -> dict[str, Any]:
    """The section without the source's name, which a copy of the source may have changed."""
    return {key: value for key, value in made.items() if key != "source"}
