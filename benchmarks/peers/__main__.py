"""`python -m benchmarks.peers`."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.peers.checkpoint import FORMATS, STORED, folders_of
from benchmarks.peers.engines import ENGINES, MLX, NEEDS
from benchmarks.peers.machine import choose_blas, default_device, installed
from benchmarks.peers.report import facts, report, show
from benchmarks.peers.rounds import compare, measure
from benchmarks.peers.worker import Setting, started


def run(names: Sequence[str], setting: Setting, apart: float | None, progress: Console) -> dict[str, Any]:
    """One setting: facts and reports."""
    progress.print(str(setting))
    with ExitStack() as stack:
        workers = [stack.enter_context(started(name, setting)) for name in names]
        measure(workers, setting, progress)
        known = facts(setting, names, apart)
        return {"setting": str(setting), "facts": known, "engines": report(workers)}


ENGINE = click.Choice(list(ENGINES))
FOLDER = click.Path(path_type=Path)


@click.command(help="Time our backends beside transformers and mlx-vlm on the same checkpoint.")
@click.option("-e", "--engine", "engines", multiple=True, type=ENGINE, help="Default: all installed.")
@click.option("--checkpoint", type=FOLDER, help="Use this folder, or make a random checkpoint there.")
@click.option("--set", "changes", multiple=True, metavar="KEY=N", help="Change the random geometry.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(STORED)), default=["float32"])
@click.option("--format", "forms", multiple=True, type=click.Choice(FORMATS), default=["plain"])
@click.option("--device", help="PyTorch's device. Default: cuda where there is one, else cpu.")
@click.option(
    "--context", "contexts", multiple=True, default=[512], type=click.IntRange(1), help="Prompt tokens."
)
@click.option("--steps", default=8, show_default=True, type=click.IntRange(3), help="Steps a round.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--compare/--no-compare", "same", default=True, help="Whether logits agree, before timing.")
@click.option("--blas", default="auto", show_default=True, help="Preload for MLX: auto, none or a file.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of the table.")
def main(
    engines: tuple[str, ...],
    checkpoint: Path | None,
    changes: tuple[str, ...],
    dtypes: tuple[str, ...],
    forms: tuple[str, ...],
    device: str | None,
    contexts: tuple[int, ...],
    steps: int,
    rounds: int,
    same: bool,
    blas: str,
    as_json: bool,
) -> None:
    device = device or default_device()
    progress = Console(stderr=True)
    names = [name for name in ENGINES if name in engines or (not engines and installed(NEEDS[name]))]
    results, apart = [], {}
    with tempfile.TemporaryDirectory(prefix="dgemma-peers-") as work_folder:
        scratch = Path(work_folder)
        folders = folders_of(checkpoint, forms, dtypes, changes, scratch, progress)
        for form, dtype, context in itertools.product(forms, dtypes, contexts):
            folder, lib = folders[form, dtype], choose_blas(blas)
            setting = Setting(folder, dtype, device, lib, scratch, context, steps, rounds, form)
            able = [name for name in names if form == "plain" or name in MLX]
            if same and folder not in apart:
                progress.print("comparing logits")
                apart[folder] = compare(able, setting)
            results.append(run(able, setting, apart.get(folder), progress))
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        show(results, Console(width=None if sys.stdout.isatty() else 150))


if __name__ == "__main__":
    main()
