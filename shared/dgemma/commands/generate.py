"""`dgemma generate`: a request becomes replies, live or not, as text or JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import IO, Any

import click
from rich.console import Console

from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.options import (
    as_typed,
    model_options,
    output_options,
    prompt_options,
    sampler_options,
    seed_option,
)
from dgemma.commands.progress import TerminalNotices, progress_bar, stderr_console
from dgemma.commands.requests import read_request
from dgemma.commands.streams import answer, answer_json, check_stdout, note
from dgemma.engine.events import Done, Draft, Event, Prefill
from dgemma.engine.request import check_positions
from dgemma.errors import ConfigError, PromptError
from dgemma.loading import Small, load
from dgemma.model import Model
from dgemma.reports.tables import amount
from dgemma.settings import GenerationConfig, number
from dgemma.text.tokenizer import Tokenizer, needed
from dgemma.view.terminal import View, follow, moves_cursor, screen


@click.command(cls=OneLine, context_settings=HELP)
@prompt_options
@model_options
@seed_option
@sampler_options
@output_options
def generate(
    texts: tuple[str, ...],
    prompts: tuple[str, ...],
    messages: IO[str] | None,
    system: str | None,
    tools: IO[str] | None,
    thinking: bool,
    continue_final_message: bool,
    control_tokens: bool,
    stop: tuple[str, ...],
    deadline: float | None,
    model: str | None,
    backend: str,
    dtype: str | None,
    activations: str | None,
    device: str | None,
    force: bool,
    seed: int | None,
    live: bool | None,
    stats: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a reply to a prompt, a batch of prompts or a conversation.

    Several prompts run as one batch: each PROMPT, then each --prompt. Without any, and without --messages,
    the prompt is read from stdin. Numbers that are not given come from the checkpoint's
    generation_config.json.

    \b
    dgemma generate 'Reverse "canvas".'
    dgemma generate --model google/diffusiongemma-26B-A4B-it --stats < question.txt
    """
    check_stdout()
    t_max, t_min = settings["t_max"], settings["t_min"]
    if t_max is not None and t_min is not None and t_max < t_min:
        context = click.get_current_context()
        raise click.UsageError(f"--t-max {t_max} must not be below --t-min {t_min}", context)
    if not all(stop):
        raise click.BadParameter("an empty text ends nothing.", param_hint="--stop")
    prompts = (*texts, *prompts)
    request = read_request(prompts, messages, system, tools)
    if request.ignored:
        note(f"dgemma: not used of the request: {', '.join(request.ignored)}")
    own = settings | {"seed": seed, "stop": stop or None}
    settings = own | {key: value for key, value in request.settings.items() if own[key] is None}
    seed, stop = settings.pop("seed"), settings.pop("stop") or ()

    def encoded(tokenizer: Tokenizer) -> list[list[int]]:
        return [
            tokenizer.encode_chat(
                conversation,
                request.tools,
                thinking,
                not continue_final_message,
                continue_final_message=continue_final_message,
                control_tokens=control_tokens,
            )
            for conversation in request.conversations
        ]

    def check(small: Small) -> None:
        """Everything that can be wrong with a request, before minutes of loading."""
        try:
            sampler = small.generation.override(**settings)
            check_positions(encoded(needed(small.tokenizer)), sampler, small.config.max_positions)
            if seed is not None:
                number("seed", seed)
        except (ConfigError, PromptError) as error:
            raise type(error)(as_typed(str(error))) from None

    console = stderr_console()
    with progress_bar(console, "loading weights") as progress:
        if model is None:
            note("dgemma: no --model given, so the embedded model answers; it knows toy tasks only")
        loaded = load(
            model, backend, dtype, device, progress,
            activations=activations, notices=TerminalNotices(console), check=check, force=force,
        )  # fmt: skip
    rows, sampler = encoded(loaded.tokenizer), loaded.generation.override(**settings)
    events = loaded.generate(rows, seed=seed, stop=stop, deadline=deadline, **settings)
    replies = _watch(loaded, sampler, events, len(rows), _is_live(live, as_json, console), console)
    for reply in replies:
        if as_json:
            answer_json(_record(reply, loaded, model))
        else:
            if len(replies) > 1:
                answer(_heading(reply.row, prompts[reply.row]))
            print_reply(reply)
        if stats:
            note(_stats_block(reply, loaded, len(replies), sampler))


def _is_live(live: bool | None, as_json: bool, console: Console) -> bool:
    return moves_cursor(console) and not as_json if live is None else live


def _watch(
    model: Model, sampler: GenerationConfig, events: Iterator[Event], rows: int, live: bool, console: Console
) -> list[Done]:
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


def _heading(row: int, prompt: str) -> str:
    text = " ".join(prompt.split())
    return "\n" * (row > 0) + f"==> {row + 1}: {text if len(text) <= 60 else text[:59] + '…'} <=="


_CUT = {
    "length": "cut at {} tokens; --max-tokens allows more",
    "deadline": "cut after {} tokens, as --deadline wants",
    "cancelled": "cancelled after {} tokens",
    "degenerate": "ended after {} tokens, as the canvas only repeated itself; --allow-empty lets it go on",
}


def print_reply(reply: Done) -> None:
    """Print the answer on stdout; thoughts, and why an answer is cut or empty, on stderr."""
    if reply.thinking:
        note(_safe(reply.thinking, sys.stderr), dim=True)
    if reply.text:
        answer(_safe(reply.text, sys.stdout))
    for call in reply.tool_calls:
        answer_json({"name": call.name, "arguments": call.arguments})
    for unread in reply.unread:
        note(f"dgemma: a tool call stays text: {unread.reason}")
    if reply.finish_reason in _CUT:
        note(f"dgemma: {_CUT[reply.finish_reason].format(len(reply.tokens))}")
    elif not reply.text and not reply.tool_calls:
        note("dgemma: the model ended its turn without an answer")


def _safe(text: str, stream: IO[str] | None) -> str:
    """Text unchanged, but without control characters on a terminal, which would obey them."""
    if stream is None or not stream.isatty():
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
