"""The command: see the package."""

from __future__ import annotations

import json
import sys
from collections import Counter

import click

from .run import run


@click.command()
@click.option("--cases", type=click.IntRange(min=1), default=10_000, show_default=True, help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which.")
@click.option("--only", type=click.IntRange(min=0), metavar="CASE", help="One case again, by its number.")
@click.option("--json", "as_json", is_flag=True, help="Print each case as one JSON object a line.")
def main(cases: int, seed: int, only: int | None, as_json: bool) -> None:
    """Load and run mutated checkpoints; the exit code is 1 if one ended otherwise than with an answer or a
    refusal in one line."""
    first, count = (0, cases) if only is None else (only, 1)
    counts: Counter[str] = Counter()
    with click.progressbar(run(count, seed, first), length=count, label="cases", file=sys.stderr) as results:
        for result in results:
            counts[result["outcome"]] += 1
            if as_json:
                click.echo(json.dumps(result))
            elif result["outcome"] == "fault":
                click.echo(f"case {result['case']}: {'; '.join(result['changed'])}: {result['text']}")
    if not as_json:
        click.echo("\n".join(f"{outcome:<8} {number:6,}" for outcome, number in sorted(counts.items())))
    raise SystemExit(1 if counts["fault"] else 0)


if __name__ == "__main__":
    main()
