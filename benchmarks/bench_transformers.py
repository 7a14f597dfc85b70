"""transformers' DiffusionGemma, timed in its own generate loop: what a step of ours is measured against.

    python -m benchmarks.bench_transformers --random-weights      # `dgemma bench`, and transformers after it

Nothing of its loop is rebuilt: forward pass, temperature, softmax, sample, acceptance and new noise are its
own, and a clock is read where the loop shows a draft. It is timed as it comes, and on a GPU with the static
cache for which it compiles its passes and records them. It reads no NVFP4 of this model, so that its weights
have the type of the activations whatever ours have; the report says so, and what could not be timed.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from torch import nn

from dgemma.errors import BackendError
from dgemma.files import load_json
from dgemma.network.config import Config
from dgemma.reports.tables import amount, columns
from dgemma_cuda import bench
from dgemma_cuda.command import bench as command
from dgemma_cuda.command import read_geometry
from dgemma_cuda.ops import CudaOps, make
from dgemma_cuda.synthetic import check_room

NEVER = 1e-9  # nats: a mean entropy that no random model reaches, so that no loop stops early
DEFAULT, COMPILED = "as it comes", "compiled, static cache"
MODES: dict[str, dict[str, Any]] = {DEFAULT: {}, COMPILED: {"cache_implementation": "static"}}


# ---- transformers ---------------------------------------------------------------------------------


def library() -> Any:
    """The package; BackendError where it is missing or too old."""
    try:
        import transformers
        from transformers import DiffusionGemmaForBlockDiffusion  # noqa: F401
    except ImportError:
        raise BackendError(
            "the comparison needs transformers 5.11 or newer, which is not installed: "
            "pip install 'dgemma[bench]'"
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


@dataclass
class _Ticks:
    """What transformers' loop calls; `put_draft` comes after the draft was copied to the host."""

    times: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.times.append(perf_counter())

    def put(self, value: Any) -> None:
        pass

    def put_draft(self, value: Any) -> None:
        self.tick()

    def end(self) -> None:
        pass


class Transformers:
    """A model of transformers on a device."""

    def __init__(self, model: Any):
        self.model = model.eval()

    @classmethod
    def load(cls, folder: Path, dtype: str, device: str | torch.device) -> Transformers:
        """The checkpoint in a folder."""
        config = _configuration(
            folder, tower=load_json(folder / "config.json").get("vision_config") is not None
        )
        model = library().DiffusionGemmaForBlockDiffusion.from_pretrained(folder, config=config, dtype=dtype)
        return cls(model.to(device))

    @classmethod
    def random(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> Transformers:
        """The text model of a folder's config.json, with the weights that a training begins with."""
        config = _configuration(folder, tower=False)
        with torch.device("meta"):
            model = library().DiffusionGemmaForBlockDiffusion._from_config(config, dtype=dtype)
        _materialize(model, device)
        model.initialize_weights()
        return cls(model)

    def clock(self, tokens: Any, steps: int, **options: Any) -> list[float]:
        """Times at which a canvas behind tokens [B, n] was begun, had its prefill, and showed each draft."""
        ticks, model = _Ticks(), self.model
        hook = model.model.encoder.register_forward_hook(lambda *_: self._encoded(ticks))
        ticks.tick()
        try:
            model.generate(
                torch.as_tensor(tokens).to(model.device),
                streamer=ticks,
                max_new_tokens=model.config.canvas_length,
                max_denoising_steps=steps,
                confidence_threshold=NEVER,
                **options,
            )
        finally:
            hook.remove()
        return ticks.times

    def _encoded(self, ticks: _Ticks) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        ticks.tick()

    def steps(self, tokens: Any, count: int, **options: Any) -> list[float]:
        """Milliseconds of each of `count` steps with self-conditioning, after such a run to warm up."""
        for _ in range(2):
            times = self.clock(tokens, count + 1, **options)
        return [1e3 * (b - a) for a, b in pairwise(times[2:])]


def _configuration(folder: Path, tower: bool) -> Any:
    """transformers' reading of a folder's config.json; without a `tower` the least one that it can build.

    It would build one of the default size for a checkpoint without a tower, half of a small model's memory,
    or (5.17) nothing at all.
    """
    config = library().AutoConfig.from_pretrained(folder)
    if not tower:
        least = config.vision_config = config.vision_config or library().Gemma4VisionConfig()
        least.hidden_size = least.intermediate_size = least.head_dim = least.global_head_dim = 16
        least.num_hidden_layers = least.num_attention_heads = least.num_key_value_heads = 1
    if config.image_token_id is None:
        config.image_token_id = -1  # generate compares ids with it unseen
    return config


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Ones on the device for a model on "meta", tied tensors once: `to_empty` would hold them twice.

    Its own initializer comes after it, and passes over the encoder's scalars, which are ones.
    """
    made: dict[torch.Tensor, Any] = {}  # by identity, as tensors hash

    def there(x: Any) -> Any:
        if x is not None and x not in made:
            ones = torch.ones_like(x, device=device)
            made[x] = nn.Parameter(ones, requires_grad=False) if isinstance(x, nn.Parameter) else ones
        return x if x is None else made[x]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: there(x) for name, x in own.items()})


# ---- the comparison -------------------------------------------------------------------------------


def compare(
    ops: CudaOps,
    folder: Path,
    config: Config,
    tokens: np.ndarray,
    count: int,
    ours: float,
    say: Callable[[str], None] = lambda _: None,
    modes: Sequence[str] = tuple(MODES),
) -> dict[str, Any]:
    """Steps of transformers at a folder's geometry beside one of ours, of `ours` ms; ready for JSON.

    `why` says in a sentence why nothing was timed, in all or in one mode.
    """
    facts = {"name": "transformers", "version": library().__version__, "dtype": ops.dtype_name}
    _release(ops.device)
    try:
        check_room(ops, config, "bf16")
        say("transformers: making random weights")
        model = Transformers.random(folder, ops.dtype, ops.device)
    except BackendError as error:
        return facts | {"why": str(error), "modes": {}}
    timed = {}
    for name in modes:
        say(f"transformers: timing the step, {name}")
        timed[name] = _mode(model, tokens, count, ours, MODES[name])
    return facts | {"why": None, "modes": timed, "peak_memory": ops.peak_memory()}


def _release(device: torch.device) -> None:
    """Give back what the model before has left, and count peaks anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _mode(
    model: Transformers, tokens: np.ndarray, count: int, ours: float, options: Mapping[str, Any]
) -> dict[str, Any]:
    if options and model.model.device.type != "cuda":
        return {"why": "the device is no GPU"}
    try:
        times = model.steps(tokens, count, **options)
    except RuntimeError as error:  # out of memory, and what its compiler does not compile
        return {"why": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    ms = statistics.median(times)
    return {"step_ms": {"median": ms, "min": min(times), "max": max(times)}, "ratio": ours / ms, "why": None}


def text(facts: Mapping[str, Any], form: str) -> str:
    """What `compare` found, to read; `form` is what our weights had."""
    reads = "; it reads no NVFP4" if form == "nvfp4" else ""
    head = f"{facts['name']} {facts['version']} in the same run, with {facts['dtype']} weights{reads}"
    if facts["why"]:
        return f"{head}; not timed, because {facts['why']}"
    rows = [["mode", "step ms", "min–max", "ours ÷ its"]]
    reasons = []
    for name, mode in facts["modes"].items():
        if mode["why"]:
            reasons.append(f"{name}: not timed, because {mode['why']}")
            continue
        s = mode["step_ms"]
        rows.append([name, f"{s['median']:,.2f}", f"{s['min']:,.2f}–{s['max']:,.2f}", f"{mode['ratio']:.3f}"])
    return "\n".join([head, *columns(rows), *reasons, f"memory: peak {amount(facts['peak_memory'])}"])


# ---- the command ----------------------------------------------------------------------------------


def run(
    say: Callable[[str], None],
    compiled: bool,
    geometry: str,
    dtype: str | None,
    activations: str | None,
    device: str | None,
    **measured: Any,
) -> dict[str, Any]:
    """The report of `bench.run`, which takes `measured`; "against" is that of `compare`, made after it."""
    library()  # an error for a missing package comes before minutes of work
    folder, config = read_geometry(geometry)
    ops = make(dtype, device, activations)
    report = bench.run(ops, config, **measured, say=say)
    shape = measured["rows"], measured["context"]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    ours, modes = report["step_ms"]["median"], tuple(MODES) if compiled else (DEFAULT,)
    report["against"] = compare(ops, folder, config, tokens, measured["steps"], ours, say, modes)
    return report


@click.command(cls=type(command), params=list(command.params))  # its options, and its errors in one line
@click.option(
    "--compiled/--no-compiled",
    default=True,
    show_default=True,
    help="Time transformers with its static cache, too, for which it compiles for minutes.",
)
def main(backend: str, random_weights: bool, as_json: bool, **chosen: Any) -> None:
    """Time a denoising step as `dgemma bench` does, and then transformers' at the same geometry.

    Its weights are random, too, and none is quantized.
    """
    with Console(stderr=True).status("starting") as status:
        report = run(status.update, **chosen)
    readable = f"{bench.text(report)}\n\n{text(report['against'], report['format'])}"
    click.echo(json.dumps(report) if as_json else readable)


if __name__ == "__main__":
    main()
