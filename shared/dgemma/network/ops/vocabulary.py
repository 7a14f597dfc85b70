"""The vocabulary: tokens to embeddings, hidden states to logits, samples and soft embeddings.

N positions  D hidden  V vocabulary  v some of its tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dgemma.formats.quantized import Quantized
from dgemma.network.ops.arrays import Array
from dgemma.network.ops.decoding import dense
from dgemma.network.ops.layers import Layers, top_k

# The least `missing` of a sparse row: 0 marks a dense one.
TRACE = 1e-30


@dataclass(frozen=True)
class Prediction:
    """What the vocabulary says of each position. All arrays are on the device."""

    argmax: Array  # [N] int
    sample: Array  # [N] int, drawn with the given uniforms
    entropy: Array  # [N] wide, nats
    soft: Array  # [N, D] compute: probabilities @ embedding, before the √D factor
    best: Array  # [N] wide, the probability of the argmax
    # [N] wide: `soft` leaves out at most this probability, 0 in dense rows. None if no bound was given.
    missing: Array | None = None


@dataclass(frozen=True)
class Bias:
    """What is added to processed logits: token v at position n gets `values[n, classes[which[n], v]]`.

    Values are wide, and −1e30 at the least, which forbids a token: an infinity would make NaN.
    """

    classes: Array  # [K, V] as `Vocabulary.asclasses` has them
    which: Array  # [N] int
    values: Array  # [N, C] wide

    def rows(self, at: slice | Array) -> Bias:
        """That of some positions."""
        return Bias(self.classes, self.which[at], self.values[at])


class Vocabulary(Layers):
    """What the head says of each position, with at most one plane of logits in memory."""

    # Width of a tile of logits. One float32 plane of [rows, V] exists, in such tiles, and no second one.
    vocab_tile = 32768
    # Rows of that plane at once: 256 × 262,144 float32 are 268 MB.
    vocab_rows = 256
    # Tokens that a sparse soft embedding keeps.
    soft_tokens = 128

    def asclasses(self, x: np.ndarray) -> Array:
        """Classes [K, V] of a `Bias`, below 2^15, from host to device, in two bytes each."""
        return x.astype(np.int16)

    def soft_embedding(self, p: Array, table: Array) -> Array:
        """p @ table -> [..., D] compute, for p [..., v] wide and table [v, D], which may be a record.

        The product is in the table's type, as in the reference.
        """
        return self.to_compute(p) @ dense(self, table)

    def rows_at_once(self, table: Array) -> int:
        """Rows of a block of `vocabulary` against this table, whose logits share one plane."""
        return self.vocab_rows

    def vocabulary(
        self,
        h: Array,
        table: Array,
        softcap: float | None,
        temperature: Array | float,
        uniforms: Array,
        soft_bound: float = 0.0,
        bias: Bias | None = None,
    ) -> Prediction:
        """Argmax, sample, entropy and soft embedding of h [N, D] against the table [V, D].

        z = logits / temperature (wide [N], or one number for all) + bias, p = softmax(z). The entropy is
        −Σ p log p.
        The sample is the first token whose cumulative p exceeds its uniform [N]. Two passes run over tiles of
        z: the first finds maximum and sums, the second turns tiles into probabilities.

        A soft embedding may leave out the probability `soft_bound`. A row is *sparse* if its most probable
        `soft_tokens` leave out no more: it is made of those alone. Every other row is dense. Each backend
        chooses which tokens it keeps (runs of 32, or the first of the probable ones), so only the bound is
        promised: beyond rounding, `soft` is off by at most `missing` times the largest value of the table.
        A backend may read the host to tell the rows apart, so a call with a bound must not be recorded or
        compiled.
        """
        heat: Array = temperature if getattr(temperature, "ndim", 0) else uniforms * 0.0 + temperature
        parts: list[Prediction] = []
        # No kernel leaves logits uncapped, so that such rows take the plain path and its plane.
        step = self.vocab_rows if softcap is None else self.rows_at_once(table)
        for a in range(0, h.shape[0], step):
            rows = slice(a, a + step)
            x = self.after(h[rows], parts[-1].sample, parts[-1].soft) if parts else h[rows]
            own = None if bias is None else bias.rows(rows)
            parts.append(self.vocabulary_rows(x, table, softcap, heat[rows], uniforms[rows], soft_bound, own))
        if len(parts) == 1:
            return parts[0]
        names = ("argmax", "sample", "entropy", "soft", "best", *(["missing"] if soft_bound else []))
        return Prediction(*(self.concat([getattr(part, name) for part in parts], 0) for name in names))

    def vocabulary_rows(
        self,
        h: Array,
        table: Array,
        softcap: float | None,
        temperature: Array,
        uniforms: Array,
        soft_bound: float = 0.0,
        bias: Bias | None = None,
    ) -> Prediction:
        """`vocabulary` of at most `rows_at_once` rows h [N, D]; temperature and uniforms [N] wide.

        Backends override this method, not `vocabulary`.
        """
        edges, tiles = plane(self, h, table, softcap, temperature, bias)
        top, argmax = peak(self, tiles, edges)
        mass = weighted = below = top * 0.0
        for z in tiles:
            z = self.after(z, mass, weighted)
            e = self.exp(z - top)
            mass = mass + self.sum(e, -1, keepdims=True)
            weighted = weighted + self.sum(e * (z - top), -1, keepdims=True)
        floor, missing = _few(self, tiles, top, mass, soft_bound) if soft_bound else (None, None)
        sample, soft = argmax * 0, self.to_wide(h) * 0.0
        for index, a in enumerate(edges):
            z = self.after(tiles[index], mass, weighted, sample, soft)
            tiles[index] = None  # the plane shrinks as it is read
            p = self.exp(z - top) / mass
            reach = self.cumsum(p, -1) + below
            sample = sample + self.sum(reach <= uniforms[:, None], -1)
            below = reach[:, -1:]
            if floor is not None:
                p = self.where(z < floor, p * 0.0, p)
            soft = soft + self.to_wide(self.soft_embedding(p, table[a : a + self.vocab_tile]))
        # Rounding can leave the last cumulative sum below the uniform, so that no token exceeds it.
        sample = self.where(sample < table.shape[0], sample, argmax)
        entropy = self.log(mass) - weighted / mass
        return Prediction(argmax, sample, entropy[:, 0], self.to_compute(soft), 1 / mass[:, 0], missing)


def embed(ops: Vocabulary, table: Array, ids: Array) -> Array:
    """Rows [..., D] of the embedding table [V, D] for ids [...], in the compute type."""
    # A quantized table is indexed before it is decoded: its whole would take V·D values.
    return dense(ops, table[ids]) if isinstance(table, Quantized) else ops.take(table, ids)


def logits(ops: Vocabulary, h: Array, table: Array, softcap: float | None) -> Array:
    """softcap · tanh(h @ tableᵀ / softcap) -> [..., v] wide; h [..., D], table [v, D]. None caps nothing."""
    z = ops.to_wide(ops.linear(h, table))
    return z if softcap is None else soft_cap(ops, z, softcap)


def plane(
    ops: Vocabulary, h: Array, table: Array, softcap: float | None, temperature: Array, bias: Bias | None
) -> tuple[range, list[Array]]:
    """All z of h [N, D] in tiles [N, v], and the token that each tile begins with."""
    edges = range(0, table.shape[0], ops.vocab_tile)
    tiles: list[Array] = []
    for a in edges:
        x = ops.after(h, tiles[-1]) if tiles else h
        z = logits(ops, x, table[a : a + ops.vocab_tile], softcap) / temperature[:, None]
        tiles.append(z if bias is None else z + _added(ops, bias, a, z.shape[-1]))
    return edges, tiles


def judged(ops: Vocabulary, h: Array, table: Array, softcap: float | None, ids: Array) -> tuple[Array, Array]:
    """Log-probabilities [N] wide, in nats, of tokens ids [N] at h [N, D], and the likeliest tokens [N].

    `table` is [V, D]. One tile of logits exists at a time, of `vocab_rows` positions.
    """
    logs: list[Array] = []
    best: list[Array] = []
    for start in range(0, h.shape[0], ops.vocab_rows):
        rows = slice(start, start + ops.vocab_rows)
        x = ops.after(h[rows], logs[-1], best[-1]) if logs else h[rows]
        own, first = _judged(ops, x, table, softcap, ids[rows])
        logs.append(own)
        best.append(first)
    return ops.concat(logs, 0), ops.concat(best, 0)


def _judged(
    ops: Vocabulary, h: Array, table: Array, softcap: float | None, ids: Array
) -> tuple[Array, Array]:
    own = mass = top = argmax = None
    for a in range(0, table.shape[0], ops.vocab_tile):
        x = h if own is None else ops.after(h, own, mass, top, argmax)
        z = logits(ops, x, table[a : a + ops.vocab_tile], softcap)
        here, peak, place = ids - a, ops.max(z, -1, keepdims=True), ops.argmax(z, -1) + a
        inside = (here >= 0) & (here < z.shape[-1])
        found = ops.take_along(z, ops.where(inside, here, here * 0)[:, None], -1)[:, 0]
        found = ops.where(inside, found, found * 0.0)
        if own is None:
            own, top, argmax = found, peak, place
            mass = ops.sum(ops.exp(z - peak), -1, keepdims=True)
            continue
        argmax = ops.where((peak > top)[:, 0], place, argmax)
        higher = ops.maximum(top, peak)
        mass = mass * ops.exp(top - higher) + ops.sum(ops.exp(z - higher), -1, keepdims=True)
        own, top = own + found, higher
    return own - (top + ops.log(mass))[:, 0], argmax


def _added(ops: Vocabulary, bias: Bias, start: int, count: int) -> Array:
    """What a bias adds to the logits [N, v] of so many tokens."""
    classes = ops.take(ops.integer(bias.classes[:, start : start + count]), bias.which)
    return ops.take_along(bias.values, classes, -1)


def soft_cap(ops: Vocabulary, z: Array, cap: float) -> Array:
    """cap · tanh(z / cap), elementwise; z is wide."""
    return cap * ops.tanh(z / cap)


def _few(ops: Vocabulary, tiles: list[Array], top: Array, mass: Array, bound: float) -> tuple[Array, Array]:
    """The least z [N, 1] that a row's soft embedding keeps, and the probability [N] that it leaves out.

    `tiles` are z [N, v] each, `top` and `mass` [N, 1]. Ties with the last kept token are kept too.
    """
    best = tiles[0][:, :0]
    for z in tiles:
        best, _ = top_k(ops, ops.concat([best, z], -1), ops.soft_tokens)
    floor, missing = best[:, -1:], mass * 0.0
    for z in tiles:
        missing = missing + ops.sum(ops.where(z < floor, ops.exp(z - top), 0.0), -1, keepdims=True)
    missing = missing / mass
    sparse = missing <= bound  # NaN is not
    missing = ops.where(missing > TRACE, missing, TRACE)
    return ops.where(sparse, floor, -1e30), ops.where(sparse, missing, 0.0)[:, 0]


def peak(ops: Vocabulary, tiles: list[Array], edges: range) -> tuple[Array, Array]:
    """Maximum [N, 1] and its first place [N] over all tiles [N, v], which begin at `edges`."""
    top, argmax = ops.max(tiles[0], -1, keepdims=True), ops.argmax(tiles[0], -1)
    for z, a in zip(tiles[1:], edges[1:], strict=True):
        peak = ops.max(z, -1, keepdims=True)
        argmax = ops.where((peak > top)[:, 0], ops.argmax(z, -1) + a, argmax)
        top = ops.maximum(top, peak)
    return top, argmax
