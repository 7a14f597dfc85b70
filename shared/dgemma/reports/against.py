"""How far a checkpoint is from another one of its geometry: decoded weights, and the models' logits.

The NumPy reference decodes weights of any format. They are compared class by class, a few rows or one expert
at a time, so that memory stays bounded. The price is time: minutes for the released model. Logits come from
the backend that will run the model, with one of the two loaded at a time.

    D hidden  V vocabulary  L canvas positions
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.hub import resolve
from dgemma.engine import sampler
from dgemma.errors import CheckpointError, DgemmaError, visible
from dgemma.files import Progress
from dgemma.formats.quantized import Quantized
from dgemma.formats.stored import Stored
from dgemma.model import Model
from dgemma.network import memory
from dgemma.network.config import Config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Notices, Ops
from dgemma.network.ops.decoding import dequantize
from dgemma.network.spec import GROUPS, Param, text_parameters
from dgemma.reports import tables

CHUNK = 1 << 22  # values decoded at once

# ---- weights against weights --------------------------------------------------------------------


def pair(
    folder: Path, against: str | Path, notices: Notices | None = None
) -> tuple[Checkpoint | None, Checkpoint]:
    """The checkpoint in `folder`, None if it does not open, and the one to compare it with.

    CheckpointError or ConfigError if the other one does not open or has another geometry.
    """
    other = Checkpoint.open(resolve(against, notices=notices))
    try:
        checkpoint = Checkpoint.open(folder)
    except DgemmaError:
        return None, other
    # Counts of places, token ids and the storage of numbers may differ.
    free = {"canvas_length", "max_positions", "pad_id", "image_token_id", "quantization"}
    mine, theirs = (vars(c.config) for c in (checkpoint, other))
    if differing := [key for key in mine if key not in free and _clash(key, mine[key], theirs[key])]:
        raise CheckpointError(
            f"{other.folder}: has another geometry than {folder}: {', '.join(differing)} differ; "
            "only checkpoints of one geometry can be compared"
        )
    return checkpoint, other


def _clash(key: str, mine: Any, theirs: Any) -> bool:
    """Whether two values of the configuration differ; a vision tower may be missing from one side."""
    return mine != theirs and not (key == "vision" and (mine is None or theirs is None))


@dataclass
class Sums:
    """Sums over the values a of a checkpoint and b of the other, their reference."""

    parameters: int = 0
    error: float = 0.0  # Σ (a − b)²
    mine: float = 0.0  # Σ a²
    theirs: float = 0.0  # Σ b²
    both: float = 0.0  # Σ a b

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Count values a and b, float64 of one shape."""
        with np.errstate(all="ignore"):  # non-finite weights make non-finite sums, which the report shows
            d, a, b = (a - b).ravel(), a.ravel(), b.ravel()
            self += Sums(d.size, float(d @ d), float(a @ a), float(b @ b), float(a @ b))

    def __iadd__(self, other: Sums) -> Sums:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def relative_rms(self) -> float:
        """√(Σ (a − b)² / Σ b²), infinite if only the reference is zero."""
        if self.error == 0:
            return 0.0
        return sqrt(self.error / self.theirs) if self.theirs else float("inf")

    @property
    def cosine(self) -> float:
        """Cosine of the angle between a and b, 1 if both are zero, NaN if one is."""
        if self.mine == 0 and self.theirs == 0:
            return 1.0
        norm = sqrt(self.mine) * sqrt(self.theirs)
        return max(-1.0, min(1.0, self.both / norm)) if norm else float("nan")


def compare(
    checkpoint: Checkpoint, other: Checkpoint, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """How far the decoded weights are from the other's, by class and in "total"; for JSON.

    Each class has `relative_rms` and `cosine` (null if they are not finite) and its `worst` tensor.
    Parameters that only one side has (a vision tower) are left out. `progress` counts stored bytes.
    """
    names = [name for name in checkpoint.sources if name in other.sources]
    total, done = sum(checkpoint.nbytes(name) for name in names), 0
    classes = {group: _Class() for group in (*GROUPS, "total")}
    for name in names:
        param = checkpoint.sources[name].param
        sums = _compared(checkpoint, other, param)
        for group in (param.group, "total"):
            classes[group].take(name, sums)
        done += checkpoint.nbytes(name)
        if progress:
            progress(done, total)
    return {group: found.json() for group, found in classes.items() if found.sums.parameters}


class _Class:
    """The sums of a class, and its tensor with the largest relative error; a non-finite error is largest."""

    def __init__(self) -> None:
        self.sums, self.worst, self.error = Sums(), "", -1.0

    def take(self, name: str, sums: Sums) -> None:
        self.sums += sums
        error = sums.relative_rms if isfinite(sums.relative_rms) else float("inf")
        if error > self.error:
            self.worst, self.error = name, error

    def json(self) -> dict[str, Any]:
        return {
            "parameters": self.sums.parameters,
            "relative_rms": _finite(self.sums.relative_rms),
            "cosine": _finite(self.sums.cosine),
            "worst": {"tensor": self.worst, "relative_rms": _finite(self.error)},
        }


def _finite(value: float) -> float | None:
    """`value`, or None for NaN and infinity, which JSON lacks."""
    return value if isfinite(value) else None


def _compared(checkpoint: Checkpoint, other: Checkpoint, param: Param) -> Sums:
    """The sums of one parameter. The NumPy reference decodes a few rows or one expert at a time."""
    ops, sums = NumpyOps(), Sums()
    mine, theirs = checkpoint.read(param.name), other.read(param.name)
    step = max(1, CHUNK // prod(param.shape[1:]))
    for start in range(0, param.shape[0], step):
        rows = slice(start, start + step)
        sums.add(_decoded(ops, mine, rows), _decoded(ops, theirs, rows))
    return sums


def _decoded(ops: Ops, stored: Stored | Quantized, rows: slice) -> np.ndarray:
    """Rows (or experts) of a stored parameter in its shape, float64."""
    part = stored[rows]
    if isinstance(part, Stored):
        return ops.to_numpy(ops.load(part, wide=True))
    return ops.to_numpy(dequantize(ops, ops.upload(part)))


# ---- logits against logits ----------------------------------------------------------------------

BOS, PROMPT = 2, 24  # the first token, and the number of drawn ones after it
NUMPY_LIMIT = 1e9  # parameters; a pass over more takes hours on NumPy


@dataclass(frozen=True)
class Probe:
    """Fixed inputs for two models: a prompt of token ids, a canvas [1, L] int64, uniforms [1, L] float64."""

    prompt: list[int]
    canvas: np.ndarray
    uniforms: np.ndarray


def probe(config: Config, other: Config) -> Probe:
    """The same inputs for every pair of checkpoints with this vocabulary and these lengths."""
    noise = sampler.Noise(0, 0, 0, config.vocab_size)
    length = min(config.canvas_length, other.canvas_length)
    room = min(config.max_positions, other.max_positions) - length
    drawn = noise.draw(0, max(0, min(PROMPT, room - 1)))[1]
    uniforms, canvas = (x[None] for x in noise.draw(1, length))
    return Probe([min(BOS, config.vocab_size - 1), *map(int, drawn)], canvas, uniforms)


def logits(
    checkpoint: Checkpoint, other: Checkpoint, ops: Ops, progress: Progress | None = None
) -> dict[str, Any]:
    """How far the model's distributions are from the other's on a fixed prompt and canvas; for JSON.

    "first_step" is a canvas's first step. "self_conditioned" is a step that gets the soft embedding of the
    other's first step in both models: free runs would part, so both start from the same state. The result is
    {"skipped": reason} if the two do not run here, or not at all. `progress` counts the stored bytes of each
    model.
    """
    if reason := _too_large(checkpoint, ops) or _too_large(other, ops):
        return {"skipped": reason}
    given = probe(checkpoint.config, other.config)
    try:
        soft, theirs = _passes(other, ops, given, None, progress)
        _, mine = _passes(checkpoint, ops, given, soft, progress)
    except CheckpointError as error:  # values that a load refuses
        return {"skipped": str(error)}
    return {
        "backend": ops.name,
        "prompt_tokens": len(given.prompt),
        "canvas_tokens": given.canvas.shape[1],
        "first_step": divergence(theirs[0], mine[0]),
        "self_conditioned": divergence(theirs[1], mine[1]),
    }


def _passes(
    checkpoint: Checkpoint, ops: Ops, given: Probe, soft: np.ndarray | None, progress: Progress | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """A soft embedding [1, L, D], and logits [L, V] float32 without and with it.

    It is `soft`, or for None that of the model's own first step, at the temperature of a first step.
    """
    weights = checkpoint.load(ops, progress)
    model = Model(ops, checkpoint.config, checkpoint.generation, weights, None)
    context = model.encode([given.prompt])
    if soft is None:
        heat = sampler.temperature(checkpoint.generation, checkpoint.generation.steps)
        step = model.refine(context, given.canvas, None, heat, given.uniforms, given.canvas)
        soft = ops.to_numpy(step.soft)
    return soft, [model.logits(context, given.canvas, signal)[0] for signal in (None, soft)]


def divergence(theirs: np.ndarray, mine: np.ndarray) -> dict[str, float | None]:
    """KL(theirs ‖ mine) in nats over the positions of logits [L, V], and how often the argmax agrees."""
    kl, same = [], 0
    with np.errstate(all="ignore"):
        for z, y in zip(theirs, mine, strict=True):  # position by position: the planes are large
            p, q = _log_softmax(z), _log_softmax(y)
            # Python's max(0.0, NaN) is 0.0: NaN needs a test of its own.
            kl.append(max(0.0, float(np.exp(p) @ (p - q))) if np.isfinite(q).all() else float("nan"))
            same += int(z.argmax() == y.argmax())
    return {
        "kl_mean": _finite(float(np.mean(kl))),
        "kl_max": _finite(float(np.max(kl))),
        "argmax_agreement": same / len(kl),
    }


def _log_softmax(z: np.ndarray) -> np.ndarray:
    """Log-probabilities [V] float64 of one position's logits z [V]."""
    z = z.astype(np.float64) - z.max()
    return z - np.log(np.exp(z).sum())


def _too_large(checkpoint: Checkpoint, ops: Ops) -> str | None:
    """Why this checkpoint cannot run here, in a sentence; None if it can."""
    size = sum(param.size for param in text_parameters(checkpoint.config))
    if ops.name == "numpy" and size > NUMPY_LIMIT:
        return f"{tables.count(size)} parameters are too many for the numpy backend"
    needed, free = memory_needed(checkpoint, ops), ops.free_memory()
    if free is not None and needed > free:
        return f"{checkpoint.folder} needs {tables.amount(needed)} to run, and {tables.amount(free)} are free"
    return None


def memory_needed(checkpoint: Checkpoint, ops: Ops) -> int:
    """Bytes of the loaded weights, of a decoded embedding, and of a few planes of logits."""
    config, form = checkpoint.config, memory.format_of(ops.dtype_name)
    stored = {name: source.form for name, source in checkpoint.sources.items()}
    decoded = sum(p.size for p in text_parameters(config) if p.group == "embed" and stored[p.name])
    planes = 4 * memory.vocabulary_plane(config, form)
    return memory.weight_bytes(config, form, stored) + decoded * form.wide + planes


# ---- as text ------------------------------------------------------------------------------------


def text(against: dict[str, Any]) -> list[str]:
    """The comparison with another checkpoint, its "model" included, as lines of text."""
    lines = [f"against {visible(against['model'])}"]
    if "skipped" in against:
        return [*lines, f"  not compared: {against['skipped']}"]
    rows = [["weights", "rel. RMS error", "cosine", "worst", "its error"]]
    for group, own in against["weights"].items():
        worst = own["worst"]
        errors = _percent(own["relative_rms"]), _shown(own["cosine"], ".6f")
        rows.append([f"  {group}", *errors, worst["tensor"], _percent(worst["relative_rms"])])
    lines += tables.columns(rows)
    return lines + _logits_text(against["logits"]) if "logits" in against else lines


def _logits_text(found: dict[str, Any]) -> list[str]:
    if "skipped" in found:
        return ["", f"logits not compared: {found['skipped']}"]
    where = f"logits of {found['canvas_tokens']} positions, {found['backend']}"
    rows = [[where, "mean KL, nats", "largest", "same argmax"]]
    for name, label in (("first_step", "first step"), ("self_conditioned", "self-conditioned")):
        own = found[name]
        kl = _shown(own["kl_mean"], ".3g"), _shown(own["kl_max"], ".3g")
        rows.append([f"  {label}", *kl, f"{100 * own['argmax_agreement']:.1f} %"])
    return ["", *tables.columns(rows)]


def _shown(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "not finite" if value is None else f"{100 * value:.3g} %"
