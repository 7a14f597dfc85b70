"""Whether a row's reply depends on its company: held-out prompts alone, in a batch, and in a changing crowd.

    python -m benchmarks.tiny.crowd --backend cuda --dtype float32

Sums of floats come out differently where the number of rows picks another kernel, so that two tokens that
are as good as equal may change places. Where replies differ, the first step that differs is told, with the
doubt at its first position that differs and how far entropies have moved there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click
import numpy as np

from benchmarks.tiny import tasks
from benchmarks.tiny.evaluate import held_out
from dgemma.backends import BACKENDS, DTYPES
from dgemma.engine.engine import Engine
from dgemma.engine.events import Done, Draft, Event
from dgemma.engine.request import Request
from dgemma.loading import load
from dgemma.model import Model


def alone(model: Model, requests: list[Request]) -> list[list[Event]]:
    return [list(Engine(model, None).submit(request)) for request in requests]


def in_batches(model: Model, requests: list[Request], size: int = 4) -> list[list[Event]]:
    """So many at a time, which begin together."""
    found: list[list[Event]] = []
    for start in range(0, len(requests), size):
        engine = Engine(model, None, max_rows=size)
        handles = [engine.submit(request) for request in requests[start : start + size]]
        found += [list(handle) for handle in handles]
    return found


def in_a_crowd(model: Model, requests: list[Request]) -> list[list[Event]]:
    """Up to six at a time, which come at random steps, some beside rows that are cancelled soon."""
    rng = np.random.default_rng(0)
    engine = Engine(model, None, max_rows=6, prefill=16, prefixes=1 << 26)
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        if rng.random() < 0.3:
            engine.submit(requests[rng.integers(len(requests))]).cancel()
        for _ in range(rng.integers(0, 3)):
            engine.step()
    return [list(handle) for handle in handles]


def drafts(events: list[Event]) -> Iterator[Draft]:
    return (event for event in events if isinstance(event, Draft))


def difference(one: list[Event], other: list[Event]) -> dict[str, Any]:
    """The first step in which two runs of a row differ, and how sure the first run was there."""
    for a, b in zip(drafts(one), drafts(other), strict=False):
        places = np.flatnonzero((a.tokens != b.tokens) | (a.accepted != b.accepted))
        if len(places):
            at = int(places[0])
            return {
                "canvas": a.canvas,
                "step": a.step,
                "position": at,
                "entropy": float(a.entropy[at]),
                "entropy_moved_by": float(abs(a.entropy - b.entropy).max()),
                "tokens": [int(a.tokens[at]), int(b.tokens[at])],
                "accepted": [bool(a.accepted[at]), bool(b.accepted[at])],
            }
    return {"step": None}


def reply(events: list[Event]) -> list[int]:
    done = events[-1]
    assert isinstance(done, Done)
    return done.tokens


@click.command(help=__doc__.partition("\n")[0])
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES))
@click.option("--count", default=100, show_default=True, help="Prompts in all.")
def main(backend: str, dtype: str | None, count: int) -> None:
    model = load(None, backend, dtype)
    names = list(tasks.TASKS)
    examples = [held_out(names[n % len(names)], n // len(names) + 1)[-1] for n in range(count)]
    requests = [
        Request(model.tokenizer.encode_chat(e.messages, e.tools, e.thinking), model.generation, seed=1)
        for e in examples
    ]
    expected = alone(model, requests)
    for name, found in (("batch", in_batches(model, requests)), ("crowd", in_a_crowd(model, requests))):
        apart = [n for n in range(count) if reply(found[n]) != reply(expected[n])]
        report = {"backend": model.ops.name, "dtype": model.ops.dtype_name, "company": name, "prompts": count}
        report |= {"equal": count - len(apart)}
        report |= {"first_differences": [difference(expected[n], found[n]) for n in apart]}
        click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
