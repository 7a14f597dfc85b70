"""How far a checkpoint is from another one of its geometry: decoded weights, and what the models say.

Weights are decoded by the NumPy reference, whatever the format, and compared class by class; rows or single
experts at a time, so that memory stays bounded. The price is time: minutes for the released model. Logits
come from the backends that will run the model, with one of the two loaded at a time.

    I inputs  D hidden  V vocabulary  L canvas positions
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
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.files import Progress
from dgemma.formats.quantized import Quantized
from dgemma.formats.stored import Stored
from dgemma.model import Model
from dgemma.network.config import Config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Ops
from dgemma.network.ops.decoding import dequantize
from dgemma.network.spec import GROUPS, Param, text_parameters
from dgemma.reports import info, tables

CHUNK = 1 << 22  # values decoded at once

# ---- weights against weights --------------------------------------------------------------------


def pair(folder: Path, against: str | Path) -> tuple[Checkpoint | None, Checkpoint]:
    """The checkpoint in `folder`, None if it does not open, and the one to compare it with.

    CheckpointError or ConfigError if the other one does not open or has another geometry.
    """
    other = Checkpoint.open(resolve(against))
    try:
        checkpoint = Checkpoint.open(folder)
    except DgemmaError:
        return None, other
    # What is counted in places, or says how numbers are stored, may differ.
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
        with np.errstate(all="ignore"):  # non-finite weights make the sums so, and these are shown as such
            d, a, b = (a - b).ravel(), a.ravel(), b.ravel()
            self += Sums(d.size, float(d @ d), float(a @ a), float(b @ b), float(a @ b))

    def __iadd__(self, other: Sums) -> Sums:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def relative_rms(self) -> float:
        """√(Σ (a − b)² / Σ b²), infinite for a reference of zeros that is not met."""
        if self.error == 0:
            return 0.0
        return sqrt(self.error / self.theirs) if self.theirs else float("inf")

    @property
    def cosine(self) -> float:
        """Cosine of the angle between a and b, 1 for two vectors of zeros, NaN for one."""
        if self.mine == 0 and self.theirs == 0:
            return 1.0
        norm = sqrt(self.mine) * sqrt(self.theirs)
        return max(-1.0, min(1.0, self.both / norm)) if norm else float("nan")


def compare(
    checkpoint: Checkpoint, other: Checkpoint, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """How far the decoded weights are from the other's, by class and in "total"; for JSON.

    `relative_rms` and `cosine` (null where they are not finite) and the `worst` tensor of the class.
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
    """The sums of a class, and its tensor with the largest relative error; one that is not finite leads."""

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
    """JSON has no NaN and no infinity."""
    return value if isfinite(value) else None


def _compared(checkpoint: Checkpoint, other: Checkpoint, param: Param) -> Sums:
    """The sums of one parameter, decoded by the NumPy reference a few rows or an expert at a time."""
    ops, sums = NumpyOps(), Sums()
    mine, theirs = checkpoint.read(param.name), other.read(param.name)
    step = max(1, CHUNK // prod(param.shape[1:]))
    for start in range(0, param.shape[0], step):
        rows = slice(start, start + step)
        sums.add(_decoded(ops, mine, rows), _decoded(ops, theirs, rows))
    return sums


def _decoded(ops: Ops, stored: Stored | Quantized, rows: slice) -> np.ndarray:
    """Rows (or experts) of a stored parameter, float64."""
    part = stored[rows]
    if isinstance(part, Stored):
        return ops.to_numpy(ops.load(part, wide=True))
    return ops.to_numpy(dequantize(ops, ops.upload(part)))


# ---- logits against logits ----------------------------------------------------------------------

BOS, PROMPT = 2, 24  # the first token, and how many drawn ones follow it
NUMPY_LIMIT = 1e9  # parameters beyond which a pass on NumPy takes hours


@dataclass(frozen=True)
class Probe:
    """Fixed inputs for two models: a prompt of token ids, a canvas [1, L], and uniforms [1, L]."""

    prompt: list[int]
    canvas: np.ndarray
    uniforms: np.ndarray


def probe(config: Config, other: Config) -> Probe:
    """The same inputs for every pair of checkpoints with this vocabulary and these lengths."""
    noise = sampler.Noise(0, (0,), 0, config.vocab_size)
    length = min(config.canvas_length, other.canvas_length)
    room = min(config.max_positions, other.max_positions) - length
    drawn = noise.draw(0, max(0, min(PROMPT, room - 1)))[1][0]
    uniforms, canvas = noise.draw(1, length)
    return Probe([min(BOS, config.vocab_size - 1), *map(int, drawn)], canvas, uniforms)


def logits(
    checkpoint: Checkpoint, other: Checkpoint, ops: Ops, progress: Progress | None = None
) -> dict[str, Any]:
    """How far the model's distributions are from the other's on a fixed prompt and canvas; for JSON.

    "first_step" is a canvas's first step, "self_conditioned" one to which both get the soft embedding of the
    other's first step. {"skipped": reason} where the two do not run here. One model is loaded at a time;
    `progress` counts the stored bytes of each.
    """
    if reason := _too_large(checkpoint, ops) or _too_large(other, ops):
        return {"skipped": reason}
    given = probe(checkpoint.config, other.config)
    soft, theirs = _passes(other, ops, given, None, progress)
    _, mine = _passes(checkpoint, ops, given, soft, progress)
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
    """`soft` (None: that of the model's own first step) and logits [L, V] without and with it.

    The first step is one at the checkpoint's highest temperature, as in generating.
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
            kl.append(max(0.0, float(np.exp(p) @ (p - q))) if np.isfinite(q).all() else float("nan"))
            same += int(z.argmax() == y.argmax())
    return {
        "kl_mean": _finite(float(np.mean(kl))),
        "kl_max": _finite(float(np.max(kl))),
        "argmax_agreement": same / len(kl),
    }


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64) - z.max()
    return z - np.log(np.exp(z).sum())


def _too_large(checkpoint: Checkpoint, ops: Ops) -> str | None:
    """Why this checkpoint cannot run here, in a sentence; None where nothing speaks against it."""
    size = sum(param.size for param in text_parameters(checkpoint.config))
    if ops.name == "numpy" and size > NUMPY_LIMIT:
        return f"{tables.count(size)} parameters are too many for the numpy backend"
    needed, free = memory_needed(checkpoint, ops), ops.free_memory()
    if free is not None and needed > free:
        return f"{checkpoint.folder} needs {tables.amount(needed)} to run, and {tables.amount(free)} are free"
    return None


def memory_needed(checkpoint: Checkpoint, ops: Ops) -> int:
    """Bytes of the loaded weights, of a decoded embedding, and of a few planes of logits."""
    config, form = checkpoint.config, _format(ops)
    stored = {name: source.form for name, source in checkpoint.sources.items()}
    decoded = sum(p.size for p in text_parameters(config) if p.group == "embed" and stored[p.name])
    planes = 4 * info.vocabulary_bytes(config, form)
    return info.weight_bytes(config, form, stored) + decoded * form.wide + planes


def _format(ops: Ops) -> info.Format:
    return next(form for form in info.FORMATS if form.dtype == ops.dtype_name)


# ---- as text ------------------------------------------------------------------------------------


def text(against: dict[str, Any]) -> list[str]:
    """What was found against another checkpoint, with its "model", as lines to read."""
    lines = [f"against {against['model']}"]
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
