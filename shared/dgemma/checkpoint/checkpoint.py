"""A Hugging Face checkpoint on disk or on the hub -> weights that satisfy `dgemma.network.spec`.

safetensors headers are read here and not by the safetensors library: its NumPy side has no bfloat16,
and its errors name neither file nor tensor. The price is a hundred lines of checks, which are also
what stands between a damaged download and the model. Every header is checked against its file, the
index and the configuration before the first weight is read.

Values are not looked at: to scan 51 GB for NaN would double the time of a load. That is for
`dgemma.reports.verify`.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod, sqrt
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from dgemma.checkpoint.layouts import SUPPORTED, Layout, Piece, Source, detect
from dgemma.errors import CheckpointError, ConfigError
from dgemma.formats.quantized import Form, Quantized
from dgemma.network.config import Config, GenerationConfig, load_json, read_config, read_generation_config
from dgemma.network.ops import Ops, Stored
from dgemma.network.spec import Param, is_skipped, parameters, text_parameters
from dgemma.network.weights import Weights, build, rope_frequencies

__all__ = ["Checkpoint", "Entry", "Fault", "Progress", "Stored", "read_header", "resolve", "shards"]

Progress = Callable[[int, int], None]  # bytes done, bytes in all

# How each type of the format is seen in NumPy; types that it lacks are raw integers of their width.
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
MAX_HEADER = 100_000_000  # bytes, the format's own limit
INDEX = "model.safetensors.index.json"

# ---- safetensors files --------------------------------------------------------------------------


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
        return prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def read(self) -> Stored:
        """The tensor over a memory map of its own, which is released with it; nothing is copied."""
        kind = np.dtype(DTYPES[self.dtype])
        try:
            # A map of no bytes is an error to the operating system.
            data = (
                np.memmap(self.file, kind, "r", self.offset, self.shape)
                if self.nbytes
                else np.empty(self.shape, kind)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} cannot be read ({error})") from None
        return Stored(self.name, self.dtype, self.shape, np.asarray(data), self.file)


def read_header(file: Path) -> list[Entry]:
    """The tensors of a safetensors file in file order; CheckpointError names the file and the tensor.

    The format: 8 bytes little-endian header length, the header as JSON, the data. Offsets count from
    the start of the data, which the tensors fill without a hole.
    """
    header, start, size = _header(file)
    entries = [_entry(file, name, fact, start) for name, fact in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_layout(file, entries, start, size)
    return entries


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data starts, and the file's size."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = _header_length(file, prefix, size)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
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
        raise CheckpointError(f"{file}: truncated, or not a safetensors file: {size} bytes end in its header")
    if length > MAX_HEADER:
        raise CheckpointError(f"{file}: not a safetensors file: a header of {length} bytes")
    return length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key that occurs twice, where `json` would keep the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        found[name] = value
    return found


def _entry(file: Path, name: str, fact: Any, start: int) -> Entry:
    where = f"{file}: tensor {name!r}"
    if not isinstance(fact, dict):
        raise CheckpointError(f"{where}: unreadable entry {reprlib.repr(fact)}")
    dtype, shape, offsets = fact.get("dtype"), fact.get("shape"), fact.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {reprlib.repr(dtype)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: unusable shape {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: unusable data_offsets {reprlib.repr(offsets)}")
    entry = Entry(name, dtype, tuple(shape), file, start + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {entry.nbytes} bytes, data_offsets {offsets} hold another number"
        )
    return entry


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of few non-negative integers (True is not one)."""
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def _check_layout(file: Path, entries: list[Entry], start: int, size: int) -> None:
    """Tensors in file order must follow each other without overlap or hole, to the file's end."""
    end = start
    for entry in entries:
        if entry.offset != end:
            fault = "overlaps the one before it" if entry.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{file}: tensor {entry.name!r} {fault}")
        end += entry.nbytes
        if end > size:
            raise CheckpointError(
                f"{file}: truncated: tensor {entry.name!r} ends at byte {end} of {size}; download it again"
            )
    if end < size:
        last = entries[-1].name if entries else ""
        raise CheckpointError(
            f"{file}: {size - end} bytes follow its last tensor {last!r}; download it again"
        )


# ---- folders ------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    """The files that a folder's index names, there or not; without an index, all that are there."""
    index = folder / INDEX
    if index.exists():
        return [folder / shard for shard in sorted(set(_weight_map(index).values()))]
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def _find(folder: Path) -> tuple[Path, dict[str, Entry]]:
    """The index or only safetensors file of a folder, and its tensors by name."""
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


# ---- what the tensors must be -------------------------------------------------------------------

# Names that only quantized formats use: MLX, ModelOpt, compressed-tensors, GPTQ.
_QUANTIZED = re.compile(
    r".*(\.(scales|biases|qweight|qzeros)|(weight|input)_(packed|scale(_2)?|scale_inv|global_scale))"
)
HF_QUANT_CONFIG = "hf_quant_config.json"


def _announcement(folder: Path, config: Config) -> tuple[Mapping[str, Any] | None, str]:
    """What a folder says of its quantization, and the file that says it.

    Older ModelOpt exports say it in a file of their own only.
    """
    path = folder / HF_QUANT_CONFIG
    if config.quantization is not None or not path.exists():
        return config.quantization, str(folder / "config.json")
    own = load_json(path).get("quantization")
    if not isinstance(own, Mapping):
        raise CheckpointError(f"{path}: has no usable 'quantization'")
    return {"quant_method": "modelopt", **own}, str(path)


def _contradictions(layout: Layout, sources: Sequence[Source], entries: Mapping[str, Entry]) -> Iterator[str]:
    """Where the tensors' names deny what is announced; `_faults` has those that are not as announced."""
    if not layout.announces():
        yield from _unannounced(entries)
    for source in sources:
        inputs = source.param.shape[-1]
        if source.form is not None and not source.form.fits(inputs):
            yield f"{source.param.name!r} has rows of {inputs}, which {source.form} does not divide"
    quantized = any(source.form for source in sources) or any(_looks_quantized(e) for e in entries.values())
    if layout.announces() and not quantized:
        first = sources[0].pieces[0].name
        yield f"quantized with {layout.name} by its config.json, but no tensor is; first: {first!r}"


@dataclass(frozen=True)
class Fault:
    """What is wrong with one tensor: `kind` completes "3 tensors …", `text` names it and says the rest."""

    kind: str
    name: str
    file: Path | None  # None for a missing one
    text: str


def _faults(wanted: Mapping[str, Piece], entries: Mapping[str, Entry]) -> Iterator[Fault]:
    """All that is missing, unknown, of the wrong type or shape, in this order."""
    known = [(entry, wanted[name]) for name, entry in entries.items() if name in wanted]
    for name in wanted:
        if name not in entries:
            yield Fault("missing", name, None, repr(name))
    for name, entry in entries.items():
        if name not in wanted and not is_skipped(name):
            yield Fault("unknown", name, entry.file, f"{name!r} in {entry.file.name}")
    for entry, piece in known:
        if entry.dtype not in piece.dtypes:
            text = f"{entry.name!r} is {entry.dtype}, not {', '.join(piece.dtypes)}, in {entry.file.name}"
            yield Fault("of the wrong type", entry.name, entry.file, text)
    for entry, piece in known:
        if entry.shape not in piece.shapes:
            text = f"{entry.name!r} is {entry.shape}, not {piece.shapes[0]}, in {entry.file.name}"
            yield Fault("of the wrong shape", entry.name, entry.file, text)


def _summary(faults: Sequence[Fault]) -> str:
    """Each kind with its number and its first tensors, in one line."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault.text)
    return "; ".join(f"{_count(found)} {kind}: {_first(found)}" for kind, found in kinds.items())


def _looks_quantized(entry: Entry) -> bool:
    """Whether a tensor has a name or a type that only quantized formats use."""
    own = _QUANTIZED.fullmatch(entry.name) or re.match("[UI]|F8", entry.dtype)
    return own is not None and not is_skipped(entry.name)


def _unannounced(entries: Mapping[str, Entry]) -> Iterator[str]:
    """Quantized tensors of a checkpoint whose config.json does not say so: which format, nobody knows."""
    suspects = [
        f"{entry.name!r} is {entry.dtype} in {entry.file.name}"
        for entry in entries.values()
        if _looks_quantized(entry)
    ]
    if suspects:
        yield (
            f"quantized with a method that config.json does not announce; supported: {SUPPORTED}; "
            f"{_count(suspects)}: {_first(suspects)}"
        )


def _expected(config: Config, entries: Iterable[str]) -> list[Param]:
    """The table to check against. A text-only export may lack the vision tower, but not a part of it."""
    vision = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
    if any(name.startswith(vision) for name in entries):
        return parameters(config)
    return text_parameters(config)


def _count(found: list[str]) -> str:
    return f"{len(found)} tensor{'s' * (len(found) != 1)}"


def _first(found: list[str], most: int = 3) -> str:
    return ", ".join(found[:most]) + (", …" if len(found) > most else "")


# ---- from tensors to weights --------------------------------------------------------------------


def _record(source: Source, form: Form, entries: Mapping[str, Entry]) -> Quantized:
    """The record that a source's tensors make up, fields `Stored`. A lone tensor stays a map of its file."""
    lead, inputs = source.param.shape[:-1], source.param.shape[-1]
    fields: dict[str, Stored] = {}
    for role, width in (
        ("codes", inputs * form.bits // 8),
        ("scales", inputs // (form.group or inputs)),
        ("biases", inputs // (form.group or inputs)),
    ):
        parts = [piece for piece in source.pieces if piece.role == role]
        if parts:
            fields[role] = _stack(parts, (*lead, width), entries)
    parts = [piece for piece in source.pieces if piece.role == "factor"]
    if parts:
        fields["factor"] = _factor(parts, lead, entries)
    return Quantized(form, **fields, divides=source.divides)


def _stack(parts: Sequence[Piece], shape: tuple[int, ...], entries: Mapping[str, Entry]) -> Stored:
    """One field from its tensors: the lone one as it lies in its file, or a stack filled part by part."""
    first = entries[parts[0].name].read()
    if parts[0].place is None:
        # Words of codes become bytes: a view, as both are little-endian.
        data = first.data.view(np.uint8) if parts[0].role == "codes" else first.data
        return replace(first, dtype="U8" if parts[0].role == "codes" else first.dtype, shape=shape, data=data)
    data = np.empty(shape, np.uint8)
    for piece in parts:
        data[piece.place] = entries[piece.name].read().data
    return Stored(first.name, "U8", shape, data, first.file)


def _factor(parts: Sequence[Piece], lead: tuple[int, ...], entries: Mapping[str, Entry]) -> Stored:
    """The factor [..., O] in float32, or [..., 1] where every matrix has a single one."""
    first = entries[parts[0].name].read()
    data = np.empty(lead, np.float32)
    for piece in parts:
        value = entries[piece.name].read().to_float32()
        part = ... if piece.place is None else piece.place
        if value.size == data[part].size:
            data[part] = value.reshape(data[part].shape)
        else:  # one number a matrix
            data[part] = value if value.ndim == data[part].ndim else value.reshape(())
    if (data == data[..., :1]).all():
        data = data[..., :1].copy()
    return Stored(first.name, "F32", data.shape, data, first.file)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose configuration and tensors were checked against each other; no weight is read yet."""

    folder: Path
    config: Config
    generation: GenerationConfig
    layout: Layout
    entries: Mapping[str, Entry]  # every stored tensor by name, those of the vision tower included
    sources: Mapping[str, Source]  # how each parameter is stored, by its name in the parameter table

    @classmethod
    def open(cls, folder: str | Path, check: bool = True) -> Checkpoint:
        """Read the headers of a folder.

        ConfigError for config.json and generation_config.json, CheckpointError for the tensors. Values
        are not read, so NaN and infinities pass (see the module). Without `check` tensors may be missing,
        wrong, or not what is announced: `contradictions` and `faults` list it all, and such a checkpoint is
        for looking at only.
        """
        folder = Path(folder)
        path = folder / "config.json"
        raw = load_json(path)
        config = read_config(raw, str(path))
        path = folder / "generation_config.json"
        own = load_json(path) if path.exists() else None
        generation = read_generation_config(own, config.vocab_size, str(path), raw)
        announcement, announcer = _announcement(folder, config)
        where, entries = _find(folder)
        layout = detect(announcement, announcer, entries)
        sources = {param.name: layout.source(param) for param in _expected(config, entries)}
        checkpoint = cls(folder, config, generation, layout, entries, sources)
        if check and (wrong := checkpoint.contradictions()):
            raise CheckpointError(f"{where}: {wrong[0]}")
        if check and (faults := checkpoint.faults()):
            raise CheckpointError(f"{where}: {_summary(faults)}")
        return checkpoint

    def contradictions(self) -> list[str]:
        """Where the tensors deny the quantization that config.json announces, or its silence."""
        return list(_contradictions(self.layout, list(self.sources.values()), self.entries))

    def faults(self) -> list[Fault]:
        """Every tensor that is not as the parameter table and the layout want it."""
        wanted = {piece.name: piece for source in self.sources.values() for piece in source.pieces}
        return list(_faults(wanted, self.entries))

    def read(self, name: str) -> Stored | Quantized:
        """A parameter as it is stored: a tensor, or a record whose fields are `Stored`.

        Stacks of experts that a format takes apart are put together in memory of their own; everything
        else is a map of its file.
        """
        source = self.sources[name]
        if source.form is None:
            return self.entries[source.pieces[0].name].read()
        return _record(source, source.form, self.entries)

    def nbytes(self, name: str) -> int:
        """Stored bytes of a parameter."""
        return sum(self.entries[piece.name].nbytes for piece in self.sources[name].pieces)

    def load(self, ops: Ops, progress: Progress | None = None) -> Weights:
        """The text model's weights on the device of `ops`.

        Each tensor is read once, in file order, so memory stays about one parameter above the weights.
        `progress(done, total)` counts stored bytes.
        """
        table = sorted(text_parameters(self.config), key=self._place)
        total, done = sum(self.nbytes(param.name) for param in table), 0

        def leaf(param: Param) -> Any:
            nonlocal done
            array = self._leaf(ops, param)
            done += self.nbytes(param.name)
            if progress:
                progress(done, total)
            return array

        return build(self.config, table, leaf, constants(self.config, ops), ops)

    def _leaf(self, ops: Ops, param: Param) -> Any:
        stored = self.read(param.name)
        # The whole router stays in the wide type: its logits tie in bf16, and a tie flips a pick.
        wide = param.group == "router"
        if isinstance(stored, Quantized):
            record = ops.place(stored)
            if wide:
                return ops.dequantize(record)
            # Rows of the embedding are looked up, too, and stay as they are.
            return record if param.group == "embed" else ops.arrange(record, str(param.path[-1]))
        return ops.load(stored, wide=wide)

    def _place(self, param: Param) -> tuple[str, int]:
        entry = self.entries[self.sources[param.name].pieces[0].name]
        return entry.file.name, entry.offset


def constants(config: Config, ops: Ops) -> dict[str, Any]:
    """The fields of Weights that no tensor holds."""
    layers = {layer.kind: layer for layer in config.layers}
    return {
        "embed_scale": ops.rounded(sqrt(config.hidden_size)),
        "frequencies": {kind: ops.aswide(rope_frequencies(layer)) for kind, layer in layers.items()},
    }


# ---- the hub ------------------------------------------------------------------------------------

# What a model needs; a repository may hold other formats and demos beside it.
HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    HF_QUANT_CONFIG,
]
# What a conversion takes along.
EVERY_FILE = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md"]
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")


def resolve(model: str | Path, progress: bool = True, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a checkpoint: `model` itself, or a hub id `org/name[@revision]`, downloaded or cached.

    Of a hub id only `files` (patterns) are fetched. The hub's own progress bars go to stderr unless
    `progress` is False. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they always do; without a network
    the cached copy is taken. CheckpointError when there is no such folder or the hub does not hand the
    model out.
    """
    if not (name := str(model)):
        raise CheckpointError("an empty model name; give a folder or a hub id org/name")
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise CheckpointError(f"{name!r} is not a folder; give the folder of the checkpoint")
    # A revision may have slashes of its own ("refs/pr/1"), a hub id has one.
    if isinstance(model, Path) or name[0] in "./~" or "\\" in name or name.split("@")[0].count("/") > 1:
        raise CheckpointError(f"{name!r}: no such folder")
    match = _HUB_ID.fullmatch(name)
    if match is None or ".." in name or "--" in match[1]:
        raise CheckpointError(f"{name!r} is neither a folder nor a hub id org/name[@revision]")
    return _download(match[1], match[2], progress, files)


def _download(repo: str, revision: str | None, progress: bool, files: Sequence[str]) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors

    # In the order of the tests: a gated repository is also one that is not found.
    advice: dict[type[Exception], str] = {
        errors.GatedRepoError: f"access is gated: accept the terms at https://huggingface.co/{repo}, "
        "then run `hf auth login` or set HF_TOKEN",
        errors.RepositoryNotFoundError: "neither a folder here nor a model that the hub shows you; "
        "for a private one run `hf auth login` or set HF_TOKEN",
        errors.RevisionNotFoundError: f"the hub has no revision {revision!r} of it",
        errors.LocalEntryNotFoundError: "not wholly in the cache, and the hub cannot be reached or "
        "HF_HUB_OFFLINE is set; connect, or give a folder",
    }
    # Errors of the HTTP client pass through the hub unchanged. Which client it is depends on the hub's
    # release, so its base class (and OSError) is taken from the hub's own. hf_xet raises RuntimeError.
    failures: tuple[type[Exception], ...] = (*errors.HfHubHTTPError.__bases__, ValueError, RuntimeError)
    try:
        with _bars(progress):
            return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except failures as error:
        reason = next((text for kind, text in advice.items() if isinstance(error, kind)), None)
        raise CheckpointError(f"{repo!r}: {reason or _failed(error)}") from None


def _failed(error: BaseException) -> str:
    """One line for an error that has no advice of its own."""
    text = " ".join(str(error).split())
    return f"download failed ({type(error).__name__}: {text[:200]}); try again: what has arrived is kept"


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Without the hub's progress bars, unless `shown`."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
