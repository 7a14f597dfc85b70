"""The model, written once: encoder and decoder passes as plain functions over an `Ops` object.

The functions are pure: they read cached keys and values and return new ones, without host data, host reads
or state. So a backend may compile each whole, but for `vocabulary` with a `soft_bound`. Rows of a batch *end*
together: shorter prompts are padded on the left. So a sliding window is the same run of slots for every row,
and a row's padding follows from its `offset` alone, the position of its first query.

    B rows  L queries  D hidden  H heads  G KV heads  C head size; past keys and values: [B, G, slots, C]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.network.config import Config, LayerConfig
from dgemma.network.ops import KV, Array, Mask, Ops, Prediction
from dgemma.network.ops.layers import rotary
from dgemma.network.ops.vocabulary import embed
from dgemma.network.weights import AttentionWeights, BiasWeights, LayerWeights, MlpWeights, Weights


@dataclass(frozen=True)
class Pass:
    """What the layers of one pass share.

    The encoder's pass is causal, the decoder's is not. `offset` [B] int is the position of each row's first
    query, `rotary` the input of `rope` by layer kind. `ragged`: some row has padding among the keys.
    """

    ops: Ops
    config: Config
    offset: Array
    rotary: dict[str, Any]
    causal: bool
    ragged: bool

    def norm(self, x: Array, weight: Array | None) -> Array:
        """RMS norm of x [..., D] with weight [D] or none."""
        return self.ops.rms_norm(x, weight, self.config.rms_eps)


def attention(
    run: Pass, layer: LayerConfig, w: AttentionWeights, bias: BiasWeights, x: Array, past: KV | None
) -> tuple[Array, KV]:
    """Attention of x [B, L, D] over `past` and itself -> [B, L, D], and own keys and values [B, G, L, C]."""
    ops = run.ops
    q, k, v = ops.heads(x, w, bias, run.config.rms_eps, run.rotary[layer.kind])
    B, H, L, C = q.shape
    # `offset` tokens came before, other cached slots are padding. A window may have cut them: pad < 0 then.
    pad = (0 if past is None else past[0].shape[2]) - run.offset if run.ragged else None
    y = ops.attend(q, (k, v), past, Mask(pad, run.causal, layer.window))
    y = ops.transpose(y, 0, 2, 1, 3).reshape(B, L, H * C)
    return ops.linear(y, w.o, bias.o), (k, v)


def mlp(ops: Ops, w: MlpWeights, x: Array) -> Array:
    """down(gelu(gate(x)) · up(x)) of x [..., D]."""
    return ops.linear(ops.gated(x, w.gate, w.up), w.down)


def moe(run: Pass, w: LayerWeights, x: Array, routed: Array) -> Array:
    """The routed experts of x [B, L, D] -> [B, L, D].

    The router reads `routed` [B, L, D] wide, its own norm of the raw stream, and not the experts' x.
    """
    ops, D = run.ops, x.shape[-1]
    weights, ids = ops.router(routed.reshape(-1, D), w.router.proj, w.router.expert_scale, run.config.top_k)
    return ops.experts(x.reshape(-1, D), weights, ids, w.experts.gate_up, w.experts.down).reshape(x.shape)


def block(run: Pass, layer: LayerConfig, w: LayerWeights, h: Array, past: KV | None) -> tuple[Array, KV]:
    """One layer on the residual stream h [B, L, D] -> the stream, and own keys and values [B, G, L, C].

    Dense MLP and experts run side by side, each with its own norms. Their sum is normed again.
    """
    ops, eps = run.ops, run.config.rms_eps
    # Encoder and decoder share all weights but these: the encoder's scalar is not the decoder's.
    bias, scalar = (w.encoder_bias, w.encoder_scalar) if run.causal else (w.bias, w.scalar)
    a, kv = attention(run, layer, w.attention, bias, run.norm(h, w.pre_attention), past)
    opening = w.post_attention, w.pre_mlp, w.pre_experts, w.router.scale
    h, x, y, routed = ops.open_branches(h, a, *opening, eps)
    m, e = mlp(ops, w.mlp, x), moe(run, w, y, routed)
    closing = w.post_mlp, w.post_experts, w.post_feedforward, scalar
    return ops.join_branches(h, m, e, *closing, eps), kv


def encode(
    ops: Ops,
    config: Config,
    w: Weights,
    tokens: Array,
    offset: Array,
    past: Sequence[KV] | None,
    *,
    ragged: bool,
) -> list[KV]:
    """One causal pass of tokens from positions offset [B] on -> new keys and values [B, G, L, C] by layer.

    `tokens` are ids [B, L], or vectors in their place [B, L, D]: embeddings times √D, or an image's.
    `past` holds each layer's cached keys and values; sliding layers need their last window − 1.
    `ragged`: some row has padding among the keys, so masks are needed. Nothing reads the encoder's last
    hidden state, so the last layer stops at its keys and values.
    """
    run = Pass(ops, config, offset, _rotary(ops, w, offset, tokens.shape[1]), True, ragged)
    h = tokens if len(tokens.shape) == 3 else embed(ops, w.embed, tokens) * w.embed_scale
    new: list[KV] = []
    for index, layer in enumerate(config.layers[:-1]):
        h, kv = block(run, layer, w.layers[index], h, past[index] if past else None)
        new.append(kv)
    last, rotary = w.layers[-1], run.rotary[config.layers[-1].kind]
    x = run.norm(h, last.pre_attention)
    return [*new, ops.keys_values(x, last.attention, last.encoder_bias, config.rms_eps, rotary)]


def denoise(
    ops: Ops,
    config: Config,
    w: Weights,
    canvas: Array,
    soft: Array | None,
    offset: Array,
    past: Sequence[KV] | None,
    *,
    ragged: bool,
) -> Array:
    """One bidirectional pass of canvas ids [B, L] -> normed hidden states [B, L, D], ready for the head.

    `soft` [B, L, D] is the previous step's soft embedding (None on a canvas's first step). `past` is as in
    `encode`. Every canvas position sees the same last window − 1 cached slots of sliding layers: a
    rectangle, not a band.
    """
    run = Pass(ops, config, offset, _rotary(ops, w, offset, canvas.shape[1]), False, ragged)
    h = self_condition(run, w, canvas, soft)
    for index, layer in enumerate(config.layers):
        h, _ = block(run, layer, w.layers[index], h, past[index] if past else None)
    return run.norm(h, w.norm)


def _rotary(ops: Ops, w: Weights, offset: Array, length: int) -> dict[str, Any]:
    """The input of `rope` by layer kind, for `length` positions from offset [B] on."""
    return {kind: rotary(ops, offset, length, f) for kind, f in w.frequencies.items()}


def self_condition(run: Pass, w: Weights, canvas: Array, soft: Array | None) -> Array:
    """Embeddings [B, L, D] of canvas ids [B, L], conditioned on `soft` [B, L, D], or on zeros for None."""
    e = embed(run.ops, w.embed, canvas) * w.embed_scale
    if soft is not None:  # the block has no bias, so zeros stay zeros and only the norm remains
        n = run.norm(soft * w.embed_scale, w.self_conditioning.pre_norm)
        e = e + mlp(run.ops, w.self_conditioning, n)
    return run.norm(e, None)


def step(
    ops: Ops,
    config: Config,
    w: Weights,
    canvas: Array,
    soft: Array | None,
    offset: Array,
    past: Sequence[KV] | None,
    temperature: Array | float,
    uniforms: Array,
    *,
    ragged: bool,
) -> Prediction:
    """`denoise`, then `vocabulary` -> a `Prediction` whose rows are the B·L positions.

    `temperature` is [B, L] wide, or one number for all; `uniforms` are [B, L] wide in [0, 1).
    """
    h = denoise(ops, config, w, canvas, soft, offset, past, ragged=ragged)
    return vocabulary(ops, config, w, h, temperature, uniforms)


def vocabulary(
    ops: Ops,
    config: Config,
    w: Weights,
    h: Array,
    temperature: Array | float,
    uniforms: Array,
    soft_bound: float = 0.0,
) -> Prediction:
    """What the vocabulary says of hidden states h [B, L, D] -> a `Prediction` of B·L rows.

    `temperature` and `uniforms` are as in `step`. A `soft_bound` may make it read the host.
    """
    h, uniforms = h.reshape(-1, h.shape[-1]), uniforms.reshape(-1)
    if getattr(temperature, "ndim", 0):
        temperature = temperature.reshape(-1)  # type: ignore[union-attr]
    return ops.vocabulary(h, w.embed, config.softcap, temperature, uniforms, soft_bound)
