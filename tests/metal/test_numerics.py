"""The traps of MLX's number formats that other engines for this model fell into, each held shut.

What MLX itself does without care is shown in the assertions' comments, not asserted: it may be mended.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import dgemma
from dgemma.files import load_json
from dgemma.network import graph
from dgemma.network.build import rope_frequencies
from dgemma.network.config import read_config
from dgemma.network.ops.layers import rope, rotary
from dgemma.released import RELEASED_DIR
from dgemma_mlx.ops import MlxOps
from tests.compare import REFERENCE, close

BF16 = MlxOps(mx.bfloat16)
V = 262_144
RELEASED = read_config(load_json(RELEASED_DIR / "config.json"))


def test_a_bfloat16_softmax_over_the_whole_vocabulary_sums_to_one() -> None:
    """`mx.softmax` without `precise` sums in bfloat16: to 2.2 here."""
    x = mx.array(np.random.default_rng(0).standard_normal((2, V)).astype(np.float32)).astype(mx.bfloat16)
    total = np.array(mx.sum(BF16.softmax(x, -1).astype(mx.float32), -1))
    assert np.abs(total - 1).max() < 2e-3, total


def test_probabilities_of_the_whole_vocabulary_sum_to_one() -> None:
    """The soft embedding of a table whose last column is 1 is the sum of the probabilities."""
    rng = np.random.default_rng(1)
    table = rng.standard_normal((V, 8)).astype(np.float32) * 0.1  # flat: every token counts
    table[:, -1] = 1
    h = rng.standard_normal((3, 8))
    said = BF16.vocabulary(
        BF16.asarray(h), BF16.asarray(table), 30.0, mx.array(0.8), BF16.aswide(np.full(3, 0.5))
    )
    close(BF16.to_numpy(said.soft)[:, -1], np.ones(3), 2.0**-7, "sum of probabilities")
    # The entropy of nearly 262,144 equal choices, 12.47: bfloat16 knows 12.4375 and 12.5 there.
    z = BF16.to_numpy(BF16.asarray(h)).astype(float) @ BF16.to_numpy(BF16.asarray(table)).astype(float).T
    z = REFERENCE.tanh(z / 30) * 30 / 0.8
    p = REFERENCE.softmax(z, -1)
    close(BF16.to_numpy(said.entropy), -(p * np.log(p)).sum(-1), 1e-3, "entropy")


def test_router_logits_that_bfloat16_cannot_tell_apart() -> None:
    """Logits 1 + i/1024 round to few values in bfloat16; float32 keeps their order."""
    E, D = 64, 64
    proj = np.eye(E, D) * (1 + np.random.default_rng(2).permutation(E)[:, None] / 1024)
    r = BF16.aswide(np.ones((1, D)))
    weights, ids = BF16.router(r, BF16.aswide(proj), BF16.asarray(np.ones(E)), 8)
    assert weights.dtype == mx.float32
    assert np.array_equal(np.array(ids)[0], np.argsort(-proj.sum(-1))[:8])


def test_router_ties_go_to_the_lower_expert() -> None:
    """`mx.argpartition` gives ties in an order of its own."""
    r = BF16.aswide(np.eye(4))
    proj = np.array([[1, 0, 2, 2, 1, 2], [3, 3, 3, 3, 3, 3], [0, 1, 0, 1, 0, 1], [0, 0, 5, 0, 0, 5]]).T
    _, ids = BF16.router(r, BF16.aswide(proj), BF16.asarray(np.ones(6)), 3)
    assert np.array(ids).tolist() == [[2, 3, 5], [0, 1, 2], [1, 3, 5], [2, 5, 0]]


def test_no_float32_leaks_into_the_stream() -> None:
    """A float32 scalar array promotes all that it touches; Python floats do not."""
    model = dgemma.load(backend="mlx", dtype="bfloat16")
    ops, config, w = model.ops, model.config, model.weights
    L = config.canvas_length
    canvas, positions = ops.asarray(np.full(L, 7)), ops.arange(L)
    turned = {kind: rotary(ops, positions, f) for kind, f in w.frequencies.items()}
    run = graph.Pass(ops, config, (L,), turned, False)
    soft = ops.asarray(np.ones((L, config.hidden_size)))
    h = graph.self_condition(run, w, canvas, soft)
    assert h.dtype == mx.bfloat16
    for index, layer in enumerate(config.layers):
        h, (k, v) = graph.block(run, layer, w.layers[index], h, [[]])
        assert h.dtype == k.dtype == v.dtype == mx.bfloat16
    said = ops.vocabulary(h, w.embed, config.softcap, mx.array(0.7), ops.aswide(np.full(L, 0.5)))
    assert said.soft.dtype == mx.bfloat16 and said.entropy.dtype == mx.float32


def test_the_embedding_scale_is_rounded_before_the_product() -> None:
    """√2816 = 53.066 is 53.0 in bfloat16, and transformers multiplies by that: 0.12 % apart."""
    assert BF16.rounded(RELEASED.hidden_size**0.5) == 53.0
    model = dgemma.load(backend="mlx", dtype="bfloat16")
    root = model.config.hidden_size**0.5
    assert model.weights.embed_scale == BF16.rounded(root)
    assert abs(dgemma.load(backend="mlx", dtype="float32").weights.embed_scale - root) < 1e-6


@pytest.mark.parametrize("offset", [0, 1000])
def test_a_part_of_the_head_rotates_with_the_exponents_of_the_whole(offset: int) -> None:
    """As `mx.fast.rope` with infinite wavelengths where nothing turns; rotating 128 of 512 is wrong by 5."""
    layer = next(layer for layer in RELEASED.layers if not layer.window)
    C, L = layer.head_dim, 9
    assert (C, layer.rope_pairs) == (512, 64)
    ops = MlxOps(mx.float32)
    x = mx.array(np.random.default_rng(3).standard_normal((2, L, C)).astype(np.float32))
    frequencies = ops.aswide(rope_frequencies(layer))
    ours = rope(ops, x, rotary(ops, ops.asarray(offset + np.arange(L)), frequencies))
    wavelengths = mx.where(frequencies > 0, 1 / frequencies, mx.array(float("inf")))
    theirs = mx.fast.rope(x, C, traditional=False, base=None, scale=1.0, offset=offset, freqs=wavelengths)
    close(np.array(ours), np.array(theirs), 1e-6 + 1e-7 * offset, "rotation")
    wrong = mx.fast.rope(x, 128, traditional=False, base=layer.rope_theta, scale=1.0, offset=offset)
    assert float(mx.abs(ours - wrong).max()) > 1
