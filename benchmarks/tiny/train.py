"""Trains the embedded model on its toy tasks, with the engine's own graph under autograd.

    python -m benchmarks.tiny.train --steps 8000 --state DIR

The recipe: the prompt (and the canvases already written) goes to the encoder; the answer's next canvas
has each token replaced by a uniform random one with probability t, and the model predicts the clean
canvas. Half of the rows are conditioned on the detached soft prediction of a first pass. The state is
saved as it goes and an interrupted run continues; the result is a bf16 Hugging Face checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn

from dgemma.network import graph
from dgemma.network.build import build, rope_frequencies
from dgemma.network.config import Config, read_config
from dgemma.network.ops import KV, Array, Mask
from dgemma.network.ops.layers import geglu, visible
from dgemma.network.ops.vocabulary import logits
from dgemma.network.spec import Param, text_parameters
from dgemma.text.template import ChatTemplate
from dgemma.tiny import MODEL_DIR
from dgemma_cuda.ops import CudaOps

from . import tasks
from . import tokenizer as tiny_tokenizer
from .geometry import CONFIG, GENERATION_CONFIG

# How often each task is drawn. Arithmetic, counting and replacing words learn slowest.
MIXTURE = {
    "add": 4.0,
    "subtract": 4.0,
    "reverse": 0.5,
    "sort": 0.7,
    "json": 0.9,
    "repair": 1.0,
    "replace": 3.0,
    "count": 3.5,
    "think": 4.0,
    "tool": 0.6,
}
# Rows a batch by length of context: contexts are filled up to one of these lengths, so that compilation sees
# four shapes.
BUCKETS = {32: 128, 64: 96, 128: 48, 256: 24}
FILL_ID = 1  # after the stop token a canvas is filled with <eos>
FILL_WEIGHT = 0.3  # of a filler position's loss: most of a short answer's canvas is filler
PURE_NOISE = 0.25  # share of canvases that are all noise, as at the first step of every canvas


class TrainOps(CudaOps):
    """The backend with two composites in a form that CPUs differentiate fast.

    Experts are computed densely, every expert for every token: eight times narrow is one wide product.
    Attention is spelled out, because the CPU's fused kernel is slow backwards at these sizes.
    """

    def experts(self, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array) -> Array:
        E, M2, D = gate_up.shape
        share = torch.zeros(len(x), E, device=x.device).scatter(1, ids, weights).to(x.dtype)
        y = F.linear(x, gate_up.reshape(E * M2, D)).reshape(-1, E, M2)
        y = geglu(self, y[..., : M2 // 2], y[..., M2 // 2 :]) * share[:, :, None]
        return F.linear(y.reshape(-1, E * M2 // 2), down.transpose(0, 1).reshape(D, -1))

    def attend(self, q: Array, own: KV, past: Any, lengths: Sequence[int], mask: Mask) -> Array:
        """All rows of a batch at once: `past`, a `Past`, counts them, and they have one length."""
        (H, N, C), (G, B) = q.shape, (len(own[0]), past.rows)
        L = N // B
        k, v = (x.reshape(G, B, L, C) for x in own)
        seen = visible(self, L, L, mask)
        if past.seen is not None:
            k, v = torch.cat([past.k, k], 2), torch.cat([past.v, v], 2)
            seen = F.pad(past.seen, (0, L), value=True)[:, None, None]
        S = k.shape[2]
        k, v = k.reshape(G * B, S, C), v.reshape(G * B, S, C)
        x = q.reshape(G, H // G, B, L, C).transpose(1, 2).reshape(G * B, H // G * L, C)
        scores = (x @ k.transpose(1, 2)).reshape(G, B, H // G, L, S).float()
        if seen is not None:
            scores = scores.masked_fill(~seen, -1e30)
        y = torch.softmax(scores, -1).to(q.dtype).reshape(G * B, H // G * L, S) @ v
        return y.reshape(G, B, H // G, L, C).transpose(1, 2).reshape(H, N, C)


@dataclass(frozen=True)
class Past:
    """What a batch's rows have before them in one layer: k and v [G, rows, S, C], `seen` [rows, S] bool.

    A context has nothing before it.
    """

    rows: int
    k: Any = None
    v: Any = None
    seen: Any = None


@dataclass(frozen=True)
class Batch:
    """Contexts [B, P] filled up behind, their lengths [B], canvases [B, L].

    What fills a context up is encoded and never seen: by its tokens, as they come before it, nor by canvases.
    """

    context: torch.Tensor
    length: torch.Tensor
    canvas: torch.Tensor


class Sampler:
    """Endless batches of training examples, one bucket of context length at a time."""

    def __init__(self, canvas_length: int, mixture: Mapping[str, float] = MIXTURE):
        self.canvas_length = canvas_length
        self.tokenizer = tiny_tokenizer.build_tokenizer()
        self.template = ChatTemplate(tiny_tokenizer.chat_template(), {"bos_token": "<bos>"})
        names = list(mixture)
        shares = np.array([mixture[name] for name in names])
        self.names, self.shares = names, shares / shares.sum()

    def encode(self, example: tasks.Example) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer."""
        prompt = self.template.render(example.messages, example.tools, example.thinking)
        ids = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, example.answer)]
        return ids[0], ids[1]

    def pair(self, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """A context and the full canvas that follows it, from one canvas of a random answer."""
        while True:
            example = tasks.sample(rng, self.names[rng.choice(len(self.names), p=self.shares)])
            if not tasks.held_out(example):
                break
        prompt, answer = self.encode(example)
        L = self.canvas_length
        canvases = math.ceil(len(answer) / L)
        # The last one half of the time: where to stop is learnt slowest.
        start = L * (canvases - 1 if rng.random() < 0.5 else int(rng.integers(0, canvases)))
        canvas = answer[start : start + L]
        return prompt + answer[:start], canvas + [FILL_ID] * (L - len(canvas))

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Batches without end, each as soon as its bucket is full."""
        waiting: dict[int, list[tuple[list[int], list[int]]]] = defaultdict(list)
        while True:
            context, canvas = self.pair(rng)
            bucket = next(size for size in BUCKETS if len(context) <= size)
            waiting[bucket].append((context, canvas))
            if len(waiting[bucket]) == BUCKETS[bucket]:
                yield collate(waiting.pop(bucket), bucket)


def collate(pairs: list[tuple[list[int], list[int]]], size: int) -> Batch:
    """A batch [B, `size`] of pairs whose contexts have at most that many tokens."""
    context = [c + [0] * (size - len(c)) for c, _ in pairs]
    lengths = [len(c) for c, _ in pairs]
    return Batch(torch.tensor(context), torch.tensor(lengths), torch.tensor([canvas for _, canvas in pairs]))


class Trainer:
    """Parameters, optimizer and the loss of one batch."""

    def __init__(self, config: Config, dtype: torch.dtype, compiled: bool, seed: int):
        self.config, self.ops = config, TrainOps("cpu", dtype)
        self.table = text_parameters(config)
        generator = torch.Generator().manual_seed(seed)
        self.params = {p.name: nn.Parameter(initial(p, config, generator)) for p in self.table}
        self.frequencies = {layer.kind: self.ops.aswide(rope_frequencies(layer)) for layer in config.layers}
        matrices = [w for w in self.params.values() if w.ndim > 1]
        vectors = [w for w in self.params.values() if w.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def weights(self) -> Any:
        """The graph's tree over the parameters, cast to the compute type; the router stays wide."""
        constants = {"embed_scale": self.config.hidden_size**0.5, "frequencies": self.frequencies}

        def leaf(p: Param) -> Array:
            w = self.params[p.name]
            return w if p.wide else self.ops.to_compute(w)

        return build(self.config, self.table, leaf, constants, self.ops)

    def _loss(self, batch: Batch, noisy: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over a canvas [B, L], each row's mean; the first half of the rows is conditioned."""
        ops, config, w = self.ops, self.config, self.weights()
        past = self._encode(w, batch)
        half = len(noisy) // 2

        def canvas_logits(B: int, soft: torch.Tensor) -> torch.Tensor:
            """Logits [B, L, V] of the first B rows."""
            own = [Past(B, x.k[:, :B], x.v[:, :B], x.seen[:B]) for x in past]
            canvas = noisy[:B]
            positions = (batch.length[:B, None] + torch.arange(canvas.shape[1])).reshape(-1)
            h = graph.denoise(ops, config, w, canvas, soft, positions, own)
            return logits(ops, h, w.embed, config.softcap).reshape(*canvas.shape, -1)

        with torch.no_grad():
            # A signal of zeros is no conditioning.
            zeros = w.embed.new_zeros(half, noisy.shape[1], config.hidden_size)
            p = torch.softmax(canvas_logits(half, zeros) / temperature[:half, None, None], -1)
            soft = ops.soft_embedding(p, w.embed)
            soft = F.pad(soft, (0, 0, 0, 0, 0, len(noisy) - half))
        z = canvas_logits(len(noisy), soft)
        # A short answer counts as much as a long one: a mean a row.
        share = torch.where(batch.canvas == FILL_ID, FILL_WEIGHT, 1.0)
        share = share / share.sum(-1, keepdim=True) / len(noisy)
        return (F.cross_entropy(z.transpose(1, 2), batch.canvas, reduction="none") * share).sum()

    def _encode(self, w: Any, batch: Batch) -> list[Past]:
        """What canvases see of contexts, by layer: on sliding layers their last window − 1 tokens."""
        B, P = batch.context.shape
        positions = torch.arange(P).repeat(B)
        empty = [Past(B)] * len(self.config.layers)
        new = graph.encode(self.ops, self.config, w, [batch.context.reshape(-1)], positions, empty)
        past = []
        for layer, kv in zip(self.config.layers, new, strict=True):
            S = P if layer.past is None else min(P, layer.past)
            at = torch.arange(P).expand(B, P) if S == P else batch.length[:, None] - S + torch.arange(S)
            seen = (at >= 0) & (at < batch.length[:, None])
            k, v = (x.reshape(len(x), B, P, -1) for x in kv)
            if S < P:
                rows, at = torch.arange(B)[:, None], at.clamp(min=0)
                k, v = k[:, rows, at], v[:, rows, at]
            past.append(Past(B, k, v, seen))
        return past

    def step(self, batch: Batch, rng: torch.Generator, lr: float) -> float:
        """One update; returns the loss."""
        noisy, temperature = corrupt(batch.canvas, self.config.vocab_size, rng)
        loss = self.loss(batch, noisy, temperature)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def corrupt(canvas: torch.Tensor, vocab_size: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A canvas [B, L] made noisy, and the temperature of each row's first pass [B]."""
    B, L = canvas.shape
    t = torch.rand(B, generator=rng)
    t = torch.where(torch.rand(B, generator=rng) < PURE_NOISE, 1.0, t)
    noise = torch.randint(0, vocab_size, (B, L), generator=rng)
    noisy = torch.where(torch.rand(B, L, generator=rng) < t[:, None], noise, canvas)
    # The sampler anneals between these two, and conditions on the tempered prediction.
    low, high = GENERATION_CONFIG["t_min"], GENERATION_CONFIG["t_max"]
    return noisy, low + (high - low) * torch.rand(B, generator=rng)


def initial(param: Param, config: Config, generator: torch.Generator) -> torch.Tensor:
    """Initial values: matrices by fan-in, norms 1, q_norm such that scores start near unit variance."""
    if len(param.shape) == 1:
        value = param.shape[0] ** -0.5 if param.path[-1] == "q_norm" else 1.0
        return torch.full(param.shape, value)
    return torch.randn(param.shape, generator=generator) * param.shape[-1] ** -0.5


def schedule(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    warm = min(1.0, (step + 1) / 200)
    return peak * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def save_state(trainer: Trainer, step: int, folder: Path) -> None:
    """Parameters and optimizer, replaced in one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    moments = trainer.optimizer.state_dict()["state"]
    tensors = {f"param.{name}": w.detach() for name, w in trainer.params.items()}
    tensors |= {f"moment.{i}.{key}": v for i, own in moments.items() for key, v in own.items()}
    save_file(tensors, folder / "state.tmp", metadata={"step": str(step)})
    os.replace(folder / "state.tmp", folder / "state.safetensors")
    (folder / "step.json").write_text(json.dumps({"step": step}))


def load_weights(trainer: Trainer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take every parameter from `tensors`, by name."""
    with torch.no_grad():
        for name, w in trainer.params.items():
            w.copy_(tensors[name])


def load_state(trainer: Trainer, folder: Path) -> int:
    """Continue from `save_state`; returns the step, 0 when there is nothing to continue."""
    if not (folder / "state.safetensors").exists():
        return 0
    tensors = load_file(folder / "state.safetensors")
    load_weights(trainer, {name.removeprefix("param."): tensor for name, tensor in tensors.items()})
    state = trainer.optimizer.state_dict()
    state["state"] = defaultdict(dict)
    for name, tensor in tensors.items():
        if name.startswith("moment."):
            _, index, key = name.split(".")
            state["state"][int(index)][key] = tensor
    trainer.optimizer.load_state_dict(state)
    return json.loads((folder / "step.json").read_text())["step"]


def write_checkpoint(trainer: Trainer, folder: Path) -> None:
    """The parameters as a bf16 Hugging Face checkpoint with tokenizer, template and configs."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.detach().to(torch.bfloat16).contiguous() for name, w in trainer.params.items()}
    save_file(tensors, folder / "model.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.tmp", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")
    tiny_tokenizer.write(folder)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--steps", default=8000, show_default=True, help="Updates in all, resumed ones included.")
@click.option("--state", type=click.Path(path_type=Path), default=Path("train-state"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=MODEL_DIR, help="Where the checkpoint goes.")
@click.option("--seed", default=0, show_default=True)
@click.option("--lr", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, help="Needs a C++ compiler.")
@click.option("--warm", type=click.Path(path_type=Path), help="Start from the weights of this checkpoint.")
@click.option(
    "--mix", type=(click.Choice(list(MIXTURE)), float), multiple=True, help="Draw a task that often: think 8."
)
def main(
    steps: int,
    state: Path,
    out: Path,
    seed: int,
    lr: float,
    dtype: str,
    compiled: bool,
    warm: Path | None,
    mix: tuple[tuple[str, float], ...],
) -> None:
    config = read_config(CONFIG)
    trainer = Trainer(config, getattr(torch, dtype), compiled, seed)
    if warm is not None:
        load_weights(trainer, load_file(warm / "model.safetensors"))
    first = load_state(trainer, state)
    rng = torch.Generator().manual_seed(seed * 1_000_003 + first)
    batches = Sampler(config.canvas_length, MIXTURE | dict(mix)).batches(np.random.default_rng([seed, first]))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    average = 0.0
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("training", total=steps, completed=first)
        for step in range(first, steps):
            loss = trainer.step(next(batches), rng, schedule(step, steps, lr))
            average = loss if step == first else 0.98 * average + 0.02 * loss
            progress.update(bar, completed=step + 1, description=f"loss {average:.4f}")
            if (step + 1) % 250 == 0 or step + 1 == steps:
                save_state(trainer, step + 1, state)
                write_checkpoint(trainer, out)
                progress.console.print(f"step {step + 1}: loss {average:.4f}")


if __name__ == "__main__":
    main()
