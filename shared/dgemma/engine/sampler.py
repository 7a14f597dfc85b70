"""The entropy-bound sampler, once, in NumPy over small arrays, for every backend.

Randomness is counter-based: a number depends on (seed, row id, canvas, step) and on nothing else, so
the same seed gives the same noise on every backend, and a row does not notice its batch. The source of
every rule is model.md, "The sampler (entropy bound), exactly"; steps count *down* from N to 1.

    B rows  L canvas positions
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

    `seed` is a 64-bit integer, `rows` are the rows' own ids, `canvas` their canvases, one number for all or
    [B].
    """

    seed: int
    rows: tuple[int, ...]
    canvas: int | Sequence[int]
    vocab_size: int

    def draw(self, step: int | Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Uniforms [B, L] in [0, 1) float64 and uniform tokens [B, L] int64 of a step, one for all or [B]."""
        steps, canvases = (np.broadcast_to(x, len(self.rows)) for x in (step, self.canvas))
        places = zip(self.rows, canvases.tolist(), steps.tolist(), strict=True)
        words = np.stack([self._words(*place, 2 * length) for place in places])
        uniforms = (words[:, :length] >> np.uint64(11)) * 2.0**-53
        tokens = (words[:, length:] >> np.uint64(32)) * np.uint64(self.vocab_size) >> np.uint64(32)
        return uniforms, tokens.astype(np.int64)

    def start(self, steps: int, length: int) -> np.ndarray:
        """The canvas [B, L] of random tokens that denoising starts from."""
        return self.draw(steps + 1, length)[1]

    def _words(self, row: int, canvas: int, step: int, count: int) -> np.ndarray:
        # Raw words: NumPy promises the bit stream of Philox, not what distributions make of it.
        mask = 2**64 - 1
        # As uint64 arrays: from a list with one value beyond 2^63 NumPy makes floats, and drops low bits.
        key = np.array([self.seed & mask, row & mask], np.uint64)
        counter = np.array([0, 0, step, canvas], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)


def row_ids(prompts: Sequence[Sequence[int]]) -> list[int]:
    """An id for each prompt that depends on its tokens and on how often they came before in the batch.

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
    """t_min + (t_max − t_min) · n / N for step n, a number or an array [B]."""
    return config.t_min + (config.t_max - config.t_min) * step / config.steps


def accept(entropy: np.ndarray, bound: float) -> np.ndarray:
    """Which positions keep their sample, [B, L] bool: those whose surer ones' entropies sum to ≤ bound.

    The surest position is always accepted; equal entropies are taken from the left.
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
    """One refinement of a canvas. NumPy on the host, but for `soft`, which stays on the device.

    `canvas` [B, L]: accepted samples, fresh noise elsewhere: the next step's input. `argmax` [B, L]:
    what would be committed. `entropy` [B, L] float32 nats; `accepted` [B, L] bool; `soft` [B, L, D].
    `missing` [B, L] is the probability that `soft` leaves out at most, None where all of it is dense.
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
    """What the sampler makes of what the network says of a canvas [B, L].

    `noise` [B, L] int64 are the tokens that positions outside the entropy `bound` in nats are refilled with.
    """
    accepted = accept(seen.entropy, bound)
    canvas = np.where(accepted, seen.sample, noise).astype(np.int64)
    entropy = seen.entropy.astype(np.float32)
    return Step(canvas, seen.argmax, entropy, accepted, seen.soft, seen.missing)


class Stop:
    """The stable-and-confident rule for the rows of one canvas."""

    def __init__(self, config: GenerationConfig, rows: int):
        self.config = config
        self._history: list[list[np.ndarray]] = [[] for _ in range(rows)]

    def __call__(self, argmax: np.ndarray, entropy: np.ndarray) -> np.ndarray:
        """Which rows are done, [B] bool, given this step's argmax canvas and entropies [B, L]."""
        done = entropy.mean(-1) < self.config.confidence
        for row, (canvas, history) in enumerate(zip(argmax, self._history, strict=True)):
            same = [np.array_equal(canvas, before) for before in history]
            done[row] &= len(same) == self.config.stability and all(same)
            history.append(canvas)
            del history[: max(0, len(history) - self.config.stability)]
        return done

    def keep(self, rows: np.ndarray) -> None:
        """Forget all rows but these."""
        self._history = [self._history[row] for row in rows]
