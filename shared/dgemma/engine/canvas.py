"""One canvas of one row while it settles: everything about it but the network.

L canvas positions  D hidden
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from dgemma.engine import sampler
from dgemma.engine.request import FREE
from dgemma.network.ops import Array
from dgemma.network.runner import Seen
from dgemma.settings import GenerationConfig


@dataclass
class Canvas:
    """The state of a canvas between two steps.

    `pins` [L] are tokens that stand, `FREE` elsewhere. They are on the canvas at every step, count neither
    for acceptance nor for the stop, and the model's own soft embedding stays in their places.
    `begin` [L] has tokens to start with, `FREE` where noise starts; a whole draft that the first step
    confirms is done.
    """

    settings: GenerationConfig
    noise: sampler.Noise
    pins: np.ndarray
    begin: np.ndarray
    tokens: np.ndarray = field(init=False)  # [L] what the network sees next
    argmax: np.ndarray = field(init=False)  # [L] what would be committed now
    step: int = 0  # steps made
    done: bool = False
    soft: Array | None = None  # [L, D] on the device

    def __post_init__(self) -> None:
        start = self.noise.start(self.settings.steps, len(self.pins))
        start = np.where(self.begin == FREE, start, self.begin)
        self.free = self.pins == FREE
        self.tokens = self.argmax = self._pinned(start)
        self.done = not self.free.any()
        whole = (self.begin[self.free] != FREE).all()
        self._stop = sampler.Stop(self.settings, self.argmax if whole else None)
        self._last: deque[np.ndarray] = deque(maxlen=self.settings.majority)

    @property
    def left(self) -> int:
        """The number of the next step, which counts down from N."""
        return self.settings.steps - self.step

    @property
    def temperature(self) -> float:
        """That of the next step."""
        return float(sampler.temperature(self.settings, self.left))

    def uniforms(self) -> np.ndarray:
        """The numbers [L] that pick the next step's samples."""
        return self.noise.draw(self.left, len(self.pins))[0]

    def take(self, seen: Seen, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Take in what the network says of the canvas, as row `row`: accepted [L] bool, entropy [L] float32.

        The next canvas keeps accepted samples, and has fresh noise elsewhere.
        """
        noise = self.noise.draw(self.left, len(self.pins))[1]
        entropy = seen.entropy[row]
        best = None if seen.best is None else seen.best[row, self.free]
        accepted = np.zeros(len(self.pins), bool)
        accepted[self.free] = sampler.kept(self.settings, entropy[self.free], best)
        # Nothing is frozen: a position that is not accepted now gets noise again, whatever it had before.
        self.tokens = self._pinned(np.where(accepted, seen.sample[row], noise))
        self.argmax = self._pinned(seen.argmax[row])
        self.soft = seen.soft[row]
        self.step += 1
        self.done = self._stop(self.argmax, entropy, self.free) or not self.left
        # The argmax is committed, never the sample.
        self._last.append(self.argmax)
        if self.done:
            self.argmax = sampler.majority(list(self._last))
        return accepted, entropy.astype(np.float32)

    def _pinned(self, tokens: np.ndarray) -> np.ndarray:
        return np.where(self.free, tokens, self.pins)


def is_degenerate(tokens: np.ndarray, pad_id: int, ended: bool) -> bool:
    """Whether a canvas [L], or what it has before a stop id, says nothing.

    It is padding alone; or, where it has not `ended`, one run of tokens again and again, eight times at
    least.
    """
    if len(tokens) and (tokens == pad_id).all():
        return True
    runs = [] if ended else range(1, len(tokens) // 8 + 1)
    return any(np.array_equal(tokens[run:], tokens[:-run]) for run in runs)
