"""The tensors that a checkpoint must have, and what is wrong with those that it has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.checkpoint.layouts.announced import SUPPORTED
from dgemma.checkpoint.layouts.base import Layout, Piece, Source
from dgemma.checkpoint.safetensors import Entry
from dgemma.errors import CheckpointError
from dgemma.files import exists, load_json
from dgemma.network.config import Config
from dgemma.network.spec import Param, is_skipped, parameters, text_parameters

# Names that only quantized formats use: MLX, ModelOpt, compressed-tensors, GPTQ.
_QUANTIZED = re.compile(
    r".*(\.(scales|biases|qweight|qzeros)|(weight|input)_(packed|shape|scale(_2)?|scale_inv|global_scale))"
)

# Names of tensors that change what weights mean, by what they hold. No format here computes with them.
_FOREIGN = {
    "an order of inputs (actorder)": r"(\w+_)?g_idx",
    "scales of inputs (AWQ, SmoothQuant)": r"(pre_quant|smooth\w*)_(scale|factor)\w*",
    "zero points": r"(\w+_)?zero_points?|qzeros",
    "rotations": r"\w*(rotat|hadamard|transform)\w*|R[1-4](_\w+)?",
    "GPTQ's or AWQ's words": r"qweight",
    "scales of blocks of rows (FP8)": r"weight_scale_inv",
    "bitsandbytes' blocks": r"absmax|quant_map|nested_\w+|quant_state\w*|SCB",
    "MXFP4 blocks of another layout": r"\w+_proj_(blocks|scales)",
    "sparse weights": r"bitmask|row_offsets|compressed",
    "codebooks": r"centroids|codebooks?|indices|vptq\w*",
}

HF_QUANT_CONFIG = "hf_quant_config.json"


def find_announcement(folder: Path, config: Config) -> tuple[Mapping[str, Any] | None, str]:
    """A folder's announcement of its quantization, and the file that holds it.

    Older ModelOpt exports announce it only in hf_quant_config.json.
    """
    path = folder / HF_QUANT_CONFIG
    if config.quantization is not None or not exists(path):
        return config.quantization, str(folder / "config.json")
    own = load_json(path).get("quantization")
    if not isinstance(own, Mapping):
        raise CheckpointError(f"{path}: has no usable 'quantization'")
    return {"quant_method": "modelopt", **own}, str(path)


def find_contradictions(
    layout: Layout, sources: Sequence[Source], entries: Mapping[str, Entry]
) -> Iterator[str]:
    """Where the tensors' names contradict the announcement; `find_faults` finds single wrong tensors."""
    yield from _foreign(sources, entries)
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
    """What is wrong with one tensor. `kind` completes "3 tensors …"; `text` names it and gives details."""

    kind: str
    name: str
    file: Path | None  # None for a missing one
    text: str


def find_faults(wanted: Mapping[str, Piece], entries: Mapping[str, Entry]) -> Iterator[Fault]:
    """All tensors that are missing, unknown, of the wrong type or of the wrong shape, in this order.

    A tensor that nothing reads may be missing, but is of its type and shape where it is present.
    """
    known = [(entry, wanted[name]) for name, entry in entries.items() if name in wanted]
    for name, piece in wanted.items():
        if name not in entries and piece.role != "unused":
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


def summary(faults: Sequence[Fault]) -> str:
    """Each kind of fault with its number and its first tensors, in one line."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault.text)
    return "; ".join(f"{_count(found)} {kind}: {_first(found)}" for kind, found in kinds.items())


def _looks_quantized(entry: Entry) -> bool:
    """Whether a tensor has a name or a type that only quantized formats use."""
    # Plain weights are floats of 16 bits or more: integers and 8-bit types are codes.
    own = _QUANTIZED.fullmatch(entry.name) or re.match("[UI]|F8", entry.dtype)
    return own is not None and not is_skipped(entry.name)


def _foreign(sources: Sequence[Source], entries: Mapping[str, Entry]) -> Iterator[str]:
    """Tensors of a quantization that no format here has, whether config.json announces it or not."""
    known = {piece.name for source in sources for piece in source.pieces}
    unknown = [name for name in entries if name not in known and not is_skipped(name)]
    for what, pattern in _FOREIGN.items():
        ending = re.compile(rf"(.*\.)?({pattern})(\.\w+)?")
        if found := [f"{name!r} in {entries[name].file.name}" for name in unknown if ending.fullmatch(name)]:
            yield (
                f"quantized with {what}, which is not supported; supported: {SUPPORTED}; "
                f"{_count(found)}: {_first(found)}"
            )


def _unannounced(entries: Mapping[str, Entry]) -> Iterator[str]:
    """Quantized tensors of a checkpoint whose config.json does not say so: their format is unknown."""
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


def expected_parameters(config: Config, entries: Iterable[str]) -> list[Param]:
    """The table to check against. A text-only export may lack the vision tower, but not a part of it."""
    vision = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
    if any(name.startswith(vision) for name in entries):
        return parameters(config)
    return text_parameters(config)


def _count(found: list[str]) -> str:
    return f"{len(found)} tensor{'s' * (len(found) != 1)}"


def _first(found: list[str], most: int = 3) -> str:
    return ", ".join(found[:most]) + (", …" if len(found) > most else "")
