"""What a backend must offer: a few primitives to fill in, and composites that are defined here.

A primitive raises until a backend supplies it. A composite's body below *is* its definition, written
with primitives; a backend overrides one only where a measurement says it is faster, and a test holds
the override against this body on NumPy float64. No formula of the model lives outside this package.

"Wide" is the type in which norms, softmax, router and statistics are computed: float32 on the fast
backends, float64 on NumPy. "Compute" is the type of weights and activations.

    B rows (sequences)  L queries  S keys  D hidden  H heads  G KV heads  C head size
    N tokens (B·L)  V vocabulary  E experts  K picks a token  M expert size
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgemma.formats.quantized import TABLES, Quantized
from dgemma.formats.stored import Stored

if TYPE_CHECKING:
    from dgemma.network.cache import Cache
    from dgemma.network.config import Config
    from dgemma.network.weights import AttentionWeights, BiasWeights, MlpWeights

Array = Any
# What a sparse row is said to leave out at least, so that it can be told from a dense one.
TRACE = 1e-30


@dataclass(frozen=True)
class Guess:
    """What the vocabulary says of each position, still on the device."""

    argmax: Array  # [N] int
    sample: Array  # [N] int, drawn with the given uniforms
    entropy: Array  # [N] wide, nats
    soft: Array  # [N, D] compute: probabilities @ embedding, before the √D factor
    # [N] wide: probability that `soft` leaves out at most, 0 in dense rows. None where all had to be dense.
    missing: Array | None = None


class Ops:
    """Base of the backends. Arrays are the backend's own; operators and slicing work on all of them."""

    name = "ops"
    # Vocabulary entries whose logits are made at once. One float32 plane of [rows, V] exists, in tiles
    # of this width, and no second one.
    vocab_tile = 32768
    # Rows of that plane at once: 256 × 262,144 float32 are 268 MB.
    vocab_rows = 256
    # Tokens that a sparse soft embedding keeps.
    soft_tokens = 128
    # What surrounds work that is done once and may take seconds, as compiling: waiting("what it is"). A front
    # end that wants to say so replaces it; see `dgemma.cli`.
    waiting: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def progress(self) -> str:
        """What there is to say of such work while it goes on, after a comma; nothing by default."""
        return ""

    # ---- primitives -----------------------------------------------------------------------------

    def asarray(self, x: np.ndarray) -> Array:
        """Host to device: floats become the compute type, integers stay integers."""
        raise NotImplementedError

    def aswide(self, x: np.ndarray) -> Array:
        """Host to device, in the wide type."""
        raise NotImplementedError

    def load(self, stored: Stored, wide: bool = False) -> Array:
        """A stored tensor to the device, in the compute type, or the wide type; never a view of the file."""
        raise NotImplementedError

    def raw(self, x: np.ndarray) -> Array:
        """Bytes (uint8) to the device as they are; never a view of `x`."""
        raise NotImplementedError

    def integer(self, x: Array) -> Array:
        """Unsigned integers as a signed type in which they can be shifted and looked up."""
        raise NotImplementedError

    def to_numpy(self, x: Array) -> np.ndarray:
        """Device to host: floats as float32 (float64 on NumPy), integers as they are. Synchronizes."""
        raise NotImplementedError

    def rounded(self, x: float) -> float:
        """`x` rounded to the compute type."""
        raise NotImplementedError

    def wide(self, x: Array) -> Array:
        """`x` in the wide type."""
        raise NotImplementedError

    def compute(self, x: Array) -> Array:
        """`x` in the compute type."""
        raise NotImplementedError

    def like(self, x: Array, reference: Array) -> Array:
        """`x` in the type of `reference`."""
        raise NotImplementedError

    def transpose(self, x: Array, *axes: int) -> Array:
        raise NotImplementedError

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        raise NotImplementedError

    def take(self, x: Array, ids: Array) -> Array:
        """Rows `ids` of `x` along its first axis."""
        raise NotImplementedError

    def arange(self, stop: int) -> Array:
        raise NotImplementedError

    def where(self, condition: Array, x: Array, y: Array | float) -> Array:
        raise NotImplementedError

    def exp(self, x: Array) -> Array:
        raise NotImplementedError

    def log(self, x: Array) -> Array:
        raise NotImplementedError

    def tanh(self, x: Array) -> Array:
        raise NotImplementedError

    def cos(self, x: Array) -> Array:
        raise NotImplementedError

    def sin(self, x: Array) -> Array:
        raise NotImplementedError

    def maximum(self, x: Array, y: Array) -> Array:
        """Elementwise."""
        raise NotImplementedError

    def sum(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        """For a boolean `x` the count, as an integer."""
        raise NotImplementedError

    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        raise NotImplementedError

    def argmax(self, x: Array, axis: int) -> Array:
        """First of equals."""
        raise NotImplementedError

    def argsort(self, x: Array, axis: int) -> Array:
        """Ascending and stable."""
        raise NotImplementedError

    def take_along(self, x: Array, ids: Array, axis: int) -> Array:
        raise NotImplementedError

    def cumsum(self, x: Array, axis: int) -> Array:
        raise NotImplementedError

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """x [..., I] times weight [O, I] transposed, plus bias [O]. The weight may be a record."""
        raise NotImplementedError

    def expert_linear(self, x: Array, weight: Array, experts: Array) -> Array:
        """Row r of x [R, I] times weight[experts[r]] ([E, O, I]) transposed; `experts` [R] ascends.

        The weight may be a record: then no more than one expert is widened at a time.
        """
        raise NotImplementedError

    # ---- what a backend may do differently ---------------------------------------------------------

    def cache(self, config: Config) -> Cache:
        """An empty cache of keys and values."""
        from dgemma.network.cache import Cache

        return Cache(self, config)

    def running(self) -> AbstractContextManager[None]:
        """What surrounds a generation: limits of the process that are put back afterwards."""
        return nullcontext()

    def peak_memory(self) -> int:
        """Most bytes in use since the process began: of the framework's arrays, or of the whole process."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def arrange(self, record: Quantized, name: str) -> Any:
        """A placed matrix or stack of experts ("gate_up", "down") as `linear` and `experts` read it best."""
        return record

    def mlp_weights(self, gate: Array, up: Array, down: Array) -> MlpWeights:
        """The placed matrices of a dense MLP as `gated` and `linear` read them best."""
        from dgemma.network.weights import MlpWeights

        return MlpWeights(gate, up, down)

    def attention_weights(self, w: AttentionWeights, biased: bool) -> AttentionWeights:
        """A layer's placed matrices as `heads` reads them best; `biased`: its projections have biases."""
        return w

    def free_memory(self) -> int | None:
        """Bytes that weights may still take: of the device, or of the machine; None if nothing says."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            available = next(line for line in lines if line.startswith("MemAvailable:"))
            return 1024 * int(available.split()[1])
        except (OSError, StopIteration):  # not Linux: all of the memory but what the system is left
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        """A pure function of arrays, traced and compiled where the backend can.

        `repeats`: it is called many times with the same shapes, and worth recording for each.
        """
        return fn

    def settle(self, arrays: Any) -> None:
        """Finish pending work on these arrays (lazy backends)."""

    def after(self, x: Array, *done: Array) -> Array:
        """`x`, to be used once `done` are computed: lazy backends would hold all tiles of a loop at once."""
        return x

    # ---- composites: the definitions ------------------------------------------------------------

    def place(self, record: Quantized) -> Quantized:
        """A record of `Stored` fields to the device; scales of a type wider than bfloat16 stay wide."""

        def field(stored: Stored) -> Array:
            if stored.data.dtype == np.uint8:
                return self.raw(stored.data)
            return self.load(stored, wide=stored.dtype != "BF16")

        return record.map(field)

    def unpack(self, codes: Array, bits: int) -> Array:
        """Codes [..., n] of a stream of bits, bytes [..., n·bits/8]: eight codes fill `bits` bytes."""
        octets = self.integer(codes)
        if bits == 8:
            return octets
        count = 8 // np.gcd(8, bits)  # codes in the shortest run of whole bytes
        octets = octets.reshape(*octets.shape[:-1], -1, count * bits // 8)
        parts = []
        for start in range(0, count * bits, bits):
            byte, shift = divmod(start, 8)
            part = octets[..., byte] >> shift
            if shift + bits > 8:
                part = part | octets[..., byte + 1] << (8 - shift)
            parts.append((part & (2**bits - 1))[..., None])
        return self.concat(parts, -1).reshape(*octets.shape[:-2], -1)

    def table(self, values: np.ndarray) -> Array:
        """A constant of the formats, wide; placed once, as a recorded step must not copy from the host."""
        placed: dict[int, Array] = self.__dict__.setdefault("_tables", {})
        if id(values) not in placed:
            placed[id(values)] = self.aswide(values)
        return placed[id(values)]

    def dequantize(self, w: Quantized) -> Array:
        """The matrix or stack of a record, wide: code · scale (+ bias), times or by the factor.

        Exact on NumPy: that is the definition of each format (`dgemma.formats.quantized`, checkpoints.md).
        """
        code_table, scale_table = TABLES[w.form.mode]
        y = self.unpack(w.codes, w.form.bits)
        y = self.wide(y) if code_table is None else self.take(self.table(code_table), y)
        if w.scales is not None:
            s = w.scales
            s = self.wide(s) if scale_table is None else self.take(self.table(scale_table), self.integer(s))
            grouped = y.reshape(*s.shape, w.form.group) * s[..., None]
            if w.biases is not None:
                grouped = grouped + self.wide(w.biases)[..., None]
            y = grouped.reshape(y.shape)
        if w.factor is None:
            return y
        return y / w.factor[..., None] if w.divides else y * w.factor[..., None]

    def dense(self, weight: Array) -> Array:
        """A weight as an array: a record is decoded into the compute type, an array is passed on."""
        return self.compute(self.dequantize(weight)) if isinstance(weight, Quantized) else weight

    def softmax(self, x: Array, axis: int) -> Array:
        """Softmax in the type of `x`, which callers make wide."""
        e = self.exp(x - self.max(x, axis, keepdims=True))
        return e / self.sum(e, axis, keepdims=True)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        """x / rms(x) · weight over the last axis, computed wide, in x's type (not `1 + weight`)."""
        y = self.wide(x)
        y = y * (self.sum(y * y, -1, keepdims=True) / y.shape[-1] + eps) ** -0.5
        if weight is not None:
            y = y * self.wide(weight)
        return self.like(y, x)

    def open_branches(
        self, h: Array, a: Array, post: Array, mlp: Array, experts: Array, router: Array, eps: float
    ) -> tuple[Array, Array, Array, Array]:
        """The stream h + norm(a)·post, and three norms of it: for the dense MLP, the experts, the router.

        All [..., D]. The router's is wide, its weight scale/√D: bf16 logits tie in 5 % of rows, and a tie
        flips a pick.
        """
        h = h + self.rms_norm(a, post, eps)
        routed = self.rms_norm(self.wide(h), router, eps) * h.shape[-1] ** -0.5
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
        """(h + norm(norm(m)·post_mlp + norm(e)·post_experts)·post) · scalar: how a layer ends.

        The stream h, the dense MLP's m and the experts' e are [..., D], scalar [1].
        """
        both = self.rms_norm(m, post_mlp, eps) + self.rms_norm(e, post_experts, eps)
        return (h + self.rms_norm(both, post, eps)) * scalar

    def gelu(self, x: Array) -> Array:
        """GELU, tanh approximation: x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³))), computed wide.

        In bfloat16 the sum 1 + tanh cancels: 4 % off at x = −2.
        """
        y = self.wide(x)
        return self.like(0.5 * y * (1.0 + self.tanh(0.7978845608028654 * (y + 0.044715 * y * y * y))), x)

    def geglu(self, gate: Array, up: Array) -> Array:
        """gelu(gate) · up."""
        return self.gelu(gate) * up

    def gated(self, x: Array, gate: Array, up: Array) -> Array:
        """gelu(x gateᵀ) · (x upᵀ) of x [..., D]: the first half of a dense MLP."""
        return self.geglu(self.linear(x, gate), self.linear(x, up))

    def rotary(self, offset: Array, length: int, frequencies: Array) -> Any:
        """What `rope` needs for `length` positions from offset [B] on: here cos and sin [B, 1, L, C/2]."""
        positions = self.wide(offset)[:, None] + self.wide(self.arange(length))[None, :]
        angles = positions[:, None, :, None] * frequencies
        return self.cos(angles), self.sin(angles)

    def rope(self, x: Array, rotary: Any) -> Array:
        """Rotate the pairs (i, i + C/2) of x [B, heads, L, C]; computed wide."""
        cos, sin = rotary
        half = x.shape[-1] // 2
        y = self.wide(x)
        a, b = y[..., :half], y[..., half:]
        return self.like(self.concat([a * cos - b * sin, b * cos + a * sin], -1), x)

    def heads(
        self, x: Array, w: AttentionWeights, bias: BiasWeights, eps: float, rotary: Any
    ) -> tuple[Array, Array, Array]:
        """q [B, H, L, C] and k, v [B, G, L, C] of x [B, L, D]: all three normed, q and k rotated."""
        q, k, v = self.project(x, w, bias)
        C = w.q_norm.shape[0]
        q, k = self.as_heads(q, C, w.q_norm, eps, rotary), self.as_heads(k, C, w.k_norm, eps, rotary)
        return q, k, self.as_heads(v, C, None, eps, None)

    def keys_values(
        self, x: Array, w: AttentionWeights, bias: BiasWeights, eps: float, rotary: Any
    ) -> tuple[Array, Array]:
        """k and v of `heads`, where nothing reads q."""
        return self.heads(x, w, bias, eps, rotary)[1:]

    def project(self, x: Array, w: AttentionWeights, bias: BiasWeights) -> tuple[Array, Array, Array]:
        """The three products q [B, L, H·C] and k, v [B, L, G·C] of x [B, L, D]."""
        q, k = self.linear(x, w.q, bias.q), self.linear(x, w.k, bias.k)
        # On full layers V is k_proj's output *before* k_norm and RoPE.
        return q, k, k if w.v is None else self.linear(x, w.v, bias.v)

    def as_heads(self, y: Array, size: int, weight: Array | None, eps: float, rotary: Any) -> Array:
        """A projection y [B, L, H·C] as heads [B, H, L, C] of `size` C, normed, and rotated unless None."""
        x = self.transpose(y.reshape(*y.shape[:2], -1, size), 0, 2, 1, 3)
        x = self.rms_norm(x, weight, eps)
        return x if rotary is None else self.rope(x, rotary)

    def visible(self, L: int, S: int, pad: Array | None, causal: bool, window: int | None) -> Array | None:
        """Which keys a query may see, [B or 1, 1, L, S] bool, or None for all.

        Queries are the last L of the S slots. `pad` [B]: slots before it hold no token. A padding
        query sees itself, so that no row of scores is empty and nothing becomes NaN.
        """
        mask = None
        key = self.arange(S)[None, None, None, :]
        query = self.arange(L)[None, None, :, None] + (S - L)
        if pad is not None:
            mask = (key >= pad[:, None, None, None]) | (key == query)
        if causal:
            mask = key <= query if mask is None else mask & (key <= query)
            if window is not None and window < S:
                mask = mask & (key > query - window)
        return mask

    def attention(
        self, q: Array, k: Array, v: Array, pad: Array | None, causal: bool, window: int | None
    ) -> Array:
        """softmax(q kᵀ) v with q [B, H, L, C], k and v [B, G, S, C], softmax wide -> [B, H, L, C].

        Scores are not scaled (model.md). For `pad`, `causal` and `window` see `visible`; a window
        applies to causal attention only: a canvas has its keys cut beforehand.
        """
        B, H, L, C = q.shape
        G, S = k.shape[1], k.shape[2]
        # Heads of one KV head become rows: K and V are never repeated.
        rows = self.wide(q).reshape(B, G, H // G * L, C)
        scores = (rows @ self.transpose(self.wide(k), 0, 1, 3, 2)).reshape(B, H, L, S)
        mask = self.visible(L, S, pad, causal, window)
        if mask is not None:
            scores = self.where(mask, scores, -1e30)
        p = self.softmax(scores, -1).reshape(B, G, H // G * L, S)
        return self.like((p @ self.wide(v)).reshape(B, H, L, C), q)

    def attend(
        self,
        q: Array,
        own: tuple[Array, Array],
        past: tuple[Array, Array] | None,
        pad: Array | None,
        causal: bool,
        window: int | None,
    ) -> Array:
        """Attention of q [B, H, L, C] over the keys and values [B, G, ·, C] of `past`, then its `own` L."""
        k, v = own
        if past is not None:
            k, v = self.concat([past[0], k], 2), self.concat([past[1], v], 2)
        return self.attention(q, k, v, pad, causal, window)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """The k largest of the last axis, values and ids, largest first, ties to the lower id."""
        ids = self.argsort(-x, -1)[..., :k]
        return self.take_along(x, ids, -1), ids

    def router(self, r: Array, proj: Array, expert_scale: Array, k: int) -> tuple[Array, Array]:
        """Weights [N, K] (wide) and experts [N, K] of tokens r [N, D], wide: see `open_branches`.

        Softmax over all experts, the K best renormalised to sum 1, then each times its expert's scale
        (model.md). All of it is wide.
        """
        p = self.softmax(self.linear(r, self.wide(proj)), -1)
        weights, ids = self.top_k(p, k)
        weights = weights / self.sum(weights, -1, keepdims=True)
        return weights * self.take(self.wide(expert_scale), ids), ids

    def experts(self, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array) -> Array:
        """Σ_k weights[n, k] · expert_{ids[n, k]}(x[n]) for x [N, D] -> [N, D].

        Rows are sorted by expert, so that each expert is one matrix product over adjacent rows.
        """
        N, K = ids.shape
        flat = ids.reshape(N * K)
        order = self.argsort(flat, 0)
        rows = self.take(flat, order)
        y = self.expert_linear(self.take(x, order // K), gate_up, rows)
        half = y.shape[-1] // 2
        y = self.expert_linear(self.geglu(y[:, :half], y[:, half:]), down, rows)
        y = self.take(y, self.argsort(order, 0)).reshape(N, K, x.shape[-1])
        return self.like(self.sum(self.wide(y) * weights[:, :, None], 1), x)

    def embed(self, table: Array, ids: Array) -> Array:
        """Rows of the embedding table, in the compute type."""
        return self.dense(table[ids]) if isinstance(table, Quantized) else self.take(table, ids)

    def rows(self, table: Array, start: int, stop: int) -> Array:
        """Rows start…stop of the embedding table: a tile of the head."""
        return table[start:stop]

    def logits(self, h: Array, table: Array, softcap: float) -> Array:
        """softcap · tanh(h @ tableᵀ / softcap), wide; h [..., D], table [v, D]."""
        return self.softcap(self.wide(self.linear(h, table)), softcap)

    def softcap(self, z: Array, cap: float) -> Array:
        """cap · tanh(z / cap)."""
        return cap * self.tanh(z / cap)

    def soft_embedding(self, p: Array, table: Array) -> Array:
        """p @ table: p [..., v] wide, in the table's type for the product (as the reference does)."""
        return self.compute(p) @ self.dense(table)

    def vocabulary(
        self,
        h: Array,
        table: Array,
        softcap: float,
        temperature: Array | float,
        uniforms: Array,
        soft_bound: float = 0.0,
    ) -> Guess:
        """Argmax, sample, entropy and soft embedding of h [N, D] against the table [V, D].

        With z = logits / temperature and p = softmax(z): entropy −Σ p log p; the sample is the first
        token whose cumulative p exceeds its uniform [N]. Two passes over tiles of z: the first
        gathers maximum and sums online, the second turns tiles into probabilities.

        With a `soft_bound` a soft embedding may leave out that much probability. A row whose most probable
        `soft_tokens` leave out no more is *sparse*: it is made of those alone; every other row is dense.
        Which tokens are kept is a backend's own (runs of 32, or the first of those that are probable), so
        all that is promised is the bound: beyond its rounding `soft` is off by `missing` times the largest
        value of the table at most. A backend may read the host to tell the rows apart: with a bound this
        must not be recorded or compiled.
        """
        parts: list[Guess] = []
        for a in range(0, h.shape[0], self.vocab_rows):
            rows = slice(a, a + self.vocab_rows)
            x = self.after(h[rows], parts[-1].sample, parts[-1].soft) if parts else h[rows]
            parts.append(self._vocabulary(x, table, softcap, temperature, uniforms[rows], soft_bound))
        if len(parts) == 1:
            return parts[0]
        names = ("argmax", "sample", "entropy", "soft", *(["missing"] if soft_bound else []))
        return Guess(*(self.concat([getattr(part, name) for part in parts], 0) for name in names))

    def _vocabulary(
        self,
        h: Array,
        table: Array,
        softcap: float,
        temperature: Array | float,
        uniforms: Array,
        soft_bound: float = 0.0,
    ) -> Guess:
        edges = range(0, table.shape[0], self.vocab_tile)
        tiles: list[Array] = []
        for a in edges:
            x = self.after(h, tiles[-1]) if tiles else h
            tiles.append(self.logits(x, self.rows(table, a, a + self.vocab_tile), softcap) / temperature)
        top, argmax = self._peak(tiles, edges)
        mass = weighted = below = top * 0.0
        for z in tiles:
            z = self.after(z, mass, weighted)
            e = self.exp(z - top)
            mass = mass + self.sum(e, -1, keepdims=True)
            weighted = weighted + self.sum(e * (z - top), -1, keepdims=True)
        floor, missing = self._few(tiles, top, mass, soft_bound) if soft_bound else (None, None)
        sample, soft = argmax * 0, self.wide(h) * 0.0
        for index, a in enumerate(edges):
            z = self.after(tiles[index], mass, weighted, sample, soft)
            tiles[index] = None  # the plane shrinks as it is read
            p = self.exp(z - top) / mass
            reach = self.cumsum(p, -1) + below
            sample = sample + self.sum(reach <= uniforms[:, None], -1)
            below = reach[:, -1:]
            if floor is not None:
                p = self.where(z < floor, p * 0.0, p)
            soft = soft + self.wide(self.soft_embedding(p, self.rows(table, a, a + self.vocab_tile)))
        # Rounding can leave the last cumulative sum below the uniform: then no token exceeds it.
        sample = self.where(sample < table.shape[0], sample, argmax)
        entropy = self.log(mass) - weighted / mass
        return Guess(argmax, sample, entropy[:, 0], self.compute(soft), missing)

    def _few(self, tiles: list[Array], top: Array, mass: Array, bound: float) -> tuple[Array, Array]:
        """The least z [N, 1] that a row's soft embedding keeps, and the probability [N] that it leaves out.

        Tokens as probable as the last of the most probable `soft_tokens` are kept too.
        """
        best = tiles[0][:, :0]
        for z in tiles:
            best, _ = self.top_k(self.concat([best, z], -1), self.soft_tokens)
        floor, missing = best[:, -1:], mass * 0.0
        for z in tiles:
            missing = missing + self.sum(self.where(z < floor, self.exp(z - top), 0.0), -1, keepdims=True)
        missing = missing / mass
        sparse = missing <= bound  # NaN is not
        missing = self.where(missing > TRACE, missing, TRACE)
        return self.where(sparse, floor, -1e30), self.where(sparse, missing, 0.0)[:, 0]

    def _peak(self, tiles: list[Array], edges: range) -> tuple[Array, Array]:
        """Maximum [N, 1] and its first place [N] over all tiles."""
        top, argmax = self.max(tiles[0], -1, keepdims=True), self.argmax(tiles[0], -1)
        for z, a in zip(tiles[1:], edges[1:], strict=True):
            peak = self.max(z, -1, keepdims=True)
            argmax = self.where((peak > top)[:, 0], self.argmax(z, -1) + a, argmax)
            top = self.maximum(top, peak)
        return top, argmax
