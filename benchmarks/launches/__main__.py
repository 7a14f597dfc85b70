"""`python -m benchmarks.launches`."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import click
from rich.console import Console

from benchmarks.launches.report import ENGINES, PEER, counted, judged, tell
from benchmarks.launches.step import FORMATS

ENGINE = click.Choice(list(ENGINES))


@click.command(help="Count what a denoising step launches, reads, writes and holds, ours and mlx-vlm's.")
@click.option("-e", "--engine", "engines", multiple=True, type=ENGINE, help="Default: all there are.")
@click.option("--format", "forms", multiple=True, type=click.Choice(FORMATS), help="Default: both.")
@click.option(
    "--context", "contexts", multiple=True, type=click.IntRange(1), help="Default: 1024 and 131072."
)
@click.option("--rows", "sizes", multiple=True, type=click.IntRange(1), help="Rows that share a step; 1.")
@click.option("--kinds", is_flag=True, help="Also launches by kind.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of the table.")
def main(
    engines: tuple[str, ...],
    forms: tuple[str, ...],
    contexts: tuple[int, ...],
    sizes: tuple[int, ...],
    kinds: bool,
    as_json: bool,
) -> None:
    there = [name for name in ENGINES if name != PEER or find_spec("mlx_vlm")]
    names = [name for name in there if name in engines or not engines]
    rows = judged(
        [
            counted(name, context, form, size)
            for form in forms or FORMATS
            for context in contexts or (1024, 131072)
            for size in sizes or (1,)
            for name in names
            if name != PEER or size == 1
        ]
    )
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        tell(rows, Console(width=None if sys.stdout.isatty() else 150), kinds)


if __name__ == "__main__":
    main()
