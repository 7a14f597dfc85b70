"""The `dgemma` command: a table of names, each with the module that has it.

A command parses and calls; the work is in the library. Standard output carries the answer and nothing else.
Notices, thoughts, the live view and statistics go to standard error. Wrong input ends in one line and exit
code 1, a wrong command line in one line and exit code 2, Ctrl-C in 130. Anything else that escapes is a bug
of ours and keeps its traceback.

`dgemma --help` prints the list of commands from the table, so it imports none of them.
"""

from __future__ import annotations

from importlib import import_module

import click

from dgemma import __version__
from dgemma.commands.errors import OneLine
from dgemma.commands.options import HELP

# By name: module and command, and the line in the list.
COMMANDS = {
    "bench": ("dgemma_cuda.command:bench", "Time a denoising step at full size, without a download."),
    "convert": ("dgemma_convert.command:convert", "Convert a checkpoint to another format."),
    "generate": (
        "dgemma.commands.generate:generate",
        "Write a reply to a prompt, a batch of prompts or a conversation.",
    ),
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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])


@click.group(cls=Commands, context_settings=HELP, invoke_without_command=True)
@click.version_option(__version__, prog_name="dgemma", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run DiffusionGemma: text written a canvas at a time, by denoising.

    Without --model a small embedded model answers, which knows a few toy tasks and needs no download.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
