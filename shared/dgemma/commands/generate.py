"""`dgemma generate`: a request becomes replies, live or not, as text or JSON."""

from __future__ import annotations

from typing import IO, Any

import click

from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.opened import check_stops, check_temperatures, checked_sampler, open_model
from dgemma.commands.options import (
    model_options,
    output_options,
    prompt_options,
    sampler_options,
    seed_option,
)
from dgemma.commands.progress import stderr_console
from dgemma.commands.replies import is_live, print_reply, record, stats_block, watch
from dgemma.commands.requests import read_request
from dgemma.commands.streams import answer, answer_json, check_stdout, note
from dgemma.engine.request import check_positions
from dgemma.loading import Small
from dgemma.text.tokenizer import Tokenizer, needed


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
    max_rows: int,
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
    check_temperatures(settings)
    check_stops(stop)
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
        sampler = checked_sampler(small, settings, seed)
        check_positions(encoded(needed(small.tokenizer)), sampler, small.config.max_positions)

    console = stderr_console()
    loaded = open_model(
        console, model, check,
        backend=backend, dtype=dtype, device=device, activations=activations, force=force,
    )  # fmt: skip
    rows, sampler = encoded(loaded.tokenizer), loaded.generation.override(**settings)
    events = loaded.generate(rows, seed=seed, stop=stop, deadline=deadline, max_rows=max_rows, **settings)
    replies = watch(loaded, sampler, events, len(rows), is_live(live, as_json, console), console)
    for reply in replies:
        if as_json:
            answer_json(record(reply, loaded, model))
        else:
            if len(replies) > 1:
                answer(_heading(reply.row, prompts[reply.row]))
            print_reply(reply)
        if stats:
            note(stats_block(reply, loaded, len(replies), sampler))


def _heading(row: int, prompt: str) -> str:
    text = " ".join(prompt.split())
    return "\n" * (row > 0) + f"==> {row + 1}: {text if len(text) <= 60 else text[:59] + '…'} <=="
