"""The events of a generation.

L canvas positions
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dgemma.text.calls import ToolCall
from dgemma.text.reply import Unread


@dataclass(frozen=True)
class Prefill:
    """`done` of a row's `total` prompt tokens are encoded, or came from the cache of prefixes."""

    row: int
    done: int
    total: int


@dataclass(frozen=True)
class Draft:
    """A row's canvas after one step.

    `tokens` [L] int64 is the argmax canvas, `accepted` [L] bool marks positions that kept their sample,
    `entropy` [L] float32 is in nats. `step` counts from 1, `canvas` from 0.
    """

    row: int
    canvas: int
    step: int
    tokens: np.ndarray
    accepted: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True)
class Committed:
    """A row's canvas is final. `tokens` are its new ids, stop token included.

    `text`, `thinking` and `tool_calls` are what it adds to the reply: those of a row's events, joined, are
    those of its `Done`. What may still change, such as half of a character or an open tool call, comes with a
    later one, or, in a reply that was cancelled or had no time left, with `Done` alone.
    """

    row: int
    canvas: int
    tokens: list[int]
    text: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Stats:
    """The cost of a reply, by a wall clock that stops while a consumer who drives the engine holds an event.

    It runs from the submission, or the request of the first event, to the row's end. Rows that run together
    share the clock.
    """

    prompt_tokens: int
    cached_tokens: int  # of the prompt's, those whose encoding was at hand
    tokens: int  # of the reply, stop token included
    seconds: float
    queued_seconds: float  # before the row was admitted
    seconds_to_first_token: float
    prefill_seconds: float
    tokens_per_second: float  # tokens / seconds, prefill included
    canvases: int
    steps: int
    steps_per_canvas: float
    tokens_per_forward: float  # tokens / denoising steps
    ms_per_step: float
    peak_memory: int  # bytes
    seed: int
    backend: str
    soft_missing: float = 0.0  # most probability that a soft embedding left out
    soft_dense: float = 1.0  # share of soft embeddings that left nothing out


@dataclass(frozen=True)
class Done:
    """A row's reply; `tokens` include the stop id.

    `finish_reason` is "stop", "tool_calls", "length", "cancelled", "deadline", or "degenerate": a canvas said
    nothing, twice.
    `unread` are the tool calls that could not be read, each with the reason; `text` has their text, too.
    """

    row: int
    tokens: list[int]
    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    stats: Stats
    unread: tuple[Unread, ...] = ()

    def json(self) -> dict[str, Any]:
        """The reply and its statistics as one flat dictionary."""
        reply = {
            "text": self.text,
            "thinking": self.thinking,
            "tool_calls": [asdict(call) for call in self.tool_calls],
            "unread": [asdict(call) for call in self.unread],
            "token_ids": self.tokens,
            "finish_reason": self.finish_reason,
        }
        return reply | asdict(self.stats)


Event = Prefill | Draft | Committed | Done
