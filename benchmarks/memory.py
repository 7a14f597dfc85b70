"""The peak memory of a run beside what `dgemma info --context` predicts; each backend has its own process.

python -m benchmarks.memory                     # the embedded model
python -m benchmarks.memory --synthetic --context 1024
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

import dgemma
from benchmarks.random_checkpoint import make_checkpoint, small
from dgemma.reports.info import describe
from dgemma.reports.tables import amount, columns
from dgemma.tiny import MODEL_DIR

# What is measured here, a CPU: backend, type, device.
KINDS = (("numpy", None, None), ("mlx", "float32", None), ("cuda", "float32", "cpu"))
STEPS = 2


def synthetic() -> dict[str, Any]:
    """The configuration of 563 million parameters in the release's proportions, roughly."""
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "vocab_size": 65536,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_global_key_value_heads": 2,
        "global_head_dim": 256,
        "sliding_window": 512,
        "intermediate_size": 1024,
        "num_experts": 64,
        "moe_intermediate_size": 384,
        "top_k_experts": 4,
        "max_position_embeddings": 16384,
    }
    return small(**sizes) | {"canvas_length": 256}


def run(folder: Path, rows: int, context: int, backend: str, dtype: str | None, device: str | None) -> int:
    """Encode rows, make steps, commit a canvas, make steps: the contexts come to `context` tokens each.

    Returns the peak in bytes.
    """
    model, rng = dgemma.load(folder, backend, dtype, device), np.random.default_rng(0)
    L, V = model.config.canvas_length, model.config.vocab_size
    contexts = model.encode([rng.integers(3, V, context - L).tolist() for _ in range(rows)])
    canvas = rng.integers(3, V, (rows, L))
    for last in (False, True):
        soft: Any = None
        for _ in range(STEPS):
            seen = model.see(contexts, canvas, soft, 0.7, rng.random((rows, L)))
            soft = [seen.soft[row] for row in range(rows)]
        if not last:
            model.extend(contexts, list(canvas))
    assert all(context_.length == context for context_ in contexts)
    return model.ops.peak_memory()


def measured(folder: Path, rows: int, context: int, kind: tuple[str, str | None, str | None]) -> int:
    """`run` in a process of its own."""
    given = json.dumps([str(folder), rows, context, *kind])
    command = [sys.executable, "-m", "benchmarks.memory", "--one", given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    return int(done.stdout)


def table(folder: Path, rows: int, context: int) -> list[str]:
    """Predicted and measured by backend, and their ratio."""
    report = describe(folder, run=(rows, context))
    peaks = {(p["backend"], p["device"], p["dtype"]): p for p in report["run"]["peaks"]}
    lines = [["on a CPU", "type", "weights", "process", "predicted", "measured", "predicted ÷ measured"]]
    for kind in KINDS:
        peak = peaks[kind[0], "CPU", kind[1] or "float64"]
        found = measured(folder, rows, context, kind)
        sizes = [amount(peak[part] or 0) for part in ("weights", "process", "total")]
        lines.append([kind[0], peak["dtype"], *sizes, amount(found), f"{peak['total'] / found:.3f}"])
    return columns(lines)


@click.command()
@click.option("--synthetic", "is_synthetic", is_flag=True, help="563 million random parameters.")
@click.option("--model", type=click.Path(path_type=Path), default=MODEL_DIR, help="Another folder.")
@click.option("--rows", default=2, show_default=True)
@click.option("--context", default=512, show_default=True)
@click.option("--one", hidden=True)
def main(is_synthetic: bool, model: Path, rows: int, context: int, one: str | None) -> None:
    """Print predicted and measured peaks."""
    if one is not None:
        folder, *rest = json.loads(one)
        print(run(Path(folder), *rest))
        return
    with TemporaryDirectory() as scratch:
        folder = make_checkpoint(Path(scratch) / "model", synthetic()) if is_synthetic else model
        print("\n".join(table(folder, rows, context)))


if __name__ == "__main__":
    main()
