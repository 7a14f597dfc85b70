"""How long a long prompt delays the rows that run: milliseconds a step, for several sizes of a chunk.

    python -m benchmarks.prefill --backend cuda

One row of the embedded model writes canvases. Then a prompt of `--prompt` tokens comes, which is encoded in
chunks between its steps. A chunk's tokens cost about what so many tokens of canvases cost, so that the delay
follows from the sizes alone where a pass is bound by arithmetic, as on a CPU.
"""

from __future__ import annotations

import json
import statistics
import time

import click
import numpy as np

from dgemma.backends import BACKENDS, DTYPES
from dgemma.engine.engine import Engine
from dgemma.engine.request import Request
from dgemma.loading import load
from dgemma.model import Model


def timed(model: Model, chunk: int, prompt: list[int], steps: int) -> dict[str, float]:
    """Milliseconds of a step alone and beside the prompt, and seconds until the prompt is encoded."""
    endless = model.generation.override(
        max_new_tokens=20 * model.config.canvas_length, stop_ids=(), confidence=1e-9, allow_empty=True
    )
    engine = Engine(model, None, prefill=chunk)
    handle = engine.submit(Request([2, 5, 6], endless, 0))
    engine.step()
    alone, beside = [], []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        alone.append(time.perf_counter() - began)
    late = engine.submit(Request(prompt, model.generation.override(max_new_tokens=1), 0))
    for _ in range(-(-len(prompt) // chunk)):
        began = time.perf_counter()
        engine.step()
        beside.append(time.perf_counter() - began)
    handle.cancel()
    late.cancel()
    engine.step()
    return {
        "chunk": chunk,
        "step_ms": round(1000 * statistics.median(alone), 2),
        "step_beside_ms": round(1000 * statistics.median(beside), 2),
        "prompt_s": round(sum(beside), 3),
    }


@click.command(help=__doc__.partition("\n")[0])
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES))
@click.option("--prompt", default=3000, show_default=True, help="Tokens of the long prompt.")
@click.option("--steps", default=20, show_default=True, help="Steps timed without it.")
def main(backend: str, dtype: str | None, prompt: int, steps: int) -> None:
    model = load(None, backend, dtype)
    tokens = np.random.default_rng(0).integers(5, model.config.vocab_size, prompt).tolist()
    for chunk in (64, 128, 256, 512, 1024, 2048):
        click.echo(json.dumps({"backend": model.ops.name} | timed(model, chunk, tokens, steps)))


if __name__ == "__main__":
    main()
