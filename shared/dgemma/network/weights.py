"""The typed tree of weights that the graph reads.

A leaf is the result of `Ops.load` or `Ops.upload`: an array of the backend or, from quantized checkpoints,
a record that `linear` and `expert_linear` accept. The graph cannot tell them apart.

    D hidden  V vocabulary  H heads  G KV heads  C head size  F dense MLP  E experts  M expert size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Array = Any  # numpy.ndarray, mlx.core.array or torch.Tensor


@dataclass(frozen=True)
class AttentionWeights:
    q: Array  # [H·C, D]; k's and v's rows stand below if a backend has stacked them
    k: Array  # [G·C, D]; None if it is in q
    o: Array  # [D, H·C]
    q_norm: Array  # [C]
    k_norm: Array  # [C]
    v: Array | None = None  # [G·C, D]; None on full layers, whose V is k's projection, and if it is in q
    rows: tuple[int, ...] = ()  # numbers of rows of stacked q, k and, on sliding layers, v


@dataclass(frozen=True)
class BiasWeights:
    """Biases [H·C], [G·C], [G·C] and [D] of the four projections, all None in the released model."""

    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    o: Array | None = None


@dataclass(frozen=True)
class MlpWeights:
    gate: Array  # [F, D]
    up: Array  # [F, D]; None if a backend has stacked it below the gate
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
    proj: Array  # [E, D] wide, never quantized on the device
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
    # Encoder and decoder share all but one scalar, and biases if there are any.
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
