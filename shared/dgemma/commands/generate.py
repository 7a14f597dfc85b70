"""`dgemma generate`: a request becomes replies, live or not, as text or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import IO, Any

import click
from rich.console import Console

from dgemma.commands.errors import OneLine
from dgemma.commands.options import (
    HELP,
    model_options,
    number_option,
    output_options,
    prompt_options,
    sampler_options,
)
from dgemma.commands.progress import TerminalNotices, progress_bar, stderr_console
from dgemma.commands.requests import read_request
from dgemma.engine.events import Done, Event, Prefill
from dgemma.files import Progress
from dgemma.loading import load
from dgemma.model import Model
from dgemma.network.ops import Notices
from dgemma.reports.tables import amount
from dgemma.settings import GenerationConfig
from dgemma.view.terminal import View, follow, moves_cursor, screen


@click.command(cls=OneLine, context_settings=HELP)
@prompt_options
@model_options
@number_option("--seed", click.IntRange(min=0), "Makes the reply repeatable.  [default: drawn anew]")
@sampler_options
@output_options
def generate(
    prompts: tuple[str, ...],
    messages: IO[str] | None,
    system: str | None,
    tools: IO[str] | None,
    thinking: bool,
    model: str | None,
    backend: str,
    dtype: str | None,
    activations: str | None,
    device: str | None,
    seed: int | None,
    live: bool | None,
    stats: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a reply to a prompt, a batch of prompts or a conversation.

    Numbers that are not given come from the checkpoint's generation_config.json.

    \b
    dgemma generate --prompt 'Reverse "canvas".'
    dgemma generate --model google/diffusiongemma-26B-A4B-it --stats < question.txt
    """
    conversations, functions = read_request(prompts, messages, system, tools)
    console = stderr_console()
    with progress_bar(console, "loading weights") as progress:
        loaded = _load(model, backend, dtype, device, progress, activations, TerminalNotices(console))
    events = loaded.generate(conversations, tools=functions, thinking=thinking, seed=seed, **settings)
    sampler = loaded.generation.override(**settings)
    replies = _watch(loaded, sampler, events, len(conversations), _is_live(live, as_json, console), console)
    for reply in replies:
        if as_json:
            click.echo(json.dumps(_record(reply, loaded, model), ensure_ascii=False, allow_nan=False))
        else:
            if len(replies) > 1:
                click.echo(_heading(reply.row, prompts[reply.row]))
            print_reply(reply)
        if stats:
            click.echo(_stats_block(reply, loaded, len(replies), sampler), err=True)


def _load(
    model: str | None,
    backend: str,
    dtype: str | None,
    device: str | None,
    progress: Progress,
    activations: str | None,
    notices: Notices,
) -> Model:
    if model is None:
        click.echo(
            "dgemma: no --model given, so the embedded model answers; it knows toy tasks only", err=True
        )
    return load(model, backend, dtype, device, progress, activations=activations, notices=notices)


def _is_live(live: bool | None, as_json: bool, console: Console) -> bool:
    return moves_cursor(console) and not as_json if live is None else live


def _watch(
    model: Model, sampler: GenerationConfig, events: Iterator[Event], rows: int, live: bool, console: Console
) -> list[Done]:
    if live:
        return follow(events, screen(View(model.tokenizer, sampler, rows), console))
    replies = []
    with progress_bar(console, "reading the prompt") as bar:
        for event in events:
            if isinstance(event, Prefill):
                bar(event.done, event.total)
            elif isinstance(event, Done):
                replies.append(event)
    return sorted(replies, key=lambda done: done.row)


def _heading(row: int, prompt: str) -> str:
    text = " ".join(prompt.split())
    return "\n" * (row > 0) + f"==> {row + 1}: {text if len(text) <= 60 else text[:59] + '…'} <=="


def print_reply(reply: Done) -> None:
    """Print the answer on stdout; thoughts, and why an answer is cut or empty, on stderr."""
    if reply.thinking:
        click.secho(_safe(reply.thinking, sys.stderr), dim=True, err=True)
    if reply.text:
        click.echo(_safe(reply.text, sys.stdout), color=True)  # without it click drops colour codes
    for call in reply.tool_calls:
        record = {"name": call.name, "arguments": call.arguments}
        click.echo(json.dumps(record, ensure_ascii=False, allow_nan=False))
    for unread in reply.unread:
        click.echo(f"dgemma: a tool call stays text: {unread.reason}", err=True)
    if reply.finish_reason == "length":
        click.echo(f"dgemma: cut at {len(reply.tokens)} tokens; --max-tokens allows more", err=True)
    elif not reply.text and not reply.tool_calls:
        click.echo("dgemma: the model ended its turn without an answer", err=True)


def _safe(text: str, stream: IO[str]) -> str:
    """Text unchanged, but without control characters on a terminal, which would obey them."""
    if not stream.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 0x9F else "\ufffd" for c in text)


def _record(reply: Done, model: Model, name: str | None) -> dict[str, Any]:
    return {"row": reply.row} | reply.json() | {"model": name or "embedded", "dtype": _dtype(model)}


def _dtype(model: Model) -> str:
    """The format of quantized activations, else the compute type."""
    return model.ops.activations or model.ops.dtype_name


def _stats_block(reply: Done, model: Model, rows: int, sampler: GenerationConfig) -> str:
    s = reply.stats
    canvases = f"{s.canvases} canvas" + "es" * (s.canvases != 1)
    lines = {
        "prompt": f"{s.prompt_tokens} tokens, read in {s.prefill_seconds:.2f} s",
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
