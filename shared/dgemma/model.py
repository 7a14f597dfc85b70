"""A loaded model: the network, its tokenizer, and the few calls that everything else uses.

model = dgemma.load()                               # the embedded model
contexts = model.encode([[2, 105, ...]])            # lists of token ids -> a context a row
logits = model.logits(contexts, canvas)             # [B, L, V] float32 NumPy

B rows  L canvas positions  V vocabulary  D hidden
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Unpack

import numpy as np

from dgemma.engine.edit import Edited, edit
from dgemma.engine.engine import MAX_ROWS, Engine, Limits
from dgemma.engine.events import Event
from dgemma.engine.fill import ROWS, Filler, Watch
from dgemma.engine.infill import Infilled, infill
from dgemma.engine.run import generate
from dgemma.engine.sampler import Step, refined
from dgemma.errors import PromptError
from dgemma.network.config import Config
from dgemma.network.context import Context
from dgemma.network.memory import forms_of, room
from dgemma.network.ops import Ops
from dgemma.network.runner import Runner
from dgemma.network.weights import Weights
from dgemma.settings import GenerationConfig, Settings, number
from dgemma.text.holes import Hole, Seams, emptied, marked
from dgemma.text.messages import is_conversation
from dgemma.text.tokenizer import Tokenizer, needed
from dgemma.text.wording import to_edit, to_infill


class Model(Runner):
    """A loaded model, see the module. `dgemma.load` makes it; it is not thread-safe."""

    def __init__(
        self,
        ops: Ops,
        config: Config,
        generation: GenerationConfig,
        weights: Weights,
        tokenizer: Tokenizer | None,
    ):
        super().__init__(ops, config, weights)
        self.generation, self._tokenizer = generation, tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; PromptError if it has none."""
        return needed(self._tokenizer)

    def refine(
        self,
        contexts: Sequence[Context],
        canvas: Any,
        soft: Any,
        temperature: float | np.ndarray,
        uniforms: np.ndarray,
        noise: np.ndarray,
        entropy_bound: float | None = None,
        soft_bound: float = 0.0,
    ) -> Step:
        """One denoising step of canvas [B, L] ids: `see`, then the sampler.

        Positions outside the entropy bound (default: the checkpoint's) are refilled from `noise` [B, L], even
        if an earlier step accepted them. `noise` is int64; the other arguments are those of `see`.
        """
        seen = self.see(contexts, canvas, soft, temperature, uniforms, soft_bound)
        return refined(seen, noise, self.generation.entropy_bound if entropy_bound is None else entropy_bound)

    def generate(
        self,
        prompt: Sequence[Any],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        seed: int | None = None,
        row_ids: Sequence[int] | None = None,
        continue_final_message: bool = False,
        control_tokens: bool = False,
        stop: Sequence[str] = (),
        deadline: float | None = None,
        max_rows: int | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Event]:
        """Replies to one prompt or a batch, as events; every row ends with a `Done`.

        `prompt` is a conversation (list of messages), a list of token ids, or a list of either. With
        `continue_final_message` a conversation ends with the beginning of the answer, and the reply goes on
        from there. A control token that a message spells is text unless `control_tokens` is set. `settings`
        override the checkpoint's `GenerationConfig` by field name, within `dgemma.settings.RANGES`. A missing
        `seed` is drawn and reported. `row_ids` key each row's noise; they and the seed have 64 bits. The
        default id follows from the prompt itself, so that a row draws the same noise alone and in a batch.
        A reply ends before the first of the texts in `stop`, and after `deadline` seconds. At most `max_rows`
        run together, by default all. Closing the iterator stops within a step. PromptError and ConfigError
        come before the first event.
        """
        config = self.generation.override(**settings)
        return generate(
            self, self._tokenizer, config, prompt, tools, thinking, seed, row_ids,
            continue_final_message, control_tokens, stop, deadline, max_rows,
        )  # fmt: skip

    def engine(self, **limits: Unpack[Limits]) -> Engine:
        """An engine on this model: it takes requests at any time, from any thread. See `Engine`.

        Without `memory` its rows may take what is free now: see `dgemma.network.memory.room`.
        """
        if "memory" not in limits:
            forms = forms_of(self.config, self.weights)
            limits["memory"] = room(self.ops, self.config, limits.get("max_rows", MAX_ROWS), forms)
        return Engine(self, self._tokenizer, **limits)

    @cached_property
    def seams(self) -> Seams:
        """What tokens may stand for at the edge of a hole; PromptError without a tokenizer."""
        return Seams(self.tokenizer, self.config.vocab_size, self.generation.stop_ids)

    def infill(
        self,
        text: str,
        holes: Sequence[Hole] | None = None,
        *,
        instruction: str | None = None,
        prompt: Sequence[Any] | None = None,
        seed: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[Settings],
    ) -> Infilled:
        """A text with its holes filled; without `holes` they are where it has the mark `<<>>`, or `<<5>>`.

        Outside the holes the text stays as it is, character by character. A hole without a length gets up to
        `max_new_tokens`, by default a quarter of a canvas and at most three. `instruction` is the user's
        turn; `prompt`, a conversation or token ids, is all that stands before the text, in its place.
        `watch(done, total, what)` is told how far it is. PromptError and ConfigError in one line for what
        cannot be filled.
        """
        if holes is None:
            text, holes = marked(text)
        text, holes = emptied(text, holes)

        def asked(rest: str) -> list[int]:
            return self._ids(to_infill(instruction, rest) if prompt is None else prompt)

        with self._filler(seed, watch, settings) as filler:
            return infill(filler, text, holes, asked, settings.get("max_new_tokens"))

    def edit(
        self,
        text: str,
        instruction: str | None = None,
        *,
        regions: Sequence[Hole] = (),
        prompt: Sequence[Any] | None = None,
        seed: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[Settings],
    ) -> Edited:
        """A text changed as an instruction asks, where the model is not sure of it; the rest is pinned.

        If there are `regions`, nothing outside of them changes. A hole may grow by `max_new_tokens`, by
        default and at most a quarter of a canvas. The other arguments are those of `infill`; `prompt` stands
        in the place of the instruction. PromptError and ConfigError in one line for what cannot be edited.
        """
        if (instruction is None) == (prompt is None):
            raise PromptError("an edit takes an instruction or a prompt, and not both")
        ids = self._ids(to_edit(instruction or "", text) if prompt is None else prompt)
        with self._filler(seed, watch, settings) as filler:
            return edit(filler, text, ids, regions, settings.get("max_new_tokens"))

    @contextmanager
    def _filler(self, seed: int | None, watch: Watch | None, settings: Settings) -> Iterator[Filler]:
        config = self.generation.override(**settings)
        seed = secrets.randbits(63) if seed is None else number("seed", seed)
        with Engine(self, None, max_rows=ROWS, prefixes=sys.maxsize) as engine:
            yield Filler(engine, self.seams, config, seed, watch)

    def _ids(self, prompt: Sequence[Any]) -> list[int]:
        """Token ids of a conversation, or those that are given."""
        if is_conversation(prompt):
            return self.tokenizer.encode_chat(prompt)
        return [int(token) for token in self.check_tokens(prompt)]
