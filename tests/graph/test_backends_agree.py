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
from dgemma.network.context import cut, last
from dgemma.network.ops import Array, Ops, Past
from dgemma.network.ops.vocabulary import logits
from dgemma.network.spec import Param, text_parameters
from tests.compare import AS_ON_GPU, REFERENCE, backends, close, make

WINDOW, PROMPT, CANVAS = 8, 30, 12
UNEQUAL = (PROMPT, 3, 23)  # one shorter than the window
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
    """Prompts of these lengths, a canvas behind each, and its signal, run on any backend."""

    config: Config
    lengths: tuple[int, ...] = (PROMPT, PROMPT)

    def __post_init__(self) -> None:
        rng, B = np.random.default_rng(1), len(self.lengths)
        shape = (B, CANVAS, self.config.hidden_size)
        self.prompts = [rng.integers(1, self.config.vocab_size, PROMPT)[:length] for length in self.lengths]
        self.canvas = rng.integers(0, self.config.vocab_size, (B, CANVAS))
        self.soft = rng.standard_normal(shape) / self.config.hidden_size**0.5
        self.positions = np.concatenate([length + np.arange(CANVAS) for length in self.lengths])

    def past(self, ops: Ops, w: weights.Weights) -> Any:
        """The prompts encoded in one pass, as a canvas reads them."""
        positions = ops.asarray(np.concatenate([np.arange(length) for length in self.lengths]))
        empty = ops.pasts([[[] for _ in self.lengths]] * len(self.config.layers), self.lengths)
        rows = [ops.asarray(prompt) for prompt in self.prompts]
        new = graph.encode(ops, self.config, w, rows, positions, empty)
        ends = np.cumsum(self.lengths)
        layers: list[list[Past]] = [
            [[last(cut(kv, int(end) - n, int(end)), n if layer.past is None else layer.past)]
             for n, end in zip(self.lengths, ends, strict=True)]
            for layer, kv in zip(self.config.layers, new, strict=True)
        ]  # fmt: skip
        return ops.pasts(layers, (CANVAS,) * len(self.lengths))

    def inputs(self, ops: Ops, with_soft: bool = True) -> list[Array]:
        """Canvas, signal and positions on the device."""
        return [ops.asarray(x) for x in (self.canvas, self.soft * with_soft, self.positions)]

    def logits(self, ops: Ops, with_soft: bool, arranged: bool = True) -> np.ndarray:
        """[B·L, V]"""
        w = place(ops, self.config, arranged)
        h = graph.denoise(ops, self.config, w, *self.inputs(ops, with_soft), self.past(ops, w))
        return ops.to_numpy(logits(ops, h, w.embed, self.config.softcap))


@pytest.fixture(params=backends("float32", "bfloat16"))
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"config": config()},
    "biases": {"config": config(bias=True)},
    "unequal": {"config": config(), "lengths": UNEQUAL},
}


@pytest.mark.parametrize("with_soft", [False, True], ids=["first step", "soft"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree(backend: tuple[str, str], variant: str, with_soft: bool):
    runner = Runner(**VARIANTS[variant])
    actual, expected = runner.logits(make(backend), with_soft), runner.logits(REFERENCE, with_soft)
    rtol, rms = BOUNDS.get(backend) or BOUNDS[backend[1]]
    close(actual, expected, rtol, f"logits of {'-'.join(backend)}", rms)


@pytest.mark.parametrize("lengths", [(PROMPT,), UNEQUAL], ids=str)
def test_arranged_matrices_change_no_logit(backend: tuple[str, str], lengths: tuple[int, ...]):
    ops, runner = make(backend), Runner(config(), lengths)
    arranged, plain = (runner.logits(ops, True, arranged) for arranged in (True, False))
    close(arranged, plain, max(1e-6, BOUNDS[backend[1]][0] / 10), f"logits of {'-'.join(backend)}")


def test_a_row_in_company_is_the_row_alone():
    """Of equal or unequal lengths: no row sees another, neither encoded nor denoised in one pass."""
    for lengths in ((PROMPT, PROMPT), UNEQUAL):
        together = Runner(config(), lengths)
        z = together.logits(REFERENCE, True).reshape(len(lengths), CANVAS, -1)
        for row, length in enumerate(lengths):
            alone = Runner(config(), (length,))
            at = slice(row, row + 1)
            alone.prompts, alone.canvas, alone.soft = (
                together.prompts[at],
                together.canvas[at],
                together.soft[at],
            )
            close(z[row], alone.logits(REFERENCE, True), 1e-12, f"row {row} of {lengths}")


@pytest.mark.parametrize("name", ["mlx", AS_ON_GPU])
def test_a_traced_step_equals_the_plain_one(tmp_path: Path, name: str):
    """MLX can trace the whole step, as `mx.compile` does: nothing in it evaluates or reads an array.

    It is exported and run as recorded, because compiling on a CPU takes half a minute of g++; of a small
    model it is done in tests/graph/test_compiled.py.
    """
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten, tree_unflatten

    ops = make((name, "float32"))
    ops.vocab_tile, ops.vocab_rows, ops.score_bytes = 40, 20, 1 << 12  # type: ignore[attr-defined]
    runner = Runner(config(), UNEQUAL)
    w = place(ops, runner.config)
    names, past = zip(*tree_flatten(runner.past(ops, w)), strict=True)

    def step(canvas: Array, soft: Array, positions: Array, t: Array, u: Array, *flat: Array) -> list[Array]:
        given = tree_unflatten(list(zip(names, flat, strict=True)))
        said = graph.step(ops, runner.config, w, canvas, soft, positions, given, t, u)
        return [said.argmax, said.sample, said.entropy, said.soft]

    uniforms = np.random.default_rng(2).random(runner.canvas.size)
    inputs = [*runner.inputs(ops), *(ops.aswide(x) for x in (0 * uniforms + 0.7, uniforms)), *past]
    mx.export_function(str(tmp_path / "step.mlxfn"), step, *inputs)
    traced = mx.import_function(str(tmp_path / "step.mlxfn"))(*inputs)
    for said, plain, what in zip(traced, step(*inputs), ("argmax", "sample", "entropy", "soft"), strict=True):
        close(ops.to_numpy(said), ops.to_numpy(plain), 1e-6, what)
