"""A canvas's attention piece by piece, with the kernel and without, against the composite in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma.network.ops import Mask, Ops
from dgemma_mlx.kernels import attention
from dgemma_mlx.kernels.attention import (
    Path,
    Weighed,
    attend,
    attend_plain,
    merged,
    merged_plain,
    slots,
    softmax,
    softmax_plain,
)
from dgemma_mlx.ops import MlxOps
from tests.compare import EPS, REFERENCE, close
from tests.metal import simulator

pytestmark = pytest.mark.usefixtures("metal")

ORDERS = ("forward", "backward", "shuffled")
F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16
STEP = {F32: EPS["float32"], BF16: EPS["bfloat16"], F16: 2.0**-10}

formats = pytest.mark.parametrize("dtype", STEP, ids=["float32", "bfloat16", "float16"])


def attend_plain_on_gpu(ops: MlxOps, *args: Any) -> mx.array:
    """`attend_plain` as a GPU runs it, which is not as a CPU does."""
    ops.on_gpu = True
    return attend_plain(ops, *args)


both = pytest.mark.parametrize(
    "run", [attend, attend_plain, attend_plain_on_gpu], ids=["kernel", "cpu", "gpu"]
)


def host(x: mx.array) -> np.ndarray:
    """The same numbers in float64."""
    return np.array(x.astype(F32)).astype(np.float64)


@dataclass(frozen=True)
class Case:
    """A canvas of L over P slots, and where the tokens of each row begin."""

    q: np.ndarray
    own: tuple[np.ndarray, np.ndarray]
    past: tuple[np.ndarray, np.ndarray] | None
    pad: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, B: int, H: int, G: int, L: int, P: int | None, C: int, pad: tuple[int, ...] | None = None
    ) -> Case:
        """Unit normals, queries scaled so that scores have some spread; P None is no past at all."""
        rng = np.random.default_rng([B, H, G, L, C])
        q = 2 * rng.standard_normal((B, H, L, C)) * C**-0.5
        own, past = [
            (rng.standard_normal((B, G, n, C)), rng.standard_normal((B, G, n, C))) for n in (L, P or 0)
        ]
        return cls(q, own, None if P is None else past, pad)

    def rounded(self, dtype: mx.Dtype) -> Case:
        """The numbers that `dtype` has."""

        def cut(x: np.ndarray) -> np.ndarray:
            return host(mx.array(x.astype(np.float32)).astype(dtype))

        past = None if self.past is None else (cut(self.past[0]), cut(self.past[1]))
        return replace(self, q=cut(self.q), own=(cut(self.own[0]), cut(self.own[1])), past=past)

    def arrays(self, dtype: mx.Dtype) -> tuple[Any, Any, Any, Any]:
        """q, own, past and pad as `attend` takes them; the past is a window of a longer cache."""

        def put(x: np.ndarray) -> mx.array:
            return mx.array(x.astype(np.float32)).astype(dtype)

        def window(x: np.ndarray) -> mx.array:
            return put(np.pad(x, ((0, 0), (0, 0), (3, 2), (0, 0)), constant_values=np.nan))[:, :, 3:-2]

        past = None if self.past is None else tuple(map(window, self.past))
        pad = None if self.pad is None else mx.array(self.pad)
        return put(self.q), tuple(map(put, self.own)), past, pad

    def expected(self) -> np.ndarray:
        pad = None if self.pad is None else np.array(self.pad)
        return REFERENCE.attend(self.q, self.own, self.past, Mask(pad))

    def scores(self) -> float:
        """The largest, by which a rounding of scores counts."""
        k = self.own[0] if self.past is None else np.concatenate([self.past[0], self.own[0]], 2)
        k = np.repeat(k, self.q.shape[1] // k.shape[1], 1)
        return float(np.abs(self.q @ k.swapaxes(2, 3)).max())


def backend(most: int | None = None) -> MlxOps:
    """Plain MLX, with `most` bytes of scores."""
    ops = MlxOps(F32, frozenset())
    ops.score_bytes = most or ops.score_bytes
    return ops


def pieces_of(case: Case, n: int, at_once: int = 1) -> MlxOps:
    """MLX whose pieces have n slots; at most `at_once` of them are weighed at once, in float32."""
    B, H, L, _ = case.q.shape
    ops = backend(4 * B * H * L * n)
    ops.scores_at_once = at_once * ops.score_bytes
    assert slots(B * H * L, ops.score_bytes) == n
    return ops


def check(run: Any, case: Case, dtype: mx.Dtype = F32, n: int = 1024, at_once: int = 1) -> np.ndarray:
    case = case.rounded(dtype)
    q, own, past, pad = case.arrays(dtype)
    y = run(pieces_of(case, n, at_once), q, own, past, Mask(pad, window=5))
    assert y.dtype == dtype and y.shape == q.shape
    # A rounded score moves its weight by the score's error, and the sum of weights by as much; then weights
    # are rounded, the sum over a piece, and the output.
    bound = max(1e-5, (3 + 2 * case.scores()) * STEP[dtype] / 2)
    close(host(y), case.expected(), bound, f"{run.__name__}, pieces of {n}")
    return host(y)


# ---- attend ----------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("H", "G"), [(2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize(("B", "L", "P", "C"), [(1, 1, 1, 2), (2, 5, 7, 16), (1, 16, 37, 20), (3, 7, 300, 8)])
def test_groups_of_heads_and_odd_sizes(run: Any, B: int, L: int, P: int, C: int, H: int, G: int) -> None:
    check(run, Case.of(B, H, G, L, P, C))


@both
@formats
@pytest.mark.parametrize(("n", "at_once"), [(1024, 1), (9, 1), (9, 2)])
def test_formats(run: Any, dtype: mx.Dtype, n: int, at_once: int) -> None:
    check(run, Case.of(2, 4, 2, 11, 45, 32, pad=(0, 17)), dtype, n, at_once)


@both
@pytest.mark.parametrize("P", [None, 0])
def test_a_canvas_alone(run: Any, P: int | None) -> None:
    """Without a past, and with an empty one, where a ragged pass gives pads of 0 and less."""
    check(run, Case.of(2, 4, 2, 7, P, 16))
    check(run, Case.of(2, 4, 2, 7, P, 16, pad=(0, -3)))


@both
@pytest.mark.parametrize("n", [1, 7, 10, 20, 29, 30, 31])
@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("pad", [None, (0, 3), (30, 29), (17, -5), (10, 9)], ids=str)
def test_pieces_and_padding(run: Any, pad: tuple[int, ...] | None, at_once: int, n: int) -> None:
    """Even and uneven pieces of 30 slots and groups of them; padding ends within, at an edge, behind all."""
    check(run, Case.of(2, 2, 1, 5, 30, 8, pad), n=n, at_once=at_once)


@both
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_large_scores(run: Any, size: float) -> None:
    """Scores are not scaled: at ±300 the softmax is a choice, and must not overflow."""
    case = Case.of(1, 2, 1, 9, 40, 16)
    case = replace(case, q=size * case.q)
    assert case.scores() > 300
    for n in (1024, 11):
        # A float32 score of 300 is off by 2⁻¹⁶, and its weight by as much.
        q, own, past, pad = case.rounded(F32).arrays(F32)
        y = run(pieces_of(case, n), q, own, past, Mask(pad))
        close(host(y), case.rounded(F32).expected(), 2e-4, f"pieces of {n}")


@both
@pytest.mark.parametrize(("C", "H", "G", "P"), [(256, 4, 2, 1023), (512, 8, 1, 1024), (512, 8, 1, 2500)])
def test_the_released_heads(run: Any, C: int, H: int, G: int, P: int) -> None:
    """Windows of one piece, a context of one, and one of three."""
    check(run, Case.of(1, H, G, 16, P, C), BF16, at_once=2)


@both
@pytest.mark.parametrize("n", [1024, 7])
def test_padding_does_not_leak(run: Any, n: int) -> None:
    """Keys may be anything there, NaN included. Values have to be finite, and are hidden by a weight of 0."""
    case, spoiled = (Case.of(2, 2, 1, 5, 30, 8, pad=(19, 30)) for _ in range(2))
    assert case.pad and spoiled.past
    for b, end in enumerate(case.pad):
        spoiled.past[0][b, :, :end] = np.nan
        spoiled.past[1][b, :, :end] = 1e9
    np.testing.assert_array_equal(finite(run, spoiled, n), finite(run, case, n))


def finite(run: Any, case: Case, n: int) -> np.ndarray:
    q, own, past, pad = case.arrays(F32)
    y = host(run(pieces_of(case, n), q, own, past, Mask(pad)))
    assert np.isfinite(y).all()
    return y


@both
@pytest.mark.parametrize("n", [1024, 7])
def test_a_nan_query_stays_alone(run: Any, n: int) -> None:
    case = Case.of(1, 4, 2, 9, 20, 16)
    before = finite(run, case, n)
    q, own, past, pad = case.arrays(F32)
    q[0, 1, 4] = np.nan
    after = host(run(pieces_of(case, n), q, own, past, Mask(pad)))
    assert np.isnan(after[0, 1, 4]).all()
    after[0, 1, 4] = before[0, 1, 4]
    np.testing.assert_array_equal(after, before)


@both
def test_a_causal_pass_is_the_composite(run: Any) -> None:
    case = Case.of(2, 4, 2, 7, 30, 16, pad=(3, 0))
    q, own, past, pad = case.arrays(F32)
    expected = REFERENCE.attend(case.q, case.own, case.past, Mask(np.array(case.pad), True, 9))
    close(host(run(backend(), q, own, past, Mask(pad, True, 9))), expected, 1e-5, "causal")


@both
def test_compiled(run: Any) -> None:
    """As on a GPU, where a step is compiled: the edges between pieces hold, and nothing reads the host."""
    if run is attend and simulator.active():
        pytest.skip("the simulator launches at once, and a traced array has no values")
    case = Case.of(2, 4, 2, 5, 30, 16, pad=(3, 11))
    q, own, past, pad = case.arrays(F32)
    ops = pieces_of(case, 8, 2)

    def call(q: Any, own: Any, past: Any, pad: Any) -> mx.array:
        return run(ops, q, own, past, Mask(pad))

    close(host(mx.compile(call)(q, own, past, pad)), case.expected(), 1e-5, "compiled")


# ---- softmax ---------------------------------------------------------------------------------------


def scores(B: int, G: int, R: int, sizes: Sequence[int], dtype: mx.Dtype, N: int = 1) -> list[mx.array]:
    rng = np.random.default_rng(0)
    some = [4 * rng.standard_normal((B, G, N, R, n)) for n in sizes]
    return [mx.array(x.astype(np.float32)).astype(dtype) for x in some]


def exact(pieces: Sequence[mx.array], hidden: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights and log Σ exp of joined rows in float64; `hidden` [B] slots of the first piece are."""
    x = np.concatenate([host(s) for s in pieces], -1)
    if hidden is not None:
        slot = np.arange(x.shape[-1])
        mask = (slot < hidden[:, None]) & (slot < pieces[0].shape[-1])
        x = np.where(mask[:, None, None, None], -np.inf, x)
    top = x.max(-1, keepdims=True)
    e = np.exp(x - top)
    mass = e.sum(-1, keepdims=True)
    return e / mass, top + np.log(mass)


SIZES = [(1,), (13,), (33, 7), (1, 1), (256,), (300, 20), (64, 256), (1023, 16)]
FORMATS = [*((sizes, F32) for sizes in SIZES), ((33, 7), BF16), ((33, 7), F16), ((1024, 256), BF16)]


@pytest.mark.parametrize(("sizes", "dtype"), FORMATS, ids=str)
@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("hidden", [None, (5, 11), (-3, 0)], ids=str)
def test_softmax(sizes: tuple[int, ...], dtype: mx.Dtype, hidden: tuple[int, ...] | None, start: int) -> None:
    """`hidden` slots of the first piece, whose first slot is `start`; of a piece alone one is left."""
    pieces = scores(2, 2, 3, sizes, dtype)
    slots = None if hidden is None else np.minimum(hidden, sizes[0] - (len(sizes) == 1))
    pad = None if slots is None else mx.array(start + slots)
    expected, log_expected = exact(pieces, slots)
    weights, log_mass = softmax(pieces, pad, start)
    assert [p.shape for p in weights] == [s.shape for s in pieces]
    assert {p.dtype for p in weights} == {dtype} and log_mass.dtype == F32
    joined = np.concatenate([host(p) for p in weights], -1)
    close(joined, expected, STEP[dtype] / 2 + 1e-6, "weights")
    assert (joined[expected == 0] == 0).all()
    close(host(log_mass), log_expected, 1e-6, "log mass")
    twin, log_mass = softmax_plain(backend(), pieces, pad, start)
    assert [p.shape for p in twin] == [s.shape for s in pieces]
    close(np.concatenate([host(p) for p in twin], -1), expected, STEP[dtype] / 2 + 1e-5, "twin")
    close(host(log_mass), log_expected, 1e-6, "twin's log mass")


def test_softmax_of_several_pieces() -> None:
    """Each as it is alone, with the slots that it begins at; padding ends within one and at an edge."""
    N, n, start = 3, 40, 7
    (pieces,) = scores(2, 2, 3, (n,), F32, N)
    pad = mx.array([start + n + 5, start + n])
    for run in (softmax, lambda *args: softmax_plain(backend(), *args)):
        (weights,), log_mass = run([pieces], pad, start)
        for i in range(1, N):
            (alone,), log_alone = run([pieces[:, :, i : i + 1]], pad, start + i * n)
            np.testing.assert_array_equal(host(weights[:, :, i : i + 1]), host(alone))
            np.testing.assert_array_equal(host(log_mass[:, :, i : i + 1]), host(log_alone))


@formats
def test_a_row_without_a_slot_weighs_nothing(dtype: mx.Dtype) -> None:
    """All of a piece is padding: weights are 0, and what another piece weighs is all there is."""
    (piece,) = scores(2, 1, 3, (40,), dtype)
    weights, log_mass = softmax([piece], mx.array([90, 41]), 50)
    assert not host(weights[0])[0].any() and host(weights[0])[1].any()
    assert (host(log_mass)[0] < -1e38).all() and np.isfinite(host(log_mass)).all()


def test_a_hidden_score_is_not_read() -> None:
    pieces = scores(2, 1, 3, (40, 9), F32)
    clean = softmax(pieces, mx.array([3, 40]), 0)
    pieces[0][0, ..., :3], pieces[0][1] = np.nan, np.inf
    dirty = softmax(pieces, mx.array([3, 40]), 0)
    for a, b in zip([*clean[0], clean[1]], [*dirty[0], dirty[1]], strict=True):
        np.testing.assert_array_equal(host(a), host(b))


# ---- merging ---------------------------------------------------------------------------------------


def weighed_rows(N: int, dtype: mx.Dtype, C: int = 20) -> Weighed:
    """Means of 2 × 2 × N × 5 rows, of which the last weighs nothing and the one before is all there is."""
    rng = np.random.default_rng(N)
    y, log_mass = rng.standard_normal((2, 2, N, 5, C)), 3 * rng.standard_normal((2, 2, N, 5, 1))
    log_mass[:, :, :, 4], y[:, :, :, 4], log_mass[:, :, 1:, 3] = -3e38, 0, -3e38
    return Weighed(mx.array(y.astype(np.float32)).astype(dtype), mx.array(log_mass.astype(np.float32)))


@formats
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("before", [False, True])
def test_merge(dtype: mx.Dtype, N: int, before: bool) -> None:
    new, total = weighed_rows(N, dtype), weighed_rows(1, F32) if before else None
    each = [new] if total is None else [total, new]
    y, logs = (np.concatenate([host(getattr(w, name)) for w in each], 2) for name in ("y", "log_mass"))
    top = logs.max(2, keepdims=True)
    mass = np.exp(logs - top).sum(2, keepdims=True)
    expected = (y * np.exp(logs - top) / mass).sum(2, keepdims=True)
    for run in (merged, merged_plain):
        out = run(backend(), total, new)
        close(host(out.y), expected, 1e-6, run.__name__)
        close(host(out.log_mass)[..., :4, :], (top + np.log(mass))[..., :4, :], 1e-6, "log")
        assert (host(out.log_mass)[..., 4, :] < -1e38).all()


def test_a_merge_keeps_nan_to_its_row() -> None:
    new, total = weighed_rows(2, F32), weighed_rows(1, F32)
    for spoiled in (new.y, new.log_mass, total.y, total.log_mass):
        clean = host(merged(backend(), total, new).y)
        kept = spoiled[1, 0, 0, 2]
        spoiled[1, 0, 0, 2] = np.nan
        dirty = host(merged(backend(), total, new).y)
        assert np.isnan(dirty[1, 0, 0, 2]).all()
        dirty[1, 0, 0, 2] = clean[1, 0, 0, 2]
        np.testing.assert_array_equal(dirty, clean)
        spoiled[1, 0, 0, 2] = kept


# ---- temporaries -----------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize(("P", "most"), [(1023, 64 << 20), (1024, 64 << 20), (1 << 17, 256_000_000)])
@pytest.mark.parametrize("B", [1, 4])
def test_the_largest_temporary_of_the_released_model(dtype: mx.Dtype, B: int, P: int, most: int) -> None:
    """By the shapes that are weighed: 16 heads and a canvas of 256. Nothing is computed."""
    H, L = 16, 256
    q = mx.zeros((B, H, L, 512), dtype)
    own, past = [(mx.zeros((B, 2, n, 512), dtype),) * 2 for n in (L, P)]
    seen: list[int] = []

    def weigh(ops: Any, x: mx.array, pieces: Any, pad: Any, start: int) -> Weighed:
        assert start == sum(seen) and x.shape == (B, 2, 1, H // 2 * L, 512)
        (_, _, N, n, _) = pieces[0][0].shape
        seen.append(N * n)
        assert all(dtype.size * x.size // 512 * k.shape[2] * k.shape[3] <= most for k, _ in pieces)
        return Weighed(x, x[..., :1])

    ops = MlxOps(F32, frozenset())
    ops.score_bytes = MlxOps.score_bytes  # as on a GPU
    attention._attend(ops, q, own, past, None, Path(ops.scores_at_once, weigh, lambda ops, total, new: new))
    assert sum(seen) == P
    if P > 1024 and B == 1:  # three pieces at once of 16, the last one with the canvas
        assert len(seen) == (6 if dtype.size == 2 else 16)


@pytest.mark.parametrize("P", [8192, 16384])
def test_memory_does_not_grow_with_the_context(P: int) -> None:
    """Operations are in flight on a CPU, each with a piece's scores."""
    case = Case.of(1, 8, 1, 32, P, 16)
    q, own, past, pad = case.arrays(F32)
    past = tuple(mx.contiguous(x) for x in past)
    ops = pieces_of(case, 256)
    mx.eval(q, own, past)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend_plain(ops, q, own, past, Mask(pad)))
    assert mx.get_peak_memory() - before <= 16 * ops.score_bytes  # the scores of 4,096 slots


# ---- what only the simulator can tell --------------------------------------------------------------

PAD = [3, 50]
LAUNCHES = {  # sizes of what is weighed together, and how many pieces of the first
    "a pair": ((33, 7), 1),
    "one piece": ((40,), 1),
    "three pieces": ((40,), 3),
    "more than a simdgroup": ((290, 20), 1),
}
named = pytest.mark.parametrize("name", [*LAUNCHES, "merge"])


def outputs(name: str, dtype: mx.Dtype = BF16) -> list[mx.array]:
    """Of one launch."""
    if name == "merge":
        out = merged(backend(), weighed_rows(1, F32), weighed_rows(3, dtype))
        return [out.y, out.log_mass]
    sizes, N = LAUNCHES[name]
    weights, log_mass = softmax(scores(2, 2, 2, sizes, dtype, N), mx.array(PAD), 0)
    return [*weights, log_mass]


def launched(name: str, dtype: mx.Dtype = BF16) -> simulator.Call:
    with simulator.recording() as calls:
        outputs(name, dtype)
    (call,) = calls
    return call


@named
def test_the_order_of_lanes_makes_no_difference(simulated: None, name: str) -> None:
    found = []
    for order in ORDERS:
        with simulator.installed(order=order):
            found.append([host(x) for x in outputs(name, F32)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@named
@formats
def test_types(simulated: None, name: str, dtype: mx.Dtype) -> None:
    assert not simulator.typecheck(launched(name, dtype))


def test_types_of_the_smallest_inputs(simulated: None) -> None:
    """Inputs of fewer than 8 values are in another address space."""
    with simulator.recording() as calls:
        softmax(scores(1, 1, 1, (3, 2), F32), None, 0)
        one = Weighed(mx.ones((1, 1, 2, 1, 3)), mx.ones((1, 1, 2, 1, 1)))
        merged(backend(), None, one)
        merged(backend(), Weighed(one.y[:, :, :1], one.log_mass[:, :, :1]), one)
    assert [simulator.typecheck(call) for call in calls] == [[]] * 3


@named
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers(simulated: None, name: str, sanitizer: str) -> None:
    assert simulator.sanitize(launched(name), sanitizer) == []


def test_one_launch_a_group(simulated: None) -> None:
    """And another for its merge, but where it is alone; eight scores a thread at most, as released."""
    case = Case.of(1, 2, 1, 3, 30, 8, pad=(4,))
    for n, at_once, groups in ((1024, 1, 1), (30, 1, 1), (10, 1, 3), (10, 2, 2), (7, 1, 5), (7, 3, 3)):
        q, own, past, pad = case.arrays(F32)
        with simulator.recording() as calls:
            attend(pieces_of(case, n, at_once), q, own, past, Mask(pad))
        names = [call.kernel.name for call in calls]
        assert names.count("dgemma_attention_softmax") == groups, (n, at_once)
        assert len(names) == groups + (groups if at_once > 1 else groups - 1), (n, at_once)
    with simulator.recording() as calls:
        softmax(scores(1, 1, 2, (1024, 256), BF16), None, 0)
    assert dict(calls[0].template)["HELD"] == 5 and calls[0].threadgroup == (256, 1, 1)


def test_nothing_is_joined(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of a cache: neither way concatenates."""

    def refuse(*args: Any) -> None:
        raise AssertionError("keys or values were joined")

    case = Case.of(2, 4, 2, 5, 30, 8)
    q, own, past, pad = case.arrays(F32)
    ops = pieces_of(case, 8)
    monkeypatch.setattr(Ops, "attend", refuse)
    monkeypatch.setattr(mx, "concatenate", refuse)
    for run in (attend, attend_plain):
        run(ops, q, own, past, Mask(pad))
