"""The source of a conversion: read and not mapped, watched for changes, and the files beside its weights.

A map of a file that another program cuts short kills the process with SIGBUS. A read fails, and says so.

    E experts or other rows along the first axis
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import find_tensors
from dgemma.checkpoint.safetensors import DTYPES, Entry
from dgemma.errors import CheckpointError
from dgemma.formats.stored import Stored

SMALL = (
    1 << 20
)  # bytes of a tensor that is read at once; a larger one is read in the parts that are asked for
_CHUNK = 1 << 24
# Weights in any format, and their indexes: every other file of a source's folder comes along.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".npz", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".tflite", ".index.json"),
)


@dataclass(frozen=True)
class Rows:
    """A tensor [E, ...] in its file, in place of an array; it reads the rows that it is asked for."""

    file: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        row = prod(self.shape[1:])
        offset = self.offset + start * row * self.dtype.itemsize
        data = _read(self.file, self.name, self.dtype, (stop - start) * row, offset)
        return data.reshape(stop - start, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def view(self, dtype: Any) -> Rows:
        """The same bytes as numbers of another width along the last axis."""
        kind = np.dtype(dtype)
        last = self.shape[-1] * self.dtype.itemsize // kind.itemsize
        return replace(self, dtype=kind, shape=(*self.shape[:-1], last))

    def reshape(self, *shape: int) -> np.ndarray:
        return self[:].reshape(*shape)

    def astype(self, dtype: Any) -> np.ndarray:
        return self[:].astype(dtype)

    def tobytes(self) -> bytes:
        return self[:].tobytes()


def _read(file: Path, name: str, dtype: np.dtype[Any], count: int, offset: int) -> np.ndarray:
    try:
        data = np.fromfile(file, dtype, count, offset=offset) if count else np.empty(0, dtype)
    except OSError as error:
        raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({error.strerror})") from None
    if len(data) < count:
        raise _changed(file)
    return data


def _changed(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: changed while it was converted; when it is whole, run the same command again"
    )


class FileEntry(Entry):
    """A tensor that is read from its file and not mapped."""

    def read(self) -> Stored:
        kind = np.dtype(DTYPES[self.dtype])
        data: Any
        if self.nbytes <= SMALL or not self.shape:
            data = _read(self.file, self.name, kind, prod(self.shape), self.offset).reshape(self.shape)
        else:
            data = Rows(self.file, self.name, kind, self.shape, self.offset)
        return Stored(self.name, self.dtype, self.shape, data, self.file)


class Watch:
    """Files as they were first seen; `check` raises CheckpointError if one was changed or replaced since."""

    def __init__(self, files: Iterable[Path]):
        self._seen = {file: _look(file) for file in files}

    def check(self) -> None:
        for file, seen in self._seen.items():
            if _look(file) != seen:
                raise _changed(file)


def _look(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold its tensors, in order of their names."""
    return sorted({entry.file for entry in checkpoint.entries.values()})


def by_file(checkpoint: Checkpoint) -> tuple[Checkpoint, Watch]:
    """The checkpoint with tensors that are read and not mapped, and the watch over its files.

    CheckpointError if a header is no longer what it was when the checkpoint was opened.
    """
    watch = Watch(weight_files(checkpoint))
    _, found = find_tensors(checkpoint.folder)
    for name, entry in checkpoint.entries.items():
        if found.get(name) != entry:
            raise _changed(entry.file)
    entries = {
        name: FileEntry(*(getattr(entry, field.name) for field in fields(Entry)))
        for name, entry in checkpoint.entries.items()
    }
    return replace(checkpoint, entries=entries), watch


# ---- the files beside the weights -----------------------------------------------------------------


def side_files(folder: Path, made: Iterable[str]) -> list[Path]:
    """The files of a folder that come along: no weights, nothing hidden, and none that is `made` anew.

    CheckpointError for a file that cannot be opened, and for a link that leads out of the folder, or nowhere:
    what it leads to was not given to us. Links to blobs in the hub's cache pass: a snapshot is nothing else.
    """
    made = set(made)
    named = [name for name in listed(folder) if name[0] != "." and name not in made]
    paths = [folder / name for name in named if not name.lower().endswith(_WEIGHTS)]
    found = [path for path in paths if _comes_along(path)]
    for path in found:
        try:
            path.open("rb").close()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return found


def listed(folder: Path) -> list[str]:
    """The names in a folder, in order; CheckpointError if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None


def _comes_along(path: Path) -> bool:
    """Whether a path is a file of its folder; folders, pipes and devices are none."""
    if not path.is_symlink():
        return os.path.isfile(path)
    target = Path(os.path.realpath(path))
    # Path.is_file would raise where a folder on the way may not be searched.
    if os.path.isdir(target):
        return False
    if not os.path.isfile(target):
        raise CheckpointError(
            f"{path}: a link to no file that can be read; restore the file or remove the link"
        )
    if not target.is_relative_to(os.path.realpath(path.parent)) and not _is_blob(target):
        raise CheckpointError(
            f"{path}: a link that leads out of its folder, to {target}; copy the file or remove it"
        )
    return True


def _is_blob(target: Path) -> bool:
    """Whether a file lies where the hub's cache keeps the files of a model, hub/models--org--name/blobs."""
    blobs = target.parent
    return blobs.name == "blobs" and blobs.parent.name.startswith("models--")


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, piece by piece; CheckpointError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            while data := stream.read(_CHUNK):
                yield data
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
