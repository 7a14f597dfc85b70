"""`dgemma convert`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dgemma.checkpoint.hub import EVERY_FILE, resolve
from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.progress import TerminalNotices, progress_bar, stderr_console
from dgemma.commands.streams import answer, answer_json, check_stdout, note
from dgemma.errors import CheckpointError, ConfigError
from dgemma_convert.place import settle
from dgemma_convert.plan import make_plan, report, text
from dgemma_convert.stream import convert as run

_PLANNED = ["config.json", "generation_config.json"]  # the files that a plan needs


@click.command(cls=OneLine, context_settings=HELP)
@click.argument("source")
@click.argument("dest", required=False)
@click.option("--to", type=click.Choice(["mlx", "nvfp4", "bf16"]), required=True, help="Format to write.")
@click.option(
    "--preset",
    type=click.Choice(["quality", "balanced", "small"]),
    default="balanced",
    show_default=True,
    help="What each class of weight becomes.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="CLASS=FORMAT",
    help="Override a class (embed, attention, mlp, experts, router, self_conditioning, vision) or a module. "
    "Formats: bf16, nvfp4, mxfp4, mxfp8, and 2bit to 8bit, 8bit-g32 for groups of 32. Repeatable.",
)
@click.option("--plan", "plan_only", is_flag=True, help="Print what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def convert(
    source: str,
    dest: str | None,
    to: str,
    preset: str,
    settings: tuple[str, ...],
    plan_only: bool,
    as_json: bool,
) -> None:
    """Convert SOURCE, a folder or a hub id in any format, into the folder DEST.

    DEST appears when it is whole. An interrupted run goes on where it stopped when the same command is given
    again. Memory stays near the largest tensor.

    \b
    dgemma convert google/diffusiongemma-26B-A4B-it model-mlx --to mlx
    dgemma convert model-bf16 model-nvfp4 --to nvfp4
    dgemma convert model-bf16 --to mlx --set experts=mxfp4 --plan
    """
    if dest is None and not plan_only:
        raise click.UsageError("give the folder DEST to write, or --plan", click.get_current_context())
    if plan_only or as_json:
        check_stdout()
    console = stderr_console()
    notices = TerminalNotices(console)
    if plan_only or dest is None:
        plan, _ = make_plan(resolve(source, files=_PLANNED, notices=notices), to, preset, settings, source)
        facts = report(plan)
        if as_json:
            answer_json(facts)
        else:
            answer(text(facts))
        return
    folder = _folder(dest)
    settle(folder)  # a destination that cannot be is known before a download
    whole = resolve(source, files=EVERY_FILE, notices=notices)
    plan, checkpoint = make_plan(whole, to, preset, settings, source)
    if checkpoint is None:
        raise CheckpointError(f"{source}: no .safetensors file here")
    with progress_bar(console, "converting", in_bytes=True) as update:
        written = run(plan, checkpoint, folder, update)
    shown = dest if dest.isprintable() else repr(dest)
    note(f"dgemma: {shown} {'is written' if written else 'was written before; nothing to do'}")
    if as_json:
        answer_json(report(plan) | {"dest": dest})


def _folder(dest: str) -> Path:
    """The folder that DEST names; ConfigError for no name, or the home of nobody here."""
    folder = os.path.expanduser(dest)
    if not folder:
        raise ConfigError("an empty DEST; name the folder to write")
    if folder.startswith("~"):
        raise ConfigError(f"{dest}: no such user's home folder; for a folder of this name give ./{dest}")
    return Path(folder)
