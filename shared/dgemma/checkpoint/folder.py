"""The tensors of a folder: its index and its shards."""

from __future__ import annotations

import os
import re
import reprlib
from pathlib import Path

from dgemma.checkpoint.safetensors import Entry, read_header
from dgemma.errors import CheckpointError, ConfigError
from dgemma.files import load_json

INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> list[Path]:
    """The files that a folder's index names, present or not; without an index, all that are present."""
    index = folder / INDEX
    if index.exists():
        return [folder / shard for shard in sorted(set(_weight_map(index).values()))]
    # macOS leaves hidden files such as ._model.safetensors beside copies.
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def find_tensors(folder: Path) -> tuple[Path, dict[str, Entry]]:
    """A folder's index, or its only safetensors file, and its tensors by name."""
    index = folder / INDEX
    if index.exists():
        return index, _indexed(index)
    files = shards(folder)
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file here")
    single = folder / "model.safetensors"
    if single not in files:
        single = files[0]
        if len(files) > 1:
            raise CheckpointError(f"{index}: no such file, though there are {len(files)} .safetensors files")
    return single, {entry.name: entry for entry in read_header(single)}


def _indexed(index: Path) -> dict[str, Entry]:
    """The tensors of all shards; the index and the shards must agree tensor by tensor."""
    weight_map = _weight_map(index)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        for entry in read_header(_shard(index, shard)):
            if entry.name in entries:
                both = f"{entries[entry.name].file.name} and {shard}"
                raise CheckpointError(f"{index}: tensor {entry.name!r} is in both {both}")
            if weight_map.get(entry.name) != shard:
                raise CheckpointError(f"{entry.file}: tensor {entry.name!r} is not in {INDEX}")
            entries[entry.name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise CheckpointError(f"{index.parent / shard}: lacks tensor {name!r}, which {INDEX} puts there")
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = load_json(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no usable weight_map")
    for name, shard in weight_map.items():
        # A name, never a path: an index must not reach out of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\x00-\x1f]+\.safetensors", shard):
            raise CheckpointError(f"{index}: tensor {name!r} is in {reprlib.repr(shard)}, not a shard's name")
    return weight_map


def _shard(index: Path, shard: str) -> Path:
    path = index.parent / shard
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: missing shard that {INDEX} names; download it again")
    return path
