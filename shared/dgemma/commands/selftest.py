"""`dgemma selftest`."""

from __future__ import annotations

import json
from typing import Any

import click

from dgemma.commands.errors import OneLine
from dgemma.commands.options import HELP
from dgemma.commands.progress import stderr_console


@click.command(cls=OneLine, context_settings=HELP)
@click.option(
    "--backend",
    type=click.Choice(["auto", "mlx", "cuda"]),
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
    from dgemma.loading import choose

    report: Any
    with stderr_console().status("checking") as status:
        if choose(backend, None, device) == "mlx":
            from dgemma_mlx import selftest as metal

            report = metal.run(status.update)
            readable = metal.text(report)
        else:
            report, readable = _selftest_cuda(device)
    click.echo(json.dumps(report) if as_json else readable)
    return 1 if report["ok"] is False else 0


def _selftest_cuda(device: str | None) -> tuple[Any, str]:
    from dgemma.files import load_json
    from dgemma.loading import make_ops
    from dgemma.network.config import read_config
    from dgemma.released import RELEASED_DIR

    ops: Any = make_ops("cuda", None, device)
    from dgemma_cuda import selftest as library

    report = library.run(ops, read_config(load_json(RELEASED_DIR / "config.json")))
    return report, library.text(report)
