"""`dgemma bench`: PyTorch is imported once the options are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dgemma.backends import ACTIVATIONS, DTYPES, make_ops
from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.options import Number, Whole
from dgemma.commands.progress import TerminalNotices, stderr_console
from dgemma.commands.streams import answer, answer_json, check_stdout
from dgemma.files import load_json
from dgemma.network.config import Config, read_config
from dgemma.released import RELEASED_DIR
from dgemma.tiny import MODEL_DIR


@click.command(cls=OneLine, context_settings=HELP)
@click.option("--backend", type=click.Choice(["cuda"]), default="cuda", show_default=True)
@click.option(
    "--geometry",
    default="released",
    show_default=True,
    metavar="NAME|FOLDER",
    help="released, tiny, or a folder with a config.json.",
)
@click.option(
    "--format", "form", type=click.Choice(["nvfp4", "fp8", "bf16"]), default="nvfp4", show_default=True
)
@click.option("--random-weights", is_flag=True, required=True, help="Make the weights on the device.")
@click.option(
    "--context", type=Whole(1, 1_000_000), default=1024, show_default=True, help="Tokens of a prompt."
)
@click.option("--rows", type=Whole(1, 10_000), default=1, show_default=True, help="Canvases at once.")
@click.option(
    "--skew", type=Number(0, 10), default=0.0, show_default=True, help="How unevenly experts are picked."
)
@click.option("--steps", type=Whole(1, 10_000), default=20, show_default=True, help="Steps to time.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of activations.")
@click.option("--activations", type=click.Choice(ACTIVATIONS), help="Quantize what goes into experts, too.")
@click.option("--device", metavar="NAME", help="A torch device, such as cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    backend: str,
    geometry: str,
    form: str,
    random_weights: bool,
    context: int,
    rows: int,
    skew: float,
    steps: int,
    dtype: str | None,
    activations: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Time a denoising step with random weights, part by part, against what the device allows.

    Nothing is downloaded. A part's floor follows from its bytes and products and the device's measured copy
    bandwidth and matrix throughput.
    """
    check_stdout()
    _, config = read_geometry(geometry)
    console = stderr_console()
    ops: Any = make_ops(backend, dtype, device, activations, TerminalNotices(console))
    from dgemma_cuda import bench as library

    with console.status("starting") as status:
        report = library.run(ops, config, form, context, rows, skew, steps, status.update)
    if as_json:
        answer_json(report)
    else:
        answer(library.text(report))


def read_geometry(name: str) -> tuple[Path, Config]:
    """The folder and the config of "released", of "tiny", or of a folder with a config.json."""
    folder = {"released": RELEASED_DIR, "tiny": MODEL_DIR}.get(name, Path(name))
    return folder, read_config(load_json(folder / "config.json"), str(folder / "config.json"))
