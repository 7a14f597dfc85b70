"""A reply in the making: its context, its canvases, and the events that it gives.

L canvas positions
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from dgemma.engine import sampler
from dgemma.engine.canvas import Canvas, is_degenerate
from dgemma.engine.events import Committed, Done, Draft, Event, Prefill, Stats
from dgemma.engine.request import FREE, Request
from dgemma.engine.stops import StopTexts
from dgemma.network.bias import RowBias
from dgemma.network.context import Context
from dgemma.network.runner import Runner, Seen
from dgemma.text.reply import Reply, ReplyParser, joined


class Row:
    """The state of one request, from its submission on. Times are in seconds of the engine's clock."""

    def __init__(self, request: Request, runner: Runner, parser: ReplyParser | None, now: float):
        self.request, self.runner, self.parser = request, runner, parser
        self.tokens = list(request.committed)
        self.stops = StopTexts(request.stop)
        self.pieces: list[Reply] = []
        self.context: Context | None = None
        self.pending = np.concatenate([request.prompt, request.committed]).astype(np.int64)  # to be encoded
        self.canvas: Canvas | None = None
        self.canvases = len(self.tokens) // runner.config.canvas_length
        self.first_canvas, self.attempt = self.canvases, 0
        self.cached = 0  # prompt tokens that came from the cache of prefixes
        self.submitted, self.admitted, self.prefilled, self.first_token = now, 0.0, 0.0, 0.0
        self.steps, self.step_seconds = 0, 0.0
        self.missing, self.dense = 0.0, 0.0  # dense: shares of the steps, added up
        self._sparse = True  # whether the next step looks for sparse soft embeddings
        self.expires = None if request.deadline is None else time.monotonic() + request.deadline
        if parser and self.tokens:
            self.pieces.append(self.stops.feed(parser.feed(self.tokens)))

    # ---- encoding -------------------------------------------------------------------------------

    @property
    def encoded(self) -> list[int]:
        """The tokens that its context holds."""
        assert self.context is not None
        return [*self.request.prompt, *self.tokens][: self.context.length]

    def extended(self, count: int, now: float) -> Iterator[Event]:
        """The context has taken `count` of the pending tokens."""
        assert self.context is not None
        self.pending = self.pending[count:]
        if not self.prefilled:
            total = len(self.request.prompt) + len(self.request.committed)
            yield Prefill(self.request.row, self.context.length, total)
            if not len(self.pending):
                self.prefilled = now

    # ---- denoising ------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether its context is whole, so that its canvas can be seen."""
        return self.context is not None and not len(self.pending)

    def begin(self) -> Canvas:
        """The canvas under way, a new one if there is none."""
        if self.canvas is None:
            L, request = self.runner.config.canvas_length, self.request
            noise = sampler.Noise(
                request.seed, request.id, self.canvases, self.runner.config.vocab_size, self.attempt
            )
            start = self.canvases * L
            # Begun again, a canvas begins with noise: the draft may be what said nothing.
            begin = () if self.attempt else request.draft
            pins, draft = (_part(tokens, start, L) for tokens in (request.pins, begin))
            self.canvas = Canvas(request.settings, noise, pins, draft)
        return self.canvas

    @property
    def soft_bound(self) -> float:
        """Probability that the next soft embedding may leave out."""
        return self.request.settings.soft_bound if self._sparse else 0.0

    def bias(self) -> RowBias | None:
        """What the next step adds to the processed logits of its canvas."""
        canvas, constraint = self.begin(), self.request.constraint
        if constraint:
            return constraint.bias(self.canvases, canvas.argmax if canvas.step else None)
        if self.canvases or self.request.settings.allow_empty:
            return None
        return sampler.no_stop_first(
            self.request.settings.stop_ids, self.runner.config.vocab_size, len(canvas.pins)
        )

    def take(self, seen: Seen, place: int, seconds: float) -> Draft:
        """Take in a step in which this row was row `place` of the pass."""
        canvas = self.begin()
        accepted, entropy = canvas.take(seen, place)
        self.steps += 1
        self.step_seconds += seconds
        missing = None if seen.missing is None else seen.missing[place]
        dense = 1.0 if missing is None else float((missing == 0).mean())
        self.dense += dense
        if missing is not None:
            self.missing = max(self.missing, float(missing.max()))
        # Looking for sparse rows costs a backend more than it saves if most turn out dense. The next step
        # does not look then, and the one after it does.
        self._sparse = missing is None or dense <= 0.5
        if canvas.done and self.request.constraint:
            canvas.argmax = self.request.constraint.commit(self.canvases, canvas.argmax)
        return Draft(self.request.row, self.canvases, canvas.step, canvas.argmax, accepted, entropy)

    def commit(self, now: float) -> Iterator[tuple[Event, str | None]]:
        """A settled canvas joins the reply: the event, and the finish reason or None while it goes on.

        Nothing comes of a canvas that says nothing: it is begun again, once.
        """
        assert self.canvas is not None and self.canvas.done
        canvas, self.canvas = self.canvas, None
        tokens, settings = canvas.argmax, self.request.settings
        room = settings.max_new_tokens - len(self.tokens)
        stops = np.flatnonzero(np.isin(tokens, settings.stop_ids))
        stopped = len(stops) > 0 and stops[0] < room  # a stop beyond the limit does not count
        empty = (
            not settings.allow_empty
            and canvas.free.all()
            and is_degenerate(tokens[: stops[0]] if stopped else tokens, self.runner.config.pad_id, stopped)
        )
        if empty and not self.attempt:
            self.attempt = 1
            return
        self.attempt = 0
        new = [int(token) for token in (tokens[: stops[0] + 1] if stopped else tokens[:room])]
        reason = "degenerate" if empty else "stop" if stopped else "length" if len(new) == room else None
        piece = self._read(new, last=reason is not None)
        if self.stops.found and reason != "degenerate":
            reason = "stop"
        self.canvases += 1
        self.first_token = self.first_token or now
        if reason is None:
            self.pending = tokens
        said = piece.text, piece.thinking, piece.tool_calls
        yield Committed(self.request.row, self.canvases - 1, new, *said), reason

    def _read(self, tokens: list[int], last: bool) -> Reply:
        """Take in new ids; returns what they add to the reply, and all the rest of it with the last ones."""
        self.tokens += tokens
        if self.parser is None:
            return Reply()
        parts = [self.parser.feed(tokens)]
        piece = self.stops.feed(parts[0])
        if last and not self.stops.found:
            piece = joined([piece, self.stops.feed(self.parser.close())])
        if last:
            piece = joined([piece, self.stops.close()])
        self.pieces.append(piece)
        return piece

    # ---- the end --------------------------------------------------------------------------------

    def done(self, reason: str, now: float) -> Done:
        """The reply as it stands, ended for `reason`."""
        runner, steps, tokens = self.runner, self.steps, len(self.tokens)
        if self.parser and reason in ("cancelled", "deadline"):
            rest = joined([self.stops.feed(self.parser.close()), self.stops.close()])
            self.pieces.append(rest)
        seconds = now - self.submitted
        written = self.canvases - self.first_canvas
        stats = Stats(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached,
            tokens=tokens,
            seconds=seconds,
            queued_seconds=(self.admitted or now) - self.submitted,
            seconds_to_first_token=max(0.0, self.first_token - self.submitted),
            prefill_seconds=max(0.0, self.prefilled - self.admitted),
            tokens_per_second=tokens / seconds if seconds else 0.0,
            canvases=self.canvases,
            steps=steps,
            steps_per_canvas=steps / max(1, written),
            tokens_per_forward=(tokens - len(self.request.committed)) / max(1, steps),
            ms_per_step=1000 * self.step_seconds / max(1, steps),
            peak_memory=runner.ops.peak_memory(),
            seed=self.request.seed,
            backend=runner.ops.name,
            soft_missing=self.missing,
            soft_dense=self.dense / max(1, steps),
        )
        reply = joined(self.pieces)
        # A reply that the limit cut stays "length", even with a whole call in it.
        reason = "tool_calls" if reply.tool_calls and reason == "stop" else reason
        return Done(
            self.request.row, self.tokens, reply.text, reply.thinking, reply.tool_calls, reason, stats,
            reply.unread,
        )  # fmt: skip


def _part(tokens: Sequence[int], start: int, length: int) -> np.ndarray:
    """Tokens [length] from `start` on, `FREE` beyond the end."""
    part = np.full(length, FREE, np.int64)
    given = np.asarray(tokens[start : start + length], np.int64)
    part[: len(given)] = given
    return part
