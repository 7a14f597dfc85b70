"""How a flat table of tensors becomes the typed tree of weights, and the values that no tensor holds.

C head size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from dgemma.network.config import Config, LayerConfig
from dgemma.network.ops import Ops
from dgemma.network.spec import Param
from dgemma.network.weights import (
    Array,
    AttentionWeights,
    BiasWeights,
    ConditioningWeights,
    ExpertWeights,
    LayerWeights,
    MlpWeights,
    RouterWeights,
    Weights,
)

if TYPE_CHECKING:
    from dgemma.network.ops import Ops


def rope_frequencies(layer: LayerConfig) -> np.ndarray:
    """Angle per position of each pair, [C/2] float64: θ^(−2i/C)/factor for the rotated pairs, then 0.

    The exponent runs over the whole head, even if only a part rotates (model.md, "proportional").
    """
    pairs = np.arange(layer.head_dim // 2)
    frequencies = layer.rope_theta ** (-2.0 * pairs / layer.head_dim) / layer.rope_factor
    return np.where(pairs < layer.rope_pairs, frequencies, 0.0)


def build(
    config: Config,
    table: list[Param],
    leaf: Callable[[Param], Array],
    constants: Mapping[str, Any],
    ops: Ops,
) -> Weights:
    """The tree of a text model: `leaf(param)` supplies each tensor of `table`, in table order.

    `constants` are the fields of `Weights` that no tensor holds (embed_scale, frequencies). `ops` may stack a
    layer's matrices.
    """
    tree: dict[str | int, Any] = {}
    for param in table:
        node = tree
        for key in param.path[:-1]:
            node = node.setdefault(key, {})
        node[param.path[-1]] = leaf(param)
    layers = tuple(_layer(tree["layers"][index], ops) for index in range(len(config.layers)))
    return Weights(
        embed=tree["embed"],
        norm=tree["norm"],
        self_conditioning=ConditioningWeights(**tree["self_conditioning"]),
        layers=layers,
        **constants,
    )


def _layer(node: dict[str, Any], ops: Ops) -> LayerWeights:
    """One layer from its nested dictionary of arrays, which it empties."""
    parts: dict[str, Any] = {
        "attention": AttentionWeights(**node.pop("attention")),
        "mlp": MlpWeights(**node.pop("mlp")),
        "experts": ExpertWeights(**node.pop("experts")),
        "router": RouterWeights(**node.pop("router")),
        "bias": BiasWeights(**node.pop("bias", {})),
        "encoder_bias": BiasWeights(**node.pop("encoder_bias", {})),
    }
    return ops.layer_weights(LayerWeights(**parts, **node))


def constants(config: Config, ops: Ops) -> dict[str, Any]:
    """The fields of `Weights` that no tensor holds: √D as a float, frequencies [C/2] wide by layer kind."""
    layers = {layer.kind: layer for layer in config.layers}
    return {
        "embed_scale": ops.rounded(sqrt(config.hidden_size)),
        "frequencies": {kind: ops.aswide(rope_frequencies(layer)) for kind, layer in layers.items()},
    }
