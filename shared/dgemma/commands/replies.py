"""Replies of commands: watched while they are written, printed as text or JSON, and what they cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from dgemma.commands.progress import progress_bar
from dgemma.commands.streams import answer, answer_json, note, safe
from dgemma.engine.events import Done, Draft, Event, Prefill
from dgemma.model import Model
from dgemma.reports.tables import amount
from dgemma.settings import GenerationConfig
from dgemma.text.calls import ToolCall
from dgemma.view.terminal import View, follow, moves_cursor, screen


def is_live(live: bool | None, as_json: bool, console: Console) -> bool:
    """Whether the canvas is shown, by the options --live and --json."""
    return moves_cursor(console) and not as_json if live is None else live


def watch(
    model: Model, sampler: GenerationConfig, events: Iterable[Event], rows: int, live: bool, console: Console
) -> list[Done]:
    """Show a generation, or how far it is, and return its replies in the order of their rows."""
    if live:
        return follow(events, screen(View(model.tokenizer, sampler, rows), console))
    replies, read = [], {}
    with progress_bar(console, "reading the prompt") as bar:
        for event in events:
            if isinstance(event, Prefill):
                read[event.row] = event
                bar(sum(one.done for one in read.values()), sum(one.total for one in read.values()))
            elif isinstance(event, Draft):  # a canvas may take minutes, and must not look like a hang
                bar(event.step, sampler.steps, f"writing canvas {event.canvas + 1}")
            elif isinstance(event, Done):
                replies.append(event)
    return sorted(replies, key=lambda done: done.row)


_CUT = {
    "length": "cut at {} tokens; --max-tokens allows more",
    "deadline": "cut after {} tokens, as --deadline wants",
    "cancelled": "cancelled after {} tokens",
    "degenerate": "ended after {} tokens, as the canvas only repeated itself; --allow-empty lets it go on",
}


def print_reply(reply: Done, thoughts: bool = True) -> None:
    """Print the answer on stdout; thoughts, and why an answer is cut or empty, on stderr."""
    if reply.thinking and thoughts:
        note(safe(reply.thinking, sys.stderr), dim=True)
    if reply.text:
        answer(safe(reply.text, sys.stdout))
    for call in reply.tool_calls:
        if sys.stdout is not None and sys.stdout.isatty():
            answer(safe(_block(call), sys.stdout))
        else:
            answer_json({"name": call.name, "arguments": call.arguments})
    for unread in reply.unread:
        note(f"dgemma: a tool call stays text: {unread.reason}")
    if reply.finish_reason in _CUT:
        note(f"dgemma: {_CUT[reply.finish_reason].format(len(reply.tokens))}")
    elif not reply.text and not reply.tool_calls:
        note("dgemma: the model ended its turn without an answer")


def _block(call: ToolCall) -> str:
    """A call for a reader: its name, and an argument a line. The lines of a text stay lines."""
    lines = [f"call {call.name}"]
    for key, value in call.arguments.items():
        if isinstance(value, str) and "\n" in value:
            lines += [f"  {key}:", *(f"    {line}" for line in value.splitlines())]
        else:
            lines.append(f"  {key}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines)


def record(reply: Done, model: Model, name: str | None) -> dict[str, Any]:
    """The object that --json prints for a reply."""
    return {"row": reply.row} | reply.json() | {"model": name or "embedded", "dtype": _dtype(model)}


def _dtype(model: Model) -> str:
    """The format of quantized activations, else the compute type."""
    return model.ops.activations or model.ops.dtype_name


def stats_block(reply: Done, model: Model, rows: int, sampler: GenerationConfig) -> str:
    """What a reply cost, as lines for a reader."""
    s = reply.stats
    canvases = f"{s.canvases} canvas" + "es" * (s.canvases != 1)
    cached = f", {s.cached_tokens} of them cached" if s.cached_tokens else ""
    lines = {
        "prompt": f"{s.prompt_tokens} tokens{cached}, read in {s.prefill_seconds:.2f} s",
        "reply": f"{s.tokens} tokens in {canvases}, {s.steps} steps ({s.steps_per_canvas:.1f} a canvas)",
        "time": f"{s.seconds:.2f} s, first token after {s.seconds_to_first_token:.2f} s",
        "speed": f"{s.tokens_per_second:.1f} tokens/s by wall clock, "
        f"{s.tokens_per_forward:.2f} tokens/forward, {s.ms_per_step:.1f} ms/step",
        "memory": f"{amount(s.peak_memory)} at the peak",
        "run": f"{s.backend} {_dtype(model)}, seed {s.seed}, ended by {reply.finish_reason}",
    }
    if sampler.soft_bound:
        lines["soft"] = f"{s.soft_missing:.1e} of the probability left out at most, {s.soft_dense:.0%} dense"
    head = {"row": f"{reply.row + 1} of {rows}; the rows of a batch share the clock"} if rows > 1 else {}
    return "\n".join(f"{name:<8}{line}" for name, line in (head | lines).items())
