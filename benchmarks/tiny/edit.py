"""Edits of broken texts by the embedded model, beside the answers that it writes anew to the same prompts.

    python -m benchmarks.tiny.edit --count 40

A draft is what the question quotes (brackets that are open, a sentence before a word is replaced, letters before they
are sorted), or the right answer with one token replaced, gone or too many. The prompt is the task's own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.tiny import tasks
from benchmarks.tiny.evaluate import held_out, replies
from dgemma.backends import BACKENDS
from dgemma.engine.edit import Edited
from dgemma.errors import DgemmaError
from dgemma.loading import load
from dgemma.model import Model

TASKS = ("repair", "replace", "sort")
DRAFTS = ("quoted", "damaged")


@dataclass
class Score:
    """Whether each answer is right, anew and edited, and what each of them took."""

    anew: list[bool] = field(default_factory=list)
    anew_steps: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    edits: list[Edited] = field(default_factory=list)


def quoted(example: tasks.Example) -> str:
    """The text that a question asks to be changed."""
    question = tasks.prompt_key(example)
    return question.split('"')[1] if example.task == "sort" else question.split(": ", 1)[1]


def damaged(model: Model, text: str, rng: np.random.Generator) -> str:
    """The text with one token replaced, gone or too many."""
    ids = model.tokenizer.encode(text)
    others = np.flatnonzero(model.seams.written)
    at, kind = int(rng.integers(len(ids))), int(rng.integers(3))
    new = [] if kind == 1 else [int(rng.choice(others))]
    return model.tokenizer.decode(ids[:at] + new + ids[at + (kind < 2) :])


def score(model: Model, task: str, draft: str, count: int, seed: int) -> Score:
    """Edits of `count` held-out questions' drafts."""
    rng, result = np.random.default_rng([seed, *f"{task} {draft}".encode()]), Score()
    examples = held_out(task, count, seed)
    for example, anew in zip(examples, replies(model, examples, seed, 32), strict=True):
        result.anew.append(tasks.correct(example, model.tokenizer.decode(anew.tokens)))
        result.anew_steps.append(anew.stats.steps)
        answer = tasks.visible(example.answer)
        text = quoted(example) if draft == "quoted" else damaged(model, answer, rng)
        prompt = model.tokenizer.encode_chat(example.messages, example.tools, example.thinking)
        result.edits.append(model.edit(text, prompt=prompt, seed=seed))
        result.right.append(tasks.correct(example, result.edits[-1].text))
    return result


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--model", help="Checkpoint folder; default the embedded model.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--device", help="A torch device.")
@click.option("--count", type=click.IntRange(1), default=40, show_default=True, help="Texts a task.")
@click.option("--seed", default=0, show_default=True)
def main(model: str | None, backend: str, device: str | None, count: int, seed: int) -> None:
    err = Console(file=sys.stderr)
    out = Table("task", "draft", "anew", "steps", "edited", "steps", "surveys", "candidates", box=None)
    try:
        loaded = load(model, backend, device=device)
        todo = [(task, draft) for draft in DRAFTS for task in TASKS]
        for task, draft in track(todo, "editing", console=err, disable=not err.is_terminal):
            got = score(loaded, task, draft, count, seed)
            means = [
                np.mean([getattr(one, name) for one in got.edits])
                for name in ("steps", "surveys", "candidates")
            ]
            shares = f"{np.mean(got.anew):.1%}", f"{np.mean(got.anew_steps):.1f}", f"{np.mean(got.right):.1%}"
            out.add_row(task, draft, *shares, *(f"{mean:.1f}" for mean in means))
    except DgemmaError as error:
        raise click.ClickException(str(error)) from None
    Console().print(out)


if __name__ == "__main__":
    main()
