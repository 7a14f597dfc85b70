"""What a folder is that holds no checkpoint, and what to do about it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from dgemma.errors import ConfigError
from dgemma.files import is_folder, names, read_text

_CONFIG = "config.json"
_CACHED = re.compile(r"models--(.+?)--(.+)")  # the hub's cache writes "/" as "--"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
_FOLDERS = 30  # that are looked into

# Endings of files that hold a model in another way, and what they are.
_FOREIGN: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".incomplete", ".part", ".crdownload", ".aria2", ".download"), "an unfinished download; finish it"),
    ((".gguf", ".ggml"), "GGUF, which dgemma does not read; take the model's safetensors checkpoint"),
    ((".onnx", ".onnx_data", ".ort"), "ONNX, which dgemma does not read; take a safetensors checkpoint"),
    ((".bin", ".pt", ".pth", ".ckpt"), "PyTorch's pickle, which dgemma does not read; save as safetensors"),
    ((".npz", ".npy"), "NumPy's format, which dgemma does not read; save as safetensors"),
    ((".h5", ".msgpack", ".tflite", ".litertlm", ".task"), "not safetensors, which alone dgemma reads"),
)


def misplaced(folder: Path) -> str | None:
    """What a folder without a config.json is, if that can be told, and which one to give.

    None for a folder that has one, and for a folder of which nothing can be said. ConfigError if the folder
    cannot be read.
    """
    if os.path.lexists(folder / _CONFIG):  # whoever reads it says what is wrong with it
        return None
    inside = names(folder)
    if text := _cached(folder):
        return text
    below = [folder / name for name in _folders(folder, inside) if os.path.isfile(folder / name / _CONFIG)]
    if below:
        some = ", ".join(map(str, below[:3])) + (", …" if len(below) > 3 else "")
        return f"no {_CONFIG} here but in a folder below; give {'one of them: ' * (len(below) > 1)}{some}"
    return foreign(folder)


def foreign(folder: Path) -> str | None:
    """What a folder without weights is, if it is the hub's or of another program; None for others.

    ConfigError if the folder cannot be read.
    """
    if text := _cached(folder):
        return text
    inside = names(folder)
    files = list(inside)
    for name in _folders(folder, inside):
        with suppress(ConfigError):
            files += [f"{name}/{file}" for file in names(folder / name)]
    return foreign_names(files)


def foreign_names(files: Sequence[str]) -> str | None:
    """What files of these names are if they are another program's; None for others."""
    if found := next((name for name in files if is_adapter(name)), None):
        return f"{found} belongs to an adapter, which is no whole model; merge it into its base model"
    for endings, text in _FOREIGN:
        if found := next((name for name in files if _is_of(name.lower(), endings)), None):
            return f"{found} is {text}"
    return None


def _is_of(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a name has one of these endings; `.bin` is any program's, so it must speak of a model."""
    return name.endswith(endings) and (not name.endswith(".bin") or "model" in name)


def is_adapter(name: str) -> bool:
    """Whether a file of this name changes another model's weights."""
    return name in _ADAPTERS


def _folders(folder: Path, inside: Iterable[str]) -> list[str]:
    # A folder that may not be searched is none that a hint can name.
    return [name for name in inside if os.path.isdir(folder / name)][:_FOLDERS]


def _cached(folder: Path) -> str | None:
    """What to say of a folder of the hub's cache: a snapshot that lacks files, or one above the snapshots."""
    root = folder.absolute()
    if root.parent.name == "snapshots" and (hub_id := _id(root.parent.parent)):
        return f"a part of {hub_id} in the hub's cache; give {hub_id} to complete the download"
    if models := [hub_id for name in names(root) if (hub_id := _id(root / name))]:
        some = ", ".join(models[:3]) + (", …" if len(models) > 3 else "")
        return f"the hub's cache; give a model of it: {some}"
    root = root.parent if root.name in ("snapshots", "blobs", "refs") else root
    if (hub_id := _id(root)) is None or not is_folder(root / "snapshots"):
        return None
    found = names(root / "snapshots")
    if not found:
        return f"a folder of the hub's cache without a snapshot; give {hub_id} to download it"
    newest = root / "snapshots" / _current(root, found)
    return f"a folder of the hub's cache; give {hub_id}, or its snapshot {newest}"


def _id(root: Path) -> str | None:
    """The model whose folder in the hub's cache has this name."""
    match = _CACHED.fullmatch(root.name)
    return f"{match[1]}/{match[2]}" if match else None


def _current(root: Path, found: Sequence[str]) -> str:
    """The snapshot that refs/main names, else any."""
    with suppress(ConfigError):
        main = read_text(root / "refs" / "main").strip()
        return main if main in found else found[0]
    return found[0]
