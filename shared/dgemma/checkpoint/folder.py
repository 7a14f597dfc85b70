"""The tensors of a folder: its index and its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgemma.checkpoint.hints import foreign, is_adapter
from dgemma.checkpoint.safetensors import MAX_TENSORS, Entry, read_header
from dgemma.errors import CheckpointError, ConfigError
from dgemma.files import exists, load_json, names, quoted

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> list[Path]:
    """The weights of a folder: what its index names, present or not; without an index, all that are present.

    CheckpointError if the index or the folder cannot be used.
    """
    if (weight_map := _index(folder)) is not None:
        return [folder / shard for shard in sorted(set(weight_map.values()))]
    if _exists(folder / SINGLE):
        return [folder / SINGLE]
    return [folder / name for name in _names(folder) if name.endswith(".safetensors")]


def has_weights(folder: Path) -> bool:
    """Whether a folder has an index or any safetensors file; CheckpointError if it cannot be listed."""
    if _exists(folder / INDEX) or _exists(folder / SINGLE):
        return True
    return any(name.endswith(".safetensors") for name in _names(folder))


def find_tensors(folder: Path) -> tuple[Path, dict[str, Entry]]:
    """A folder's index, or its only safetensors file, and its tensors by name."""
    if (weight_map := _index(folder)) is not None:
        return folder / INDEX, _indexed(folder / INDEX, weight_map)
    files = [file for file in shards(folder) if not is_adapter(file.name)]
    if not files:
        hint = foreign(folder)
        raise CheckpointError(f"{folder}: no .safetensors file here" + (f": {hint}" if hint else ""))
    if len(files) > 1:
        count = f"{len(files)} .safetensors files"
        raise CheckpointError(f"{folder / INDEX}: no such file, though there are {count}")
    return files[0], {entry.name: entry for entry in read_header(files[0])}


def read_shard(file: Path) -> list[Entry]:
    """The tensors of a file that the index beside it names; CheckpointError as of `read_header`."""
    if not _exists(file):
        raise CheckpointError(f"{file}: missing shard that {INDEX} names; download it again")
    return read_header(file)


def _index(folder: Path) -> dict[str, str] | None:
    """The shard of each tensor by the folder's index; None without an index, or if it belongs elsewhere.

    transformers takes model.safetensors and reads no index beside it. So an index of other shards, none of
    which is here, is left over from another checkpoint. If both sets of weights are here, nothing says which
    one is meant, and neither is taken.
    """
    if not _exists(folder / INDEX):
        return None
    weight_map = _weight_map(folder / INDEX)
    named = sorted(set(weight_map.values()))
    if SINGLE in named or not _exists(folder / SINGLE):
        return weight_map
    if other := next((shard for shard in named if _exists(folder / shard)), None):
        both = f"{SINGLE} and those of {INDEX}, such as {other}"
        raise CheckpointError(f"{folder}: two sets of weights, {both}; remove one of them")
    return None


def _indexed(index: Path, weight_map: dict[str, str]) -> dict[str, Entry]:
    """The tensors of all shards; the index and the shards must agree tensor by tensor."""
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        for entry in read_shard(index.parent / shard):
            if entry.name in entries:
                both = f"{entries[entry.name].file.name} and {shard}"
                raise CheckpointError(f"{index}: tensor {entry.name!r} is in both {both}")
            if weight_map.get(entry.name) != shard:
                raise CheckpointError(f"{entry.file}: tensor {entry.name!r} is not in {INDEX}")
            entries[entry.name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            where = index.parent / shard
            raise CheckpointError(f"{where}: lacks tensor {quoted(name)}, which {INDEX} puts there")
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = load_json(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no usable weight_map")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{index}: names more than {MAX_TENSORS:,} tensors")
    for name, shard in weight_map.items():
        if not _is_shard(shard):
            raise CheckpointError(f"{index}: tensor {quoted(name)} is in {quoted(shard)}, not a shard's name")
    return weight_map


def _is_shard(name: Any) -> bool:
    """Whether this is a file's name that file systems take; never a path, which could leave the folder."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or name.startswith("."):
        return False
    return name.isprintable() and not set(name) & set("/\\:") and len(name.encode()) <= 255


def _exists(path: Path) -> bool:
    try:
        return exists(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _names(folder: Path) -> list[str]:
    try:
        return names(folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
