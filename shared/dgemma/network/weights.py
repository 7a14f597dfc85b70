"""The typed tree of weights that the graph reads, and how a flat table becomes one.

A leaf is whatever `Ops.place` made of a stored tensor: an array of the backend, or (for quantized
checkpoints) a record that `linear` and `expert_linear` accept. The graph cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dgemma.network.config import Config, LayerConfig
from dgemma.network.spec import Param

if TYPE_CHECKING:
    from dgemma.network.ops import Ops

Array = Any  # numpy.ndarray, mlx.core.array or torch.Tensor


@dataclass(frozen=True)
class AttentionWeights:
    q: Array  # [H·C, D]; with k's and v's rows below where a backend has stacked them
    k: Array  # [G·C, D]; None where it is in q
    o: Array  # [D, H·C]
    q_norm: Array  # [C]
    k_norm: Array  # [C]
    v: Array | None = None  # [G·C, D]; None on full layers, where V is k's projection, and where it is in q
    rows: tuple[int, ...] = ()  # of q, k and, if it has its own, v, where they are stacked


@dataclass(frozen=True)
class BiasWeights:
    """Biases of the four projections, all None in the released model."""

    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    o: Array | None = None


@dataclass(frozen=True)
class MlpWeights:
    gate: Array  # [F, D]
    up: Array  # [F, D]; None where a backend has stacked it below the gate
    down: Array  # [D, F]


@dataclass(frozen=True)
class ConditioningWeights(MlpWeights):
    pre_norm: Array  # [D]


@dataclass(frozen=True)
class ExpertWeights:
    gate_up: Array  # [E, 2M, D], gate rows first
    down: Array  # [E, D, M]


@dataclass(frozen=True)
class RouterWeights:
    proj: Array  # [E, D], kept in the wide type
    scale: Array  # [D]
    expert_scale: Array  # [E]


@dataclass(frozen=True)
class LayerWeights:
    attention: AttentionWeights
    mlp: MlpWeights
    experts: ExpertWeights
    router: RouterWeights
    pre_attention: Array  # the seven norms, [D] each
    post_attention: Array
    pre_mlp: Array
    post_mlp: Array
    pre_experts: Array
    post_experts: Array
    post_feedforward: Array
    scalar: Array  # [1], decoder
    # What encoder and decoder do not share: one scalar, and biases where there are any.
    encoder_scalar: Array  # [1], encoder
    bias: BiasWeights
    encoder_bias: BiasWeights


@dataclass(frozen=True)
class Weights:
    embed: Array  # [V, D], also the output head
    embed_scale: float  # √D, rounded to the compute type
    norm: Array  # [D]
    self_conditioning: ConditioningWeights
    layers: tuple[LayerWeights, ...]
    frequencies: dict[str, Array]  # by layer kind: [C/2] wide, 0 where a pair does not rotate


def rope_frequencies(layer: LayerConfig) -> np.ndarray:
    """Angle per position of each pair, [C/2] float64: θ^(−2i/C)/factor for the rotated pairs, then 0.

    The exponent runs over the whole head also where only a part rotates (model.md, "proportional").
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

    `constants` are the fields of Weights that no tensor holds (embed_scale, frequencies); `ops` may put a
    layer's matrices together as it reads them best.
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
    parts: dict[str, Any] = {
        "attention": ops.attention_weights(AttentionWeights(**node.pop("attention")), "bias" in node),
        "mlp": ops.mlp_weights(**node.pop("mlp")),
        "experts": ExpertWeights(**node.pop("experts")),
        "router": RouterWeights(**node.pop("router")),
        "bias": BiasWeights(**node.pop("bias", {})),
        "encoder_bias": BiasWeights(**node.pop("encoder_bias", {})),
    }
    return LayerWeights(**parts, **node)
