"""The loop above the graph: canvases, commits and the rows of a batch, as a stream of typed events.

A canvas is denoised until it is stable and confident, committed, and encoded into the context. Then the
next one begins. A row that stopped leaves the batch at once: its canvas costs no more steps, its reply
no more canvases. The last canvas of a reply is not encoded, because nothing would read it.

    B rows  L canvas positions
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dgemma.engine import sampler
from dgemma.engine.events import Committed, Done, Draft, Event, Prefill, Stats
from dgemma.engine.sampler import Step
from dgemma.errors import ConfigError, PromptError
from dgemma.network.context import Context
from dgemma.network.runner import Runner
from dgemma.settings import GenerationConfig, number, shown
from dgemma.text.messages import is_conversation
from dgemma.text.reply import Reply, ReplyParser, joined
from dgemma.text.tokenizer import Tokenizer, needed


@dataclass
class _Row:
    """A reply in the making."""

    index: int
    id: int
    prompt: list[int]
    parser: ReplyParser | None  # None without a tokenizer
    tokens: list[int] = field(default_factory=list)
    pieces: list[Reply] = field(default_factory=list)
    canvases: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    first_token: float = 0.0
    missing: float = 0.0
    dense: float = 0.0  # shares of the steps, added up

    def read(self, tokens: list[int], last: bool) -> Reply:
        """Take in new ids; returns what they add to the reply, and all the rest of it with the last ones."""
        self.tokens += tokens
        if self.parser is None:
            return Reply()
        pieces = [self.parser.feed(tokens), *([self.parser.close()] if last else [])]
        self.pieces += pieces
        return joined(pieces)

    def add(self, step: Step, place: int, seconds: float) -> None:
        """Count a step in which this row is row `place` of the batch."""
        self.steps += 1
        self.step_seconds += seconds
        self.dense += float(step.dense[place].mean())
        if step.missing is not None:
            self.missing = max(self.missing, float(step.missing[place].max()))


def generate(
    runner: Runner,
    tokenizer: Tokenizer | None,
    config: GenerationConfig,
    prompt: Sequence[Any],
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = False,
    seed: int | None = None,
    row_ids: Sequence[int] | None = None,
    continue_final_message: bool = False,
    control_tokens: bool = False,
) -> Iterator[Event]:
    """Replies to one prompt or a batch, as events: see `dgemma.model.Model.generate`.

    `tokenizer` may be None: prompts are token ids then, and replies have no text.
    """

    def encode(messages: Any) -> list[int]:
        return needed(tokenizer).encode_chat(
            messages,
            tools,
            thinking,
            not continue_final_message,
            continue_final_message=continue_final_message,
            control_tokens=control_tokens,
        )

    prompts = _prompts(runner, prompt, encode)
    ids = sampler.row_ids(prompts) if row_ids is None else _row_ids(row_ids)
    if len(ids) != len(prompts):
        raise PromptError(f"{len(ids)} row ids for {len(prompts)} prompts")
    seed = secrets.randbits(63) if seed is None else number("seed", seed)
    rows = [
        _Row(index, id, tokens, ReplyParser(tokenizer.raw, config.stop_ids) if tokenizer else None)
        for index, (id, tokens) in enumerate(zip(ids, prompts, strict=True))
    ]
    check_positions(prompts, config, runner.config.max_positions)
    return _Run(runner, config, rows, seed).events()


def check_positions(prompts: Sequence[Sequence[int]], config: GenerationConfig, most: int) -> None:
    """PromptError if a prompt and its reply may need more than `most` positions, which the model has."""
    longest = max(len(prompt) for prompt in prompts) + config.max_new_tokens
    if longest > most:
        raise PromptError(
            f"prompt and max_new_tokens need {longest} positions, the model has {most}; shorten the prompt "
            "or lower max_new_tokens"
        )


def _row_ids(ids: Sequence[int]) -> list[int]:
    if not isinstance(ids, Sequence | np.ndarray):
        raise ConfigError(f"row_ids has the unusable value {shown(ids)}")
    return [number("row_ids", id) for id in ids]


def _prompts(runner: Runner, prompt: Sequence[Any], encode: Callable[[Any], list[int]]) -> list[list[int]]:
    """Token ids of each row, from any form of prompt."""
    if not isinstance(prompt, list | tuple | np.ndarray) or not len(prompt):
        raise PromptError("a prompt is a list of messages, a list of token ids, or a list of either")
    many = prompt if isinstance(prompt[0], list | tuple | np.ndarray) else [prompt]
    return [
        encode(one) if is_conversation(one) else [int(token) for token in runner.check_tokens(one)]
        for one in many
    ]


class _Run:
    """One call of `generate`, with its rows and its clock."""

    def __init__(
        self,
        runner: Runner,
        config: GenerationConfig,
        rows: list[_Row],
        seed: int,
    ):
        self.runner, self.config, self.rows, self.seed = runner, config, rows, seed
        self.began = 0.0
        self.prefill_seconds = 0.0

    def events(self) -> Iterator[Event]:
        """The run's events. Its clock stands still while the consumer holds one."""
        with self.runner.ops.running():
            self.began = time.perf_counter()
            for event in self._events():
                held = time.perf_counter()
                yield event
                self.began += time.perf_counter() - held  # the consumer's time is not ours

    def _events(self) -> Iterator[Event]:
        """Encode, denoise and commit canvas by canvas, until no row is active."""
        context: Context | None = None
        active, fresh = self.rows, [row.prompt for row in self.rows]
        while active:
            context = yield from self._prefill(fresh, context)
            canvases = yield from self._canvas(context, active)
            alive = []
            for position, (row, canvas) in enumerate(zip(active, canvases, strict=True)):
                reason = yield from self._commit(row, canvas)
                if reason is None:
                    alive.append(position)
                else:
                    yield self._done(row, reason)
            fresh = [list(canvases[position]) for position in alive]
            if len(alive) < len(active):
                active, context = [active[i] for i in alive], context.fork(alive) if alive else None

    def _prefill(self, tokens: list[list[int]], context: Context | None) -> Generator[Event, None, Context]:
        """Encode the prompts, with events, or later the committed canvases, without; returns the context."""
        # The old context ends here: holding it would double the keys and values.
        prefill = self.runner.prefill(tokens, context, consume=True)
        while True:
            try:
                done, total = next(prefill)
            except StopIteration as end:
                self.prefill_seconds = self.prefill_seconds or time.perf_counter() - self.began
                return end.value
            if not self.prefill_seconds:
                yield Prefill(done, total)

    def _canvas(self, context: Context, rows: list[_Row]) -> Generator[Event, None, np.ndarray]:
        """Denoise one canvas of every row; returns the argmax canvases [B, L] int64 to commit."""
        config, L, vocab = self.config, self.runner.config.canvas_length, self.runner.config.vocab_size
        final = np.zeros((len(rows), L), np.int64)
        live = np.arange(len(rows))
        noise = self._noise(rows, vocab)
        # A canvas starts without the last one's soft embedding.
        canvas, soft = noise.start(config.steps, L), None
        stop = sampler.Stop(config, len(rows))
        sparse = True
        for n in range(config.steps, 0, -1):
            started = time.perf_counter()
            uniforms, fresh = noise.draw(n, L)
            heat, bound = sampler.temperature(config, n), config.soft_bound if sparse else 0.0
            seen = self.runner.see(context, canvas, soft, heat, uniforms, soft_bound=bound)
            step = sampler.refined(seen, fresh, config.entropy_bound)
            # Looking for sparse rows costs a backend more than it saves if most turn out dense. The next step
            # does not look then, and the one after it does.
            sparse = step.missing is None or step.dense.mean() <= 0.5
            spent = time.perf_counter() - started
            for place, row in enumerate(live):
                rows[row].add(step, place, spent)
                number = config.steps - n + 1
                yield Draft(
                    rows[row].index, rows[row].canvases, number, step.argmax[place], step.accepted[place],
                    step.entropy[place],
                )  # fmt: skip
            done = stop(step.argmax, step.entropy)
            final[live] = step.argmax  # the argmax is committed, never the sample
            if done.all():
                break
            canvas, soft = step.canvas, step.soft
            if done.any():
                keep = np.flatnonzero(~done)
                live, canvas = live[keep], canvas[keep]
                soft = self.runner.ops.take(soft, self.runner.ops.asarray(keep))
                context, noise = context.fork(keep), self._noise([rows[row] for row in live], vocab)
                stop.keep(keep)
        return final

    def _noise(self, rows: list[_Row], vocab: int) -> sampler.Noise:
        """The randomness of these rows, each on its current canvas."""
        return sampler.Noise(self.seed, tuple(row.id for row in rows), [row.canvases for row in rows], vocab)

    def _commit(self, row: _Row, canvas: np.ndarray) -> Generator[Event, None, str | None]:
        """Append a final canvas [L] to its reply; returns the finish reason, None while it goes on."""
        room = self.config.max_new_tokens - len(row.tokens)
        stops = np.flatnonzero(np.isin(canvas, self.config.stop_ids))
        stopped = len(stops) > 0 and stops[0] < room  # a stop beyond the limit does not count
        new = [int(token) for token in (canvas[: stops[0] + 1] if stopped else canvas[:room])]
        reason = "stop" if stopped else "length" if len(new) == room else None
        piece = row.read(new, last=reason is not None)
        row.canvases += 1
        row.first_token = row.first_token or time.perf_counter() - self.began
        yield Committed(row.index, row.canvases - 1, new, piece.text, piece.thinking)
        return reason

    def _done(self, row: _Row, reason: str) -> Done:
        seconds = time.perf_counter() - self.began
        tokens, steps = len(row.tokens), row.steps
        stats = Stats(
            prompt_tokens=len(row.prompt),
            tokens=tokens,
            seconds=seconds,
            seconds_to_first_token=row.first_token,
            prefill_seconds=self.prefill_seconds,
            tokens_per_second=tokens / seconds,
            canvases=row.canvases,
            steps=steps,
            steps_per_canvas=steps / row.canvases,
            tokens_per_forward=tokens / steps,
            ms_per_step=1000 * row.step_seconds / steps,
            peak_memory=self.runner.ops.peak_memory(),
            seed=self.seed,
            backend=self.runner.ops.name,
            soft_missing=row.missing,
            soft_dense=row.dense / steps,
        )
        reply = joined(row.pieces)
        # A reply that the limit cut stays "length", even with a whole call in it.
        reason = "tool_calls" if reply.tool_calls and reason == "stop" else reason
        return Done(
            row.index, row.tokens, reply.text, reply.thinking, reply.tool_calls, reason, stats, reply.unread
        )
