"""The model, written once: encoder and decoder passes as plain functions over an `Ops` object.

The functions are pure: they read cached keys and values and return new ones, without host data, host reads
or state. So a backend may compile each whole, but for `vocabulary` with a `soft_bound`. A pass is a list of
tokens, in which rows lie one behind the other. Everything but attention is per token; attention goes row by
row over that row's own past. So no row is padded, and none depends on another.

    B rows  L canvas positions  N tokens of all rows  D hidden  G KV heads  C head size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.network.config import Config, LayerConfig
from dgemma.network.ops import KV, Array, Bias, Mask, Ops, Prediction
from dgemma.network.ops.layers import rotary
from dgemma.network.ops.vocabulary import embed
from dgemma.network.weights import AttentionWeights, BiasWeights, LayerWeights, MlpWeights, Weights


@dataclass(frozen=True)
class Pass:
    """What the layers of one pass share.

    The encoder's pass is causal, the decoder's is not. `lengths` are the rows' tokens, `rotary` is the input
    of `rope` by layer kind.
    """

    ops: Ops
    config: Config
    lengths: tuple[int, ...]
    rotary: dict[str, Any]
    causal: bool

    def norm(self, x: Array, weight: Array | None) -> Array:
        """RMS norm of x [..., D] with weight [D] or none."""
        return self.ops.rms_norm(x, weight, self.config.rms_eps)


def attention(
    run: Pass, layer: LayerConfig, w: AttentionWeights, bias: BiasWeights, x: Array, past: Any
) -> tuple[Array, KV]:
    """Attention of x [N, D] over the layer's past and itself -> [N, D], and own keys and values [G, N, C]."""
    ops = run.ops
    q, k, v = ops.heads(x, w, bias, run.config.rms_eps, run.rotary[layer.kind])
    y = ops.attend(q, (k, v), past, run.lengths, Mask(run.causal, layer.window))
    return ops.linear(ops.transpose(y, 1, 0, 2).reshape(x.shape[0], -1), w.o, bias.o), (k, v)


def mlp(ops: Ops, w: MlpWeights, x: Array) -> Array:
    """down(gelu(gate(x)) · up(x)) of x [..., D]."""
    return ops.linear(ops.gated(x, w.gate, w.up), w.down)


def moe(run: Pass, w: LayerWeights, x: Array, routed: Array) -> Array:
    """The routed experts of x [N, D] -> [N, D].

    The router reads `routed` [N, D] wide, its own norm of the raw stream, and not the experts' x.
    """
    ops = run.ops
    weights, ids = ops.router(routed, w.router.proj, w.router.expert_scale, run.config.top_k)
    return ops.experts(x, weights, ids, w.experts.gate_up, w.experts.down)


def block(run: Pass, layer: LayerConfig, w: LayerWeights, h: Array, past: Any) -> tuple[Array, KV]:
    """One layer on the residual stream h [N, D] -> the stream, and own keys and values [G, N, C].

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
    rows: Sequence[Array],
    positions: Array,
    past: Sequence[Any],
) -> list[KV]:
    """One causal pass of rows at positions [N] -> new keys and values [G, N, C] by layer.

    `rows` are ids [n], or vectors in their place [n, D]: embeddings times √D, or an image's. `past` is what
    `Ops.pasts` made of the contexts, by layer. Nothing reads the encoder's last hidden state, so the last
    layer stops at its keys and values.
    """
    run = Pass(ops, config, tuple(row.shape[0] for row in rows), _rotary(ops, w, positions), True)
    vectors = [row if len(row.shape) == 2 else embed(ops, w.embed, row) * w.embed_scale for row in rows]
    h = vectors[0] if len(rows) == 1 else ops.concat(vectors, 0)
    new: list[KV] = []
    for index, layer in enumerate(config.layers[:-1]):
        h, kv = block(run, layer, w.layers[index], h, past[index])
        new.append(kv)
    last, rotary = w.layers[-1], run.rotary[config.layers[-1].kind]
    x = run.norm(h, last.pre_attention)
    return [*new, ops.keys_values(x, last.attention, last.encoder_bias, config.rms_eps, rotary)]


def denoise(
    ops: Ops,
    config: Config,
    w: Weights,
    canvas: Array,
    soft: Array,
    positions: Array,
    past: Sequence[Any],
) -> Array:
    """One bidirectional pass of canvas ids [B, L] -> normed hidden states [B·L, D], ready for the head.

    `soft` [B, L, D] is the previous step's soft embedding, zeros on a canvas's first step. `positions` are
    [B·L], `past` is as in `encode`. Every canvas position sees the same last window − 1 tokens of sliding
    layers: a rectangle, not a band.
    """
    B, L = canvas.shape
    run = Pass(ops, config, (L,) * B, _rotary(ops, w, positions), False)
    h = self_condition(run, w, canvas.reshape(-1), soft.reshape(B * L, -1))
    for index, layer in enumerate(config.layers):
        h, _ = block(run, layer, w.layers[index], h, past[index])
    return run.norm(h, w.norm)


def _rotary(ops: Ops, w: Weights, positions: Array) -> dict[str, Any]:
    """The input of `rope` by layer kind, for positions [N]."""
    return {kind: rotary(ops, positions, f) for kind, f in w.frequencies.items()}


def self_condition(run: Pass, w: Weights, ids: Array, soft: Array) -> Array:
    """Embeddings [N, D] of ids [N], conditioned on `soft` [N, D]; zeros leave nothing but the norm."""
    e = embed(run.ops, w.embed, ids) * w.embed_scale
    n = run.norm(soft * w.embed_scale, w.self_conditioning.pre_norm)
    return run.norm(e + mlp(run.ops, w.self_conditioning, n), None)


def step(
    ops: Ops,
    config: Config,
    w: Weights,
    canvas: Array,
    soft: Array,
    positions: Array,
    past: Sequence[Any],
    temperature: Array,
    uniforms: Array,
    bias: Bias | None = None,
) -> Prediction:
    """`denoise`, then `vocabulary` -> a `Prediction` of the B·L positions.

    `temperature` and `uniforms` in [0, 1) are [B·L] wide.
    """
    h = denoise(ops, config, w, canvas, soft, positions, past)
    return ops.vocabulary(h, w.embed, config.softcap, temperature, uniforms, bias=bias)
