"""The engine: requests come at any time, share every pass, and leave when they are done.

One `step` ends what was cancelled, admits what fits, encodes some tokens and makes one denoising step of all
rows that are ready. Rows may be at different steps of different canvases: a pass is a list of tokens, and
each row has a context of its own. A row that is done leaves at once, and no row waits for another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Self, TypedDict

import numpy as np

from dgemma.engine.handle import Handle
from dgemma.engine.prefix import Prefixes
from dgemma.engine.request import Request
from dgemma.engine.row import Row
from dgemma.engine.sampler import few
from dgemma.errors import DgemmaError, PromptError, QueueFullError
from dgemma.network.context import Context
from dgemma.network.memory import row_bytes
from dgemma.network.passes import backend_of
from dgemma.network.runner import PREFILL_CHUNK, Runner, shares
from dgemma.text.reply import ReplyParser
from dgemma.text.tokenizer import Tokenizer

MAX_ROWS = 8  # of an engine that is not told


class Limits(TypedDict, total=False):
    """The settings of an `Engine`."""

    max_rows: int
    memory: int | None
    queue: int
    prefill: int
    prefixes: int


class Clock:
    """Seconds that stand still while somebody holds them."""

    def __init__(self) -> None:
        self._held = 0.0

    def now(self) -> float:
        return time.perf_counter() - self._held

    @contextmanager
    def held(self) -> Iterator[None]:
        """Time inside does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._held += time.perf_counter() - began


class Engine:
    """Runs requests on a model, at most `max_rows` together.

    `memory` bounds the bytes of their contexts and canvases, each grown to its request's most; None is no
    bound. `queue` is how many may wait. `prefill` is how many prompt tokens one step encodes: so long does a
    long prompt delay the rows that run. `prefixes` are the bytes that encoded prefixes may keep.

    `step` runs it by hand, and so does whoever iterates a handle. `with engine.thread():` runs it in a thread
    of its own. `submit` and `Handle.cancel` may be called from any thread, and `step` too, one at a time.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        *,
        max_rows: int = MAX_ROWS,
        memory: int | None = None,
        queue: int = 256,
        prefill: int = PREFILL_CHUNK,
        prefixes: int = 0,
    ):
        self.runner, self.tokenizer = runner, tokenizer
        self.max_rows, self.memory, self.queue, self.prefill = max_rows, memory, queue, prefill
        self.prefixes = Prefixes(prefixes)
        self.clock = Clock()
        self.reserved = 0  # bytes that admitted rows may come to take
        self._rows: list[tuple[Row, Handle]] = []
        self._waiting: deque[tuple[Row, Handle]] = deque()
        self._news = threading.Condition()  # guards what waits; told when something comes
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- from outside ---------------------------------------------------------------------------

    def submit(self, request: Request) -> Handle:
        """Queue a request. PromptError or ConfigError if it cannot be served at all, QueueFullError if too
        many wait."""
        self.check(request)
        parser = ReplyParser(self.tokenizer.raw, request.settings.stop_ids) if self.tokenizer else None
        row = Row(request, self.runner, parser, self.clock.now())
        handle = Handle(None if self._thread else self.step)
        with self._news:
            if self._closed:
                raise DgemmaError("the engine is closed")
            if len(self._waiting) >= self.queue:
                raise QueueFullError(f"{self.queue} requests wait already; try again later")
            self._waiting.append((row, handle))
            self._news.notify_all()
        return handle

    def check(self, request: Request) -> None:
        """Whether a request can be served at all; raises what `submit` would."""
        request.check(self.runner)
        needed = self.needs(request)
        if self.memory is not None and needed > self.memory:
            raise PromptError(
                f"the request may need {needed / 1e9:.2f} GB for {request.positions} positions, and the "
                f"engine has {self.memory / 1e9:.2f} GB; shorten the prompt or lower max_new_tokens"
            )

    def needs(self, request: Request) -> int:
        """Bytes that a request may come to take beside the weights."""
        return row_bytes(self.runner.config, backend_of(self.runner.ops), request.positions)

    @property
    def running(self) -> int:
        """Rows that are admitted."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that are not."""
        return len(self._waiting)

    # ---- one step -------------------------------------------------------------------------------

    def step(self) -> bool:
        """One step of every row; whether anything is left to do. An error ends all rows that run."""
        with self._stepping:
            try:
                self._end_early()
                self._admit()
                self._encode()
                self._denoise()
            except BaseException as error:
                self._fail(error)
                raise
            return bool(self._rows or self._waiting)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing steps inside, so that the caller may use the model and the prefixes."""
        with self._stepping:
            yield

    def _end_early(self) -> None:
        """Let go of what was cancelled, or has no time left."""
        now = time.monotonic()
        with self._news:
            early = [pair for pair in self._waiting if _early(*pair, now)]
            self._waiting = deque(pair for pair in self._waiting if pair not in early)
        for row, handle in [pair for pair in self._rows if _early(*pair, now)]:
            self._end(row, handle, _early(row, handle, now) or "")
        for row, handle in early:
            handle.put(row.done(_early(row, handle, now) or "", self.clock.now()))

    def _admit(self) -> None:
        """Take rows in, first come, first served: a request that does not fit yet keeps others waiting."""
        while True:
            with self._news:
                if not self._waiting or len(self._rows) >= self.max_rows:
                    return
                needed = self.needs(self._waiting[0][0].request)
                if self.memory is not None and self.reserved + needed > self.memory:
                    return
                row, handle = self._waiting.popleft()
                self.reserved += needed
                self._rows.append((row, handle))
            self._enter(row, handle)

    def _enter(self, row: Row, handle: Handle) -> None:
        """Give an admitted row its context, with what is known of its tokens."""
        row.admitted = self.clock.now()
        known = self.prefixes.find(row.pending)
        row.context = known or Context(self.runner.ops, self.runner.config)
        row.cached = min(row.context.length, len(row.request.prompt))
        if known:
            for event in row.extended(known.length, self.clock.now()):
                handle.put(event)

    def _encode(self) -> None:
        """Encode committed canvases, and of prompts as much as a step may, all in one pass."""
        fresh = [pair for pair in self._rows if len(pair[0].pending)]
        canvases = [pair for pair in fresh if pair[0].prefilled]
        prompts = [pair for pair in fresh if not pair[0].prefilled]
        counts = [len(row.pending) for row, _ in canvases]
        counts += shares([len(row.pending) for row, _ in prompts], self.prefill)
        some = [(*pair, n) for pair, n in zip(canvases + prompts, counts, strict=True) if n]
        if not some:
            return
        contexts = [row.context for row, *_ in some if row.context is not None]
        self.runner.extend(contexts, [row.pending[:n] for row, _, n in some])
        for row, handle, n in some:
            for event in row.extended(n, self.clock.now()):
                handle.put(event)
            if row.ready and row.context is not None:
                # A next turn may leave this reply's thoughts out: the prompt's state outlives the canvases'.
                self.prefixes.refresh(row.request.prompt)
                self.prefixes.keep(row.encoded, row.context)

    def _denoise(self) -> None:
        """One step of every canvas whose row is ready, and the commit of those that settled."""
        ready = [pair for pair in self._rows if pair[0].ready]
        live = [(row, handle) for row, handle in ready if not row.begin().done]
        if live:
            self._see(live)
        for row, handle in ready:
            if not row.begin().done:
                continue
            for event, reason in row.commit(self.clock.now()):
                handle.put(event)
                if reason:
                    self._end(row, handle, reason)

    def _see(self, live: list[tuple[Row, Handle]]) -> None:
        began = time.perf_counter()
        canvases = [row.begin() for row, _ in live]
        seen = self.runner.see(
            [row.context for row, _ in live if row.context is not None],
            np.stack([canvas.tokens for canvas in canvases]),
            [canvas.soft for canvas in canvases],
            np.array([canvas.temperature for canvas in canvases]),
            np.stack([canvas.uniforms() for canvas in canvases]),
            min(row.soft_bound for row, _ in live),
            [row.bias() for row, _ in live],
            [few(row.request.settings) for row, _ in live],
        )
        spent = time.perf_counter() - began
        for place, (row, handle) in enumerate(live):
            handle.put(row.take(seen, place, spent))

    # ---- the end --------------------------------------------------------------------------------

    def _end(self, row: Row, handle: Handle, reason: str) -> None:
        self._leave(row, handle)
        handle.put(row.done(reason, self.clock.now()))

    def _leave(self, row: Row, handle: Handle) -> None:
        self._rows.remove((row, handle))
        self.reserved -= self.needs(row.request)
        row.context = row.canvas = None

    def _fail(self, error: BaseException) -> None:
        for row, handle in list(self._rows):
            self._leave(row, handle)
            if not handle.ended:
                handle.fail(error)

    def close(self) -> None:
        """End everything: what runs or waits is cancelled, and nothing new is taken."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if self._thread:
            self._thread.join()
            self._thread = None
        with self._stepping:
            for row, handle in [*self._rows, *self._waiting]:
                handle.put(row.done("cancelled", self.clock.now()))
            self._rows, self._waiting, self.reserved = [], deque(), 0

    # ---- a thread of its own --------------------------------------------------------------------

    def thread(self) -> Engine:
        """Start a thread that runs the engine until `close`; returns the engine."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, name="dgemma-engine", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        with self.runner.ops.running():
            while True:
                with self._news:
                    while not (self._closed or self._rows or self._waiting):
                        self._news.wait()
                    if self._closed:
                        return
                # The rows that failed have the error, and their owners get it.
                with suppress(Exception):
                    self.step()

    def __enter__(self) -> Self:
        self._running = ExitStack()
        if self._thread is None:
            self._running.enter_context(self.runner.ops.running())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._running:
            self.close()


def _early(row: Row, handle: Handle, now: float) -> str | None:
    """Why a row ends before its time, if it does."""
    if handle.cancelled:
        return "cancelled"
    return "deadline" if row.expires is not None and now >= row.expires else None
