"""Holes in right answers of the embedded model: how many are filled with the very text that was there.

    python -m benchmarks.tiny.infill --count 40

Spans of tokens are cut out of the answers to held-out questions, in three ways: one span whose length is told, one
whose length is not, and two of unknown length. The prompt is the task's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.tiny import tasks
from benchmarks.tiny.evaluate import held_out
from dgemma.backends import BACKENDS
from dgemma.errors import DgemmaError
from dgemma.loading import load
from dgemma.model import Model
from dgemma.text.holes import Hole

TASKS = ("json", "repair", "replace", "sort", "add", "count")
WAYS = {"known": 1, "unknown": 1, "two": 2}  # the number of holes


@dataclass(frozen=True)
class Question:
    """An answer with holes: the ids of its prompt, its text, and the holes, which hold what is wanted."""

    task: str
    prompt: list[int]
    text: str
    holes: list[Hole]


def questions(model: Model, task: str, way: str, count: int, seed: int, longest: int) -> Iterator[Question]:
    """Held-out answers that fit on a canvas, with spans of up to `longest` tokens cut out."""
    rng = np.random.default_rng([seed, *f"{task} {way}".encode()])
    holes, found, tokenizer = WAYS[way], 0, model.tokenizer
    for example in held_out(task, 20 * count, seed):
        ids = tokenizer.encode(tasks.visible(example.answer))
        if found == count:
            return
        if not 2 * holes + 1 <= len(ids) < model.config.canvas_length:
            continue
        # Something stands between the holes, and beside them.
        share = len(ids) // holes
        spans = []
        for at in range(holes):
            length = int(rng.integers(1, min(longest, share - 1) + 1))
            start = at * share + int(rng.integers(0, share - length))
            spans.append((start, start + length))
        edges = [(len(tokenizer.decode(ids[:a])), len(tokenizer.decode(ids[:b]))) for a, b in spans]
        lengths = [b - a if way == "known" else None for a, b in spans]
        found += 1
        yield Question(
            task,
            tokenizer.encode_chat(example.messages, example.tools, example.thinking),
            tokenizer.decode(ids),
            [Hole(a, b, n) for (a, b), n in zip(edges, lengths, strict=True)],
        )


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--model", help="Checkpoint folder; default the embedded model.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--device", help="A torch device.")
@click.option("--count", type=click.IntRange(1), default=40, show_default=True, help="Answers a task.")
@click.option("--way", "ways", type=click.Choice(list(WAYS)), multiple=True, help="Default: all.")
@click.option("--longest", type=click.IntRange(1), default=4, show_default=True, help="Tokens of a hole.")
@click.option("--seed", default=0, show_default=True)
@click.option("--wrong", is_flag=True, help="Print what was filled wrongly, on stderr.")
def main(
    model: str | None,
    backend: str,
    device: str | None,
    count: int,
    ways: tuple[str, ...],
    longest: int,
    seed: int,
    wrong: bool,
) -> None:
    err = Console(file=sys.stderr)
    out = Table("holes", *TASKS, "all", "steps", "candidates", box=None)
    try:
        loaded = load(model, backend, device=device)
        for way in ways or WAYS:
            right: dict[str, list[bool]] = {}
            steps, candidates = [], []
            todo = [one for task in TASKS for one in questions(loaded, task, way, count, seed, longest)]
            for one in track(todo, way, console=err, disable=not err.is_terminal):
                got = loaded.infill(one.text, one.holes, prompt=one.prompt, seed=seed)
                right.setdefault(one.task, []).append(got.text == one.text)
                steps.append(got.steps / got.canvases)
                candidates.append(got.candidates)
                if wrong and got.text != one.text:
                    err.print(way, one.task, one.holes, one.text, got, sep="\n", markup=False)
            every = [answer for answers in right.values() for answer in answers]
            shares = [f"{np.mean(right[task]):.1%}" if task in right else "" for task in TASKS]
            shares.append(f"{np.mean(every):.1%}")
            out.add_row(way, *shares, f"{np.mean(steps):.1f}", f"{np.mean(candidates):.1f}")
    except DgemmaError as error:
        raise click.ClickException(str(error)) from None
    Console().print(out)


if __name__ == "__main__":
    main()
