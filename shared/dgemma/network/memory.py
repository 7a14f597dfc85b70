"""The memory that a model takes, from its geometry: weights, contexts, canvases, and the widest pass.

`dgemma info`, `load` and the engine's admission all count by this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgemma.formats.quantized import Form
from dgemma.network.config import Config, LayerConfig
from dgemma.network.ops import Ops
from dgemma.network.passes import Backend, Work, attention_bytes, backend_of, moments, slot_bytes
from dgemma.network.runner import PREFILL_CHUNK
from dgemma.network.spec import Param, text_parameters
from dgemma.network.weights import Weights

Forms = Mapping[str, Form | None]  # of parameters by name


@dataclass(frozen=True)
class Format:
    """How a backend holds numbers: bytes of the compute type (weights, cache) and of the wide type."""

    backends: str
    dtype: str
    compute: int
    wide: int


FORMATS = (
    Format("mlx, cuda", "bfloat16", 2, 4),
    Format("mlx, cuda", "float32", 4, 4),
    Format("numpy", "float64", 8, 8),
)

NOTHING_QUANTIZED: Forms = {}


def format_of(dtype: str) -> Format:
    """The format of a compute type's name."""
    return next(form for form in FORMATS if form.dtype == dtype)


def weight_bytes(config: Config, form: Format, stored: Forms = NOTHING_QUANTIZED) -> int:
    """Loaded weights: the text model in the compute type, its router in the wide one.

    `stored` has the forms of parameters by name. Records stay packed, but for the router's.
    """
    return sum(_loaded_bytes(param, form, stored.get(param.name)) for param in text_parameters(config))


def _loaded_bytes(param: Param, form: Format, quantized: Form | None) -> int:
    if param.wide:
        return param.size * form.wide
    if quantized is None:
        return param.size * form.compute
    rows, inputs = param.size // param.shape[-1], param.shape[-1]
    groups = rows * (inputs // quantized.group) if quantized.group else 0
    # Affine scales and biases have the compute type, codes of scales one byte.
    scales = groups * (2 * form.compute if quantized.is_affine else 1)
    factors = rows * form.wide if quantized.scales_rows else 0
    return param.size * quantized.bits // 8 + scales + factors


def kv_bytes(config: Config, compute: int, tokens: int) -> int:
    """Keys and values of a context in all layers, in numbers of `compute` bytes.

    Full layers keep every token. Sliding layers keep window − 1 and a canvas, so that a canvas can be
    taken back.
    """
    return sum(slot_bytes(layer, compute) * _slots(config, layer, tokens) for layer in config.layers)


def _slots(config: Config, layer: LayerConfig, tokens: int) -> int:
    return tokens if layer.past is None else min(tokens, layer.past + config.canvas_length)


def row_bytes(config: Config, backend: Backend, tokens: int) -> int:
    """What a row that grows to so many tokens takes beside the weights and the pass that all rows share.

    Its context, one layer of it twice while that grows, its canvas, and its scores and joined keys, which no
    other row has at the same time: rows that share an engine reserve more of these than they use.
    """
    widest = max(
        attention_bytes(backend, config, work) for work in (_prompt(1, tokens), _canvases(config, 1, tokens))
    )
    context = kv_bytes(config, backend.compute, tokens) + _growth(config, backend, tokens)
    return context + _canvas_bytes(config, backend) + widest


def pass_bytes(config: Config, backend: Backend, rows: int, forms: Forms = NOTHING_QUANTIZED) -> int:
    """The widest pass of so many rows, whose prompts come one by one, without what `row_bytes` counts."""
    tokens = PREFILL_CHUNK + rows * config.canvas_length
    works = (Work(tokens, 1, 0, True), Work(rows * config.canvas_length, 1, 0, False))
    each = [max(moments(backend, config, work, forms).values()) for work in works]
    return sum(each) if backend.kernels else max(each)


def room(ops: Ops, config: Config, rows: int, forms: Forms = NOTHING_QUANTIZED) -> int | None:
    """Bytes that `row_bytes` of all rows may come to on this machine now, weights loaded; None if unknown.

    It is what is free, less a pass of so many rows, less a tenth, which allocators lose between their blocks.
    """
    free = ops.free_memory()
    return (
        None if free is None else max(0, int(0.9 * free) - pass_bytes(config, backend_of(ops), rows, forms))
    )


def forms_of(config: Config, weights: Weights) -> dict[str, Form | None]:
    """The forms of parameters by name, from loaded weights; of stacked ones only where the stack stands."""
    forms: dict[str, Form | None] = {}
    for param in text_parameters(config):
        leaf: Any = weights
        for key in param.path:
            leaf = leaf[key] if isinstance(key, int) else getattr(leaf, key)
        form = getattr(leaf, "form", None)
        forms[param.name] = form if isinstance(form, Form) else None
    return forms


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a run, by part.

    `widest` says which part of which pass has the most temporaries; of a recorded step and a pass both count.
    `process` is what the interpreter and the framework take without a model, 0 where a backend's peak is that
    of its arrays, None if unknown.
    """

    weights: int
    contexts: int
    canvases: int
    temporaries: int
    widest: str
    process: int | None = 0

    @property
    def total(self) -> int:
        """All parts that are known."""
        return self.weights + self.contexts + self.canvases + self.temporaries + (self.process or 0)


def predict(
    config: Config,
    backend: Backend,
    rows: int,
    tokens: int,
    forms: Forms = NOTHING_QUANTIZED,
    process: int | None = 0,
) -> Memory:
    """The peak of a run that encodes rows together, which come to so many tokens of context each.

    `forms` are those of quantized parameters by name.
    """
    L, weights = config.canvas_length, weight_bytes(config, format_of(backend.dtype), forms)
    works = {
        "a prompt": _prompt(rows, tokens),
        "a step": _canvases(config, rows, tokens),
        "a commit": Work(rows * L, min(L, tokens), max(0, tokens - L), True),
    }
    parts = {
        f"{part} of {name}": size
        for name, work in works.items()
        for part, size in moments(backend, config, work, forms).items()
    }
    for name in ("a prompt", "a commit"):
        new = works[name].tokens * kv_bytes(config, backend.compute, 1)
        parts[f"contexts of {name}"] = new + _growth(config, backend, tokens)
    contexts, canvases = (
        rows * kv_bytes(config, backend.compute, tokens),
        rows * _canvas_bytes(config, backend),
    )
    parts["a tensor that is loaded"] = _loading(config, backend, forms) - contexts - canvases
    widest = max(parts, key=lambda name: parts[name])
    most = parts[widest]
    if backend.kernels:  # what recorded steps write in is theirs for good
        steps = {name: size for name, size in parts.items() if name.endswith("a step")}
        others = {name: size for name, size in parts.items() if name not in steps}
        recorded, widest = (max(some, key=lambda name: parts[name]) for some in (steps, others))
        most, widest = parts[recorded] + parts[widest], f"{recorded}, {widest}"
    staged = _staged(config, backend, forms)
    known = None if process is None else process + staged if backend.whole_process else 0
    return Memory(weights, contexts, canvases, most, widest, known)


def vocabulary_plane(config: Config, form: Format) -> int:
    """The plane of logits of one canvas, wide: at most `Ops.vocab_rows` positions.

    PyTorch's plain path and NumPy keep all of it, MLX a few tiles, CUDA's kernels half.
    """
    return min(Ops.vocab_rows, config.canvas_length) * config.vocab_size * form.wide


def _prompt(rows: int, tokens: int) -> Work:
    """The last pass over prompts: first come, first served, so that it may be all of one row's."""
    queries = min(PREFILL_CHUNK, tokens)
    return Work(min(PREFILL_CHUNK, rows * tokens), queries, tokens - queries, True)


def _canvases(config: Config, rows: int, tokens: int) -> Work:
    return Work(rows * config.canvas_length, config.canvas_length, tokens, False)


def _canvas_bytes(config: Config, backend: Backend) -> int:
    """A canvas's soft embedding: of the last step, as this step's input, and as its result."""
    return 3 * config.canvas_length * config.hidden_size * backend.compute


def _growth(config: Config, backend: Backend, tokens: int) -> int:
    """The widest layer's piece that is there twice while a context grows."""
    return max(
        slot_bytes(layer, backend.compute) * min(_slots(config, layer, tokens), backend.piece_slots)
        for layer in config.layers
    )


def _loading(config: Config, backend: Backend, forms: Forms) -> int:
    """What the largest tensor takes beside itself: as it is stored, twice where a file's map counts.

    NumPy makes float32 of it on the way.
    """
    if backend.place == "GPU" and backend.dtype == "bfloat16":
        return 0
    between = 4 if backend.name == "numpy" else 0
    return max(
        _stored_bytes(param, forms) * (1 + (backend.whole_process and backend.name != "numpy"))
        + (0 if forms.get(param.name) else between * param.size)
        for param in text_parameters(config)
    )


def _staged(config: Config, backend: Backend, forms: Forms) -> int:
    """The part of PyTorch's buffers for uploads that tensors have filled."""
    largest = max(_stored_bytes(param, forms) for param in text_parameters(config))
    return min(backend.staging, largest) + min(backend.staging, max(0, largest - backend.staging))


def _stored_bytes(param: Param, forms: Forms) -> int:
    """A parameter in its file, where it is bfloat16 or a record's codes."""
    form = forms.get(param.name)
    return param.size * (form.bits if form else 16) // 8
