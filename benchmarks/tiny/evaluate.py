"""Held-out evaluation of the embedded model: accuracy, tokens a forward and steps a canvas, by task.

    python -m benchmarks.tiny.evaluate --count 200
    python -m benchmarks.tiny.evaluate --count 200 --speeds

Only questions that training skipped are asked, with the checkpoint's own sampler. The same command
judges any checkpoint of the tiny model, a quantized one too: steps a canvas is what quantization costs.
The second compares the sets of settings that --speed names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby, product
from statistics import mean
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.tiny import tasks
from dgemma.backends import BACKENDS, DTYPES
from dgemma.engine.events import Done
from dgemma.errors import DgemmaError
from dgemma.loading import load
from dgemma.model import Model
from dgemma.settings import SPEEDS


@dataclass(frozen=True)
class Score:
    """One task's result over `count` prompts; what follows the accuracy is pooled."""

    task: str
    count: int
    accuracy: float
    tokens_per_forward: float
    steps_per_canvas: float
    soft_dense: float  # share of soft embeddings that left nothing out
    speed: str = "quality"


def held_out(task: str, count: int, seed: int = 0) -> list[tasks.Example]:
    """`count` examples of a task that training never saw."""
    rng = np.random.default_rng([seed, *task.encode()])
    found: list[tasks.Example] = []
    while len(found) < count:
        example = tasks.sample(rng, task)
        if tasks.held_out(example):
            found.append(example)
    return found


def replies(
    model: Model, examples: list[tasks.Example], seed: int, batch: int, **settings: Any
) -> list[Done]:
    """The model's reply to each example, in order, generated in batches."""
    done: list[Done] = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        prompts = [model.tokenizer.encode_chat(e.messages, e.tools, e.thinking) for e in part]
        events = model.generate(prompts, seed=seed, **settings)
        done += sorted((e for e in events if isinstance(e, Done)), key=lambda e: e.row)
    return done


def score(model: Model, task: str, count: int, seed: int = 0, batch: int = 32, **settings: Any) -> Score:
    """Ask `count` held-out questions of a task."""
    examples = held_out(task, count, seed)
    done = replies(model, examples, seed, batch, **settings)
    right = [
        tasks.correct(example, model.tokenizer.decode(reply.tokens))
        for example, reply in zip(examples, done, strict=True)
    ]
    steps = sum(reply.stats.steps for reply in done)
    canvases = sum(reply.stats.canvases for reply in done)
    tokens = sum(reply.stats.tokens for reply in done)
    dense = sum(reply.stats.soft_dense * reply.stats.steps for reply in done)
    speed = settings.get("speed") or "quality"
    return Score(task, count, sum(right) / count, tokens / steps, steps / canvases, dense / steps, speed)


def table(scores: Iterable[Score]) -> Table:
    """The scores as a printed table."""
    out = Table("task", box=None)
    for header in ("prompts", "accuracy", "tokens/forward", "steps/canvas", "dense"):
        out.add_column(header, justify="right")
    for s in scores:
        cells = f"{s.accuracy:.1%}", f"{s.tokens_per_forward:.1f}", f"{s.steps_per_canvas:.1f}"
        out.add_row(s.task, str(s.count), *cells, f"{s.soft_dense:.1%}")
    return out


def speeds_table(scores: Iterable[Score]) -> Table:
    """A line a speed: means over tasks, then each task's accuracy."""
    scores, out = list(scores), Table("speed", box=None)
    for header in ("steps/canvas", "tokens/forward", "accuracy", *dict.fromkeys(s.task for s in scores)):
        out.add_column(header, justify="right")
    for speed, group in groupby(scores, key=lambda s: s.speed):
        own = list(group)
        means = (mean(getattr(s, name) for s in own) for name in ("steps_per_canvas", "tokens_per_forward"))
        cells = *(f"{x:.2f}" for x in means), f"{mean(s.accuracy for s in own):.1%}"
        out.add_row(speed, *cells, *(f"{s.accuracy:.1%}" for s in own))
    return out


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--model", help="Checkpoint folder; default the embedded model.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES))
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Prompts a task.")
@click.option("--task", "chosen", type=click.Choice(list(tasks.TASKS)), multiple=True, help="Default: all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=JSON", help="A sampler's setting; may repeat."
)
@click.option("--speeds", is_flag=True, help="Compare the sets of settings that --speed names.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a task on stdout.")
def main(
    model: str | None,
    backend: str,
    dtype: str | None,
    count: int,
    chosen: tuple[str, ...],
    seed: int,
    batch: int,
    changes: tuple[str, ...],
    speeds: bool,
    as_json: bool,
) -> None:
    try:
        loaded = load(model, backend, dtype)
        err = Console(file=sys.stderr)
        settings = {field: json.loads(value) for field, _, value in (c.partition("=") for c in changes)}
        asked = list(product(SPEEDS if speeds else ["quality"], chosen or tasks.TASKS))
        scores = [
            score(loaded, task, count, seed, batch, speed=speed, **settings)
            for speed, task in track(asked, "evaluating", console=err, disable=not err.is_terminal)
        ]
    except (DgemmaError, json.JSONDecodeError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        for s in scores:
            click.echo(json.dumps(asdict(s)))
    else:
        Console().print(speeds_table(scores) if speeds else table(scores))


if __name__ == "__main__":
    main()
