"""The `dgemma` command: a table of names, each with the module that has it.

A command parses and calls; the work is in the library. Standard output carries the answer and nothing else.
Notices, thoughts, the live view and statistics go to standard error. Wrong input ends in one line and exit
code 1, a wrong command line in one line and exit code 2, a signal in 128 and its number. Anything else that
escapes is a bug of ours and keeps its traceback.

`dgemma --help` prints the list of commands from the table, so it imports none of them.
"""

from __future__ import annotations

import reprlib
from difflib import get_close_matches
from importlib import import_module

import click

from dgemma import __version__
from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.streams import answer

# By name: module and command, and the line in the list.
COMMANDS = {
    "bench": ("dgemma_cuda.command:bench", "Time a denoising step at full size, without a download."),
    "chat": ("dgemma.commands.chat:chat", "Talk with the model, turn by turn."),
    "convert": ("dgemma_convert.command:convert", "Convert a checkpoint to another format."),
    "edit": ("dgemma.commands.edit:edit", "Change a text as an instruction asks, and show the difference."),
    "generate": (
        "dgemma.commands.generate:generate",
        "Write a reply to a prompt, a batch of prompts or a conversation.",
    ),
    "infill": ("dgemma.commands.infill:infill", "Fill the holes in a text."),
    "info": ("dgemma.commands.info:info", "Show a model's size and the memory it needs."),
    "selftest": ("dgemma.commands.selftest:selftest", "Check the kernels on this machine's GPU."),
    "verify": ("dgemma.commands.verify:verify", "Check a checkpoint, or compare two."),
}


class Commands(OneLine, click.Group):
    """The commands of the table, each imported only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, function = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(import_module(module), function)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in COMMANDS or name.startswith("-"):
            return super().resolve_command(ctx, args)
        close = get_close_matches(name, COMMANDS, 1)
        advice = f"Did you mean {close[0]!r}?" if close else "A prompt goes to 'generate'."
        raise click.UsageError(f"No such command {reprlib.repr(name)}. {advice}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        answer(f"dgemma {__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings=HELP, invoke_without_command=True)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run DiffusionGemma: text written a canvas at a time, by denoising.

    Without --model a small embedded model answers, which knows a few toy tasks and needs no download.
    """
    if ctx.invoked_subcommand is None:
        answer(ctx.get_help())
