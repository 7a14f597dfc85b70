"""Quantized checkpoints, from file to logits, against the same model with its decoded weights.

The reference is built from what the independent writers say each parameter decodes to, written as a plain
float32 checkpoint: neither layouts nor records nor packed products are part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.formats.quantized import Quantized
from dgemma.model import Model
from dgemma.network.ops import Ops
from dgemma.network.ops.vocabulary import embed
from tests.compare import REFERENCE, backends, close, make
from tests.formats import writers
from tests.formats.writers import CASES, LAYOUTS

# Every width of affine once, every group twice; tests/formats/test_decode.py has all.
WIDTHS = list(writers.AFFINE)[::4] + ["affine 5bit g128"]
RUN = [case for case in CASES if case in WIDTHS or case not in writers.AFFINE]
CANVAS, TEMPERATURE = 10, 0.7
PROMPT = np.random.default_rng(1).integers(3, 131, 21).tolist()
TOKENS = np.random.default_rng(2).integers(0, 131, (1, CANVAS))
UNIFORMS = np.random.default_rng(3).random((1, CANVAS))
# Maximum and RMS error, of the largest value. float64: the reference's weights were rounded to float32.
# float32: as for plain weights (tests/graph). bfloat16: a rounding of 2⁻⁸ at each of some ten steps a
# layer, and a router that may pick another expert.
BOUNDS: dict[Any, tuple[float, float]] = {
    "float64": (1e-6, 1e-6),
    "float32": (2e-5, 5e-6),
    "bfloat16": (0.5, 0.1),
    ("mlx", "float32"): (2e-4, 5e-5),  # on an Apple GPU; its CPU build is at 4e-6
}


@dataclass
class Run:
    """What a model says of one canvas: in two steps, the second with the first's soft embedding."""

    first: np.ndarray  # logits [1, L, V]
    second: np.ndarray  # logits, given the reference's soft embedding
    entropy: np.ndarray  # of refinements 1 and 2, [2, L]
    soft: np.ndarray  # soft embeddings after refinements 1 and 2, [2, L, D]


def model(folder: Path, ops: Ops) -> Model:
    checkpoint = Checkpoint.open(folder)
    return Model(ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), None)


def run(model: Model, signal: np.ndarray | None = None) -> Run:
    """`signal` is the soft embedding for `second`, by default the model's own.

    The canvas stays as it is between the refinements, so that no sample can tip: what is compared is
    continuous.
    """
    context = model.encode([PROMPT])
    one = model.refine(context, TOKENS, None, TEMPERATURE, UNIFORMS, TOKENS)
    two = model.refine(context, TOKENS, one.soft, TEMPERATURE, UNIFORMS, TOKENS)
    soft = np.concatenate([model.ops.to_numpy(step.soft) for step in (one, two)])
    return Run(
        model.logits(context, TOKENS),
        model.logits(context, TOKENS, soft[:1] if signal is None else signal),
        np.concatenate([one.entropy, two.entropy]),
        soft,
    )


@dataclass
class Case:
    """A quantized checkpoint on disk, and what its decoded weights compute."""

    folder: Path
    expected: Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Every case is written and its reference computed once."""
    done: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in done:
            written, root = CASES[name](), tmp_path_factory.mktemp("logits")
            plain = written.write_decoded(root / "decoded")
            done[name] = Case(written.write(root / "quantized"), run(model(plain, REFERENCE)))
        return done[name]

    return get


def bounds(backend: tuple[str, str]) -> tuple[float, float]:
    return BOUNDS.get(backend) or BOUNDS[backend[1]]


def compare(actual: Run, expected: Run, backend: tuple[str, str], what: str) -> None:
    rtol, rms = bounds(backend)
    for name in ("first", "second", "entropy", "soft"):
        where = f"{what}, {'-'.join(backend)}: {name}"
        close(getattr(actual, name), getattr(expected, name), rtol, where, rms)


@pytest.mark.parametrize("case", RUN)
@pytest.mark.parametrize("backend", backends("float32", reference=True))
def test_logits_are_those_of_the_decoded_weights(made: Any, backend: tuple[str, str], case: str) -> None:
    done = made(case)
    actual = run(model(done.folder, make(backend)), done.expected.soft[:1])
    compare(actual, done.expected, backend, case)


@pytest.mark.parametrize("case", [*LAYOUTS, "mlx community"])
@pytest.mark.parametrize("backend", backends("bfloat16"))
def test_bfloat16(made: Any, backend: tuple[str, str], case: str) -> None:
    done = made(case)
    actual = run(model(done.folder, make(backend)), done.expected.soft[:1])
    compare(actual, done.expected, backend, case)


@pytest.mark.parametrize("case", ["mlx community", "mlx mxfp8", "mlx nvfp4 factor a row"])
@pytest.mark.parametrize("backend", backends("float32", reference=True))
def test_tiles_of_a_quantized_embedding(made: Any, backend: tuple[str, str], case: str) -> None:
    """A real vocabulary is read in tiles, some rows at a time; the last tile is narrower."""
    done, ops = made(case), make(backend)
    ops.vocab_tile, ops.vocab_rows = 33, 4
    actual = run(model(done.folder, ops), done.expected.soft[:1])
    compare(actual, done.expected, backend, f"{case} in tiles")


@pytest.mark.parametrize("case", ["mlx community", "mlx nvfp4 factor a matrix", "modelopt"])
@pytest.mark.parametrize("backend", backends("float32", reference=True))
def test_a_soft_embedding_of_given_probabilities(made: Any, backend: tuple[str, str], case: str) -> None:
    """Rows of certainty are rows of the table, and means are means."""
    loaded = model(made(case).folder, make(backend))
    expected = CASES[case]().decoded["model.decoder.embed_tokens.weight"]
    probs = np.eye(len(expected))[None]
    probs[0, 0, :4] = 0.25
    soft = loaded.ops.to_numpy(loaded.soft_embedding(probs))[0]
    means = np.concatenate([expected[:4].mean(0)[None], expected[1:]])
    close(soft, means, bounds(backend)[0], f"{case}: soft embedding")
    looked_up = loaded.ops.to_numpy(embed(loaded.ops, loaded.weights.embed, loaded.ops.asarray(TOKENS)))
    close(looked_up, expected[TOKENS], bounds(backend)[0], f"{case}: lookup")


@pytest.mark.parametrize("case", RUN)
@pytest.mark.parametrize("backend", backends("float32", reference=True))
def test_records_stay_records(made: Any, backend: tuple[str, str], case: str) -> None:
    """Loading widens the router and nothing else: a model takes the memory of its file."""
    ops = make(backend)
    weights = model(made(case).folder, ops).weights
    written = CASES[case]()
    kept = {"embed": weights.embed, "gate_up": weights.layers[1].experts.gate_up}
    names = {"embed": "embed_tokens.weight", "gate_up": "layers.1.experts.gate_up_proj"}
    for field, leaf in kept.items():
        quantized = f"model.decoder.{names[field]}" in written.quantized
        # MLX has no packed product for FP8 rows that do not divide by 32.
        if "compressed fp8 F32" in case and ops.name == "mlx":
            quantized = False
        assert isinstance(leaf, Quantized) == quantized, field
    router = weights.layers[0].router.proj
    assert not isinstance(router, Quantized)
    np.testing.assert_allclose(
        ops.to_numpy(router),
        written.decoded["model.decoder.layers.0.router.proj.weight"],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("case", LAYOUTS)
def test_progress_counts_every_stored_byte(made: Any, case: str) -> None:
    said: list[tuple[int, int]] = []
    Checkpoint.open(made(case).folder).load(REFERENCE, lambda *pair: said.append(pair))
    total = sum(len(tensor.raw) for tensor in CASES[case]().tensors.values())
    assert said[-1] == (total, total)
    assert all(a[0] < b[0] for a, b in pairwise(said))


def test_one_wrong_code_shows(made: Any, tmp_path: Path) -> None:
    """The comparison is sharp enough to see one nibble of one expert's matrix."""
    written = CASES["modelopt"]()
    name = "model.decoder.layers.0.experts.1.down_proj.weight"
    raw = bytearray(written.tensors[name].raw)
    raw[5] ^= 0x70
    written.tensors[name].raw = bytes(raw)
    actual = run(model(written.write(tmp_path), REFERENCE))
    expected = made("modelopt").expected
    error = np.abs(actual.first - expected.first).max() / np.abs(expected.first).max()
    assert error > 10 * BOUNDS["float32"][0], error
