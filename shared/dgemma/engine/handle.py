"""What a request's owner holds: its events, from any thread or event loop, and the way to cancel it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from dgemma.engine.events import Done, Event


class Handle:
    """The events of one request, each given once: iterate it, iterate it with `async for`, or await it.

    The last event is `Done`; an engine that failed raises its error instead. `drive` makes events where no
    thread does.
    """

    def __init__(self, drive: Callable[[], object] | None):
        self._drive = drive
        self._events: deque[Event] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._news = threading.Condition()
        self._wake: Callable[[], object] | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """End the request at the next boundary of a step or a chunk; its `Done` says "cancelled"."""
        self.cancelled = True

    def put(self, event: Event) -> None:
        """Give an event to the owner; the engine's part."""
        self._notify(lambda: self._events.append(event), isinstance(event, Done))

    def fail(self, error: BaseException) -> None:
        """End the request with an error; the engine's part."""
        self._error = error
        self._notify(lambda: None, True)

    def _notify(self, change: Callable[[], object], ended: bool) -> None:
        with self._news:
            assert not self._ended, "a request ended twice"
            change()
            self._ended = ended
            self._news.notify_all()
            wake = self._wake
        if wake:
            wake()

    @property
    def ended(self) -> bool:
        """Whether its last event has been made."""
        return self._ended

    def taken(self) -> list[Event]:
        """The events that are there, without waiting."""
        found = []
        while self._events:
            found.append(self._events.popleft())
        return found

    def __iter__(self) -> Iterator[Event]:
        while True:
            while not self._events and not self._ended and self._drive:
                self._drive()
            with self._news:
                while not self._events and not self._ended:
                    self._news.wait()
                event = self._next()
            if event is None:
                return
            yield event

    def _next(self) -> Event | None:
        """The next event, None after the last; raises the engine's error."""
        if self._events:
            return self._events.popleft()
        if self._error:
            raise self._error
        return None

    async def __aiter__(self) -> AsyncIterator[Event]:
        news, loop = asyncio.Event(), asyncio.get_running_loop()
        self._wake = lambda: loop.call_soon_threadsafe(news.set)
        try:
            while True:
                news.clear()
                if not self._events and not self._ended:
                    if self._drive:
                        await asyncio.to_thread(self._drive)
                    else:
                        await news.wait()
                    continue
                event = self._next()
                if event is None:
                    return
                yield event
        finally:
            self._wake = None

    def __await__(self) -> Generator[Any, None, Done]:
        return self._last().__await__()

    async def _last(self) -> Done:
        async for event in self:
            if isinstance(event, Done):
                return event
        raise AssertionError("a request ended without Done")

    def result(self) -> Done:
        """Wait for the end; returns the reply."""
        for event in self:
            if isinstance(event, Done):
                return event
        raise AssertionError("a request ended without Done")
