"""Which tensors a conversion writes: worked out from headers alone, before a weight is read.

The whole output is known from here on, names and offsets included. So parts of tensors can be written in any
order, and a killed run can be told from a finished one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import dgemma
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.layouts.base import Layout, Piece, Place, Source
from dgemma.checkpoint.safetensors import DTYPES
from dgemma.errors import ConfigError
from dgemma.files import load_json
from dgemma.formats.quantized import Form
from dgemma.network.config import Config, read_config
from dgemma.network.memory import FORMATS
from dgemma.network.spec import Param, parameters
from dgemma.reports.info import memory
from dgemma.reports.tables import amount, columns

from .bf16 import Bf16Target
from .mlx import MlxTarget
from .nvfp4 import Nvfp4Target
from .recipe import CLASSES, recipe
from .source import listed
from .target import Target

TARGETS: dict[str, Target] = {target.name: target for target in (MlxTarget(), Nvfp4Target(), Bf16Target())}
SHARD_BYTES = 5_000_000_000
_DTYPES = ("dtype", "torch_dtype")  # transformers' names for it, now and before
_ANNOUNCEMENTS = ("quantization", "quantization_config", "dgemma")


@dataclass(frozen=True)
class Output:
    """A tensor to write: field `role` of its parameter's record, or the part at `place`."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    place: Place | None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class Job:
    """One parameter: how it is stored and what becomes of it."""

    source: Source
    form: Form | None
    outputs: tuple[Output, ...]
    factored: bool

    @property
    def param(self) -> Param:
        return self.source.param

    @property
    def kept(self) -> bool:
        """Whether codes and scales pass through as they are."""
        return self.form is not None and self.form == self.source.form

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Plan:
    """A whole conversion. `config` and `files` are the JSON files of the output, by name in `files`."""

    target: Target
    geometry: Config
    jobs: tuple[Job, ...]
    stored: Mapping[str, int]  # bytes of each parameter in the source
    config: Mapping[str, Any]
    files: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    @property
    def tensors(self) -> int:
        return sum(len(job.outputs) for job in self.jobs)

    def shards(self) -> list[tuple[str, list[Job]]]:
        """File names with the parameters in them, in order; none above SHARD_BYTES if no parameter is."""
        parts: list[list[Job]] = [[]]
        size = 0
        for job in self.jobs:
            if parts[-1] and size + job.nbytes > SHARD_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(job)
            size += job.nbytes
        if len(parts) == 1:
            return [("model.safetensors", parts[0])]
        name = f"model-{{:05}}-of-{len(parts):05}.safetensors"
        return [(name.format(index + 1), part) for index, part in enumerate(parts)]


def make_plan(
    folder: Path, to: str, preset: str = "balanced", settings: Sequence[str] = (), source_name: str = ""
) -> tuple[Plan, Checkpoint | None]:
    """The conversion of a folder, and its checkpoint; None for a folder with config.json and no weights.

    Such a folder is taken for the release's bfloat16, so that a plan can be made before a download.
    ConfigError and CheckpointError say what is wrong with files and settings.
    """
    names = listed(folder)
    raw = load_json(folder / "config.json")
    checkpoint = Checkpoint.open(folder) if any(".safetensors" in name for name in names) else None
    if checkpoint is not None:
        geometry = checkpoint.config
        sources = list(checkpoint.sources.values())
        stored = {name: checkpoint.nbytes(name) for name in checkpoint.sources}
    else:
        geometry = read_config(raw, str(folder / "config.json"))
        sources = [Layout().source(param) for param in parameters(geometry)]
        stored = {source.param.name: 2 * source.param.size for source in sources}
    if to not in TARGETS:
        raise ConfigError(f"unknown target {to!r}; known: {', '.join(TARGETS)}")
    target = TARGETS[to]
    params = [source.param for source in sources]
    chosen = recipe(target.presets[preset], settings, params, target.stores)
    forms = {param.name: chosen.form(param) for param in params}
    target.check(params, forms)
    jobs = _jobs(target, sources, forms, checkpoint)
    bare = _in_bf16({key: value for key, value in raw.items() if key not in _ANNOUNCEMENTS})
    config = target.announce(bare, params, forms)
    own = folder / "generation_config.json"
    if to == "mlx" and own.exists():  # mlx-community's files have it inside as well
        config = config | {"generation_config": load_json(own)}
    made = {
        "version": dgemma.__version__,
        "source": source_name or folder.name,
        "target": to,
        "preset": preset,
        "settings": list(settings),
    }
    plan = Plan(target, geometry, tuple(jobs), stored, config | {"dgemma": made}, target.files(params, forms))
    return plan, checkpoint


def _in_bf16(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, where every type that it names, in its sections as well, is what is written: bfloat16."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            made[key] = _in_bf16(value)
        else:
            made[key] = "bfloat16" if key in _DTYPES and value is not None else value
    return made


def _jobs(
    target: Target, sources: Sequence[Source], forms: Mapping[str, Form | None], checkpoint: Checkpoint | None
) -> list[Job]:
    factored = {source.param.name for source in sources if _factored(target, source, forms)}
    layout = target.layout([source.param for source in sources], forms, factored)
    jobs = []
    for source in sources:
        form = forms[source.param.name]
        outputs = tuple(
            Output(p.name, p.role, _dtype(p, source, form, checkpoint), p.shapes[0], p.place)
            for p in layout.pieces(source.param, form)
        )
        jobs.append(Job(source, form, outputs, source.param.name in factored))
    return jobs


def _factored(target: Target, source: Source, forms: Mapping[str, Form | None]) -> bool:
    """Whether the output's record has a factor: one that is kept, or one that quantizing makes."""
    form = forms[source.param.name]
    if form is None:
        return False
    has = any(piece.role == "factor" for piece in source.pieces)
    return target.factored(form) or (form == source.form and has)


def _dtype(piece: Piece, source: Source, form: Form | None, checkpoint: Checkpoint | None) -> str:
    """The type to write a tensor in: float scales that pass through keep theirs, and biases have the same."""
    if form == source.form and piece.role in ("scales", "biases") and checkpoint is not None:
        own = next(p.name for p in source.pieces if p.role == "scales")
        if (dtype := checkpoint.entries[own].dtype) in piece.dtypes:
            return dtype
    return piece.dtypes[0]


def header(jobs: Sequence[Job], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a shard and every tensor's offset in it. Padded to 8 bytes, as all writers do."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for output in (output for job in jobs for output in job.outputs):
        offsets[output.name] = end
        end += output.nbytes
        spans = [offsets[output.name], end]
        header[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": spans}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {name: start + offset for name, offset in offsets.items()}


# ---- as a report --------------------------------------------------------------------------------


def report(plan: Plan) -> dict[str, Any]:
    """What `--plan` prints, ready for JSON: what each class becomes, its bytes, and the memory to run."""
    forms = {job.param.name: job.form for job in plan.jobs}
    classes = []
    for group in (*CLASSES, "norm"):
        jobs = [job for job in plan.jobs if job.param.group == group]
        if jobs:
            classes.append(
                {
                    "class": group,
                    "becomes": _becomes(jobs),
                    "parameters": sum(job.param.size for job in jobs),
                    "bytes_before": sum(plan.stored[job.param.name] for job in jobs),
                    "bytes_after": sum(job.nbytes for job in jobs),
                }
            )
    return {
        "target": plan.target.name,
        "classes": classes,
        "tensors": plan.tensors,
        "bytes_before": sum(plan.stored.values()),
        "bytes_after": plan.nbytes,
        "shards": len(plan.shards()),
        "memory": [memory(plan.geometry, form, forms) for form in FORMATS],
    }


def _becomes(jobs: Sequence[Job]) -> str:
    """The forms of a class's matrices, most weights first."""
    sizes: dict[str, int] = {}
    for job in jobs:
        form = "bf16" if job.form is None else str(job.form)
        sizes[form] = sizes.get(form, 0) + job.param.size
    return ", ".join(sorted(sizes, key=lambda form: -sizes[form]))


def text(facts: Mapping[str, Any]) -> str:
    """The report of `report` to read."""
    rows = [["class", "becomes", "before", "after"]]
    rows += [
        [c["class"], c["becomes"], amount(c["bytes_before"]), amount(c["bytes_after"])]
        for c in facts["classes"]
    ]
    rows.append(["all", "", amount(facts["bytes_before"]), amount(facts["bytes_after"])])
    files = f"{facts['tensors']:,} tensors, {facts['bytes_after']:,} bytes in {facts['shards']} files"
    contexts = list(facts["memory"][0]["total"])
    needs = [["memory to run one row", "weights", *(f"at {tokens:,}" for tokens in contexts)]]
    for m in facts["memory"]:
        totals = (amount(m["total"][tokens]) for tokens in contexts)
        needs.append([f"{m['backends']}, {m['dtype']}", amount(m["weights"]), *totals])
    return "\n".join([*columns(rows), "", files, "", *columns(needs)])
