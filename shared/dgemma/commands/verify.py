"""`dgemma verify`: a checkpoint's faults, and its distance from another."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

from dgemma.backends import BACKENDS, make_ops
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.hub import resolve
from dgemma.commands.errors import HELP, OUT_OF_MEMORY, OneLine, first_line, is_out_of_memory
from dgemma.commands.progress import TerminalNotices, progress_bar, stderr_console
from dgemma.commands.streams import answer, answer_json, check_stdout
from dgemma.network.ops import Ops
from dgemma.reports import against as comparison
from dgemma.reports import verify as library


@click.command(cls=OneLine, context_settings=HELP)
@click.argument("model")
@click.option(
    "--against",
    metavar="OTHER",
    help="Compare the weights, class by class, and the logits with this checkpoint's; a folder or a hub id.",
)
@click.option(
    "--logits/--no-logits", default=True, help="Compare logits too.  [default: where both run here]"
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What to make the logits on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(model: str, against: str | None, logits: bool, backend: str, as_json: bool) -> int:
    """Check MODEL, a folder or a hub id, down to every stored value.

    Names, types and shapes are held against config.json, the quantization against what it announces, and the
    tokenizer and the chat template are opened; values that are not finite, scales of zero, weights that are
    all zero or have a hole of zeros and tied copies that differ are listed. The exit code is 1 if anything is
    wrong. Notes and differences from --against change no exit code.

    \b
    dgemma verify google/diffusiongemma-26B-A4B-it
    dgemma verify ./converted --against ./original
    """
    check_stdout()
    console = stderr_console()
    notices = TerminalNotices(console)
    folder = resolve(model, notices=notices)
    # Errors of the other checkpoint or the backend come before minutes of reading.
    pair = comparison.pair(folder, against, notices) if against is not None else None
    ops = make_ops(backend, notices=notices) if pair and pair[0] and logits else None
    with progress_bar(console, "checking values", in_bytes=True) as progress:
        report = {"model": model} | library.inspect(folder, progress)
    if pair:
        report["against"] = {"model": against} | _against(*pair, ops, console)
    if as_json:
        answer_json(report)
    else:
        answer(library.text(report))
    return 0 if report["ok"] else 1


def _against(
    checkpoint: Checkpoint | None, other: Checkpoint, ops: Ops | None, console: Console
) -> dict[str, Any]:
    if checkpoint is None:
        return {"skipped": "the checkpoint does not open"}
    with progress_bar(console, "comparing weights", in_bytes=True) as progress:
        found: dict[str, Any] = {"weights": comparison.compare(checkpoint, other, progress)}
    if ops is None:
        return found
    try:
        with progress_bar(console, "comparing logits", in_bytes=True) as progress:
            found["logits"] = comparison.logits(checkpoint, other, ops, progress)
    except OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        found["logits"] = {"skipped": f"out of memory ({first_line(error)})"}
    return found
