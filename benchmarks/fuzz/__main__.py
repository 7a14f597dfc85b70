"""The command: see the package."""

from __future__ import annotations

import json
from collections import Counter

import click
from rich.console import Console

from dgemma.commands.progress import progress_bar

from .run import run


@click.command()
@click.option("--cases", type=click.IntRange(min=1), default=10_000, show_default=True, help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which.")
@click.option("--only", type=click.IntRange(min=0), metavar="CASE", help="One case again, by its number.")
@click.option("--json", "as_json", is_flag=True, help="Print each case as one JSON object a line.")
def main(cases: int, seed: int, only: int | None, as_json: bool) -> None:
    """Load and run mutated checkpoints; the exit code is 1 if one ended otherwise than with an answer or a
    refusal in one line."""
    with progress_bar(Console(stderr=True), "cases") as progress:
        results = run(1, seed, progress, only) if only is not None else run(cases, seed, progress)
    faults = [result for result in results if result["outcome"] == "fault"]
    if as_json:
        for result in results:
            click.echo(json.dumps(result))
    else:
        counts = Counter(result["outcome"] for result in results)
        click.echo("\n".join(f"{outcome:<8} {count:6,}" for outcome, count in sorted(counts.items())))
        for fault in faults:
            click.echo(f"case {fault['case']}: {'; '.join(fault['changed'])}: {fault['text']}")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
