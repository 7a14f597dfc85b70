"""An engine's process as the run sees it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.peers.engines import MLX
from benchmarks.peers.machine import environment, version_of


@dataclass(frozen=True)
class Setting:
    """What all engines of a run share."""

    folder: Path
    dtype: str
    device: str
    blas: Path | None
    scratch: Path
    context: int
    steps: int
    rounds: int
    form: str = "plain"

    def __str__(self) -> str:
        return f"{self.form}, {self.dtype}, context {self.context}"

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def inputs(self) -> tuple[list[int], np.ndarray]:
        """A random prompt and a random canvas [1, L]."""
        rng = np.random.default_rng(0)
        # Above the control tokens and below the image tokens of the released vocabulary.
        high = min(self.config["text_config"]["vocab_size"], 255_000)
        tokens = rng.integers(min(200, high // 2), high, self.context)
        return tokens.tolist(), rng.integers(0, high, (1, self.config["canvas_length"]))


class Failed(click.ClickException):
    """An engine's process ended."""


@dataclass
class Worker:
    """An engine's process, as the run sees it, and what was measured of it so far."""

    name: str
    process: subprocess.Popen[str]
    errors: Path
    prefill: list[float] = field(default_factory=list)  # seconds, one a round
    steps: list[list[float]] = field(default_factory=list)  # seconds, by round
    peak: int = 0  # bytes
    above: list[int] = field(default_factory=list)  # bytes, as in `Engine`
    failure: str = ""

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` finds no line, and tells why
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise Failed(f"{self.name} failed:\n{self.errors.read_text()[-2000:].strip()}")

    def round(self, tokens: list[int], steps: int, keep: bool) -> None:
        """One generate call; kept unless it is the warm-up."""
        answer = self.ask(tokens=tokens, steps=steps)
        times, self.peak, self.above = answer["times"], answer["peak"], answer["above"]
        if len(times) != steps + 2:
            raise click.ClickException(f"{self.name} showed {len(times) - 2} drafts of {steps} steps")
        if keep:
            self.prefill.append(times[1] - times[0])
            # The first step has no self-conditioning.
            self.steps.append([b - a for a, b in pairwise(times[2:])])

    def report(self) -> dict[str, Any]:
        if self.failure:
            return {"engine": self.name, "version": version_of(self.name), "failure": self.failure}
        steps = [1000 * s for one in self.steps for s in one]
        return {
            "engine": self.name,
            "version": version_of(self.name),
            "prefill_ms": 1000 * statistics.median(self.prefill),
            "step_ms": statistics.median(steps),
            "step_ms_min": min(steps),
            "step_ms_max": max(steps),
            "peak_bytes": self.peak,
            "above_bytes": self.above,
            "rounds_ms": [[1000 * s for s in one] for one in self.steps],
        }


@contextmanager
def started(name: str, setting: Setting) -> Iterator[Worker]:
    """A worker that has loaded its model."""
    command = [sys.executable, "-m", "benchmarks.peers.serve"]
    command += [name, str(setting.folder), setting.dtype, setting.device]
    variables = environment()
    if setting.blas and name in MLX:
        variables["LD_PRELOAD"] = f"{setting.blas} {os.environ.get('LD_PRELOAD', '')}".strip()
    errors = setting.scratch / f"{name}.log"
    pipe = subprocess.PIPE
    with errors.open("w") as log:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=variables)
    worker = Worker(name, process, errors)
    try:
        worker.answer()
        yield worker
    finally:
        process.terminate()
        process.wait()
