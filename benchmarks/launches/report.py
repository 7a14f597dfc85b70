"""Lines of the report, ready for JSON or as a table, and whether they meet the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from benchmarks.launches.ours import EVERY, ours
from benchmarks.launches.peer import peer
from benchmarks.launches.step import Step, released

PEER = "mlx-vlm"
# Ours in MLX's own operations; with our kernels, but MLX's expert products; with all of our kernels.
ENGINES: dict[str, Callable[..., Step]] = {
    "dgemma-mlx": ours,
    "dgemma-mlx+kernels": partial(ours, kernels=EVERY - {"gather"}),
    "dgemma-mlx+gather": partial(ours, kernels=EVERY),
    PEER: peer,
}

MEGABYTE = 1_000_000
# The largest temporary allowed, in bytes, up to so many tokens of context. It keeps out whole what is done in
# pieces: float32 logits of a canvas are 268 MB, and a full layer's bfloat16 scores at 128k 1,076 MB.
CEILINGS = ((1024, 64 * MEGABYTE), (131072, 256 * MEGABYTE))


def counted(engine: str, context: int, form: str, rows: int = 1) -> dict[str, Any]:
    """One line of the report, ready for JSON: a step of so many rows; the peer counts one."""
    step = ENGINES[engine](context, form) if engine == PEER else ENGINES[engine](context, form, rows=rows)
    count, table = step.count()
    mx.random.seed(0)  # its key was traced too
    return {
        "engine": engine,
        "format": form,
        "context": context,
        "rows": rows,
        "launches": sum(count.launches.values()),
        "kinds": dict(count.launches.most_common()),
        "bytes_read": count.read,
        "bytes_written": count.written,
        "bytes_read_a_token": count.read / (rows * released()[0]["canvas_length"]),
        "largest_temporary": count.largest,
        "largest_is": count.largest_is,
        "flops": count.flops,
        "table_reads": count.table_read / table,
    }


def judge(row: dict[str, Any], other: dict[str, Any] | None) -> dict[str, bool]:
    """The targets, and whether a row of ours meets them."""
    ceiling = next(most for context, most in CEILINGS if row["context"] <= context)
    met = {
        f"no temporary above {ceiling // MEGABYTE} MB": row["largest_temporary"] <= ceiling,
        # A sample may read again what it needs of the table, but not the table.
        "the table read once for the head and once for the soft embedding": row["table_reads"] <= 2.01,
    }
    if other:
        met["half of the peer's launches"] = 2 * row["launches"] <= other["launches"]
    return met


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of ours with the ratio to the peer's launches and what the targets for one row say."""
    peers = {(row["format"], row["context"]): row for row in rows if row["engine"] == PEER}
    for row in rows:
        if row["engine"] != PEER and row["rows"] == 1 and row["context"] <= CEILINGS[-1][0]:
            other = peers.get((row["format"], row["context"]))
            row["targets"] = judge(row, other)
            if other:
                row["ratio"] = row["launches"] / other["launches"]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    grid = Table(title="One denoising step of a canvas of 256, counted", title_justify="left")
    for heading in ("format", "context", "rows", "engine"):
        grid.add_column(heading, no_wrap=True)
    for heading in (
        "launches",
        "÷ peer's",
        "GB read",
        "MB a token",
        "GB written",
        "largest MB",
        "TFLOP",
        "table reads",
    ):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = [f"{row['launches']:,}", f"{row['ratio']:.2f}" if "ratio" in row else ""]
        numbers += [f"{row['bytes_read'] / 1e9:.2f}", f"{row['bytes_read_a_token'] / 1e6:.1f}"]
        numbers += [f"{row['bytes_written'] / 1e9:.2f}"]
        numbers += [f"{row['largest_temporary'] / MEGABYTE:.1f}", f"{row['flops'] / 1e12:.2f}"]
        which = row["format"], str(row["context"]), str(row["rows"]), row["engine"]
        grid.add_row(*which, *numbers, f"{row['table_reads']:.2f}")
    return grid


def tell(rows: Sequence[dict[str, Any]], console: Console, kinds: bool) -> None:
    """The table, and in lines what has no column."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    console.print(table(rows))
    for row in rows:
        name = f"{row['engine']}, {row['format']}, {row['context']}, {row['rows']}"
        if kinds:
            say(f"{name}: " + ", ".join(f"{kind} {n}" for kind, n in row["kinds"].items()))
        say(f"{name}: the largest temporary is {row['largest_is']}")
        for met, word in ((True, "met"), (False, "missed")):
            if those := [target for target, kept in row.get("targets", {}).items() if kept is met]:
                say(f"{name}: {word}: {'; '.join(those)}")
    mine = f"mlx {version('mlx')}"
    say(f"{mine}, mlx-vlm {version('mlx-vlm')}" if find_spec("mlx_vlm") else mine)
