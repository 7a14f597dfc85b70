"""Times a denoising step at a geometry, part by part, against what the device's memory and cores allow.

The model has random weights made on the device. A part is timed by itself over all layers, so that weights
come from memory as they do in a step; the whole step is timed as the engine runs it, one host read a step.
The floor of a part is the larger of its bytes over the measured copy bandwidth and its products over the
measured matrix throughput. The same program runs on a CPU, for its tests.

    B rows  L canvas  N = B·L tokens  D hidden  C head size  V vocabulary  K picks
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dgemma.formats.quantized import Quantized
from dgemma.model import Model
from dgemma.network import graph
from dgemma.network.config import Config, LayerConfig
from dgemma.network.context import Context
from dgemma.network.ops import Mask
from dgemma.network.ops.vocabulary import embed
from dgemma.network.weights import LayerWeights
from dgemma.reports.tables import amount, columns
from dgemma.settings import read_generation_config

from .graphs import record_cuda
from .ops import CudaOps
from .synthetic import FORMATS, check_room, random_weights

Progress = Callable[[str], None]
TOKENS_A_FORWARD = (12, 16, 20)


@dataclass(frozen=True)
class Part:
    """A part of a step: median milliseconds, and the bytes and operations that it cannot do without."""

    name: str
    ms: float
    nbytes: int
    flops: int

    def floor(self, ceilings: Mapping[str, float]) -> float:
        """Milliseconds that the device's measured ceilings leave."""
        return 1e3 * max(self.nbytes / ceilings["bytes_per_s"], self.flops / ceilings["flops_per_s"])


# ---- the clock ----------------------------------------------------------------------------------


def clock(ops: CudaOps, run: Callable[[], Any], repeats: int, record: bool = True) -> float:
    """Median milliseconds of `run`; a GPU replays it as a graph, so that launches do not count."""
    if ops.device.type != "cuda":
        return _median(_wall(run) for _ in range(repeats))
    call = record_cuda(run)[0] if record else run
    call()
    return _median(_events(call) for _ in range(repeats))


def _median(times: Iterator[float]) -> float:
    return statistics.median(times)


def _wall(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def _events(run: Callable[[], Any]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def ceilings(ops: CudaOps) -> dict[str, float]:
    """The bytes/s, read and written, of a plain copy, and the operations/s of one large product."""
    wide = ops.device.type == "cuda"
    x = torch.empty(1 << (30 if wide else 24), dtype=torch.uint8, device=ops.device)
    y = torch.empty_like(x)
    copy = clock(ops, lambda: y.copy_(x), 10)
    n = 8192 if wide else 256
    a, b = (torch.randn(n, n, device=ops.device, dtype=ops.dtype) for _ in range(2))
    product = clock(ops, lambda: a @ b, 10)
    return {"bytes_per_s": 2 * x.numel() / copy * 1e3, "flops_per_s": 2 * n**3 / product * 1e3}


# ---- the parts ----------------------------------------------------------------------------------


def stored_bytes(weight: Any) -> int:
    """Bytes of a weight, array or record."""
    return weight.nbytes


@dataclass(frozen=True)
class Bench:
    """A model with random weights, an encoded context a row, and inputs of a step in its middle."""

    ops: CudaOps
    model: Model
    contexts: list[Context]
    hidden: torch.Tensor  # [N, D]
    canvas: np.ndarray  # [B, L]
    soft: torch.Tensor  # [B, L, D]

    @property
    def tokens(self) -> int:
        return self.canvas.size

    def parts(self, repeats: int) -> Iterator[Part]:
        yield self._experts(repeats)
        yield self._attention(repeats)
        yield self._linears("projections", repeats, [self._projections(w) for w in self.model.weights.layers])
        yield self._linears("dense MLP", repeats, [[w.mlp.gate, w.mlp.up] for w in self.model.weights.layers])
        yield self._vocabulary(repeats)

    def _layers(self) -> Iterator[tuple[LayerConfig, LayerWeights]]:
        yield from zip(self.model.config.layers, self.model.weights.layers, strict=True)

    def _experts(self, repeats: int) -> Part:
        """Router and experts of every layer."""
        ops, config, h = self.ops, self.model.config, self.hidden
        run = graph.Pass(ops, config, (), {}, False)
        layers = [w for _, w in self._layers()]
        touched = [self._touched(w, h) for w in layers]
        share = [len(ids) / config.num_experts for ids in touched]
        size = sum(
            part * (stored_bytes(w.experts.gate_up) + stored_bytes(w.experts.down))
            for part, w in zip(share, layers, strict=True)
        )
        flops = 6 * len(layers) * self.tokens * config.top_k * config.hidden_size * config.expert_size
        ms = clock(ops, lambda: [graph.moe(run, w, h, h.float()) for w in layers], repeats)
        return Part("experts", ms, int(size), flops)

    def _touched(self, w: LayerWeights, h: torch.Tensor) -> torch.Tensor:
        """The ids of experts that tokens h [N, D] pick in a layer, each once."""
        _, ids = self.ops.router(h.float(), w.router.proj, w.router.expert_scale, self.model.config.top_k)
        return ids.unique()

    def _attention(self, repeats: int) -> Part:
        """The products of queries with keys and values of every layer, own canvas included."""
        ops, config, N = self.ops, self.model.config, self.tokens
        B, L = self.canvas.shape
        by_row = [context.read() for context in self.contexts]
        pieces = [list(layer) for layer in zip(*by_row, strict=True)]
        pasts = ops.pasts(pieces, (L,) * B)
        calls, size, flops = [], 0, 0
        for index, (layer, _) in enumerate(self._layers()):
            C = layer.head_dim
            q = torch.randn(config.heads, N, C, device=ops.device, dtype=ops.dtype) * C**-0.5
            own = torch.zeros(layer.kv_heads, N, C, device=ops.device, dtype=ops.dtype)
            calls.append((q, (own, own), pasts[index], (L,) * B, Mask(window=layer.window)))
            read = [x for row in pieces[index] for pair in row for x in pair]
            size += sum(x.nbytes for x in read) + 2 * own.nbytes + 2 * q.nbytes
            keys = N + sum(x.shape[1] for x in read) // 2
            flops += 4 * config.heads * L * keys * C
        ms = clock(ops, lambda: [ops.attend(*call) for call in calls], repeats)
        return Part("attention", ms, size, flops)

    def _projections(self, w: LayerWeights) -> list[Any]:
        return [x for x in (w.attention.q, w.attention.k, w.attention.v) if x is not None]

    def _linears(self, name: str, repeats: int, stages: Sequence[Sequence[Any]]) -> Part:
        """Every layer's matrices from the hidden size, and the one back to it."""
        ops, h = self.ops, self.hidden
        back = [w.attention.o if name == "projections" else w.mlp.down for w in self.model.weights.layers]
        wide = [torch.zeros(len(h), w.shape[-1], device=ops.device, dtype=ops.dtype) for w in back]
        every = [w for stage in stages for w in stage] + back

        def run() -> list[Any]:
            out = [ops.linear(h, w) for stage in stages for w in stage]
            return out + [ops.linear(x, w) for x, w in zip(wide, back, strict=True)]

        flops = sum(2 * len(h) * w.shape[0] * w.shape[1] for w in every)
        return Part(name, clock(ops, run, repeats), sum(stored_bytes(w) for w in every), flops)

    def _vocabulary(self, repeats: int) -> Part:
        ops, w, config, h = self.ops, self.model.weights, self.model.config, self.hidden
        temperature, uniforms = ops.aswide(np.full(len(h), 0.6)), torch.rand(len(h), device=ops.device)
        ms = clock(ops, lambda: ops.vocabulary(h, w.embed, config.softcap, temperature, uniforms), repeats)
        plane = 2 * len(h) * config.vocab_size  # bfloat16 logits, once out and twice in
        flops = 4 * len(h) * config.vocab_size * config.hidden_size
        return Part("vocabulary", ms, 2 * stored_bytes(w.embed) + 3 * plane, flops)

    def steps(self, count: int) -> list[float]:
        """Milliseconds of each of `count` steps as the engine takes them, after three to warm up."""
        rng, vocab, soft = np.random.default_rng(0), self.model.config.vocab_size, self.soft
        times, canvas = [], self.canvas
        for _ in range(count + 3):
            uniforms, noise = rng.random(canvas.shape), rng.integers(0, vocab, canvas.shape)
            began = time.perf_counter()
            step = self.model.refine(self.contexts, canvas, soft, 0.6, uniforms, noise)
            times.append(1e3 * (time.perf_counter() - began))
            canvas, soft = step.canvas, step.soft
        return times[3:]


def prepare(
    ops: CudaOps, config: Config, form: str, context: int, rows: int, skew: float, seed: int = 0
) -> Bench:
    """Weights in a format, a random prompt of `context` tokens a row, and a step's inputs."""
    weights = random_weights(ops, config, FORMATS[form], skew, seed)
    settings = read_generation_config(None, config.vocab_size)  # the released numbers, and no stop ids
    model, rng = Model(ops, config, settings, weights, None), np.random.default_rng(seed)
    encoded = model.encode(rng.integers(0, config.vocab_size, (rows, context)).tolist())
    canvas = rng.integers(0, config.vocab_size, (rows, config.canvas_length))
    shape = canvas.size, config.hidden_size
    hidden = torch.randn(shape, device=ops.device, dtype=ops.dtype)
    return Bench(ops, model, encoded, hidden, canvas, embed(ops, weights.embed, ops.asarray(canvas)))


@torch.inference_mode()
def run(
    ops: CudaOps,
    config: Config,
    form: str = "nvfp4",
    context: int = 1024,
    rows: int = 1,
    skew: float = 0.0,
    steps: int = 20,
    say: Progress = lambda _: None,
) -> dict[str, Any]:
    """The whole report, ready for JSON. No model outlives this; `say` is told what is under way."""
    check_room(ops, config, form)
    say("making random weights")
    bench = prepare(ops, config, form, context, rows, skew)
    say("measuring the device")
    limits = ceilings(ops)
    say("timing the parts")
    parts = list(bench.parts(max(3, steps // 2)))
    say("timing the step")
    times = bench.steps(steps)
    ms = statistics.median(times)
    floor = sum(part.floor(limits) for part in parts)
    rest = ms - sum(part.ms for part in parts)
    return {
        "device": torch.cuda.get_device_name(ops.device) if ops.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "format": form,
        "dtype": ops.dtype_name,
        "context": context,
        "rows": rows,
        "skew": skew,
        "ceilings": limits,
        "parts": [asdict(part) | {"floor_ms": part.floor(limits)} for part in parts],
        "rest_ms": rest,
        "step_ms": {"median": ms, "min": min(times), "max": max(times)},
        "floor_ms": floor,
        "ratio": ms / floor,
        "tokens_per_s": {n: 1e3 * rows * n / ms for n in TOKENS_A_FORWARD},
        "weight_bytes": sum(stored_bytes(w) for w in _leaves(bench.model.weights)),
        "peak_memory": ops.peak_memory(),
    }


def _leaves(tree: Any) -> Iterator[Any]:
    """The arrays and records of a weight tree."""
    if isinstance(tree, torch.Tensor | Quantized):
        yield tree
    elif isinstance(tree, tuple):
        for child in tree:
            yield from _leaves(child)
    elif hasattr(tree, "__dataclass_fields__"):
        for child in vars(tree).values():
            yield from _leaves(child)


def text(report: Mapping[str, Any]) -> str:
    """The report of `run` to read."""
    c, s = report["ceilings"], report["step_ms"]
    head = (
        f"{report['device']}, torch {report['torch']}; {report['format']} weights, {report['rows']} rows, "
        f"context {report['context']:,}\n"
        f"measured ceilings: copy {c['bytes_per_s'] / 1e9:,.0f} GB/s, products "
        f"{c['flops_per_s'] / 1e12:,.2f} TFLOP/s"
    )
    rows = [["part", "ms", "floor ms", "ratio", "GB/s", "TFLOP/s"]]
    for part in report["parts"]:
        speed = part["nbytes"] / part["ms"] / 1e6, part["flops"] / part["ms"] / 1e9
        cells = [part["ms"], part["floor_ms"], part["ms"] / part["floor_ms"], *speed]
        rows.append([part["name"], *(f"{cell:,.2f}" for cell in cells)])
    rows.append(["rest", f"{report['rest_ms']:,.2f}", "", "", "", ""])
    whole = f"{s['median']:,.2f}", f"{report['floor_ms']:,.2f}", f"{report['ratio']:,.2f}"
    rows.append(["step", *whole, "", ""])
    rates = ", ".join(f"{rate:,.0f} at {n}" for n, rate in report["tokens_per_s"].items())
    tail = [
        f"step min–max {s['min']:,.2f}–{s['max']:,.2f} ms",
        f"tokens/s by tokens a forward: {rates}",
        f"memory: weights {amount(report['weight_bytes'])}, peak {amount(report['peak_memory'])}",
    ]
    return "\n".join([head, "", *columns(rows), "", *tail])
