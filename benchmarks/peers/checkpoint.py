"""The checkpoint that all engines read: random, or as MLX's 4-bit one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from benchmarks import random_checkpoint
from benchmarks.peers.machine import environment

STORED = {"float32": "F32", "bfloat16": "BF16"}
FORMATS = ("plain", "4bit")

SLIDING, FULL = "sliding_attention", "full_attention"
GEOMETRY = {
    "canvas_length": 256,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 1024,
    "num_experts": 32,
    "top_k_experts": 4,
    "moe_intermediate_size": 256,
    "vocab_size": 32768,
    "max_position_embeddings": 131072,
}


def geometry(changes: Sequence[str]) -> dict[str, int]:
    """GEOMETRY with KEY=NUMBER changes."""
    sizes = dict(GEOMETRY)
    for change in changes:
        key, _, value = change.partition("=")
        if key not in sizes or not value.isdecimal():
            known = ", ".join(GEOMETRY)
            raise click.BadParameter(f"{change!r} is not KEY=NUMBER with one of: {known}", param_hint="--set")
        sizes[key] = int(value)
    return sizes


def make_checkpoint(folder: Path, changes: Sequence[str], dtype: str) -> None:
    """Write a random checkpoint with tame weights. Every sixth layer is full, and the last."""
    sizes = geometry(changes)
    canvas, layers = sizes.pop("canvas_length"), sizes["num_hidden_layers"]
    kinds = [FULL if i % 6 == 5 or i == layers - 1 else SLIDING for i in range(layers)]
    config = random_checkpoint.small(**sizes, layer_types=kinds) | {"canvas_length": canvas}
    random_checkpoint.make_checkpoint(folder, config, dtype=STORED[dtype])


def _checkpoint(folder: Path, changes: Sequence[str], dtype: str, console: Console) -> None:
    """Make the checkpoint unless it is there."""
    geometry(changes)  # so that a wrong option is told before anything else
    if (folder / "config.json").exists():
        if changes:
            raise click.UsageError(f"{folder} is there already, --set would change nothing")
        return
    console.print("making a random checkpoint")
    # A process of its own, as a child inherits the high-water mark of the memory of its parent.
    command = [sys.executable, "-m", "benchmarks.peers.checkpoint", str(folder), dtype, *changes]
    subprocess.run(command, check=True, env=environment())


def folders_of(
    given: Path | None,
    forms: Sequence[str],
    dtypes: Sequence[str],
    changes: Sequence[str],
    scratch: Path,
    console: Console,
) -> dict[tuple[str, str], Path]:
    """Checkpoints by format and type: a random one is stored in the type that it runs in, or 4-bit."""
    needed = dtypes if "plain" in forms else dtypes[:1]
    plain = {dtype: given or scratch / dtype for dtype in needed}
    for folder, dtype in {folder: dtype for dtype, folder in reversed(plain.items())}.items():
        _checkpoint(folder, changes, dtype, console)
    folders = {("plain", dtype): folder for dtype, folder in plain.items()}
    if "4bit" in forms:
        packed = _packed(plain[dtypes[0]], scratch / "4bit", console)
        folders |= {("4bit", dtype): packed for dtype in dtypes}
    return folders


def _packed(folder: Path, packed: Path, console: Console) -> Path:
    """The checkpoint as MLX's 4-bit one."""
    console.print("converting it to 4 bit")
    command = [sys.executable, "-m", "dgemma_convert", str(folder), str(packed), "--to", "mlx"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return packed


if __name__ == "__main__":
    folder, dtype, *changes = sys.argv[1:]
    make_checkpoint(Path(folder), changes, dtype)
