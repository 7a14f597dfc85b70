"""Thousands of requests through one engine: memory must stay flat, and the last must be as fast as the first.

    python -m benchmarks.soak --backend cuda --requests 2000

The embedded model is asked held-out questions of mixed lengths. One request in eight is cancelled at a random
moment, one in sixteen has a deadline that has hardly begun, one in eight is a hole between pinned tokens, one
in thirty-two is refused, and one in two hundred meets a failing step. A row is printed for every hundred
requests: resident memory of the process, from /proc, and milliseconds of processor time a
step, which a busy machine does not stretch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np

from benchmarks.tiny import tasks
from benchmarks.tiny.evaluate import held_out
from dgemma.backends import BACKENDS, DTYPES
from dgemma.engine.engine import Engine
from dgemma.engine.events import Done
from dgemma.engine.handle import Handle
from dgemma.engine.request import FREE, Request
from dgemma.errors import DgemmaError
from dgemma.loading import load
from dgemma.model import Model

WARM_UP = 500  # requests after which memory must be flat: the cache of prefixes is full by then
ROWS = 4


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


class Soak:
    """One engine under mixed requests."""

    def __init__(self, model: Model, seed: int):
        self.model, self.rng = model, np.random.default_rng(seed)
        self.engine = Engine(model, model.tokenizer, max_rows=ROWS, prefixes=16 << 20)
        self.prompts = [
            (model.tokenizer.encode_chat(e.messages, e.tools, e.thinking), model.tokenizer.encode(e.answer))
            for task in tasks.TASKS
            for e in held_out(task, 40)
        ]
        self.ends: dict[str, int] = {}
        self.steps, self.seconds = 0, 0.0

    def request(self, number: int) -> Request:
        prompt, answer = self.prompts[self.rng.integers(len(self.prompts))]
        limit = int(self.rng.choice([16, 32, 64, 96]))
        settings = self.model.generation.override(max_new_tokens=limit)
        options: dict[str, Any] = {}
        if number % 8 == 3 and 4 < len(answer) <= self.model.config.canvas_length:
            hole = int(self.rng.integers(1, len(answer) - 2))
            options["pins"] = [*answer[:hole], FREE, *answer[hole + 1 :]]
            settings = settings.override(max_new_tokens=len(answer))
        if number % 16 == 5:
            options["deadline"] = 0.001
        if number % 32 == 9:
            settings = settings.override(max_new_tokens=self.model.config.max_positions)
        return Request(prompt, settings, seed=number, **options)

    def run(self, count: int) -> Iterator[int]:
        """Yields the number of each request once it is submitted or refused."""
        waiting: list[tuple[Handle, int]] = []
        for number in range(count):
            try:
                handle = self.engine.submit(self.request(number))
                waiting.append((handle, int(self.rng.integers(0, 6)) if number % 8 == 6 else -1))
            except DgemmaError:
                self.count("refused")
            while self.engine.waiting + self.engine.running >= ROWS + 2:
                self.step(fails=number % 200 == 77)
                for handle, left in waiting:
                    if left == 0:
                        handle.cancel()
                waiting = self.read(waiting)
            yield number
        while self.engine.running + self.engine.waiting:
            self.step()
        self.read(waiting)

    def read(self, waiting: list[tuple[Handle, int]]) -> list[tuple[Handle, int]]:
        """Take the events that are there; returns the handles that go on, a step nearer to their cancel."""
        for handle, _ in waiting:
            for event in handle.taken():
                if isinstance(event, Done):
                    self.count(event.finish_reason)
        return [(handle, left - 1) for handle, left in waiting if not handle.ended]

    def step(self, fails: bool = False) -> None:
        began, rows = time.process_time(), self.engine.running
        context = mock.patch.object(self.model, "see", broken) if fails and rows else nullcontext()
        try:
            with context:
                self.engine.step()
        except MemoryError:
            self.count("failed", rows)
        self.steps, self.seconds = self.steps + 1, self.seconds + time.process_time() - began

    def count(self, end: str, times: int = 1) -> None:
        self.ends[end] = self.ends.get(end, 0) + times

    def clock(self) -> float:
        """Milliseconds of processor time a step since the last call."""
        ms = 1000 * self.seconds / max(1, self.steps)
        self.steps, self.seconds = 0, 0.0
        return ms


def broken(*_: Any) -> Any:
    raise MemoryError("as a framework without memory would say")


def reply(model: Model) -> Done:
    """A fixed request, by itself."""
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": 'Reverse "canvas".'}])
    return Engine(model, model.tokenizer).submit(Request(prompt, model.generation, seed=0)).result()


@click.command(help=__doc__.partition("\n")[0])
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES))
@click.option("--requests", default=2000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(backend: str, dtype: str | None, requests: int, seed: int) -> None:
    if sys.platform != "linux":
        raise click.UsageError("resident memory is read from /proc, which is Linux's")
    model = load(None, backend, dtype)
    before = reply(model)
    soak = Soak(model, seed)
    rows = []
    for number in soak.run(requests):
        if (number + 1) % 100 == 0:
            rows.append(
                {
                    "requests": number + 1,
                    "resident_mb": round(resident() / 1e6, 1),
                    "ms_per_step": round(soak.clock(), 2),
                    "prefixes_mb": round(soak.engine.prefixes.bytes / 1e6, 1),
                }
            )
            click.echo(json.dumps(rows[-1]))
    after = reply(model)
    warm = [row for row in rows if row["requests"] > WARM_UP] or rows
    sizes = [row["resident_mb"] for row in warm]
    click.echo(
        json.dumps(
            {
                "backend": model.ops.name,
                "dtype": model.ops.dtype_name,
                "resident_spread": round((max(sizes) - min(sizes)) / sizes[0], 4),
                "last_to_first_step": round(warm[-1]["ms_per_step"] / warm[0]["ms_per_step"], 3),
                "ends": soak.ends,
                "reserved": soak.engine.reserved,
                "same_reply_as_before": before.tokens == after.tokens and before.text == after.text,
            }
        )
    )


if __name__ == "__main__":
    main()
