"""`dgemma selftest`."""

from __future__ import annotations

import click

from dgemma.backends import PACKAGES, choose, part
from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.progress import stderr_console
from dgemma.commands.streams import answer, answer_json, check_stdout
from dgemma.reports.selftest import text


@click.command(cls=OneLine, context_settings=HELP)
@click.option(
    "--backend",
    type=click.Choice(["auto", *PACKAGES]),
    default="auto",
    show_default=True,
    help="Whose kernels.",
)
@click.option("--device", metavar="NAME", help="A torch device, such as cuda:1; cuda backend only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def selftest(backend: str, device: str | None, as_json: bool) -> int:
    """Check the kernels on this machine's GPU against their plain twins, at the released sizes.

    On a Mac the Metal kernels are off until this has passed; what it finds is kept. The exit code is 1 if a
    kernel is wrong, and 0 where there is no GPU to check one on.
    """
    check_stdout()
    with stderr_console().status("checking") as status:
        report = part(choose(backend, None, device), "selftest").check_all(device, status.update)
    if as_json:
        answer_json(report)
    else:
        answer(text(report))
    return 1 if report["ok"] is False else 0
