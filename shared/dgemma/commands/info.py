"""`dgemma info`."""

from __future__ import annotations

import click

from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.options import Whole, number_option
from dgemma.commands.progress import TerminalNotices, stderr_console
from dgemma.commands.streams import answer, answer_json, check_stdout
from dgemma.reports import info as library


@click.command(cls=OneLine, context_settings=HELP)
@click.argument("model")
@number_option("--context", Whole(1), "Predict the memory of a run with so many tokens of context a row.")
@number_option("--rows", Whole(1), "Rows of that run.  [default: 1]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, context: int | None, rows: int | None, as_json: bool) -> None:
    """Show the size of MODEL, a folder or a hub id, and the memory it needs.

    Only config.json is needed; of a hub id nothing else is downloaded. With --context it also says what a
    run takes at its peak on each backend.
    """
    if rows is not None and context is None:
        raise click.UsageError("--rows needs --context", click.get_current_context())
    check_stdout()
    run = None if context is None else (rows or 1, context)
    report = library.describe(model, TerminalNotices(stderr_console()), run)
    if as_json:
        answer_json(report)
    else:
        answer(library.text(report))
