"""The typed tree of weights that the graph reads.

A leaf is whatever `Ops.load` or `Ops.upload` made of a stored tensor: an array of the backend, or (for
quantized checkpoints) a record that `linear` and `expert_linear` accept. The graph cannot tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
