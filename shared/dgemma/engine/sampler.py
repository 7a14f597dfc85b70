"""The entropy-bound sampler, once, in NumPy over small arrays, for every backend.

Randomness is counter-based: a number depends on (seed, row id, canvas, step) and on nothing else. So the
same seed gives the same noise on every backend, and a row does not notice its company. Steps count *down*
from N to 1. By default every rule is the reference's; the other choices are off unless asked for.

    B rows  L canvas positions  D hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from dgemma.network.bias import RowBias
from dgemma.network.ops import Array
from dgemma.network.ops.few import Few
from dgemma.network.runner import Seen
from dgemma.settings import GenerationConfig

# What a bias adds to the logit of a token that may not come. It is finite: an infinity would make NaN.
FORBIDDEN = -1e30


@dataclass(frozen=True)
class Noise:
    """The randomness of one canvas of one row.

    `seed` and `row`, the row's own id, are 64-bit integers. A canvas begun again is another `attempt`.
    """

    seed: int
    row: int
    canvas: int
    vocab_size: int
    attempt: int = 0

    def draw(self, step: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Uniforms [L] float64 in [0, 1) and uniform tokens [L] int64 of a step."""
        words = self._words(step, 2 * length)
        # The upper 53 bits fill a float64 exactly, so 1.0 never occurs.
        uniforms = (words[:length] >> np.uint64(11)) * 2.0**-53
        # The upper 32 bits scaled to [0, V): the product fits 64 bits.
        tokens = (words[length:] >> np.uint64(32)) * np.uint64(self.vocab_size) >> np.uint64(32)
        return uniforms, tokens.astype(np.int64)

    def start(self, steps: int, length: int) -> np.ndarray:
        """The canvas [L] int64 of random tokens at which denoising starts."""
        return self.draw(steps + 1, length)[1]  # steps count down from N, so N + 1 is free

    def _words(self, step: int, count: int) -> np.ndarray:
        """Random words [count] uint64 of a step."""
        # Raw words: NumPy promises the bit stream of Philox, but not that of its distributions.
        mask = 2**64 - 1
        # Lists would not do: NumPy makes floats of one with a value beyond 2^63, and drops low bits.
        key = np.array([self.seed & mask, self.row & mask], np.uint64)
        counter = np.array([0, self.attempt, step, self.canvas], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)


def row_id(prompt: Sequence[int]) -> int:
    """The id in [0, 2^64) of a row with this prompt, so that it draws the same noise alone and in company."""
    digest = blake2b(np.asarray(prompt, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def row_ids(prompts: Sequence[Sequence[int]]) -> list[int]:
    """`row_id` of each prompt; one that came before counts up, so that copies get samples of their own."""
    seen: dict[int, int] = {}
    ids = []
    for prompt in prompts:
        id = row_id(prompt)
        seen[id] = seen.get(id, -1) + 1
        ids.append((id + seen[id]) % 2**64)
    return ids


def temperature(config: GenerationConfig, step: Any) -> Any:
    """t_min + (t_max − t_min) · n / N for step n, a number or an array [B]; n counts down."""
    return config.t_min + (config.t_max - config.t_min) * step / config.steps


def accept(entropy: np.ndarray, bound: float) -> np.ndarray:
    """Which positions keep their sample, [B, L] bool, for entropies [B, L] in nats, L > 0.

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


def kept(settings: GenerationConfig, entropy: np.ndarray, best: np.ndarray | None) -> np.ndarray:
    """Which positions of a canvas keep their sample, [L] bool, L > 0.

    Those within the entropy bound; or, with a `threshold`, those whose most probable token has at least this
    probability `best` [L], and the surest in any case.
    """
    if not settings.threshold or best is None:
        return accept(entropy[None], settings.entropy_bound)[0]
    sure = best >= settings.threshold
    sure[np.argmax(best)] = True
    return sure


def few(settings: GenerationConfig) -> Few | None:
    """Which tokens a sample may come from, None if from all."""
    return Few(settings.top_k, settings.top_p) if settings.top_k or settings.top_p < 1 else None


def majority(canvases: Sequence[np.ndarray]) -> np.ndarray:
    """The token [L] that most of the canvases [L] have at each position; ties go to the latest."""
    votes = np.stack(canvases[::-1])
    counts = (votes[:, None] == votes).sum(1)
    return np.take_along_axis(votes, counts.argmax(0)[None], 0)[0]


@lru_cache(maxsize=16)  # a table of the released vocabulary is 2 MB
def no_stop_first(stop_ids: tuple[int, ...], vocab_size: int, length: int) -> RowBias | None:
    """The bias on a reply's first canvas that keeps its first token from ending it; None without stop ids."""
    classes = np.isin(np.arange(vocab_size), stop_ids).astype(np.int64)
    values = np.zeros((length, 2), np.float32)
    values[0, 1] = FORBIDDEN
    return (classes, values) if stop_ids else None


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
    """The stable-and-confident rule for one canvas. `last` [L] is a draft: the step before the first.

    With `early_stop` the canvas ends for it behind its first stop id: what lies there need not be stable, and
    counts as sure. So this is never later than the reference's rule.
    """

    def __init__(self, config: GenerationConfig, last: np.ndarray | None = None):
        self.config, self._last = config, last
        self._same = 0  # steps before the last that had its canvas

    def __call__(self, argmax: np.ndarray, entropy: np.ndarray, free: np.ndarray) -> bool:
        """Whether the canvas is done, for this step's argmax canvas and entropies in nats, [L] each.

        Entropies count where `free` [L] bool holds.
        """
        end = len(argmax)
        if self.config.early_stop:
            end = int(np.argmax(np.append(np.isin(argmax, self.config.stop_ids), True))) + 1
            entropy = np.where(np.arange(len(argmax)) < end, entropy, entropy.dtype.type(0))
        held = self._last is not None and np.array_equal(argmax[:end], self._last[:end])
        self._same = self._same + 1 if held else 0
        self._last = argmax
        # A canvas with fewer steps behind it than `stability` is not stable yet.
        return bool(self._same >= self.config.stability and entropy[free].mean() < self.config.confidence)
