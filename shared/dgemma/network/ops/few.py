"""Samples from a few tokens of each position: the most probable ones.

N positions  D hidden  V vocabulary  v some of its tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dgemma.network.ops.arrays import Array
from dgemma.network.ops.vocabulary import Bias, Vocabulary, peak, plane

# Nats below the largest z: what is further has a probability below 1e-55. So often is this distance halved,
# which is beyond what float32 tells apart.
FADED, HALVINGS = 128.0, 40


@dataclass(frozen=True)
class Few:
    """The tokens that a sample is drawn from: the `k` most probable (0: all) that are also among the fewest
    whose probabilities reach `p`. Equals of the last one are kept too."""

    k: int
    p: float


def draw_few(
    ops: Vocabulary,
    h: Array,
    table: Array,
    softcap: float | None,
    temperature: Array,
    uniforms: Array,
    few: Sequence[Few | None],
    sample: Array,
    bias: Bias | None = None,
) -> Array:
    """`sample` [N] of h [N, D], drawn anew in rows that have a `Few`; a row is N / len(few) positions.

    Such a sample is the first of the few tokens whose cumulative p exceeds its uniform [N], where p [V] is
    `Ops.vocabulary`'s, divided by what the few have of it. Nothing but the sample changes: entropy and soft
    embedding are those of the whole p, on which the model was trained, and by which a position counts as
    sure. No backend overrides this: it is another product of the head for those rows, with its plane, and
    `_floor` reads that plane forty times for each of k and p.
    """
    parts: list[Array] = []
    L = h.shape[0] // len(few)
    for row, own in enumerate(few):
        for a in range(row * L, row * L + L, ops.vocab_rows):
            at = slice(a, min(a + ops.vocab_rows, row * L + L))
            if own is None:
                parts.append(sample[at])
                continue
            x, added = ops.after(h[at], parts[-1]) if parts else h[at], bias.rows(at) if bias else None
            parts.append(_drawn(ops, x, table, softcap, temperature[at], uniforms[at], own, added))
    return ops.concat(parts, 0)


def _drawn(
    ops: Vocabulary,
    h: Array,
    table: Array,
    softcap: float | None,
    temperature: Array,
    uniforms: Array,
    few: Few,
    bias: Bias | None,
) -> Array:
    """Samples [N] of positions that share a plane."""
    edges, tiles = plane(ops, h, table, softcap, temperature, bias)
    top, argmax = peak(ops, tiles, edges)
    floor = top - FADED
    if few.k:
        floor = ops.maximum(floor, _floor(ops, tiles, top, lambda z: z * 0.0 + 1.0, few.k))
    if few.p < 1:
        mass = _mass(ops, tiles, top, top - FADED)
        floor = ops.maximum(floor, _floor(ops, tiles, top, lambda z: ops.exp(z - top), few.p * mass))
    goal, below, sample = uniforms[:, None] * _mass(ops, tiles, top, floor), top * 0.0, argmax * 0
    for z in tiles:
        z = ops.after(z, sample, below)
        reach = ops.cumsum(ops.where(z >= floor, ops.exp(z - top), 0.0), -1) + below
        sample = sample + ops.sum(reach <= goal, -1)
        below = reach[:, -1:]
    return ops.where(sample < table.shape[0], sample, argmax)


def _mass(ops: Vocabulary, tiles: list[Array], top: Array, floor: Array) -> Array:
    """Σ exp(z − top) [N, 1] of the tokens with z >= floor [N, 1]."""
    mass = top * 0.0
    for z in tiles:
        z = ops.after(z, mass)
        mass = mass + ops.sum(ops.where(z >= floor, ops.exp(z - top), 0.0), -1, keepdims=True)
    return mass


def _floor(
    ops: Vocabulary, tiles: list[Array], top: Array, weight: Callable[[Array], Array], goal: Array | float
) -> Array:
    """The largest floor [N, 1] at which the weights of the tokens with z >= floor add up to `goal`.

    It is found by halving what lies between it and the top: sorting a vocabulary takes longer and a second
    plane. A token below it has nothing that a float could show.
    """
    low, high = top - FADED, top * 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        total = top * 0.0
        for z in tiles:
            z = ops.after(z, total, middle)
            total = total + ops.sum(ops.where(z >= middle, weight(z), 0.0), -1, keepdims=True)
        low, high = ops.where(total < goal, low, middle), ops.where(total < goal, middle, high)
    return low
