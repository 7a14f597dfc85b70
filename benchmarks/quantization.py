"""What quantization does to a trained model: size, error, divergence, accuracy, and steps a canvas.

    python benchmarks/quantization.py --count 100

Converts the embedded model with each recipe, measures weights and logits against its bf16 checkpoint
(`dgemma.reports.against`) and asks it held-out questions with the released sampler. Steps a canvas is the
price that users pay: a step takes the same time whatever it decides.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track

from benchmarks.tiny import tasks
from benchmarks.tiny.evaluate import Score, score
from dgemma.backends import make_ops
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.model import Model
from dgemma.reports import against, tables
from dgemma.text.tokenizer import Tokenizer
from dgemma.tiny import MODEL_DIR
from dgemma_convert import stream
from dgemma_convert.plan import make_plan


@dataclass(frozen=True)
class Recipe:
    """A row of the table: the arguments of `dgemma convert`."""

    to: str
    preset: str = "balanced"
    settings: tuple[str, ...] = ()
    w4a4: bool = False  # what goes into experts is quantized, too: `--activations nvfp4`

    def __str__(self) -> str:
        parts = [f"--to {self.to}", *(["--preset " + self.preset] if self.preset != "balanced" else [])]
        return " ".join(parts + [f"--set {setting}" for setting in self.settings]) + ", W4A4" * self.w4a4


FOUR = ("experts", "self_conditioning", "embed", "attention", "mlp")
RECIPES = (
    Recipe("bf16"),
    Recipe("mlx", "quality"),
    Recipe("mlx"),
    Recipe("mlx", "small"),
    Recipe("mlx", settings=("experts=mxfp8",)),
    Recipe("mlx", settings=("experts=mxfp4",)),
    Recipe("mlx", settings=("experts=nvfp4",)),
    Recipe("mlx", settings=tuple(f"{name}=4bit" for name in FOUR)),
    Recipe("mlx", settings=tuple(f"{name}=2bit-g32" for name in FOUR)),
    Recipe("nvfp4"),
    Recipe("nvfp4", "small"),
    Recipe("nvfp4", w4a4=True),
)


def w4a4_ops() -> Any:
    """PyTorch with what `--activations nvfp4` makes of activations, and without its kernels."""
    from dgemma_cuda.kernels.fp4 import quantized_plain
    from dgemma_cuda.ops import CudaOps

    class W4A4(CudaOps):
        def expert_linear(self, x: Any, weight: Any, experts: Any) -> Any:
            return super().expert_linear(quantized_plain(x).to(x.dtype), weight, experts)

    return W4A4()


def measure(recipe: Recipe, dest: Path, backend: str, count: int) -> dict[str, Any]:
    """One row, ready for JSON."""
    plan, source = make_plan(MODEL_DIR, recipe.to, recipe.preset, recipe.settings)
    assert source is not None
    stream.convert(plan, source, dest)
    checkpoint, ops = Checkpoint.open(dest), w4a4_ops() if recipe.w4a4 else make_ops(backend)
    weights = against.compare(checkpoint, source)["total"]
    divergence = against.logits(checkpoint, source, ops)["self_conditioned"]
    model = Model(
        ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), Tokenizer.open(checkpoint.folder)
    )
    scores = [score(model, task, count) for task in tasks.TASKS]
    return {
        "recipe": str(recipe),
        "bytes": plan.nbytes,
        "weight_error": weights["relative_rms"],
        "kl": divergence["kl_mean"],
        "accuracy": {s.task: s.accuracy for s in scores},
        "steps_per_canvas": pooled(scores),
    }


def pooled(scores: list[Score]) -> float:
    """Mean over tasks of the steps a canvas took."""
    return sum(s.steps_per_canvas for s in scores) / len(scores)


def line(row: Mapping[str, Any]) -> str:
    """A row in Markdown."""
    cells = [
        f"`{row['recipe']}`",
        tables.amount(row["bytes"]),
        f"{row['weight_error']:.2%}",
        f"{row['kl']:.2g}",
    ]
    cells += [f"{row['steps_per_canvas']:.2f}"]
    cells += [f"{100 * value:.0f}" for value in row["accuracy"].values()]
    return "| " + " | ".join(cells) + " |"


def head() -> str:
    names = ["recipe", "size", "weight error", "KL, nats", "steps/canvas", *tasks.TASKS]
    return "| " + " | ".join(names) + " |\n|---|" + "--:|" * (len(names) - 1)


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Prompts a task.")
@click.option("--backend", type=click.Choice(["cuda", "mlx", "numpy"]), default="cuda", show_default=True)
@click.option("--only", metavar="TEXT", default="", help="Rows whose recipe has this in it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row.")
def main(count: int, backend: str, only: str, as_json: bool) -> None:
    if not as_json:
        click.echo(head())
    with tempfile.TemporaryDirectory() as work:
        some = [recipe for recipe in RECIPES if only in str(recipe)]
        rows = track(some, "measuring", console=Console(file=sys.stderr), disable=not sys.stderr.isatty())
        for index, recipe in enumerate(rows):
            row = measure(recipe, Path(work) / str(index), backend, count)
            click.echo(json.dumps(row) if as_json else line(row))


if __name__ == "__main__":
    main()
