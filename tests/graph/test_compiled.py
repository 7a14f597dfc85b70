"""Steps compiled as a GPU has them compiled, run by MLX's CPU: against NumPy float64, and against the same
steps not compiled. A step of one row is compiled as a whole, one of several in parts.

One quantized model of two layers, one of each kind. Its experts are packed because others MLX's CPU
multiplies in float32 only. What an encoding came to shows in the steps behind it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from dgemma.checkpoint.checkpoint import Checkpoint  # noqa: E402
from dgemma.engine.events import Done, Draft  # noqa: E402
from dgemma.engine.sampler import Step  # noqa: E402
from dgemma.model import Model  # noqa: E402
from dgemma.network.numpy_ops import NumpyOps  # noqa: E402
from dgemma.network.ops import Ops  # noqa: E402
from tests.as_on_gpu import AsOnGpu  # noqa: E402
from tests.compare import close  # noqa: E402
from tests.formats.writers import CASES  # noqa: E402

pytestmark = pytest.mark.skipif(
    mx.default_device().type == mx.gpu, reason="on a GPU the steps of every test are compiled"
)

RNG = np.random.default_rng(0)
PROMPTS = RNG.integers(3, 131, (2, 21)).tolist()
UNEQUAL = [PROMPTS[0], PROMPTS[1][4:]]
TOKENS, NOISE = RNG.integers(3, 131, (2, 2, 16))
UNIFORMS = RNG.random((2, 16))
# Maximum and RMS error, of the largest value. To NumPy as in tests/formats/test_logits.py. To what is not
# compiled: a C++ compiler may round a product and a sum once together, which float32 shows as its own
# rounding, and bfloat16 where it tips one of its roundings of 2⁻⁸.
EXACT = {"float32": (2e-5, 5e-6), "bfloat16": (0.5, 0.1)}
PLAIN = {"float32": (1e-6, 1e-6), "bfloat16": (0.05, 0.01)}

Make = Callable[[Ops], Model]
dtypes = pytest.mark.parametrize("dtype", EXACT)


@pytest.fixture(scope="module", autouse=True)
def header_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLX calls a g++ that finds its header compiled: else reading it is four fifths of every fused kernel.

    Where it cannot be compiled nothing else changes; and without a g++ MLX fuses nothing.
    """
    compiler, folder = shutil.which("g++"), tmp_path_factory.mktemp("g++")
    if compiler is None:
        yield
        return
    include, header = Path(mx.__file__).parent / "include", "mlx/backend/cpu/compiled_preamble.h"
    done = (folder / header).with_suffix(".h.gch")
    done.parent.mkdir(parents=True)
    how = ["-std=c++17", "-O3", "-Wall", "-fPIC", f"-I{include}", "-x", "c++-header"]
    subprocess.run([compiler, *how, include / header, "-o", done], capture_output=True)
    (folder / "g++").write_text(f'#!/bin/sh\nexec "{compiler}" -I"{folder}" "$@"\n')
    (folder / "g++").chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The model as MLX's community packs it; on NumPy its decoded weights."""
    written, root = CASES["mlx community"](), tmp_path_factory.mktemp("compiled")
    packed, decoded = written.write(root / "packed"), written.write_decoded(root / "decoded")

    def model(ops: Ops) -> Model:
        checkpoint = Checkpoint.open(decoded if ops.name == "numpy" else packed)
        return Model(ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), None)

    return model


def steps(model: Model, prompts: list[list[int]], soft: Any = None) -> list[Step]:
    """A first step, a later one, one with a bound, and a first one behind a commit.

    `soft` is what the later ones are told of the first, by default its own soft embedding.
    """
    contexts, B = model.encode(prompts), len(prompts)

    def step(soft: Any, **options: float) -> Step:
        return model.refine(contexts, TOKENS[:B], soft, 0.7, UNIFORMS[:B], NOISE[:B], **options)

    first = step(None)
    soft = first.soft if soft is None else soft
    later = [step(soft), step(soft, soft_bound=1e-6)]
    contexts = model.encode(NOISE[:B], contexts)
    return [first, *later, step(None)]


@dtypes
@pytest.mark.parametrize("prompts", [PROMPTS[:1], UNEQUAL], ids=["a row", "rows"])
def test_compiled_steps(make: Make, dtype: str, prompts: list[list[int]]) -> None:
    exact = steps(make(NumpyOps()), prompts)
    compiled, plain = (
        steps(make(AsOnGpu(dtype, compiled)), prompts, exact[0].soft) for compiled in (True, False)
    )
    for other, others, bounds in (("NumPy", exact, EXACT), ("plain", plain, PLAIN)):
        for index, (step, expected) in enumerate(zip(compiled, others, strict=True)):
            agree(step, expected, bounds[dtype], f"step {index}, as {other}")
            if dtype == "float32":
                np.testing.assert_array_equal(step.argmax, expected.argmax)
                np.testing.assert_array_equal(step.canvas, expected.canvas)


def agree(step: Step, expected: Step, bounds: tuple[float, float], what: str) -> None:
    """What is continuous of a step: one rounding may tip a token."""
    rtol, rms = bounds
    close(step.entropy, expected.entropy, rtol, f"{what}: entropy", rms)
    softs = (np.array(x.soft.tolist()) for x in (step, expected))
    close(*softs, rtol, f"{what}: soft embedding", rms)


@dtypes
def test_compiled_replies(make: Make, dtype: str) -> None:
    """Two canvases of a row: in float32 every draft is NumPy's, in bfloat16 the first is close."""

    def events(ops: Ops) -> tuple[list[Draft], list[int]]:
        said = list(make(ops).generate(PROMPTS[0], seed=3, steps=4, max_new_tokens=20))
        drafts = [event for event in said if isinstance(event, Draft)]
        return drafts, [len(event.tokens) for event in said if isinstance(event, Done)]

    (drafts, lengths), (exact, _) = events(AsOnGpu(dtype, compiled=True)), events(NumpyOps())
    assert lengths == [20] and len(drafts) == 2 * 4
    for ours, theirs in zip(drafts if dtype == "float32" else drafts[:1], exact, strict=False):
        close(ours.entropy, theirs.entropy, EXACT[dtype][0], f"step {ours.step}: entropy")
        if dtype == "float32":
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
