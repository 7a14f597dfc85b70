"""Prefill and milliseconds a denoising step: both backends beside transformers and mlx-vlm, in one run.

    python benchmarks/peers.py                                 # every engine that is installed
    python benchmarks/peers.py -e dgemma-cuda -e transformers --context 2048 --set num_experts=64
    python benchmarks/peers.py -e dgemma-mlx -e mlx-vlm --format plain --format 4bit \
        --dtype float32 --dtype bfloat16 --context 512 --context 4096

The peers come with `pip install -e '.[mlx,cuda,bench]'`. How the numbers are made:

- All engines read one random checkpoint, in float32 or bfloat16 on disk as in memory. It is about 105
  million parameters unless `--set` changes the geometry, or any checkpoint given with `--checkpoint`.
  `--format 4bit` is that checkpoint after `dgemma convert --to mlx`, mlx-community's pattern, for the two
  MLX engines; `--dtype` is then that of activations. Options given twice are all combined.
- Before anything is timed, logits are compared between the engines, of a first step and of one with given
  self-conditioning, in processes of their own: nobody is timed on another model. A difference ends the run.
  This is done in float32 whatever is timed: a random model amplifies bfloat16's rounding to a quarter of
  the logits' spread. A pick of some router is a tie within float32's rounding: a tenth of the positions may
  differ, and prompts are cut to 64 tokens, as a pick that differs there reaches every position. For a
  checkpoint that does not fit in float32 there is `--no-compare`.
- Each engine lives in a process of its own, so that memory, BLAS and thread pools are its own too.
  Rounds go through the engines in turn (A B A B), so that what else the machine does falls on all alike.
- What is timed is each engine's own generate loop over one canvas, not a rebuilt step: forward pass,
  temperature, softmax, entropy, sample, acceptance and new noise are its own. A clock is read where the
  loop shows a draft. The first step has no self-conditioning and is left out; so is the first round.
  The confidence threshold is set so low that no loop stops early.
- Both peers show a draft before they make the soft embedding and ours after, so an interval between two
  drafts holds exactly one of everything in every engine.
- mlx-vlm runs its entropy-bound sampler at temperature 1 on top of the schedule: the released sampler,
  though not its default. transformers runs its defaults (SDPA, grouped_mm experts, no compilation).
- In bfloat16 mlx-vlm needs a GPU: the product of MLX's CPU that its experts use is float32 only. An engine
  that fails in its first round is shown with its error and left out.
- Peak memory is the process's, so it holds the interpreter and what an engine imports; mlx-vlm imports
  PyTorch. On a GPU it is the device's. Of MLX engines there is also what MLX had in use above the weights,
  at most, in MB, before the first draft and from there on: the prefill, and the steps with the cache they
  read; and the ratio of the larger of the two, which is the call's.

MLX's Linux wheel carries an unoptimized BLAS (2.6 GFLOP/s on two cores). An OpenBLAS is preloaded for
both MLX engines when one is found, and the table says so when none is.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
# Each of ours, and the peer that it is measured against.
PAIRS = {"dgemma-cuda": "transformers", "dgemma-mlx": "mlx-vlm"}
# The distribution that must be installed for an engine to run.
NEEDS = {"dgemma-cuda": "torch", "dgemma-mlx": "mlx", "transformers": "transformers", "mlx-vlm": "mlx-vlm"}
MLX = ("dgemma-mlx", "mlx-vlm")
NEVER = 1e-9  # nats: a mean entropy that no random model reaches
TOLERANCE = 1e-3  # largest difference of logits over the largest logit, in float32
STORED = {"float32": "F32", "bfloat16": "BF16"}
COMPARED, ALIKE = 64, 0.9  # prompt tokens, and positions that must agree
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


# ---- engines: each runs in a process of its own ---------------------------------------------------


class Engine:
    """One implementation with the checkpoint loaded. Frameworks are imported in here only."""

    def __init__(self, folder: Path, dtype: str, device: str):
        raise NotImplementedError

    def logits(self, tokens: list[int], canvas: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Softcapped logits [2, L, V]: of a first step, and conditioned on logits `before` [1, L, V]."""
        raise NotImplementedError

    def clock(self, tokens: list[int], steps: int) -> list[float]:
        """Times at which a generate call began, had its prefill, and showed the draft of each step."""
        raise NotImplementedError

    weights = 0  # bytes that MLX has in use when all is loaded
    # Most bytes in use above them, of the last call: until its prefill was done, and from then on.
    above: tuple[int, ...] = ()

    def peak_memory(self) -> int:
        """Bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Watch:
    """Times of a call from its start on; and what MLX, if it runs, had in use above the weights."""

    def __init__(self, weights: int):
        self.mx, self.weights = sys.modules.get("mlx.core"), weights
        self.times: list[float] = []
        self.above: list[int] = []
        self.tick()

    def tick(self) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) <= 2:
            self.lap()

    def lap(self) -> None:
        if self.mx:
            self.above.append(self.mx.get_peak_memory() - self.weights)
            self.mx.reset_peak_memory()

    def stop(self) -> tuple[list[float], tuple[int, ...]]:
        """All times, and the bytes until the prefill was done and from then on."""
        self.lap()
        return self.times, tuple(self.above[1:])


class Dgemma(Engine):
    """Ours, through `dgemma.load` and `Model.generate`."""

    backend = ""

    def __init__(self, folder: Path, dtype: str, device: str):
        import dgemma

        place = device if self.backend == "cuda" else None
        self.model = dgemma.load(folder, backend=self.backend, dtype=dtype, device=place)

    def logits(self, tokens: list[int], canvas: np.ndarray, before: np.ndarray) -> np.ndarray:
        context = self.model.encode([tokens])
        p = np.exp(before - before.max(-1, keepdims=True))
        soft = self.model.soft_embedding(p / p.sum(-1, keepdims=True))
        signals = (None, soft)
        return np.concatenate([self.model.logits(context, canvas, signal) for signal in signals])

    def clock(self, tokens: list[int], steps: int) -> list[float]:
        from dgemma.engine import Draft, Prefill

        length = self.model.config.canvas_length
        watch = Watch(self.weights)
        for event in self.model.generate(tokens, steps=steps, max_new_tokens=length, confidence=NEVER):
            if isinstance(event, Draft) or (isinstance(event, Prefill) and event.done == event.total):
                watch.tick()
        times, self.above = watch.stop()
        return times

    def peak_memory(self) -> int:
        return self.model.ops.peak_memory()


class DgemmaCuda(Dgemma):
    backend = "cuda"


class DgemmaMlx(Dgemma):
    backend = "mlx"

    def peak_memory(self) -> int:
        return _mlx_peak(self)


class Transformers(Engine):
    """`generate` with a streamer that is shown every draft, as `benchmarks.bench_transformers` drives it."""

    def __init__(self, folder: Path, dtype: str, device: str):
        import torch

        from benchmarks import bench_transformers as peer

        self.torch, self.peer = torch, peer.Transformers.load(folder, dtype, device)

    def logits(self, tokens: list[int], canvas: np.ndarray, before: np.ndarray) -> np.ndarray:
        model = self.peer.model
        inputs = {"input_ids": self.tensor([tokens]), "decoder_input_ids": self.tensor(canvas)}
        signals = None, self.tensor(before).to(model.dtype)
        with self.torch.no_grad():
            planes = [model(**inputs, self_conditioning_logits=signal).logits for signal in signals]
        return self.torch.cat(planes).float().cpu().numpy()

    def clock(self, tokens: list[int], steps: int) -> list[float]:
        return self.peer.clock([tokens], steps)

    def tensor(self, rows: Any) -> Any:
        return self.torch.as_tensor(np.asarray(rows)).to(self.peer.model.device)

    def peak_memory(self) -> int:
        device = self.peer.model.device
        return (
            self.torch.cuda.max_memory_allocated(device) if device.type == "cuda" else super().peak_memory()
        )


class MlxVlm(Engine):
    """`stream_diffusion_generate`, asked to show every draft; draft 0 comes right after the prefill."""

    def __init__(self, folder: Path, dtype: str, device: str):
        import mlx.core as mx
        from mlx_vlm.utils import load_model

        self.model = load_model(folder, lazy=True)
        self.model.set_dtype(getattr(mx, dtype))
        mx.eval(self.model.parameters())
        settings = json.loads((folder / "generation_config.json").read_text())
        self.model.config.generation_config = settings | {"confidence_threshold": NEVER}

    def logits(self, tokens: list[int], canvas: np.ndarray, before: np.ndarray) -> np.ndarray:
        import mlx.core as mx

        model = self.model
        inputs = {"input_ids": mx.array([tokens]), "canvas_ids": mx.array(canvas)}
        table = model.diffusion_prepare_self_conditioning()
        signal = model.diffusion_self_conditioning(mx.array(before), table)
        name = "logits" if model.prefers_logits_self_conditioning else "embeddings"
        signals: tuple[dict[str, Any], ...] = {}, {f"self_conditioning_{name}": signal}
        return np.concatenate([np.array(model(**inputs, **signal).logits) for signal in signals])

    def clock(self, tokens: list[int], steps: int) -> list[float]:
        import mlx.core as mx
        from mlx_vlm.generate.diffusion import stream_diffusion_generate

        ids, text, watch = mx.array([tokens]), _NoTokenizer(), Watch(self.weights)
        for result in stream_diffusion_generate(
            self.model,
            text,
            text,
            ids,
            None,
            None,
            max_tokens=self.model.config.canvas_length,
            skip_special_token_ids=[],
            temperature=1.0,
            max_denoising_steps=steps,
            diffusion_full_canvas=True,
            diffusion_sampler="entropy-bound",
            diffusion_show_unmasking=True,
        ):
            if result.is_draft:
                watch.tick()
        times, self.above = watch.stop()
        return times

    def peak_memory(self) -> int:
        return _mlx_peak(self)


def _mlx_peak(engine: Engine) -> int:
    """The device's, of the last call, or on a CPU the process's."""
    import mlx.core as mx

    on_gpu = mx.default_device().type == mx.gpu
    return engine.weights + max(engine.above) if on_gpu else Engine.peak_memory(engine)


class _NoTokenizer:
    """Enough of a tokenizer for mlx-vlm's loop on a checkpoint without one; text is empty."""

    last_segment = ""

    def __init__(self) -> None:
        self.stopping_criteria = _NoStop()

    @property
    def detokenizer(self) -> _NoTokenizer:
        return self

    def reset(self) -> None:
        pass

    def finalize(self) -> None:
        pass

    def add_token(self, token: int, **_: Any) -> None:
        pass

    def decode(self, tokens: list[int], **_: Any) -> str:
        return ""


class _NoStop:
    def add_eos_token_ids(self, ids: Any) -> None:
        pass

    def __call__(self, token: int) -> bool:
        return False


ENGINES: dict[str, type[Engine]] = {
    "dgemma-cuda": DgemmaCuda,
    "transformers": Transformers,
    "dgemma-mlx": DgemmaMlx,
    "mlx-vlm": MlxVlm,
}


def work(name: str, folder: Path, dtype: str, device: str) -> None:
    """A worker: requests come as JSON lines on stdin, answers go to stdout, all else to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what frameworks print must not come between
    engine = ENGINES[name](folder, dtype, device)
    if mx := sys.modules.get("mlx.core"):
        engine.weights = mx.get_active_memory()
    answers.write("{}\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_answer(engine, **request)) + "\n")


def _answer(
    engine: Engine,
    tokens: list[int],
    steps: int = 0,
    canvas: list[list[int]] | None = None,
    vocab: int = 0,
    out: str = "",
) -> dict[str, Any]:
    if canvas is not None:
        # Not each engine's own first logits: a random model amplifies rounding some hundred times a pass.
        before = 4 * np.random.default_rng(1).standard_normal((1, len(canvas[0]), vocab), np.float32)
        np.save(out, engine.logits(tokens, np.asarray(canvas), before))
        return {}
    times = engine.clock(tokens, steps)
    return {"times": times, "peak": engine.peak_memory(), "above": engine.above}


# ---- the run --------------------------------------------------------------------------------------


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
            return {"engine": self.name, "version": _version(self.name), "failure": self.failure}
        steps = [1000 * s for one in self.steps for s in one]
        return {
            "engine": self.name,
            "version": _version(self.name),
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
    options = ["--checkpoint", setting.folder, "--dtype", setting.dtype, "--device", setting.device]
    command = [sys.executable, __file__, "--worker", name, *map(str, options)]
    environment = dict(os.environ)
    if setting.blas and name in MLX:
        environment["LD_PRELOAD"] = f"{setting.blas} {os.environ.get('LD_PRELOAD', '')}".strip()
    errors = setting.scratch / f"{name}.log"
    pipe = subprocess.PIPE
    with errors.open("w") as log:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
    worker = Worker(name, process, errors)
    try:
        worker.answer()
        yield worker
    finally:
        process.terminate()
        process.wait()


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


def report(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """Each engine's numbers; ours also carry the ratios to their peer's, if that ran."""
    by_name = {worker.name: worker for worker in workers}
    reports = []
    for worker in workers:
        one, peer = worker.report(), by_name.get(PAIRS.get(worker.name, ""))
        if peer and not worker.failure and not peer.failure:
            one |= compared(worker, peer)
        reports.append(one)
    return reports


def compared(worker: Worker, peer: Worker) -> dict[str, Any]:
    # By round: what is compared was measured side by side.
    rounds = zip(worker.steps, peer.steps, strict=True)
    ratios = [statistics.median(a) / statistics.median(b) for a, b in rounds]
    above = [a / b for a, b in zip(worker.above, peer.above, strict=True)]
    above += [max(worker.above) / max(peer.above)] if worker.above and peer.above else []
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "above_ratios": above,
    }


def table(title: str, reports: Sequence[dict[str, Any]]) -> Table:
    grid = Table(title=title, title_justify="left")
    grid.add_column("engine", no_wrap=True)
    grid.add_column("version", no_wrap=True)
    headings = ["prefill", "step ms", "min–max", "÷ peer", "min–max", "peak MB"]
    memory = any(one.get("above_bytes") for one in reports)
    headings += ["+prefill", "÷", "+steps", "÷", "both ÷"] if memory else []
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    for one in reports:
        grid.add_row(one["engine"], one["version"], *_cells(one))
    return grid


def _cells(one: dict[str, Any]) -> list[str]:
    if "failure" in one:
        return ["fails"]
    cells = [f"{one['prefill_ms']:.0f}", f"{one['step_ms']:.1f}"]
    cells += [f"{one['step_ms_min']:.1f}–{one['step_ms_max']:.1f}"]
    paired = "ratio" in one
    cells += [f"{one['ratio']:.2f}", f"{one['ratio_min']:.2f}–{one['ratio_max']:.2f}"] if paired else ["", ""]
    cells += [f"{one['peak_bytes'] / 1e6:.0f}"]
    if one["above_bytes"]:
        first, then, both = [f"{ratio:.2f}" for ratio in one.get("above_ratios", ())] or [""] * 3
        before, after = (f"{size / 1e6:.0f}" for size in one["above_bytes"])
        cells += [before, first, after, then, both]
    return cells


def facts(setting: Setting, names: Sequence[str], apart: float | None) -> dict[str, str]:
    """What the numbers of one setting hold for."""
    config, text = setting.config, setting.config["text_config"]
    blas = (
        setting.blas.resolve()
        if setting.blas
        else "the wheel's own, which is slow: " + ("apt-get install libopenblas0-pthread")
    )
    found = {
        "model": f"hidden {text['hidden_size']}, {text['num_hidden_layers']} layers, {text['num_experts']} "
        f"experts top-{text['top_k_experts']}, vocabulary {text['vocab_size']}, "
        f"{setting.form}, {setting.dtype}",
        "run": f"canvas {config['canvas_length']}, context {setting.context}, {setting.rounds} rounds of "
        f"{setting.steps} steps, the first of each left out",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, PyTorch on "
        f"{setting.device}, Python {platform.python_version()}",
        "same model": "not compared"
        if apart is None
        else f"logits, without and with self-conditioning, differ by at most {apart:.1e} (relative, float32)",
    }
    return found | ({"MLX's BLAS": str(blas)} if sys.platform == "linux" and set(names) & set(MLX) else {})


# ---- the machine, the checkpoint ------------------------------------------------------------------


def find_openblas() -> Path | None:
    """An OpenBLAS with plain symbol names, those with POSIX threads first; None where there is none."""
    try:
        known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:  # not on every user's path
        known = ""
    found = [Path(path) for path in re.findall(r"libopenblas[a-z]?\.so\S* .*=> (\S+)", known)]
    for folder in ("lib/*/openblas-*", "lib64"):
        found += sorted(Path("/usr").glob(f"{folder}/libopenblas*.so.0"))
    found.sort(key=lambda path: re.search("pthread|blasp", str(path.resolve())) is None)
    return found[0] if found else None


def _choose_blas(wish: str) -> Path | None:
    if sys.platform != "linux" or wish == "none":
        return None
    if wish != "auto" and not Path(wish).is_file():  # the loader would only warn
        raise click.BadParameter(f"{wish} is not a file", param_hint="--blas")
    return find_openblas() if wish == "auto" else Path(wish)


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _version(engine: str) -> str:
    if engine in PAIRS:
        return f"{NEEDS[engine]} {_installed(NEEDS[engine])}"
    under = "mlx" if engine in MLX else "torch"
    return f"{_installed(NEEDS[engine])}, {under} {_installed(under)}"


def _device() -> str:
    """PyTorch's default device, found without importing it: the parent stays small."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


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
    """Write a random checkpoint with the tests' tame weights. Every sixth layer is full, and the last."""
    sys.path.insert(0, str(ROOT))
    from tests import checkpoints

    sizes = geometry(changes)
    canvas, layers = sizes.pop("canvas_length"), sizes["num_hidden_layers"]
    kinds = [FULL if i % 6 == 5 or i == layers - 1 else SLIDING for i in range(layers)]
    config = checkpoints.small(**sizes, layer_types=kinds) | {"canvas_length": canvas}
    checkpoints.make_checkpoint(folder, config, dtype=STORED[dtype])


def _checkpoint(folder: Path, changes: Sequence[str], dtype: str, console: Console) -> None:
    """Make the checkpoint unless it is there."""
    geometry(changes)  # so that a wrong option is told before anything else
    if (folder / "config.json").exists():
        if changes:
            raise click.UsageError(f"{folder} is there already, --set would change nothing")
        return
    console.print("making a random checkpoint")
    # In a process of its own: a child inherits the high-water mark of the memory of its parent.
    command = [sys.executable, __file__, "--make", "--checkpoint", str(folder), "--dtype", dtype]
    subprocess.run([*command, *(f"--set={change}" for change in changes)], check=True)


def _folders(
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


def run(names: Sequence[str], setting: Setting, apart: float | None, progress: Console) -> dict[str, Any]:
    """One setting: facts and reports."""
    progress.print(str(setting))
    with ExitStack() as stack:
        workers = [stack.enter_context(started(name, setting)) for name in names]
        measure(workers, setting, progress)
        known = facts(setting, names, apart)
        return {"setting": str(setting), "facts": known, "engines": report(workers)}


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    for result in results:
        console.print(table(f"Prefill and one denoising step: {result['setting']}", result["engines"]))
        for one in result["engines"]:
            if "failure" in one:
                console.print(
                    f"{one['engine']} does not run: {one['failure']}", highlight=False, soft_wrap=True
                )
        for key, value in result["facts"].items():
            console.print(f"{key}: {value}", highlight=False, soft_wrap=True)


ENGINE = click.Choice(list(ENGINES))
FOLDER = click.Path(path_type=Path)


@click.command(help="Time our backends beside transformers and mlx-vlm on the same checkpoint.")
@click.option("-e", "--engine", "engines", multiple=True, type=ENGINE, help="Default: all installed.")
@click.option("--checkpoint", type=FOLDER, help="Use this folder, or make a random checkpoint there.")
@click.option("--set", "changes", multiple=True, metavar="KEY=N", help="Change the random geometry.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(STORED)), default=["float32"])
@click.option("--format", "forms", multiple=True, type=click.Choice(FORMATS), default=["plain"])
@click.option("--device", help="PyTorch's device. Default: cuda where there is one, else cpu.")
@click.option(
    "--context", "contexts", multiple=True, default=[512], type=click.IntRange(1), help="Prompt tokens."
)
@click.option("--steps", default=8, show_default=True, type=click.IntRange(3), help="Steps a round.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--compare/--no-compare", "same", default=True, help="Whether logits agree, before timing.")
@click.option("--blas", default="auto", show_default=True, help="Preload for MLX: auto, none or a file.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of the table.")
@click.option("--worker", type=ENGINE, hidden=True)
@click.option("--make", is_flag=True, hidden=True)
def main(
    engines: tuple[str, ...],
    checkpoint: Path | None,
    changes: tuple[str, ...],
    dtypes: tuple[str, ...],
    forms: tuple[str, ...],
    device: str | None,
    contexts: tuple[int, ...],
    steps: int,
    rounds: int,
    same: bool,
    blas: str,
    as_json: bool,
    worker: str | None,
    make: bool,
) -> None:
    device = device or _device()
    if checkpoint and worker:
        return work(worker, checkpoint, dtypes[0], device)
    if checkpoint and make:
        return make_checkpoint(checkpoint, changes, dtypes[0])
    progress = Console(stderr=True)
    names = [name for name in ENGINES if name in engines or (not engines and _installed(NEEDS[name]))]
    results, apart = [], {}
    with tempfile.TemporaryDirectory(prefix="dgemma-peers-") as work_folder:
        scratch = Path(work_folder)
        folders = _folders(checkpoint, forms, dtypes, changes, scratch, progress)
        for form, dtype, context in itertools.product(forms, dtypes, contexts):
            folder, lib = folders[form, dtype], _choose_blas(blas)
            setting = Setting(folder, dtype, device, lib, scratch, context, steps, rounds, form)
            able = [name for name in names if form == "plain" or name in MLX]
            if same and folder not in apart:
                progress.print("comparing logits")
                apart[folder] = compare(able, setting)
            results.append(run(able, setting, apart.get(folder), progress))
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        show(results, Console(width=None if sys.stdout.isatty() else 150))


if __name__ == "__main__":
    main()
