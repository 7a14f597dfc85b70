"""What an engine is asked for, and what it checks before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dgemma.engine.sampler import row_id
from dgemma.errors import ConfigError, PromptError
from dgemma.network.runner import Runner
from dgemma.settings import GenerationConfig, number, shown

FREE = -1  # a place of `pins` that the model fills


class Constraint(Protocol):
    """What a reply must fit, for one request; it may keep a state of its own.

    Before every step of a canvas the engine asks for a bias: processed logits (after the temperature) of the
    tokens of class c get `values[position, c]` on top, so that acceptance, entropies, samples and the
    self-conditioning signal all know it. A forbidden token gets −1e30: an infinity would make NaN.
    """

    def bias(self, canvas: int, last: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
        """Classes [V] int below 2^15 and values [L, C] for the next step of a canvas; None changes nothing.

        `last` [L] is the argmax canvas of the step before, None at the first step. The array of classes
        should be the same object every time: it stays on the device.
        """

    def commit(self, canvas: int, tokens: np.ndarray) -> np.ndarray:
        """The canvas [L] to commit in place of the last step's argmax `tokens` [L]."""


@dataclass(frozen=True)
class Request:
    """One reply that is wanted.

    `prompt` has token ids. `pins` are tokens of the reply from its beginning on, `FREE` where the model
    decides. `draft` has tokens from the beginning on that the first canvases begin with instead of noise,
    which still stands where it has `FREE`. `committed` are whole canvases of a reply that was cut off
    elsewhere: it goes on as it would have there, with the same seed and row id. `stop` are texts before which
    the reply ends. `deadline` is how many seconds the reply may take, waiting included. `row` is the number
    that its events carry.
    """

    prompt: Sequence[int]
    settings: GenerationConfig
    seed: int
    row_id: int | None = None  # by default from the prompt
    stop: tuple[str, ...] = ()
    pins: Sequence[int] = ()
    draft: Sequence[int] = ()
    committed: Sequence[int] = ()
    constraint: Constraint | None = None
    deadline: float | None = None
    row: int = 0

    @property
    def id(self) -> int:
        """The id that keys the row's noise, in [0, 2^64)."""
        return row_id(self.prompt) if self.row_id is None else self.row_id

    @property
    def positions(self) -> int:
        """Positions that the request may come to need: those of its prompt and of all of its reply."""
        return len(self.prompt) + self.settings.max_new_tokens

    def check(self, runner: Runner) -> None:
        """PromptError or ConfigError in one line if no reply could be given."""
        settings, L = self.settings, runner.config.canvas_length
        runner.check_tokens(self.prompt)
        check_positions([self.prompt], settings, runner.config.max_positions)
        number("seed", self.seed)
        number("row_ids", self.id)
        if self.deadline is not None:
            number("deadline", self.deadline)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop has the unusable value {shown(self.stop)}: it takes texts, none empty")
        if self.committed:
            runner.check_tokens(self.committed)
            if len(self.committed) % L or len(self.committed) >= settings.max_new_tokens:
                raise PromptError(
                    f"a reply goes on after whole canvases of {L} tokens, and before max_new_tokens; "
                    f"{len(self.committed)} of {settings.max_new_tokens} tokens are committed"
                )
        if len(self.draft):
            runner.check_tokens([0 if token == FREE else token for token in self.draft])
        self._check_pins(runner)

    def _check_pins(self, runner: Runner) -> None:
        pins, settings = np.asarray(self.pins), self.settings
        if not len(pins):
            return
        if pins.dtype.kind != "i" or pins.ndim != 1:
            raise PromptError(f"pins must be token ids, and {FREE} where the model decides")
        runner.check_tokens(np.where(pins == FREE, 0, pins).tolist())
        if len(pins) > settings.max_new_tokens:
            raise PromptError(
                f"{len(pins)} tokens are pinned or left open, and max_new_tokens is {settings.max_new_tokens}"
            )
        stops = np.flatnonzero(np.isin(pins, settings.stop_ids))
        if len(stops) and (pins[stops[0] + 1 :] == FREE).any():
            raise PromptError(
                f"pins contradict: the stop token {pins[stops[0]]} at {stops[0]} ends the reply before its "
                "last hole"
            )


def check_positions(prompts: Sequence[Sequence[int]], settings: GenerationConfig, most: int) -> None:
    """PromptError if a prompt and its reply may need more than `most` positions, which the model has."""
    longest = max(len(prompt) for prompt in prompts) + settings.max_new_tokens
    if longest > most:
        raise PromptError(
            f"prompt and max_new_tokens need {longest} positions, the model has {most}; shorten the prompt "
            "or lower max_new_tokens"
        )
