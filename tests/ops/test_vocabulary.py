"""What the vocabulary says of a position (argmax, sample, entropy, soft embedding), and its memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from dgemma.network.ops import Bias, Ops, Prediction
from dgemma.network.ops.few import Few, draw_few
from dgemma.network.ops.vocabulary import logits
from tests.compare import REFERENCE, backends, close, make, pair, rounding, some_bias

SOFTCAP, TEMPERATURE, FORBIDDEN = 30.0, 0.7, -1e30


@pytest.fixture(params=backends("float32", "bfloat16", reference=True))
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


def guess(
    ops: Ops,
    h: np.ndarray,
    table: np.ndarray,
    uniforms: np.ndarray,
    soft_bound: float = 0.0,
    bias: tuple[np.ndarray, ...] | None = None,
) -> tuple[Prediction, np.ndarray]:
    """The backend's statistics on the host, and the exact processed logits of the same rounded input."""
    device, reference = pair(ops, h, table)
    z = logits(REFERENCE, *reference, SOFTCAP) / TEMPERATURE
    if bias:
        z += np.take_along_axis(bias[2], bias[0][bias[1]], -1)
    on_device = bias and Bias(ops.asclasses(bias[0]), ops.asarray(bias[1]), ops.aswide(bias[2]))
    said = ops.vocabulary(*device, SOFTCAP, TEMPERATURE, ops.aswide(uniforms), soft_bound, on_device)
    assert (said.missing is None) == (soft_bound == 0)
    names = ("argmax", "sample", "entropy", "soft", "best", *(["missing"] if soft_bound else []))
    return Prediction(*(ops.to_numpy(getattr(said, name)) for name in names)), z


def probabilities(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("scale", [0.05, 0.6, 3.0, None], ids=["flat", "mixed", "peaked", "biased"])
@pytest.mark.parametrize(
    "V, tile, N, rows", [(100, 32, 11, 4), (96, 32, 8, 8), (37, 64, 5, 256), (300, 7, 3, 1)]
)
def test_statistics(ops: Ops, V: int, tile: int, N: int, rows: int, scale: float | None):
    bias, scale = (some_bias(N, V) if scale is None else None), scale or 0.6
    rng = np.random.default_rng(V)
    ops.vocab_tile, ops.vocab_rows = tile, rows
    table = scale * rng.standard_normal((V, 24))
    uniforms = np.r_[0.0, 1 - 2.0**-24, rng.random(N)].astype(np.float32)[:N]
    said, z = guess(ops, rng.standard_normal((N, 24)), table, uniforms, bias=bias)
    p = probabilities(z)
    # A logit is off by one rounding, a probability relatively by twice that, the entropy H by H of that.
    off = 2 * max(rounding(ops) / 2, 1e-6) * np.abs(np.where(z < -1e29, 0, z)).max(-1)
    here = np.arange(N)
    assert (z[here, said.argmax] >= z.max(-1) - off).all()
    # The first token whose cumulative probability exceeds the uniform, or where rounding leaves none, argmax.
    reach = np.cumsum(p, -1)
    assert ((said.sample >= 0) & (said.sample < V)).all()
    none = (uniforms > 1 - 1e-6) & (said.sample == said.argmax)
    assert (none | (reach[here, said.sample] >= uniforms - off - 1e-6)).all()
    assert (reach[here, said.sample] - p[here, said.sample] <= uniforms + off + 1e-6).all()
    assert (p[here, said.sample] > 0).all() and (bias or said.sample[0] == 0)
    close(said.best, p.max(-1), off.max() + 1e-5, "probability of the best")
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    assert (np.abs(said.entropy - entropy) <= off * (1 + entropy) + 1e-5).all()
    soft = p @ pair(ops, table)[1][0]
    close(said.soft, soft, off.max() + 2 * rounding(ops) + 1e-5, "soft embedding")


def test_tiles_and_row_blocks_change_nothing(ops: Ops):
    rng = np.random.default_rng(1)
    h, table, uniforms = rng.standard_normal((13, 16)), rng.standard_normal((90, 16)), rng.random(13)
    whole, _ = guess(ops, h, table, uniforms)
    ops.vocab_tile, ops.vocab_rows = 11, 4
    tiled, _ = guess(ops, h, table, uniforms)
    assert np.array_equal(whole.argmax, tiled.argmax)
    assert np.array_equal(whole.sample, tiled.sample)
    close(tiled.entropy, whole.entropy, 1e-5, "entropy")
    close(tiled.soft, whole.soft, 1e-5 + rounding(ops), "soft embedding")


@pytest.mark.parametrize("soft_bound", [0.0, 0.05])
def test_each_row_has_a_temperature_of_its_own(ops: Ops, soft_bound: float):
    """In any block of rows, with sparse rows among dense ones, a row is what it is alone."""
    rng = np.random.default_rng(6)
    ops.vocab_tile, ops.vocab_rows, ops.soft_tokens = 40, 5, 32
    h, table, uniforms = rng.standard_normal((8, 16)), rng.standard_normal((90, 16)), rng.random(8)
    heat = np.array([0.5, 0.6, 2.0, 0.8, 9.0, 0.6, 0.7, 1.0])
    device, weights = ops.asarray(h), ops.asarray(table)

    def said(rows: slice, temperature: Any) -> list[np.ndarray]:
        found = ops.vocabulary(
            device[rows], weights, SOFTCAP, temperature, ops.aswide(uniforms[rows]), soft_bound
        )
        return [ops.to_numpy(x) for x in (found.argmax, found.sample, found.entropy, found.soft)]

    together = said(slice(None), ops.aswide(heat))
    for row, t in enumerate(heat):
        alone = said(slice(row, row + 1), t)
        assert [x[row] for x in together[:2]] == [x[0] for x in alone[:2]], f"ids of row {row}"
        for whole, one in zip(together[2:], alone[2:], strict=True):
            close(whole[row : row + 1], one, 1e-5 + rounding(ops), f"row {row}")


def test_argmax_takes_the_first_of_equals(ops: Ops):
    """Small integers are exact in every format, so equal rows have equal logits."""
    ops.vocab_tile = 8
    table = np.zeros((40, 4))
    table[[13, 14, 21, 39]] = [1, 2, 0, 1]  # in one tile, and in others
    table[[3, 30]] = [0, 0, 4, 0]
    said, _ = guess(ops, np.array([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]) * 1.0, table, np.zeros(3))
    assert said.argmax.tolist() == [13, 3, 0]


def test_samples_follow_the_distribution(ops: Ops):
    """Evenly spaced uniforms meet each token as often as its probability says, to within one."""
    rng = np.random.default_rng(2)
    ops.vocab_tile, M = 6, 1000
    uniforms = (np.arange(M) + 0.5) / M
    said, z = guess(
        ops, np.tile(rng.standard_normal(8), (M, 1)), 0.5 * rng.standard_normal((20, 8)), uniforms
    )
    counts = np.bincount(said.sample, minlength=20)
    slack = 1 + M * max(rounding(ops), 1e-5) * np.abs(z).max()
    assert np.abs(counts - M * probabilities(z)[0]).max() <= slack


def test_a_sample_exceeds_its_uniform(ops: Ops):
    """Strictly: a uniform of 0 never picks a token of probability 0."""
    uniforms = np.array([0.0, 0.25, 0.5, 0.75])
    said, _ = guess(ops, np.zeros((4, 4)), np.ones((4, 4)), uniforms)  # four times exactly 1/4
    assert said.sample.tolist() == [0, 1, 2, 3]
    h, table = ops.asarray(np.ones((1, 4))), ops.asarray(np.repeat([[-100.0], [100.0]], 4, 1))
    said = ops.vocabulary(h, table, SOFTCAP, 0.04, ops.aswide(np.zeros(1)))
    assert ops.to_numpy(said.sample).tolist() == [1]


@pytest.mark.parametrize("V", [2, 64, 1000])
def test_entropy_at_its_ends(ops: Ops, V: int):
    flat, _ = guess(ops, np.zeros((1, 4)), np.ones((V, 4)), np.zeros(1))
    close(flat.entropy, [np.log(V)], 1e-5, "entropy of equals")
    table = np.zeros((V, 4))
    table[V - 1] = 100.0
    sure, _ = guess(ops, np.ones((1, 4)), table, np.array([0.5]))
    assert sure.argmax[0] == sure.sample[0] == V - 1
    assert 0 <= sure.entropy[0] < 1e-6


# ---- samples from a few tokens ------------------------------------------------------------------


def few_kept(z: np.ndarray, few: Few) -> np.ndarray:
    """Which tokens [V] of a row of z stay, by sorting: equals of the last one, too."""
    p, order = probabilities(z), np.sort(z)[::-1]
    floor = order[few.k - 1] if 0 < few.k <= len(z) else -np.inf
    if few.p < 1:
        enough = np.cumsum(np.sort(p)[::-1]) >= few.p - 1e-12
        floor = max(floor, order[np.argmax(enough)])
    return z >= floor - 1e-9


@pytest.mark.parametrize("few", [Few(1, 1.0), Few(7, 1.0), Few(500, 1.0), Few(0, 0.5), Few(9, 0.8)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_samples_of_few_tokens(ops: Ops, few: Few, biased: bool):
    """Each token as often as its share of what the few have, to within one; and none but the few."""
    rng, M, V = np.random.default_rng(7), 300, 40
    ops.vocab_tile, ops.vocab_rows = 9, 128
    # Logits that every format holds, some of them equal.
    row = np.round(np.linspace(3, -8, V) * 4) / 4
    row[[4, 6]] = row[5]
    table = np.stack([rng.permutation(row)], 1)
    kinds, _, values = some_bias(1, V)
    values[0, :-1] = 2, -1, FORBIDDEN, 0
    uniforms = np.tile((np.arange(M) + 0.5) / M, 2)
    device, reference = pair(ops, np.ones((2 * M, 1)), table)
    z = logits(REFERENCE, reference[0][:1], reference[1], None)[0] / TEMPERATURE
    added = None
    if biased:
        z = z + values[0, kinds[0]]
        of = ops.asarray(np.zeros(2 * M, np.int64)), ops.aswide(np.tile(values, (2 * M, 1)))
        added = Bias(ops.asclasses(kinds), *of)
    drawn = draw_few(
        ops, *device, None, ops.aswide(np.full(2 * M, TEMPERATURE)), ops.aswide(uniforms),
        [few, None], ops.asarray(np.arange(2 * M)), added,
    )  # fmt: skip
    samples = ops.to_numpy(drawn)
    np.testing.assert_array_equal(samples[M:], np.arange(M, 2 * M))  # the row that asks for nothing
    p = np.where(few_kept(z, few), probabilities(z), 0)
    counts = np.bincount(samples[:M], minlength=V)
    assert (counts[p == 0] == 0).all()
    assert few.k in (0, 500) or (p > 0).sum() <= few.k + 2
    assert np.abs(counts - M * p / p.sum()).max() <= 1.01 + M * 1e-4


# ---- soft embeddings that leave something out ---------------------------------------------------


@pytest.mark.parametrize("bound, biased", [(1e-5, False), (1e-3, False), (0.05, True), (0.999, False)])
@pytest.mark.parametrize("V, tile, rows", [(300, 300, 64), (300, 41, 7), (97, 32, 64)])
def test_a_soft_embedding_leaves_out_what_it_reports(
    ops: Ops, V: int, tile: int, rows: int, bound: float, biased: bool
):
    """Rows from flat to sure; a sparse one is off by what is missing, a dense one not at all."""
    rng, N = np.random.default_rng(V), 24
    ops.vocab_tile, ops.vocab_rows, ops.soft_tokens = tile, rows, 64
    table = rng.standard_normal((V, 16))
    table[:3] *= 3  # what every other row is sure of
    directions = rng.standard_normal((N, 16))
    directions[1::2] = table[rng.integers(0, 3, N // 2)] / 12
    h = np.linspace(0.1, 3, N)[:, None] * directions
    bias = some_bias(N, V) if biased else None
    (full, z), (some, _) = (guess(ops, h, table, np.full(N, 0.5), b, bias) for b in (0.0, bound))
    for name in ("argmax", "sample", "entropy"):
        np.testing.assert_array_equal(getattr(some, name), getattr(full, name))
    missing, sparse = some.missing, some.missing > 0
    assert ((missing >= 0) & (missing <= bound)).all()
    assert sparse.all() if bound == 0.999 else sparse.any() and not sparse.all()
    # Relatively, of a probability.
    off = 2 * max(rounding(ops) / 2, 1e-6) * np.abs(np.where(z < -1e29, 0, z)).max(-1)
    error, largest = np.abs(some.soft - full.soft).max(-1), np.abs(table).max()
    assert (error <= (missing + sparse * off + 2 * rounding(ops) + 1e-6) * largest).all()
    # No 64 tokens leave out less than the most probable ones.
    least = np.sort(probabilities(z), -1)[:, :-64].sum(-1)
    assert (missing >= sparse * (least * (1 - off) - 1e-7)).all()


def test_of_a_small_vocabulary_nothing_is_left_out(ops: Ops):
    """Such a row is sparse nevertheless, and says that it is."""
    rng = np.random.default_rng(3)
    args = rng.standard_normal((3, 8)), rng.standard_normal((40, 8)), rng.random(3)
    (full, z), (some, _) = guess(ops, *args), guess(ops, *args, 0.5)
    assert ((some.missing > 0) & (some.missing < 1e-6)).all()
    close(some.soft, full.soft, 2 * rounding(ops) * np.abs(z).max() + 1e-5, "soft embedding")


def test_a_nan_row_is_dense(ops: Ops):
    rng = np.random.default_rng(4)
    h, ops.vocab_tile = 3 * rng.standard_normal((5, 8)), 64
    args = rng.standard_normal((300, 8)), np.full(5, 0.5)
    before, _ = guess(ops, h, *args, 0.9)
    h[2] = np.nan
    after, _ = guess(ops, h, *args, 0.9)
    assert after.missing[2] == 0 and np.isnan(after.soft[2]).all()
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(after.missing[others], before.missing[others])
    close(after.soft[others], before.soft[others], rounding(ops), "soft embedding")


# ---- memory: one plane of logits [rows, V] at most ----------------------------------------------

N, V = 64, 16384


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((N, 16)), rng.standard_normal((V, 16)), rng.random(N)


def test_memory_numpy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(REFERENCE, "vocab_tile", V // 32, raising=False)
    h, table, uniforms = problem()
    tracemalloc.start()
    REFERENCE.vocabulary(h, table, SOFTCAP, TEMPERATURE, uniforms)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 1.5 * N * V * 8


@pytest.mark.parametrize("rows", [N, N // 4])
def test_memory_mlx(rows: int):
    """No plane, but operations in flight, each with a tile, up to 24 of 32: unchained they are several."""
    mx = pytest.importorskip("mlx.core")
    from dgemma_mlx.ops import MlxOps

    ops = MlxOps()
    ops.vocab_tile, ops.vocab_rows = V // 32, rows
    arrays = [mx.array(x.astype(np.float32)) for x in problem()]
    mx.eval(arrays)
    mx.clear_cache()  # of other tests' buffers, which may be larger than what is asked for
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    said = ops.vocabulary(*arrays[:2], SOFTCAP, TEMPERATURE, arrays[2])
    mx.eval(said.argmax, said.sample, said.entropy, said.soft)
    assert mx.get_peak_memory() - before <= 0.8 * rows * V * 4


def test_a_gpu_without_our_kernels_has_the_plane_that_info_counts() -> None:
    """Only the kernels' bfloat16 plane has more rows, and only for a table that they read."""
    torch = pytest.importorskip("torch")
    from dgemma_cuda.ops import CudaOps

    plain, ours, table = CudaOps(kernels=False), CudaOps(kernels=True), torch.zeros(4, 4)
    assert plain.rows_at_once(table) == ours.rows_at_once("a record") == Ops.vocab_rows
    assert ours.rows_at_once(table) == CudaOps.kernel_rows == 2 * Ops.vocab_rows
