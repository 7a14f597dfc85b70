"""What a conversion costs at the true geometry: seconds, bytes a second, peak memory against its bound.

    python benchmarks/convert.py --layers 2

Makes a checkpoint of the released geometry with few layers and random weights (2 layers are 5 GB), converts
it to each target in a process of its own and prints a table. The bound is the converter's promise: 2.5 times
the largest tensor and 1 GB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dgemma.formats.encode import bf16_bits
from dgemma.network.config import read_config
from dgemma.network.spec import Param, parameters
from dgemma.released import RELEASED_DIR

SHARD_BYTES = 2_000_000_000
TARGETS = ("mlx", "nvfp4", "bf16")
CHILD = """
import resource, sys
from pathlib import Path
from dgemma_convert import stream
from dgemma_convert.plan import make_plan
plan, checkpoint = make_plan(Path(sys.argv[1]), sys.argv[3])
stream.convert(plan, checkpoint, Path(sys.argv[2]))
print(plan.nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def geometry(layers: int) -> dict[str, Any]:
    """The released config with its last layers: full attention comes every sixth, so it is the last."""
    config = json.loads((RELEASED_DIR / "config.json").read_text())
    text = config["text_config"]
    text["layer_types"] = text["layer_types"][-layers:]
    text["num_hidden_layers"] = layers
    return config | {"vision_config": None}


def make_source(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """A sharded bf16 checkpoint; returns its bytes and those of its largest tensor.

    Weights are cut from one block of normal numbers: drawing each would take longer than converting.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    block = bf16_bits(np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02)
    table = parameters(read_config(config))
    shards: list[list[Param]] = [[]]
    for param in table:
        if sum(2 * p.size for p in shards[-1]) + 2 * param.size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(param)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(track(shards, "making the source", console=Console(stderr=True))):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, shard, block)
        weight_map |= {param.name: name for param in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(2 * p.size for p in table), max(2 * p.size for p in table)


def write_shard(path: Path, shard: list[Param], block: np.ndarray) -> None:
    """A safetensors file of parameters; each repeats `block`, uint16 [n], the bits of bfloat16."""
    header, end = {}, 0
    for param in shard:
        spans = [end, end + 2 * param.size]
        header[param.name] = {"dtype": "BF16", "shape": list(param.shape), "data_offsets": spans}
        end = spans[1]
    raw = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for param in shard:
            for start in range(0, param.size, len(block)):
                stream.write(block[: param.size - start].tobytes())


def measure(source: Path, dest: Path, to: str) -> tuple[int, float, int]:
    """Bytes written, seconds and peak bytes of one conversion."""
    began = time.monotonic()
    command = [sys.executable, "-c", CHILD, str(source), str(dest), to]
    written, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(written), time.monotonic() - began, int(peak)


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--layers", type=click.IntRange(1, 30), default=2, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work; default the temporary folder."
)
def main(layers: int, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source = Path(work) / "source"
        total, largest = make_source(source, geometry(layers))
        bound = 2.5 * largest + 1e9
        title = (
            f"{total / 1e9:.2f} GB of bf16, largest tensor {largest / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB"
        )
        table = Table(title=title)
        for header in ("target", "GB written", "seconds", "GB/s read", "peak GB", "÷ bound"):
            table.add_column(header, justify="right")
        for to in TARGETS:
            written, seconds, peak = measure(source, Path(work) / to, to)
            cells = written / 1e9, seconds, total / 1e9 / seconds, peak / 1e9, peak / bound
            table.add_row(to, *(f"{cell:.2f}" for cell in cells))
            for path in (Path(work) / to).iterdir():
                path.unlink()
    Console().print(table)


if __name__ == "__main__":
    main()
