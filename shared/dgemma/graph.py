"""The model, written once: encoder and decoder passes as plain functions over an `Ops` object.

The functions are pure. They read the cached keys and values they are given and return new ones; no
host data, no host reads, no state: each backend may compile them whole. Rows of a batch *end*
together: shorter prompts are padded on the left, so a sliding window is the same run of slots for
every row, and a row's padding follows from its `offset` alone, the position of its first query.

    B rows  L queries  P cached slots  D hidden  H heads  G KV heads  C head size
"""

from __future__ import annotations

from collections.abc import Sequence

from .config import Config, LayerConfig
from .ops import Array, Guess, Ops
from .weights import AttentionWeights, LayerWeights, MlpWeights, Weights

KV = tuple[Array, Array]  # keys after norm and RoPE, values: [B, G, P, C] each


def attention(
    ops: Ops,
    layer: LayerConfig,
    w: AttentionWeights,
    x: Array,
    offset: Array,
    rotary: object,
    past: KV | None,
    *,
    eps: float,
    causal: bool,
    ragged: bool,
) -> tuple[Array, KV]:
    """Attention of x [B, L, D] over `past` and itself -> output [B, L, D], own keys and values."""
    q, k, v = project(ops, layer, w, x, rotary, eps)
    own = (k, v)
    if past is not None:
        k, v = ops.concat([past[0], k], 2), ops.concat([past[1], v], 2)
    B, H, L, C = q.shape
    pad = (k.shape[2] - L) - offset if ragged else None
    y = ops.attention(q, k, v, pad, causal, layer.window)
    y = ops.transpose(y, 0, 2, 1, 3).reshape(B, L, H * C)
    return ops.linear(y, w.o, w.o_bias), own


def project(
    ops: Ops, layer: LayerConfig, w: AttentionWeights, x: Array, rotary: object, eps: float
) -> tuple[Array, Array, Array]:
    """q [B, H, L, C] and k, v [B, G, L, C] of x [B, L, D], normed and rotated."""
    B, L, _ = x.shape

    def heads(y: Array) -> Array:
        return ops.transpose(y.reshape(B, L, -1, layer.head_dim), 0, 2, 1, 3)

    k = heads(ops.linear(x, w.k, w.k_bias))
    # On full layers V is k_proj's output *before* k_norm and RoPE.
    v = k if w.v is None else heads(ops.linear(x, w.v, w.v_bias))
    q = ops.rms_norm(heads(ops.linear(x, w.q, w.q_bias)), w.q_norm, eps)
    k = ops.rms_norm(k, w.k_norm, eps)
    return ops.rope(q, rotary), ops.rope(k, rotary), ops.rms_norm(v, None, eps)


def mlp(ops: Ops, w: MlpWeights, x: Array) -> Array:
    """down(gelu(gate(x)) · up(x))."""
    return ops.linear(ops.geglu(ops.linear(x, w.gate), ops.linear(x, w.up)), w.down)


def moe(ops: Ops, config: Config, w: LayerWeights, h: Array) -> Array:
    """The routed experts of tokens h [N, D]: the router reads the raw residual, the experts its norm."""
    router, eps = w.router, config.rms_eps
    weights, ids = ops.router(h, router.proj, router.scale, router.expert_scale, config.top_k, eps)
    x = ops.rms_norm(h, w.pre_experts, eps)
    return ops.experts(x, weights, ids, w.experts.gate_up, w.experts.down)


def feedforward(ops: Ops, config: Config, w: LayerWeights, h: Array) -> Array:
    """Dense MLP and experts side by side on h [B, L, D], each normed, their sum normed again."""
    eps = config.rms_eps
    m = ops.rms_norm(mlp(ops, w.mlp, ops.rms_norm(h, w.pre_mlp, eps)), w.post_mlp, eps)
    x = moe(ops, config, w, h.reshape(-1, h.shape[-1])).reshape(h.shape)
    return ops.rms_norm(m + ops.rms_norm(x, w.post_experts, eps), w.post_feedforward, eps)


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
    """One causal pass of tokens [B, L] that start at positions offset [B] -> new keys and values.

    `past` holds each layer's cached keys and values; sliding layers need their last window − 1.
    `ragged`: some row has padding among the keys, so masks are needed. Nothing reads the encoder's
    last hidden state, so the last layer stops at its keys and values.
    """
    h = ops.embed(w.embed, tokens) * w.embed_scale
    rotaries = {kind: ops.rotary(offset, tokens.shape[1], f) for kind, f in w.frequencies.items()}
    new: list[KV] = []
    for index, (layer, lw) in enumerate(zip(config.layers, w.layers, strict=True)):
        x, rotary = ops.rms_norm(h, lw.pre_attention, config.rms_eps), rotaries[layer.kind]
        if index == len(config.layers) - 1:
            new.append(project(ops, layer, lw.attention, x, rotary, config.rms_eps)[1:])
            break
        before = past[index] if past else None
        a, kv = attention(
            ops,
            layer,
            lw.attention,
            x,
            offset,
            rotary,
            before,
            eps=config.rms_eps,
            causal=True,
            ragged=ragged,
        )
        new.append(kv)
        h = h + ops.rms_norm(a, lw.post_attention, config.rms_eps)
        h = (h + feedforward(ops, config, lw, h)) * lw.encoder_scalar
    return new


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
    """One bidirectional pass of canvas [B, L] -> normed hidden states [B, L, D], ready for the head.

    `soft` [B, L, D] is the previous step's soft embedding (None on a canvas's first step). `past` as
    in `encode`: on sliding layers every canvas position sees the same last window − 1 cached slots.
    """
    h = self_condition(ops, config, w, canvas, soft)
    rotaries = {kind: ops.rotary(offset, canvas.shape[1], f) for kind, f in w.frequencies.items()}
    for index, (layer, lw) in enumerate(zip(config.layers, w.layers, strict=True)):
        x, before = ops.rms_norm(h, lw.pre_attention, config.rms_eps), past[index] if past else None
        rotary = rotaries[layer.kind]
        a, _ = attention(
            ops,
            layer,
            lw.attention,
            x,
            offset,
            rotary,
            before,
            eps=config.rms_eps,
            causal=False,
            ragged=ragged,
        )
        h = h + ops.rms_norm(a, lw.post_attention, config.rms_eps)
        h = (h + feedforward(ops, config, lw, h)) * lw.scalar
    return ops.rms_norm(h, w.norm, config.rms_eps)


def self_condition(ops: Ops, config: Config, w: Weights, canvas: Array, soft: Array | None) -> Array:
    """Canvas embeddings with the self-conditioning block applied, [B, L, D]."""
    e = ops.embed(w.embed, canvas) * w.embed_scale
    if soft is not None:  # a zero signal passes the bias-free block as zero: only the norm remains
        n = ops.rms_norm(soft * w.embed_scale, w.self_conditioning.pre_norm, config.rms_eps)
        e = e + mlp(ops, w.self_conditioning, n)
    return ops.rms_norm(e, None, config.rms_eps)


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
) -> Guess:
    """A denoise pass and what the vocabulary says of it; `Guess` rows run over B·L positions."""
    h = denoise(ops, config, w, canvas, soft, offset, past, ragged=ragged)
    h = h.reshape(-1, h.shape[-1])
    return ops.vocabulary(h, w.embed, config.softcap, temperature, uniforms.reshape(-1))
