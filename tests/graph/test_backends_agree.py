"""The whole graph on a small random model: every backend against NumPy float64.

The weights are tame (matrices of gain one, norms near one) but nothing is at a neutral value: encoder
and decoder scalars differ, the router is decided, only some pairs rotate, biases are set in one variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.network import build, graph, weights
from dgemma.network.config import FULL, SLIDING, Config, LayerConfig
from dgemma.network.ops import KV, Array, Ops
from dgemma.network.ops.vocabulary import logits
from dgemma.network.spec import Param, text_parameters
from tests.compare import AS_ON_GPU, REFERENCE, backends, close, make

WINDOW, PROMPT, CANVAS, BATCH = 8, 30, 12, 2
# Maximum and RMS error, of the largest logit. float32: sums of some hundred terms, four layers. bfloat16:
# a rounding of 2⁻⁸ at each of some ten steps a layer adds up to a few percent, and one position whose
# router was nearly undecided takes another expert, which only the maximum sees.
BOUNDS: dict[object, tuple[float, float]] = {
    "float32": (2e-5, 2e-6),
    "bfloat16": (0.5, 0.05),
    ("mlx", "float32"): (2e-4, 2e-5),  # on an Apple GPU; its CPU build is at 2e-6
}


def config(bias: bool = False) -> Config:
    sliding = LayerConfig(SLIDING, 8, 2, WINDOW, 1e4, 4, 1.0, shares_kv=False)
    full = LayerConfig(FULL, 16, 1, None, 1e6, 3, 2.0, shares_kv=True)
    return Config(
        hidden_size=32, vocab_size=96, heads=4, mlp_size=48, num_experts=6, top_k=2, expert_size=16,
        canvas_length=CANVAS, max_positions=4096, softcap=30.0, rms_eps=1e-6, attention_bias=bias,
        pad_id=0, image_token_id=None, layers=(sliding, full, sliding, full), vision=None, quantization=None,
    )  # fmt: skip


def tame(param: Param, rng: np.random.Generator) -> np.ndarray:
    """A stored tensor: rows of unit gain, norms 1 ± 0.1, small queries, decided routers."""
    name = str(param.path[-1])
    noise = rng.standard_normal(param.shape)
    if name in ("scalar", "encoder_scalar"):
        return rng.uniform(0.7, 1.2, param.shape)
    if name.endswith("_bias"):
        return 0.1 * noise
    if len(param.shape) == 1:
        return (0.3 if name == "q_norm" else 1.0) * (1 + 0.1 * noise)
    return noise / param.shape[-1] ** 0.5 * (20 if param.path[-2:] == ("router", "proj") else 1)


def place(ops: Ops, config: Config, arranged: bool = True) -> weights.Weights:
    """The same random model on any backend, its matrices as the backend reads them best, or as they are."""
    rng = np.random.default_rng(0)
    stored = {param.path: tame(param, rng) for param in text_parameters(config)}
    constants = {
        "embed_scale": ops.rounded(config.hidden_size**0.5),
        "frequencies": {layer.kind: ops.aswide(build.rope_frequencies(layer)) for layer in config.layers},
    }
    table = text_parameters(config)
    arranger = ops if arranged else Ops()
    return build.build(config, table, lambda p: ops.asarray(stored[p.path]), constants, arranger)


@dataclass
class Runner:
    """Prompt, canvases and signal of one comparison, run on any backend."""

    config: Config
    padding: tuple[int, ...] = (0,) * BATCH

    def __post_init__(self) -> None:
        rng = np.random.default_rng(1)
        shape = (BATCH, CANVAS, self.config.hidden_size)
        self.prompt = rng.integers(1, self.config.vocab_size, (BATCH, PROMPT))
        self.canvas = rng.integers(0, self.config.vocab_size, (BATCH, CANVAS))
        self.soft = rng.standard_normal(shape) / self.config.hidden_size**0.5
        for row, count in enumerate(self.padding):
            self.prompt[row, :count] = self.config.pad_id

    def cache(self, ops: Ops, w: weights.Weights) -> list[KV]:
        """Keys and values of the prompt, cut on sliding layers to what a canvas sees."""
        offset = ops.asarray(-np.array(self.padding))
        ragged = any(self.padding)
        new = graph.encode(ops, self.config, w, ops.asarray(self.prompt), offset, None, ragged=ragged)
        return [
            kv if layer.window is None else (kv[0][:, :, 1 - layer.window :], kv[1][:, :, 1 - layer.window :])
            for layer, kv in zip(self.config.layers, new, strict=True)
        ]

    def logits(self, ops: Ops, with_soft: bool, arranged: bool = True) -> np.ndarray:
        w = place(ops, self.config, arranged)
        offset = ops.asarray(PROMPT - np.array(self.padding))
        inputs = ops.asarray(self.canvas), ops.asarray(self.soft) if with_soft else None, offset
        past = self.cache(ops, w)
        h = graph.denoise(ops, self.config, w, *inputs, past, ragged=any(self.padding))
        return ops.to_numpy(logits(ops, h, w.embed, self.config.softcap))


@pytest.fixture(params=backends("float32", "bfloat16"))
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"config": config()},
    "biases": {"config": config(bias=True)},
    "ragged": {"config": config(), "padding": (0, 7)},
}


@pytest.mark.parametrize("with_soft", [False, True], ids=["first step", "soft"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree(backend: tuple[str, str], variant: str, with_soft: bool):
    runner = Runner(**VARIANTS[variant])
    actual, expected = runner.logits(make(backend), with_soft), runner.logits(REFERENCE, with_soft)
    rtol, rms = BOUNDS.get(backend) or BOUNDS[backend[1]]
    close(actual, expected, rtol, f"logits of {'-'.join(backend)}", rms)


@pytest.mark.parametrize("padding", [(0, 0), (0, 7)], ids=str)
def test_arranged_matrices_change_no_logit(backend: tuple[str, str], padding: tuple[int, int]):
    ops, runner = make(backend), Runner(config(), padding)
    arranged, plain = (runner.logits(ops, True, arranged) for arranged in (True, False))
    close(arranged, plain, max(1e-6, BOUNDS[backend[1]][0] / 10), f"logits of {'-'.join(backend)}")


def test_a_padded_row_is_the_row_alone():
    """Padding changes nothing for the row that has it, and nothing for the row beside it."""
    together = Runner(config(), (0, 7))
    alone = Runner(config(), (0, 0))
    expected = alone.logits(REFERENCE, True)
    close(together.logits(REFERENCE, True)[0], expected[0], 1e-12, "row beside a padded one")
    ops, w = REFERENCE, place(REFERENCE, alone.config)
    tokens, zero = together.prompt[1:, 7:], np.zeros(1, np.int64)
    new = graph.encode(ops, alone.config, w, tokens, zero, None, ragged=False)
    past = [
        kv if layer.window is None else (kv[0][:, :, 1 - WINDOW :], kv[1][:, :, 1 - WINDOW :])
        for layer, kv in zip(alone.config.layers, new, strict=True)
    ]
    h = graph.denoise(
        ops, alone.config, w, together.canvas[1:], together.soft[1:], zero + PROMPT - 7, past, ragged=False
    )
    z = logits(ops, h, w.embed, alone.config.softcap)
    close(together.logits(REFERENCE, True)[1], z[0], 1e-12, "padded row")


@pytest.mark.parametrize("name", ["mlx", AS_ON_GPU])
def test_a_traced_step_equals_the_plain_one(tmp_path: Path, name: str):
    """MLX can trace the whole step, as `mx.compile` does: nothing in it evaluates or reads an array.

    It is exported and run as recorded, because compiling on a CPU takes half a minute of g++; of a small
    model it is done in tests/graph/test_compiled.py.
    """
    mx = pytest.importorskip("mlx.core")
    ops = make((name, "float32"))
    ops.vocab_tile, ops.vocab_rows, ops.score_bytes = 40, 20, 1 << 12  # type: ignore[attr-defined]
    runner = Runner(config(), (0, 7))
    w = place(ops, runner.config)
    past = runner.cache(ops, w)

    def step(canvas: Array, soft: Array, offset: Array, t: Array, u: Array, *flat: Array) -> list[Array]:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        said = graph.step(ops, runner.config, w, canvas, soft, offset, pairs, t, u, ragged=True)
        return [said.argmax, said.sample, said.entropy, said.soft]

    uniforms = np.random.default_rng(2).random((BATCH, CANVAS))
    inputs = [ops.asarray(x) for x in (runner.canvas, runner.soft, PROMPT - np.array((0, 7)))]
    inputs += [ops.aswide(np.array(0.7)), ops.aswide(uniforms), *(x for kv in past for x in kv)]
    mx.export_function(str(tmp_path / "step.mlxfn"), step, *inputs)
    traced = mx.import_function(str(tmp_path / "step.mlxfn"))(*inputs)
    for said, plain, what in zip(traced, step(*inputs), ("argmax", "sample", "entropy", "soft"), strict=True):
        close(ops.to_numpy(said), ops.to_numpy(plain), 1e-6, what)
