"""The layers' composites: their bodies are the definitions, written with primitives.

A backend overrides a method only if a measurement says it is faster, and a test compares the override with
this body on NumPy float64. Composites that no backend overrides are plain functions.

    N tokens of all rows (sequences)  L queries of one row  S keys  D hidden  H heads  G KV heads
    C head size  F dense MLP  E experts  K picks a token  M expert size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from dgemma.network.ops.arrays import KV, Array, Past
from dgemma.network.ops.decoding import Decoding
from dgemma.network.weights import AttentionWeights, BiasWeights, LayerWeights


@dataclass(frozen=True)
class Mask:
    """What queries, the last L of S tokens, may see.

    `causal`: nothing after the query itself. `window`: only the last so many tokens, the query's own
    included. It holds for causal attention only; the context cuts the keys of a canvas.
    """

    causal: bool = False
    window: int | None = None


class Layers(Decoding):
    """Norms, attention, experts."""

    def layer_weights(self, w: LayerWeights) -> LayerWeights:
        """A layer's uploaded matrices, stacked if `gated` and `heads` read them faster so."""
        return w

    def softmax(self, x: Array, axis: int) -> Array:
        """Softmax along one axis, in the type of `x`; callers pass a wide one."""
        e = self.exp(x - self.max(x, axis, keepdims=True))
        return e / self.sum(e, axis, keepdims=True)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        """x / rms(x) · weight [D] over the last axis of x [..., D], computed wide, in x's type.

        The factor is `weight`, not `1 + weight` as in earlier Gemmas.
        """
        y = self.to_wide(x)
        y = y * (self.sum(y * y, -1, keepdims=True) / y.shape[-1] + eps) ** -0.5
        if weight is not None:
            y = y * self.to_wide(weight)
        return self.like(y, x)

    def open_branches(
        self, h: Array, a: Array, post: Array, mlp: Array, experts: Array, router: Array, eps: float
    ) -> tuple[Array, Array, Array, Array]:
        """The stream h + norm(a)·post, and three norms of it: for the dense MLP, the experts, the router.

        All are [..., D], the weights [D]. The router does not read the experts' norm but its own of the raw
        stream, with weight scale/√D. It is wide: bf16 logits tie in 5 % of rows, and a tie flips a pick.
        """
        h = h + self.rms_norm(a, post, eps)
        routed = self.rms_norm(self.to_wide(h), router, eps) * h.shape[-1] ** -0.5
        return h, self.rms_norm(h, mlp, eps), self.rms_norm(h, experts, eps), routed

    def join_branches(
        self,
        h: Array,
        m: Array,
        e: Array,
        post_mlp: Array,
        post_experts: Array,
        post: Array,
        scalar: Array,
        eps: float,
    ) -> Array:
        """The end of a layer: (h + norm(norm(m)·post_mlp + norm(e)·post_experts)·post) · scalar -> [..., D].

        The stream h, the dense MLP's m and the experts' e are [..., D], the weights [D], the scalar [1].
        """
        both = self.rms_norm(m, post_mlp, eps) + self.rms_norm(e, post_experts, eps)
        return (h + self.rms_norm(both, post, eps)) * scalar

    def gelu(self, x: Array) -> Array:
        """GELU, tanh approximation: x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³))), elementwise, computed wide.

        The sum 1 + tanh cancels in bfloat16: 4 % off at x = −2.
        """
        y = self.to_wide(x)
        return self.like(0.5 * y * (1.0 + self.tanh(0.7978845608028654 * (y + 0.044715 * y * y * y))), x)

    def gated(self, x: Array, gate: Array, up: Array) -> Array:
        """gelu(x gateᵀ) · (x upᵀ) for x [..., D], gate and up [F, D] -> [..., F]."""
        return geglu(self, self.linear(x, gate), self.linear(x, up))

    def heads(
        self, x: Array, w: AttentionWeights, bias: BiasWeights, eps: float, rotary: Any
    ) -> tuple[Array, Array, Array]:
        """q [H, N, C] and k, v [G, N, C] of x [N, D]: all three normed, q and k rotated."""
        q, k, v = self.project(x, w, bias)
        C = w.q_norm.shape[0]
        q, k = as_heads(self, q, C, w.q_norm, eps, rotary), as_heads(self, k, C, w.k_norm, eps, rotary)
        return q, k, as_heads(self, v, C, None, eps, None)

    def keys_values(self, x: Array, w: AttentionWeights, bias: BiasWeights, eps: float, rotary: Any) -> KV:
        """k and v [G, N, C] of `heads`, for layers whose q nothing reads."""
        return self.heads(x, w, bias, eps, rotary)[1:]

    def project(self, x: Array, w: AttentionWeights, bias: BiasWeights) -> tuple[Array, Array, Array]:
        """The three products q [N, H·C] and k, v [N, G·C] of x [N, D]."""
        q, k = self.linear(x, w.q, bias.q), self.linear(x, w.k, bias.k)
        # V of full layers is k_proj's output *before* k_norm and RoPE.
        return q, k, k if w.v is None else self.linear(x, w.v, bias.v)

    def attention(self, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        """softmax(q kᵀ) v with q [H, L, C], k and v [G, S, C], softmax wide -> [H, L, C].

        Scores are not scaled by 1/√C (model.md).
        """
        H, L, C = q.shape
        G, S, _ = k.shape
        # Query heads that share a KV head become rows, so K and V are never repeated.
        rows = self.to_wide(q).reshape(G, H // G * L, C)
        scores = (rows @ self.transpose(self.to_wide(k), 0, 2, 1)).reshape(H, L, S)
        seen = visible(self, L, S, mask)
        if seen is not None:
            scores = self.where(seen, scores, -1e30)
        p = self.softmax(scores, -1).reshape(G, H // G * L, S)
        return self.like((p @ self.to_wide(v)).reshape(H, L, C), q)

    def attend_row(self, q: Array, own: KV, past: Past, mask: Mask) -> Array:
        """Attention of one row's q [H, L, C] over its `past`, then its `own` [G, L, C] -> [H, L, C]."""
        k, v = zip(*past, own, strict=True)
        if past:
            return self.attention(q, self.concat(k, 1), self.concat(v, 1), mask)
        return self.attention(q, *own, mask)

    def attend(self, q: Array, own: KV, past: Any, lengths: Sequence[int], mask: Mask) -> Array:
        """Attention of q [H, N, C] over past and `own` [G, N, C], row by row -> [H, N, C].

        Rows of so many tokens lie one behind the other. None sees another. `past` has the pieces of each row,
        as `pasts` leaves them.
        """
        parts = []
        for stop, n, pieces in zip(accumulate(lengths), lengths, past, strict=True):
            at = slice(stop - n, stop)
            parts.append(self.attend_row(q[:, at], (own[0][:, at], own[1][:, at]), pieces, mask))
        return parts[0] if len(parts) == 1 else self.concat(parts, 1)

    def router(self, r: Array, proj: Array, expert_scale: Array, k: int) -> tuple[Array, Array]:
        """Weights [N, K] wide and expert ids [N, K] for r [N, D] wide, the router's norm of `open_branches`.

        Softmax runs over all E experts (proj [E, D]). The K best are renormalised to sum 1, then each is
        multiplied by its expert_scale [E] (model.md). All of it is wide.
        """
        p = self.softmax(self.linear(r, self.to_wide(proj)), -1)
        weights, ids = top_k(self, p, k)
        weights = weights / self.sum(weights, -1, keepdims=True)
        return weights * self.take(self.to_wide(expert_scale), ids), ids

    def experts(self, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array) -> Array:
        """Σ_k weights[n, k] · expert_{ids[n, k]}(x[n]) for x [N, D] -> [N, D].

        gate_up is [E, 2M, D], gate rows first, down [E, D, M]. Rows are sorted by expert, so that each expert
        is one matrix product over adjacent rows.
        """
        N, K = ids.shape
        flat = ids.reshape(N * K)
        order = self.argsort(flat, 0)
        rows = self.take(flat, order)
        # Pick i is one of token i // K.
        y = self.expert_linear(self.take(x, order // K), gate_up, rows)
        half = y.shape[-1] // 2
        y = self.expert_linear(geglu(self, y[:, :half], y[:, half:]), down, rows)
        y = self.take(y, self.argsort(order, 0)).reshape(N, K, x.shape[-1])
        return self.like(self.sum(self.to_wide(y) * weights[:, :, None], 1), x)


def geglu(ops: Layers, gate: Array, up: Array) -> Array:
    """gelu(gate) · up, elementwise."""
    return ops.gelu(gate) * up


def rotary(ops: Layers, positions: Array, frequencies: Array) -> Any:
    """The input of `rope` for positions [N]: cos and sin [N, C/2], wide.

    Angles are wide: bfloat16 has 8 bits, and positions need 18.
    """
    angles = ops.to_wide(positions)[:, None] * frequencies
    return ops.cos(angles), ops.sin(angles)


def rope(ops: Layers, x: Array, rotary: Any) -> Array:
    """Rotate the pairs (i, i + C/2) of x [heads, N, C]; computed wide, in x's type."""
    cos, sin = rotary
    half = x.shape[-1] // 2
    y = ops.to_wide(x)
    a, b = y[..., :half], y[..., half:]
    return ops.like(ops.concat([a * cos - b * sin, b * cos + a * sin], -1), x)


def as_heads(ops: Layers, y: Array, size: int, weight: Array | None, eps: float, rotary: Any) -> Array:
    """A projection y [N, H·C] as heads [H, N, C] of `size` C, normed with weight [C] or none.

    They are rotated unless `rotary` is None. The norm comes before the rotation.
    """
    x = ops.transpose(y.reshape(y.shape[0], -1, size), 1, 0, 2)
    x = ops.rms_norm(x, weight, eps)
    return x if rotary is None else rope(ops, x, rotary)


def visible(ops: Layers, L: int, S: int, mask: Mask) -> Array | None:
    """Which of S keys the last L tokens, the queries, may see: [L, S] bool, or None for all."""
    if not mask.causal:
        return None
    key, query = ops.arange(S)[None, :], ops.arange(L)[:, None] + (S - L)
    seen = key <= query
    if mask.window is not None and mask.window < S:
        seen = seen & (key > query - mask.window)  # the window counts the query itself
    return seen


def top_k(ops: Layers, x: Array, k: int) -> tuple[Array, Array]:
    """Values and ids [..., k] of the k largest of x [..., n], largest first, ties to the lower id."""
    ids = ops.argsort(-x, -1)[..., :k]
    return ops.take_along(x, ids, -1), ids
