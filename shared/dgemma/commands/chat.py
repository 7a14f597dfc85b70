"""`dgemma chat`: a conversation, turn by turn, on a terminal or from lines of stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO, Any

import click
from rich.console import Console

from dgemma.commands.errors import HELP, OUT_OF_MEMORY, OneLine, is_out_of_memory, out_of_memory
from dgemma.commands.opened import check_stops, check_temperatures, named_as_typed, open_model
from dgemma.commands.options import (
    conversation_options,
    ending_options,
    model_options,
    output_options,
    sampler_options,
    seed_option,
)
from dgemma.commands.process import interrupts
from dgemma.commands.progress import stderr_console
from dgemma.commands.replies import is_live
from dgemma.commands.requests import read_line, read_tools_file
from dgemma.commands.session import Output, Session, Wanted
from dgemma.commands.streams import check_stdout, note
from dgemma.engine.conversation import Conversation, user
from dgemma.engine.engine import Limits
from dgemma.engine.request import check_positions
from dgemma.errors import DgemmaError, visible
from dgemma.loading import Small
from dgemma.text.tokenizer import needed


@click.command(cls=OneLine, context_settings=HELP)
@conversation_options
@ending_options
@model_options
@seed_option
@sampler_options
@output_options
def chat(
    system: str | None,
    tools: IO[str] | None,
    thinking: bool,
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
    """Talk with the model, turn by turn.

    A line is a turn. It goes on behind a backslash at its end or after Alt-Enter, and pasted text keeps its
    lines. /help lists the commands. Ctrl-C ends a reply, which stays as far as it goes, and Ctrl-D leaves.
    Without a terminal each line of stdin is a turn, and only replies go to stdout.

    \b
    dgemma chat --model google/diffusiongemma-26B-A4B-it
    printf 'What is 47 + 85?\\nAdd 3 and 4.\\n' | dgemma chat --json
    """
    check_stdout()
    check_temperatures(settings)
    check_stops(stop)
    if tools and tools.name == "<stdin>":
        raise click.UsageError("--tools cannot be stdin, which has the turns", click.get_current_context())
    conversation = Conversation((), tuple(read_tools_file(tools)) if tools else (), thinking)
    conversation = conversation.with_system(system or "")

    def check(small: Small) -> None:
        sampler = small.generation.override(**settings)
        first = conversation.extended(user("a")).request(needed(small.tokenizer), sampler, seed or 0)
        check_positions([first.prompt], sampler, small.config.max_positions)

    console = stderr_console()
    loaded = open_model(
        console, model, check,
        backend=backend, dtype=dtype, device=device, activations=activations, force=force,
    )  # fmt: skip
    typed = bool(sys.stdin and sys.stdin.isatty() and sys.stderr.isatty())
    output = Output(model, console, is_live(live, as_json, console), as_json, stats)
    limits: Limits = {"max_rows": 1, "memory": None} if force else {"max_rows": 1}
    with loaded.engine(**limits) as engine:
        wanted = Wanted(loaded.generation.override(**settings), seed, stop, deadline)
        session = Session(engine, loaded, output, conversation, wanted)
        if typed:
            _talk(session, _terminal(console))
        else:
            while session.open and (line := read_line()) is not None:
                with named_as_typed():
                    session.take(line)


def _talk(session: Session, read: Callable[[], str]) -> None:
    """The turns of a terminal. What is wrong with one is a line, and the next one can be typed."""
    note("dgemma: /help lists the commands, Ctrl-D leaves")
    while session.open:
        try:
            line = read()
            with interrupts(session.cancel), named_as_typed():
                session.take(line)
        except EOFError:
            return
        except DgemmaError as error:
            note(f"dgemma: error: {visible(str(error))}")
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            note(f"dgemma: error: {visible(out_of_memory(error))}")


def _terminal(console: Console) -> Callable[[], str]:
    """What asks for a line; EOFError at the end."""
    if console.is_dumb_terminal:
        return _plain_line
    from dgemma.commands.lines import terminal_lines  # what edits lines is of no use elsewhere

    return terminal_lines()


def _plain_line() -> str:
    sys.stderr.write("> ")
    sys.stderr.flush()
    if (line := read_line()) is None:
        raise EOFError
    return line
