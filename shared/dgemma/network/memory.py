"""The memory that a model takes, from its geometry: weights, keys and values, logits.

The numbers leave out a framework's own memory (activations, compiled kernels), which is small beside them at
full size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dgemma.formats.quantized import Form
from dgemma.network.config import Config, LayerConfig
from dgemma.network.ops import Ops
from dgemma.network.spec import Param, text_parameters


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

NOTHING_QUANTIZED: Mapping[str, Form | None] = {}


def format_of(dtype: str) -> Format:
    """The format of a compute type's name."""
    return next(form for form in FORMATS if form.dtype == dtype)


def weight_bytes(config: Config, form: Format, stored: Mapping[str, Form | None] = NOTHING_QUANTIZED) -> int:
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


def kv_slot_bytes(layer: LayerConfig, form: Format) -> int:
    """Key and value of one token in one layer. Full layers store both: V is K's projection before k_norm."""
    return 2 * layer.kv_heads * layer.head_dim * form.compute


def kv_bytes(config: Config, form: Format, tokens: int) -> int:
    """Keys and values of a context in all layers.

    Full layers keep every token. Sliding layers keep window − 1 and a canvas, so that a canvas can be
    taken back.
    """
    return sum(
        kv_slot_bytes(layer, form)
        * (tokens if layer.past is None else min(tokens, layer.past + config.canvas_length))
        for layer in config.layers
    )


def row_bytes(config: Config, form: Format, tokens: int) -> int:
    """What a row that grows to so many tokens takes: its context, and its canvas's soft embedding.

    While a sliding layer grows it is there twice, with a canvas more.
    """
    canvas = config.canvas_length
    grown = [kv_slot_bytes(layer, form) * (layer.past + 2 * canvas) for layer in config.layers if layer.past]
    largest = max(grown, default=0)
    soft = canvas * config.hidden_size * form.compute
    return kv_bytes(config, form, tokens) + largest + 2 * soft


def vocabulary_bytes(config: Config, form: Format) -> int:
    """The plane of logits of one canvas: at most `Ops.vocab_rows` positions, wide.

    PyTorch's plain path and NumPy keep all of it, MLX a few tiles, CUDA's kernels half.
    """
    return min(Ops.vocab_rows, config.canvas_length) * config.vocab_size * form.wide
