"""The vocabulary in tiles, by kernel and plain, against the composite in float64: peaked, flat, tied and NaN.

`tests/ops/test_vocabulary.py` holds the backend as a whole to the definition; here are the kernel, the
sample's two stages, tables that are records, and memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma.formats.encode import quantize
from dgemma.formats.quantized import MXFP4, MXFP8, NVFP4, Form, Quantized, affine
from dgemma.network.ops import Bias, Ops, Prediction
from dgemma.network.ops.decoding import dense
from dgemma.network.ops.vocabulary import logits
from dgemma_mlx.kernels import vocabulary
from dgemma_mlx.kernels.vocabulary import Running, Scale, Tile
from dgemma_mlx.ops import MlxOps
from tests.compare import EPS, REFERENCE, close, some_bias
from tests.metal import simulator

pytestmark = pytest.mark.usefixtures("metal")

F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16
STEP = {F32: EPS["float32"], BF16: EPS["bfloat16"], F16: 2.0**-10}
NAMES = ("argmax", "sample", "entropy", "soft", "best")
SOFTCAP, TEMPERATURE = 30.0, 0.7
UNIT = SOFTCAP / TEMPERATURE


def scale(rows: int, bias: Bias | None = None) -> Scale:
    return vocabulary.scale_of(MlxOps(), SOFTCAP, TEMPERATURE, rows, bias)


def on_device(bias: tuple[np.ndarray, ...]) -> Bias:
    ops = MlxOps()
    return Bias(ops.asclasses(bias[0]), ops.asarray(bias[1]), ops.aswide(bias[2]))


BELOW_ONE = np.float32(1 - 2.0**-24)

both = pytest.mark.parametrize("step", [vocabulary.tile, vocabulary.tile_plain], ids=["kernel", "plain"])
wide_or_not = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])


def host(x: mx.array) -> np.ndarray:
    return np.array(x.astype(F32) if mx.issubdtype(x.dtype, mx.floating) else x).astype(np.float64)


# ---- a tile --------------------------------------------------------------------------------------------


def raw_logits(shape: tuple[int, int], scale: float, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    rng = np.random.default_rng([seed, *shape])
    return mx.array((scale * rng.standard_normal(shape)).astype(np.float32)).astype(dtype)


def bend(raw: mx.array) -> np.ndarray:
    return np.tanh(host(raw) / SOFTCAP)


def fields(tile: Tile) -> list[mx.array]:
    known = tile.running
    return [known.top, known.mass, known.weighted, known.argmax, tile.fade, tile.p, tile.masses]


def check_tile(tile: Tile, t: np.ndarray, a: int, runs: int, dtype: mx.Dtype) -> None:
    """Assert what is known after t [N, a + W], of which the last W are the tile's; straight from all of t."""
    top = t.max(-1, keepdims=True)
    d = UNIT * (t - top)
    e = np.exp(d)
    close(host(tile.running.top), top, 1e-6, "top")
    close(host(tile.running.mass), e.sum(-1, keepdims=True), 1e-5, "mass")
    close(host(tile.running.weighted), (e * d).sum(-1, keepdims=True), 1e-5, "weighted")
    np.testing.assert_array_equal(host(tile.running.argmax), t.argmax(-1)[:, None])
    before = np.exp(UNIT * (t[:, :a].max(-1, keepdims=True) - top)) if a else 0 * top
    close(host(tile.fade)[:, 0] * (a > 0), before[:, 0], 1e-5, "fade")
    close(host(tile.p), e[:, a:], STEP[dtype] + 1e-5, "p")
    assert (host(tile.p)[e[:, a:] == 1] == 1).all()
    padded = np.pad(e[:, a:], [(0, 0), (0, runs * 32 - e[:, a:].shape[1])])
    sums = padded.reshape(len(t), runs, 32).sum(-1)
    close(host(tile.masses), np.concatenate([top, sums], 1), 1e-5, "masses")


@both
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("W", [1, 7, 32, 129, 1000, 2085])
def test_a_tile_after_another(W: int, dtype: mx.Dtype, biased: bool, step: vocabulary.Step) -> None:
    """A narrower second tile: runs behind its end are empty. 1,024 tokens are a round of the kernel."""
    runs, N = -(-W // 32), 3
    raw = raw_logits((N, W), 8, dtype), raw_logits((N, W // 2 + 1), 9, dtype)
    t, of = np.concatenate([bend(raw[0]), bend(raw[1])], 1), scale(N)
    if biased:
        kinds, which, values = some_bias(N, t.shape[1])
        t += np.take_along_axis(values, kinds[which], -1) / UNIT
        of = scale(N, on_device((kinds, which, values)))
    first = step(Running.start(of), raw[0], of, 0, runs, dtype)
    check_tile(first, t[:, :W], 0, runs, dtype)
    second = step(first.running, raw[1], of, W, runs, dtype)
    check_tile(second, t, W, runs, dtype)
    assert [x.dtype for x in fields(second)] == [F32] * 3 + [mx.int32, F32, dtype, F32]


def test_kernel_and_twin_agree_on_a_row_of_equals() -> None:
    """Values at the cap: the ones that are not there behind the tile's end must not count."""
    raw, steps = mx.full((2, 45), -3e38), (vocabulary.tile, vocabulary.tile_plain)
    ours, twin = (step(Running.start(scale(2)), raw, scale(2), 0, 2, F32) for step in steps)
    for a, b in zip(fields(ours), fields(twin), strict=True):
        np.testing.assert_array_equal(host(a), host(b))
    assert host(ours.masses)[:, 1:].tolist() == [[32, 13]] * 2 and host(ours.running.argmax).max() == 0


@both
def test_the_argmax_is_the_first_of_equals(step: vocabulary.Step) -> None:
    """Of one thread, of neighbours, of simdgroups, of rounds; and a later tile's equal does not take it."""
    places = [(1, 2), (3, 4), (5, 700), (127, 128), (300, 1100), (1023, 1024)]
    raw = np.zeros((len(places), 1200), np.float32)
    for row, pair in zip(raw, places, strict=True):
        row[list(pair)] = 2.5
    one = step(Running.start(scale(len(raw))), mx.array(raw), scale(len(raw)), 0, 38, F32)
    two = step(one.running, mx.array(raw), scale(len(raw)), 1200, 38, F32)
    for tile in (one, two):
        assert host(tile.running.argmax)[:, 0].tolist() == [pair[0] for pair in places]


@both
def test_infinite_logits_are_at_the_cap(step: vocabulary.Step) -> None:
    raw = mx.array([[np.inf, 3.0, -np.inf, np.inf], [-np.inf] * 4]).astype(F16)
    tile = step(Running.start(scale(2)), raw, scale(2), 5, 1, F16)
    assert all(np.isfinite(host(x)).all() for x in fields(tile))
    assert host(tile.running.argmax)[:, 0].tolist() == [5, 5]
    np.testing.assert_allclose(host(tile.running.mass)[:, 0], [2, 4], rtol=1e-6)


def launch(dtype: mx.Dtype, biased: bool) -> Tile:
    """Two rows of a round and a bit, on what an earlier tile left."""
    of = scale(2, on_device(some_bias(2, 1101)) if biased else None)
    before = vocabulary.tile_plain(Running.start(of), raw_logits((2, 40), 3, dtype), of, 0, 34, dtype)
    return vocabulary.tile(before.running, raw_logits((2, 1061), 3, dtype), of, 40, 34, dtype)


@pytest.mark.parametrize("dtype, biased", [(F32, False), (BF16, True), (F16, False)], ids=str)
def test_the_order_of_threads_does_not_matter(simulated: None, dtype: mx.Dtype, biased: bool) -> None:
    forward = launch(dtype, biased)
    for order in ("backward", "shuffled"):
        with simulator.installed(order=order):
            other = launch(dtype, biased)
        for a, b in zip(fields(forward), fields(other), strict=True):
            assert mx.array_equal(a, b)


@pytest.mark.parametrize("sanitizer, biased", [("thread", False), ("address", False), ("address", True)])
def test_sanitizers(simulated: None, sanitizer: str, biased: bool) -> None:
    with simulator.recording() as calls:
        launch(BF16, biased)
    assert simulator.sanitize(calls[0], sanitizer) == []


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_types(simulated: None, dtype: mx.Dtype) -> None:
    """Also of so few logits that MLX puts them into constant memory."""
    with simulator.recording() as calls:
        launch(dtype, False)
        launch(dtype, True)
        vocabulary.tile(Running.start(scale(1)), mx.zeros((1, 3), dtype), scale(1), 0, 1, dtype)
    for call in calls:
        assert simulator.typecheck(call) == []


# ---- all tiles -----------------------------------------------------------------------------------------


@dataclass
class Case:
    """h [N, D], table [V, D] and uniforms [N] on the device, and a tile's width."""

    ops: MlxOps
    h: mx.array
    table: Any
    uniforms: mx.array
    bias: tuple[np.ndarray, ...] | None = None

    @classmethod
    def exact(cls, logits: np.ndarray, uniforms: Any, width: int, dtype: mx.Dtype = F32) -> Case:
        """A head product that is `logits` [N, V], rounded to `dtype` and no further."""
        return cls.of(np.eye(len(logits)), logits.T, uniforms, width, dtype)

    @classmethod
    def of(cls, h: np.ndarray, table: np.ndarray, uniforms: Any, width: int, dtype: mx.Dtype) -> Case:
        ops = MlxOps(dtype)
        ops.vocab_tile = width
        return cls(ops, ops.asarray(h), ops.asarray(np.ascontiguousarray(table)), ops.aswide(uniforms))

    def say(self, step: vocabulary.Step, temperature: float = TEMPERATURE) -> Prediction:
        args = (self.ops, self.h, self.table, SOFTCAP, mx.array(temperature), self.uniforms, step)
        guess = vocabulary.vocabulary(*args, self.bias and on_device(self.bias))
        assert guess.soft.dtype == self.ops.dtype
        return on_host(guess)

    def say_sparse(self, step: vocabulary.Step, bound: float) -> Prediction:
        args = (self.ops, self.h, self.table, SOFTCAP, mx.array(TEMPERATURE), self.uniforms, step, bound)
        guess = vocabulary.sparse_vocabulary(*args, self.bias and on_device(self.bias))
        assert guess.soft.dtype == self.ops.dtype
        return replace(on_host(guess), missing=host(guess.missing))

    def definition(self, temperature: float = TEMPERATURE) -> tuple[Prediction, np.ndarray]:
        """What the composite says of the very same numbers, and the probabilities."""
        table = self.table.map(numpy) if isinstance(self.table, Quantized) else numpy(self.table)
        args = numpy(self.h), dense(REFERENCE, table), SOFTCAP, float(np.float32(temperature))
        z = logits(REFERENCE, *args[:3]) / args[3]
        if self.bias is None:
            return REFERENCE.vocabulary(*args, host(self.uniforms)), REFERENCE.softmax(z, -1)
        kinds, which, values = self.bias
        z += np.take_along_axis(values, kinds[which], -1)
        said = REFERENCE.vocabulary(*args, host(self.uniforms), bias=Bias(*self.bias))
        return said, REFERENCE.softmax(z, -1)


def numpy(x: mx.array) -> np.ndarray:
    return np.array(x) if x.dtype == mx.uint8 else host(x)


def on_host(guess: Prediction) -> Prediction:
    return Prediction(*(host(getattr(guess, name)) for name in NAMES))


def drawn(ours: Prediction, p: np.ndarray, uniforms: Any, off: float = 1e-6) -> None:
    """Assert that each sample is the first token whose cumulative p exceeds its uniform, up to rounding."""
    here, ids, uniforms = np.arange(len(p)), ours.sample.astype(int), host(uniforms)
    reach = np.cumsum(p, -1)[here, ids]
    none = (uniforms > 1 - 1e-6) & (ours.sample == ours.argmax)
    assert (none | (reach > uniforms - off)).all()
    assert (none | (reach - p[here, ids] <= uniforms + off)).all()
    assert (p[here, ids] > 0).all()


@both
@wide_or_not
@pytest.mark.parametrize("V, width", [(5, 96), (96, 96), (97, 32), (230, 41), (300, 7)])
@pytest.mark.parametrize("scale", [0.05, 3.0, 20.0], ids=["flat", "mixed", "peaked"])
def test_statistics(scale: float, V: int, width: int, dtype: mx.Dtype, step: vocabulary.Step) -> None:
    check_statistics(scale, V, width, dtype, step, biased=False)


@both
@wide_or_not
@pytest.mark.parametrize("V, width", [(5, 96), (97, 32), (230, 41)])
def test_statistics_with_a_bias(V: int, width: int, dtype: mx.Dtype, step: vocabulary.Step) -> None:
    check_statistics(3.0, V, width, dtype, step, biased=True)


def check_statistics(
    scale: float, V: int, width: int, dtype: mx.Dtype, step: vocabulary.Step, biased: bool
) -> None:
    rng = np.random.default_rng(V)
    uniforms = np.r_[np.float32(0), BELOW_ONE, rng.random(2, dtype=np.float32)]
    case = Case.exact(scale * rng.standard_normal((4, V)), uniforms, width, dtype)
    case.bias = some_bias(4, V, classes=300 if V == 230 else 5) if biased else None
    ours, (theirs, p) = case.say(step), case.definition()
    np.testing.assert_array_equal(ours.argmax, theirs.argmax)
    drawn(ours, p, case.uniforms)
    np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-4)
    np.testing.assert_allclose(ours.best, p.max(-1), rtol=1e-4)
    close(ours.soft, theirs.soft, 2 * STEP[dtype] + 1e-5, "soft embedding")


@both
@pytest.mark.parametrize("width", [8, 32, 64, 96, 128])
def test_every_edge_of_a_flat_row_belongs_to_the_token_behind_it(width: int, step: vocabulary.Step) -> None:
    """Sums of 128 equal masses are exact: a uniform of k/128 is reached by token k − 1, exceeded by k."""
    V = 128
    case = Case.exact(np.full((V, V), 7.0), np.arange(V) / V, width)
    assert case.say(step).sample.tolist() == list(range(V))


@both
def test_samples_follow_the_distribution(step: vocabulary.Step) -> None:
    """Evenly spaced uniforms meet each token as often as its probability says, to within one."""
    M, V = 500, 90
    logits = np.tile(2 * np.random.default_rng(2).standard_normal(V), (M, 1))
    case = Case.of(np.ones((M, 1)), logits[:1].T, (np.arange(M) + 0.5) / M, 40, BF16)
    counts = np.bincount(case.say(step).sample.astype(int), minlength=V)
    assert np.abs(counts - M * case.definition()[1][0]).max() <= 1.01


@both
@pytest.mark.parametrize("place", [0, 50, 99])
def test_a_token_without_mass_is_never_drawn(place: int, step: vocabulary.Step) -> None:
    """At 0 and just below 1 the only token with any mass is drawn, wherever it is; at 1 the argmax."""
    logits = np.full((3, 100), -90.0)
    logits[:, place] = 90.0
    ours = Case.exact(logits, [0.0, BELOW_ONE, 1.0], 40).say(step, 0.2)
    assert ours.sample.tolist() == [place] * 3 == ours.argmax.tolist()


@both
def test_a_uniform_that_no_sum_exceeds_draws_the_argmax(step: vocabulary.Step) -> None:
    logits = np.random.default_rng(16).standard_normal((9, 100))
    ours = Case.exact(logits, np.full(9, 1.0), 40).say(step)
    np.testing.assert_array_equal(ours.sample, logits.argmax(-1))


@both
def test_runs_and_tiles_without_mass_are_passed_over(step: vocabulary.Step) -> None:
    """At 0 the first token with any mass is drawn: not the first of all, nor the argmax behind it."""
    logits = np.full((2, 300), -90.0)
    logits[0, [197, 199]] = 5.0, 6.0
    logits[1, [33, 230]] = 5.0, 5.5
    assert Case.exact(logits, [0.0, 0.0], 100).say(step, 0.2).sample.tolist() == [197, 33]


def test_logits_computed_again_do_not_move_the_sample_to_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are rounded, and also at the edges of runs."""
    rng, V = np.random.default_rng(6), 320
    case = Case.of(np.ones((1, 1)), 3 * rng.standard_normal((V, 1)), [0.0], 96, F32)
    p = case.definition()[1][0]
    edges = np.r_[0, np.cumsum(p.reshape(-1, 32).sum(-1))[:-1]]  # where runs begin
    uniforms = np.clip(np.r_[edges - 1e-5, edges, edges + 1e-5], 0, 1)
    case.h, case.uniforms = mx.ones((len(uniforms), 1)), case.ops.aswide(uniforms)
    exact, honest = case.say(vocabulary.tile_plain), vocabulary._candidates
    noise = mx.array(rng.standard_normal((len(uniforms), 32)).astype(np.float32))
    monkeypatch.setattr(vocabulary, "_candidates", lambda *args: honest(*args) + noise)
    rough = case.say(vocabulary.tile_plain)
    np.testing.assert_array_equal(exact.sample // 32, rough.sample // 32)
    assert (exact.sample[-len(edges) :] // 32).tolist() == list(range(len(edges)))


def test_what_has_no_mass_is_not_chosen_for_a_sum_that_rises_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As sums in parallel may, whose terms are added in a different order at each place."""
    masses, honest = mx.array([[[0.5, 4.0, 0.0, 4.0]]]), mx.cumsum
    risen = mx.array([[0.0, 1e-6, 0.0]])
    monkeypatch.setattr(mx, "cumsum", lambda *args, **kwargs: honest(*args, **kwargs) + risen)
    run, rest = vocabulary._run(scale(1), mx.array([[0.5]]), masses, mx.array([0.5]))
    assert run.item() == 2 and rest.item() == 0
    token = vocabulary._draw(mx.array([[7, 8, 9]]), masses[0, :, 1:], mx.array([[0.5]]), mx.array([[0]]))
    assert token.item() == 9


@both
def test_logits_far_beyond_the_softcap_stay_finite(step: vocabulary.Step) -> None:
    rng = np.random.default_rng(5)
    logits = np.array([[-3e4], [3e4], [1e-30]]) * rng.random((3, 70))
    case = Case.exact(logits, np.full(3, 0.5), 32)
    ours, (theirs, _) = case.say(step, 0.01), case.definition(0.01)
    assert np.isfinite(ours.entropy).all()
    np.testing.assert_allclose(ours.entropy[1:], theirs.entropy[1:], atol=1e-3)


@both
def test_a_sure_row_has_an_entropy_of_zero_and_no_less(step: vocabulary.Step) -> None:
    logits = np.random.default_rng(15).uniform(-30, 5, (20, 90))
    logits[np.arange(20), np.arange(20) * 4] = np.linspace(40, 60, 20)
    entropy = Case.exact(logits, np.zeros(20), 32).say(step, 0.4).entropy
    assert (entropy >= 0).all() and entropy.max() < 1e-6


@both
@wide_or_not
def test_a_nan_row_stays_alone(dtype: mx.Dtype, step: vocabulary.Step) -> None:
    rng = np.random.default_rng(7)
    h, table, uniforms = rng.standard_normal((5, 8)), 6 * rng.standard_normal((130, 8)), rng.random(5)
    before = Case.of(h, table, uniforms, 48, dtype).say(step)
    h[2] = np.nan
    after = Case.of(h, table, uniforms, 48, dtype).say(step)
    others = [0, 1, 3, 4]
    for name in NAMES:
        np.testing.assert_array_equal(getattr(after, name)[others], getattr(before, name)[others])
    assert np.isnan(after.entropy[2]) and np.isnan(after.soft[2]).all()
    assert 0 <= after.argmax[2] < 130 and 0 <= after.sample[2] < 130


@both
def test_one_nan_among_a_rows_logits(step: vocabulary.Step) -> None:
    """A token's table row is NaN: every row says so, and names a token that exists."""
    rng = np.random.default_rng(8)
    table = rng.standard_normal((100, 4))
    table[60, 1] = np.nan
    ours = Case.of(rng.standard_normal((3, 4)), table, rng.random(3), 32, F32).say(step)
    assert np.isnan(ours.entropy).all() and np.isnan(ours.soft).any(-1).all()
    assert ((ours.argmax >= 0) & (ours.argmax < 100) & (ours.sample >= 0) & (ours.sample < 100)).all()


def test_temperature_is_an_array_or_a_number() -> None:
    rng = np.random.default_rng(9)
    case = Case.exact(4 * rng.standard_normal((3, 60)), rng.random(3), 32)
    for step in (vocabulary.tile, vocabulary.tile_plain):
        said = [
            vocabulary.vocabulary(case.ops, case.h, case.table, SOFTCAP, t, case.uniforms, step)
            for t in (0.5, mx.array(0.5))
        ]
        assert all(mx.array_equal(getattr(said[0], name), getattr(said[1], name)) for name in NAMES)


# ---- tables that are records ---------------------------------------------------------------------------

FORMS = [affine(8, 64), affine(4, 32), affine(6, 64), MXFP4, MXFP8, NVFP4]


def record(table: np.ndarray, form: Form, factor: str) -> Quantized:
    made = quantize(table.astype(np.float32), form).map(mx.array)
    if factor == "as it is":
        return made
    rows = np.random.default_rng(3).uniform(0.5, 2, len(table)).astype(np.float32)
    return replace(made, factor=mx.array(rows), divides=factor == "divides")


@both
@wide_or_not
@pytest.mark.parametrize(
    "form, factor",
    [(form, "as it is") for form in FORMS] + [(MXFP8, "a row"), (affine(8, 64), "divides")],
    ids=lambda x: str(x).replace(" ", "-"),
)
def test_a_table_that_is_a_record(form: Form, factor: str, dtype: mx.Dtype, step: vocabulary.Step) -> None:
    rng = np.random.default_rng(10)
    N, V, D = 5, 150, 64
    case = Case.of(rng.standard_normal((N, D)), np.zeros((V, D)), rng.random(N), 64, dtype)
    case.table = record(0.3 * rng.standard_normal((V, D)), form, factor)
    if form.mode == "affine" and dtype == BF16:  # as MLX has them, and as they are placed
        kind = {"scales": case.table.scales.astype(BF16), "biases": case.table.biases.astype(BF16)}
        case.table = replace(case.table, **kind)
    ours, (theirs, p) = case.say(step), case.definition()
    off = 2 * STEP[dtype] * 12 + 1e-5  # a logit is off by a rounding of some 8 / temperature
    here = np.arange(N)
    assert (p[here, ours.argmax.astype(int)] >= p.max(-1) * (1 - 2 * off)).all()
    drawn(ours, p, case.uniforms, off)
    np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=3 * off)
    close(ours.soft, theirs.soft, off, "soft embedding")


@wide_or_not
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_candidates_are_what_the_head_gives(form: Form, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(11)
    ops = MlxOps(dtype)
    h, table = ops.asarray(rng.standard_normal((3, 64))), record(rng.standard_normal((70, 64)), form, "a row")
    ids = mx.array([[0, 69, 3], [70, 5, 5], [31, 32, 33]])  # 70 is behind the end, and passed over later
    ours = vocabulary._candidates(h, vocabulary._rows(ops, table, ids))
    head = mx.take_along_axis(ops.linear(h, table), mx.minimum(ids, 69), -1)
    assert ours.dtype == dtype
    close(host(ours), host(head), 3 * STEP[dtype], "candidates")


# ---- soft embeddings that leave something out ----------------------------------------------------------


@both
@wide_or_not
@pytest.mark.parametrize("form", [None, affine(8, 64), MXFP8], ids=str)
@pytest.mark.parametrize(
    "bound, biased", [(0.02, False), (0.999, False), (0.02, True)], ids=["some", "all sparse", "biased"]
)
def test_a_sparse_soft_embedding(
    bound: float, biased: bool, form: Form | None, dtype: mx.Dtype, step: vocabulary.Step
) -> None:
    """Of a table that may be a record, with a last run and a last tile that are cut short."""
    rng, (N, V, D) = np.random.default_rng(17), (12, 150, 64)
    h = np.linspace(0, 4, N)[:, None] * rng.standard_normal((N, D))
    case = Case.of(h, 0.3 * rng.standard_normal((V, D)), rng.random(N), 70, dtype)
    if form:
        case.table = record(numpy(case.table), form, "a row")
    case.bias = some_bias(N, V) if biased else None
    case.ops.soft_tokens = 64
    full, some = case.say(step), case.say_sparse(step, bound)
    for name in NAMES[:3]:
        np.testing.assert_array_equal(getattr(some, name), getattr(full, name))
    sparse = some.missing > 0
    assert (some.missing <= bound).all() and sparse.any() and sparse.all() == (bound > 0.9)
    error, largest = np.abs(some.soft - full.soft).max(-1), 1.5
    assert (error <= (some.missing + 20 * STEP[dtype]) * largest).all()
    np.testing.assert_allclose(error[~sparse], 0, atol=2 * STEP[dtype])


@both
def test_a_sparse_row_gathers_the_runs_of_the_most_mass(step: vocabulary.Step) -> None:
    """Three tokens of the same mass lie in three runs: two of those are kept, and a third is missing."""
    logits = np.full((1, 300), -60.0)
    logits[0, [40, 130, 131, 299]] = 5.0
    case = Case.exact(logits, [0.5], 100)
    case.ops.soft_tokens = 64
    some = case.say_sparse(step, 0.5)
    np.testing.assert_allclose(some.missing, [0.25], rtol=1e-5)
    np.testing.assert_allclose(some.soft, [[0.75 * 5]], rtol=1e-5)
    assert case.say_sparse(step, 0.2).missing == 0


def test_rows_are_gathered_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(18)
    case = Case.of(rng.standard_normal((7, 8)), rng.standard_normal((200, 8)), rng.random(7), 64, F32)
    whole = case.say_sparse(vocabulary.tile_plain, 0.9)
    monkeypatch.setattr(vocabulary, "GATHERED", 3 * 128)
    close(case.say_sparse(vocabulary.tile_plain, 0.9).soft, whole.soft, 1e-6, "soft embedding")


def test_only_dense_rows_are_read_twice(simulated: None) -> None:
    """Flat rows and sure ones in turn: three tiles for all ten, and again for the five that are flat."""
    logits = np.zeros((10, 300))
    logits[1::2, 7] = 30
    case = Case.exact(logits, np.full(10, 0.5), 100)
    with simulator.recording() as calls:
        some = case.say_sparse(vocabulary.tile, 1e-3)
    assert (some.missing > 0).tolist() == [False, True] * 5
    assert [call.inputs[0].shape for call in calls] == [(10, 100)] * 3 + [(5, 100)] * 3


# ---- wiring and memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels, launches", [(frozenset({"vocabulary"}), 8), (frozenset(), 0)])
def test_the_backend_launches_one_kernel_a_tile(
    simulated: None, kernels: frozenset[str], launches: int
) -> None:
    """Four tiles for each of two blocks of rows."""
    rng = np.random.default_rng(12)
    case = Case.of(rng.standard_normal((7, 8)), rng.standard_normal((100, 8)), rng.random(7), 30, F32)
    ops = MlxOps(F32, kernels)
    ops.vocab_tile, ops.vocab_rows = 30, 4
    for bias, name in ((None, "tile"), (some_bias(7, 100), "tile_biased")):
        case.bias = bias
        given = case.h, case.table, SOFTCAP, TEMPERATURE, case.uniforms
        with simulator.recording() as calls:
            said = ops.vocabulary(*given, bias=bias and on_device(bias))
        assert [call.kernel.name for call in calls] == [f"dgemma_vocabulary_{name}"] * launches
        theirs, p = case.definition()
        np.testing.assert_array_equal(host(said.argmax), theirs.argmax)
        drawn(on_host(said), p, case.uniforms)


def test_a_whole_vocabulary_draws_where_the_definition_does() -> None:
    """8,192 runs: their sums are float32, and a flat row is where that shows."""
    rng, V, N = np.random.default_rng(13), 262_144, 4
    case = Case.of(rng.standard_normal((N, 4)), 0.5 * rng.standard_normal((V, 4)), rng.random(N), 16384, F32)
    ours, (theirs, p) = case.say(vocabulary.tile_plain), case.definition()
    drawn(ours, p, case.uniforms, 1e-5)
    np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-4)
    close(ours.soft, theirs.soft, 1e-4, "soft embedding")


def test_no_plane_of_logits_exists() -> None:
    """Some tiles, the masses of runs and nothing else; the definition holds a plane, of 16.8 MB here."""
    N, V, width = 64, 65536, 1024
    rng = np.random.default_rng(14)
    case = Case.of(rng.standard_normal((N, 16)), rng.standard_normal((V, 16)), rng.random(N), width, F32)
    mx.eval(case.h, case.table, case.uniforms)

    def peak(function: Any) -> int:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        said = function(case.ops, case.h, case.table, SOFTCAP, mx.full((N,), TEMPERATURE), case.uniforms)
        mx.eval([getattr(said, name) for name in NAMES])
        return mx.get_peak_memory() - before

    plane = N * V * 4
    assert peak(vocabulary.vocabulary_plain) <= plane // 3 < plane <= peak(Ops.vocabulary_rows)
