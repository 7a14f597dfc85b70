"""`dgemma info`."""

from __future__ import annotations

import click

from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.progress import TerminalNotices, stderr_console
from dgemma.commands.streams import answer, answer_json, check_stdout
from dgemma.reports import info as library


@click.command(cls=OneLine, context_settings=HELP)
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, as_json: bool) -> None:
    """Show the size of MODEL, a folder or a hub id, and the memory it needs.

    Only config.json is needed; of a hub id nothing else is downloaded.
    """
    check_stdout()
    report = library.describe(model, TerminalNotices(stderr_console()))
    if as_json:
        answer_json(report)
    else:
        answer(library.text(report))
