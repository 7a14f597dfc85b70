"""Compares the logits of engines, and times the engines in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import click
import numpy as np
from rich.console import Console

from benchmarks.peers.worker import Failed, Setting, Worker, started

TOLERANCE = 1e-3  # largest difference of logits over the largest logit, in float32
COMPARED, ALIKE = 64, 0.9  # prompt tokens, and positions that must agree


def compare(names: Sequence[str], setting: Setting) -> float:
    """Largest difference of an engine's logits to the first's, but where picks tie; an error if too large."""
    tokens, canvas = setting.inputs()
    tokens = tokens[:COMPARED]
    vocab = setting.config["text_config"]["vocab_size"]
    planes: list[np.ndarray] = []
    worst = 0.0
    for name in names:
        out = setting.scratch / f"{name}.npy"
        with started(name, replace(setting, dtype="float32")) as worker:
            worker.ask(tokens=tokens, canvas=canvas.tolist(), vocab=vocab, out=str(out))
        planes.append(np.load(out, mmap_mode="r"))
        rows = np.abs(planes[-1] - planes[0]).max(-1) / np.abs(planes[0]).max()
        apart = float(np.quantile(rows, ALIKE))
        if not apart <= TOLERANCE:
            raise click.ClickException(
                f"{name} and {names[0]} do not run the same model: their logits differ by {apart:.2g} "
                f"(relative; at most {TOLERANCE:.0e}). Nothing was timed."
            )
        worst = max(worst, apart)
    return worst


def measure(workers: Sequence[Worker], setting: Setting, console: Console) -> None:
    """Rounds through the workers in turn; the first one warms up and is not kept."""
    tokens, _ = setting.inputs()
    for number in range(setting.rounds + 1):
        console.print(f"round {number} of {setting.rounds}" if number else "warm-up")
        for worker in workers:
            if not worker.failure:
                time.sleep(0.2)  # idle threads of the one before spin for a moment
                _round(worker, tokens, setting.steps, number)


def _round(worker: Worker, tokens: list[int], steps: int, number: int) -> None:
    """An engine that cannot run a setting at all is reported; one that fails later ends the run."""
    try:
        worker.round(tokens, steps, keep=number > 0)
    except Failed as error:
        if number:
            raise
        worker.failure = str(error).splitlines()[-1]
