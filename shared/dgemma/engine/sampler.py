"""The entropy-bound sampler, once, in NumPy over small arrays, for every backend.

Randomness is counter-based: a number depends on (seed, row id, canvas, step) and on nothing else. So the
same seed gives the same noise on every backend, and a row does not notice its batch. Every rule comes from
model.md, "The sampler (entropy bound), exactly". Steps count *down* from N to 1.

    B rows  L canvas positions  D hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from dgemma.network.ops import Array
from dgemma.network.runner import Seen
from dgemma.settings import GenerationConfig


@dataclass(frozen=True)
class Noise:
    """The randomness of a set of rows, each on a canvas of its own.

    `seed` is a 64-bit integer, `rows` are the rows' own ids. `canvas` is one number for all, or [B].
    """

    seed: int
    rows: tuple[int, ...]
    canvas: int | Sequence[int]
    vocab_size: int

    def draw(self, step: int | Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Uniforms [B, L] float64 in [0, 1) and uniform tokens [B, L] int64 of `step`, one for all or [B]."""
        steps, canvases = (np.broadcast_to(x, len(self.rows)) for x in (step, self.canvas))
        places = zip(self.rows, canvases.tolist(), steps.tolist(), strict=True)
        words = np.stack([self._words(*place, 2 * length) for place in places])
        # The upper 53 bits fill a float64 exactly, so 1.0 never occurs.
        uniforms = (words[:, :length] >> np.uint64(11)) * 2.0**-53
        # The upper 32 bits scaled to [0, V): the product fits 64 bits.
        tokens = (words[:, length:] >> np.uint64(32)) * np.uint64(self.vocab_size) >> np.uint64(32)
        return uniforms, tokens.astype(np.int64)

    def start(self, steps: int, length: int) -> np.ndarray:
        """The canvas [B, L] int64 of random tokens at which denoising starts."""
        return self.draw(steps + 1, length)[1]  # steps count down from N, so N + 1 is free

    def _words(self, row: int, canvas: int, step: int, count: int) -> np.ndarray:
        """Random words [count] uint64 of one row's canvas and step."""
        # Raw words: NumPy promises the bit stream of Philox, but not that of its distributions.
        mask = 2**64 - 1
        # Lists would not do: NumPy makes floats of one with a value beyond 2^63, and drops low bits.
        key = np.array([self.seed & mask, row & mask], np.uint64)
        counter = np.array([0, 0, step, canvas], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)


def row_ids(prompts: Sequence[Sequence[int]]) -> list[int]:
    """An id in [0, 2^64) for each prompt, from its tokens and from how often they came before in the batch.

    So a row draws the same noise alone and in any batch, while repeated prompts get different samples.
    """
    seen: dict[bytes, int] = {}
    ids = []
    for prompt in prompts:
        digest = blake2b(np.asarray(prompt, np.int64).tobytes(), digest_size=8).digest()
        seen[digest] = seen.get(digest, -1) + 1
        ids.append((int.from_bytes(digest, "little") + seen[digest]) % 2**64)
    return ids


def temperature(config: GenerationConfig, step: Any) -> Any:
    """t_min + (t_max − t_min) · n / N for step n, a number or an array [B]; n counts down."""
    return config.t_min + (config.t_max - config.t_min) * step / config.steps


def accept(entropy: np.ndarray, bound: float) -> np.ndarray:
    """Which positions keep their sample, [B, L] bool, for entropies [B, L] in nats.

    A position is accepted if the entropies of the surer ones, without its own, sum to at most `bound`. The
    surest position is always accepted. Equal entropies are taken from the left.
    """
    order = np.argsort(entropy, -1, kind="stable")
    ranked = np.take_along_axis(entropy.astype(np.float64), order, -1)
    before = np.cumsum(ranked, -1) - ranked
    accepted = np.empty(entropy.shape, bool)
    np.put_along_axis(accepted, order, before <= bound, -1)
    accepted[np.arange(len(entropy)), order[:, 0]] = True
    return accepted


@dataclass(frozen=True)
class Step:
    """One refinement of a canvas. `soft` [B, L, D] stays on the device, the rest is NumPy.

    `canvas` [B, L] int64 is the next step's input: accepted samples, fresh noise elsewhere. `argmax` [B, L]
    int64 is committed if this is the last step. `entropy` [B, L] is float32 in nats, `accepted` [B, L] bool.
    `soft` leaves out at most the probability `missing` [B, L]; None if all of it is dense.
    """

    canvas: np.ndarray
    argmax: np.ndarray
    entropy: np.ndarray
    accepted: np.ndarray
    soft: Array
    missing: np.ndarray | None = None

    @property
    def dense(self) -> np.ndarray:
        """Positions [B, L] whose soft embedding left nothing out."""
        return np.ones(self.argmax.shape, bool) if self.missing is None else self.missing == 0


def refined(seen: Seen, noise: np.ndarray, bound: float) -> Step:
    """The sampler's step on a canvas [B, L] that the network has seen.

    Positions outside the entropy `bound` in nats are refilled from `noise` [B, L] int64.
    """
    accepted = accept(seen.entropy, bound)
    # Nothing is frozen: a position accepted in an earlier step gets noise again if it is not accepted now.
    canvas = np.where(accepted, seen.sample, noise).astype(np.int64)
    entropy = seen.entropy.astype(np.float32)
    return Step(canvas, seen.argmax, entropy, accepted, seen.soft, seen.missing)


class Stop:
    """The stable-and-confident rule for the rows of one canvas."""

    def __init__(self, config: GenerationConfig, rows: int):
        self.config = config
        self._last: list[np.ndarray | None] = [None] * rows
        self._same = [0] * rows  # steps before the last that had its canvas

    def __call__(self, argmax: np.ndarray, entropy: np.ndarray) -> np.ndarray:
        """Which rows are done, [B] bool, for this step's argmax canvas and entropies in nats [B, L]."""
        done = entropy.mean(-1) < self.config.confidence
        for row, canvas in enumerate(argmax):
            last = self._last[row]
            held = last is not None and np.array_equal(canvas, last)
            self._same[row] = self._same[row] + 1 if held else 0
            self._last[row] = canvas
            # A canvas with fewer steps behind it than `stability` is not stable yet.
            done[row] &= self._same[row] >= self.config.stability
        return done

    def keep(self, rows: np.ndarray) -> None:
        """Forget all rows but `rows`, an array of indices."""
        self._last = [self._last[row] for row in rows]
        self._same = [self._same[row] for row in rows]
