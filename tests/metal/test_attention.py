"""A canvas's attention part by part, with the kernel and without, against the composite in float64."""

from __future__ import annotations

from collections import Counter
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
    attend_row,
    attend_row_plain,
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


def attend_row_plain_on_gpu(ops: MlxOps, *args: Any) -> mx.array:
    """`attend_row_plain` as a GPU runs it, which is not as a CPU does."""
    ops.on_gpu = True
    return attend_row_plain(ops, *args)


both = pytest.mark.parametrize(
    "run", [attend_row, attend_row_plain, attend_row_plain_on_gpu], ids=["kernel", "cpu", "gpu"]
)


def host(x: mx.array) -> np.ndarray:
    """The same numbers in float64."""
    return np.array(x.astype(F32)).astype(np.float64)


@dataclass(frozen=True)
class Case:
    """A row's canvas of L over a past in pieces."""

    q: np.ndarray
    own: tuple[np.ndarray, np.ndarray]
    past: list[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, H: int, G: int, L: int, past: Sequence[int], C: int) -> Case:
        """Unit normals, queries scaled so that scores have some spread."""
        rng = np.random.default_rng([H, G, L, C])
        q = 2 * rng.standard_normal((H, L, C)) * C**-0.5
        own, *pieces = [(rng.standard_normal((G, n, C)), rng.standard_normal((G, n, C))) for n in (L, *past)]
        return cls(q, own, pieces)

    def rounded(self, dtype: mx.Dtype) -> Case:
        """The numbers that `dtype` has."""

        def cut(x: np.ndarray) -> np.ndarray:
            return host(put(x, dtype))

        past = [(cut(k), cut(v)) for k, v in self.past]
        return Case(cut(self.q), (cut(self.own[0]), cut(self.own[1])), past)

    def arrays(self, dtype: mx.Dtype = F32) -> tuple[mx.array, Any, Any]:
        """q, own and past as `attend_row` takes them; each piece is a window of a longer one."""

        def window(x: np.ndarray) -> mx.array:
            return put(np.pad(x, ((0, 0), (3, 2), (0, 0)), constant_values=np.nan), dtype)[:, 3:-2]

        past = [(window(k), window(v)) for k, v in self.past]
        return put(self.q, dtype), (put(self.own[0], dtype), put(self.own[1], dtype)), past

    def expected(self, mask: Mask | None = None) -> np.ndarray:
        return REFERENCE.attend_row(self.q, self.own, self.past, mask or Mask())

    def scores(self) -> float:
        """The largest, by which a rounding of scores counts."""
        k = np.concatenate([k for k, _ in (*self.past, self.own)], 1)
        k = np.repeat(k, self.q.shape[0] // k.shape[0], 0)
        return float(np.abs(self.q @ k.swapaxes(1, 2)).max())


def put(x: np.ndarray, dtype: mx.Dtype = F32) -> mx.array:
    return mx.array(x.astype(np.float32)).astype(dtype)


def backend(most: int | None = None) -> MlxOps:
    """Plain MLX, with `most` bytes of scores."""
    ops = MlxOps(F32, frozenset())
    ops.score_bytes = most or ops.score_bytes
    return ops


def parts_of(case: Case, n: int, at_once: int = 1) -> MlxOps:
    """MLX whose parts have n slots; at most `at_once` of them are weighed at once, in float32."""
    H, L, _ = case.q.shape
    ops = backend(4 * H * L * n)
    ops.scores_at_once = at_once * ops.score_bytes
    assert slots(H * L, ops.score_bytes) == n
    return ops


def check(run: Any, case: Case, dtype: mx.Dtype = F32, n: int = 1024, at_once: int = 1) -> np.ndarray:
    case = case.rounded(dtype)
    q, own, past = case.arrays(dtype)
    y = run(parts_of(case, n, at_once), q, own, past, Mask(window=5))
    assert y.dtype == dtype and y.shape == q.shape
    # A rounded score moves its weight by the score's error, and the sum of weights by as much; then weights
    # are rounded, the sum over a part, and the output.
    bound = max(1e-5, (3 + 2 * case.scores()) * STEP[dtype] / 2)
    close(host(y), case.expected(), bound, f"{run.__name__}, parts of {n}")
    return host(y)


# ---- one row ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("H", "G"), [(2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize(("L", "P", "C"), [(1, 1, 2), (5, 7, 16), (16, 37, 20), (7, 300, 8)])
def test_groups_of_heads_and_odd_sizes(run: Any, L: int, P: int, C: int, H: int, G: int) -> None:
    check(run, Case.of(H, G, L, (P,), C))


@both
@formats
@pytest.mark.parametrize(("n", "at_once"), [(1024, 1), (9, 1), (9, 2)])
def test_formats(run: Any, dtype: mx.Dtype, n: int, at_once: int) -> None:
    check(run, Case.of(4, 2, 11, (18, 45), 32), dtype, n, at_once)


@both
@pytest.mark.parametrize("past", [(), (0,), (0, 0)], ids=str)
def test_a_canvas_alone(run: Any, past: tuple[int, ...]) -> None:
    """Without a past, and with an empty one."""
    check(run, Case.of(4, 2, 7, past, 16))


@both
@pytest.mark.parametrize("n", [1, 7, 10, 20, 29, 30, 31])
@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("past", [(30,), (10, 20), (1, 28, 1), (13, 0, 17), (30, 7, 0)], ids=str)
def test_pieces_and_parts(run: Any, past: tuple[int, ...], at_once: int, n: int) -> None:
    """Pieces of free sizes, of even and uneven parts and groups of them; the last rest meets the canvas."""
    check(run, Case.of(2, 1, 5, past, 8), n=n, at_once=at_once)


@both
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_large_scores(run: Any, size: float) -> None:
    """Scores are not scaled: at ±300 the softmax is a choice, and must not overflow."""
    case = Case.of(2, 1, 9, (40,), 16)
    case = replace(case, q=size * case.q).rounded(F32)
    assert case.scores() > 300
    for n in (1024, 11):
        # A float32 score of 300 is off by 2⁻¹⁶, and its weight by as much.
        y = run(parts_of(case, n), *case.arrays(), Mask())
        close(host(y), case.expected(), 2e-4, f"parts of {n}")


@both
@pytest.mark.parametrize(("C", "H", "G", "past"), [(256, 4, 2, 1023), (512, 8, 1, 1024), (512, 8, 1, 2500)])
def test_the_released_heads(run: Any, C: int, H: int, G: int, past: int) -> None:
    """Windows of one part, a context of one, and one of three."""
    check(run, Case.of(H, G, 16, (past,), C), BF16, at_once=2)


def finite(run: Any, case: Case, n: int) -> np.ndarray:
    y = host(run(parts_of(case, n), *case.arrays(), Mask()))
    assert np.isfinite(y).all()
    return y


@both
@pytest.mark.parametrize("n", [1024, 7])
def test_a_nan_query_stays_alone(run: Any, n: int) -> None:
    case = Case.of(4, 2, 9, (20,), 16)
    before = finite(run, case, n)
    q, own, past = case.arrays()
    q[1, 4] = np.nan
    after = host(run(parts_of(case, n), q, own, past, Mask()))
    assert np.isnan(after[1, 4]).all()
    after[1, 4] = before[1, 4]
    np.testing.assert_array_equal(after, before)


@both
def test_a_causal_pass_is_the_composite(run: Any) -> None:
    case, mask = Case.of(4, 2, 7, (11, 19), 16), Mask(True, 9)
    close(host(run(backend(), *case.arrays(), mask)), case.expected(mask), 1e-5, "causal")


@both
def test_compiled(run: Any) -> None:
    """As on a GPU, where a step is compiled: the edges between parts hold, and nothing reads the host."""
    if run is attend_row and simulator.active():
        pytest.skip("the simulator launches at once, and a traced array has no values")
    case = Case.of(4, 2, 5, (30, 9), 16)
    ops = parts_of(case, 8, 2)

    def call(q: Any, own: Any, past: Any) -> mx.array:
        return run(ops, q, own, past, Mask())

    close(host(mx.compile(call)(*case.arrays())), case.expected(), 1e-5, "compiled")


# ---- several rows ----------------------------------------------------------------------------------

# Each row's tokens, and the pieces of its past.
ROWS: list[tuple[int, tuple[int, ...]]] = [(5, (13, 17)), (1, ()), (9, (2,)), (3, (8, 0, 1, 30))]


def rows_of(mask: Mask, spoiled: int | None = None, dtype: mx.Dtype = F32) -> tuple[Any, list[np.ndarray]]:
    """What `Ops.attend` takes of `ROWS`, of which one may be all NaN, and what each should come to."""
    cases = [Case.of(4, 2, L, past, 16).rounded(dtype) for L, past in ROWS]
    expected = [case.expected(mask) for case in cases]
    if spoiled is not None:
        for x in (cases[spoiled].q, *cases[spoiled].own, *(x for kv in cases[spoiled].past for x in kv)):
            x[:] = np.nan
    q, k, v = (np.concatenate(x, 1) for x in zip(*((case.q, *case.own) for case in cases), strict=True))
    past = [case.arrays(dtype)[2] for case in cases]
    return (put(q, dtype), (put(k, dtype), put(v, dtype)), past, [L for L, _ in ROWS], mask), expected


@pytest.mark.parametrize("kernels", [frozenset({"attend"}), frozenset()], ids=["kernel", "plain"])
@pytest.mark.parametrize("mask", [Mask(), Mask(True), Mask(True, 6)], ids=["canvas", "causal", "window"])
@pytest.mark.parametrize("spoiled", [None, *range(len(ROWS))])
def test_rows_see_nothing_of_each_other(kernels: frozenset[str], mask: Mask, spoiled: int | None) -> None:
    """Rows of unequal lengths over pasts of their own, with parts of five slots at most."""
    ops = MlxOps(F32, kernels)
    ops.score_bytes = 4 * 4 * 9 * 5
    given, expected = rows_of(mask, spoiled)
    y, stop = host(ops.attend(*given)), 0
    for row, ((L, _), wanted) in enumerate(zip(ROWS, expected, strict=True)):
        stop += L
        found = y[:, stop - L : stop]
        if row == spoiled:
            assert np.isnan(found).all()
        else:
            close(found, wanted, 1e-5, f"row {row}")


# ---- softmax ---------------------------------------------------------------------------------------


def scores(G: int, R: int, sizes: Sequence[int], dtype: mx.Dtype, N: int = 1) -> list[mx.array]:
    rng = np.random.default_rng(0)
    return [put(4 * rng.standard_normal((G, N, R, n)), dtype) for n in sizes]


def exact(parts: Sequence[mx.array]) -> tuple[np.ndarray, np.ndarray]:
    """Weights and log Σ exp of joined rows in float64."""
    x = np.concatenate([host(s) for s in parts], -1)
    top = x.max(-1, keepdims=True)
    e = np.exp(x - top)
    mass = e.sum(-1, keepdims=True)
    return e / mass, top + np.log(mass)


SIZES = [(1,), (13,), (33, 7), (1, 1), (256,), (300, 20), (64, 256), (1023, 16)]
FORMATS = [*((sizes, F32) for sizes in SIZES), ((33, 7), BF16), ((33, 7), F16), ((1024, 256), BF16)]


@pytest.mark.parametrize(("sizes", "dtype"), FORMATS, ids=str)
def test_softmax(sizes: tuple[int, ...], dtype: mx.Dtype) -> None:
    parts = scores(2, 3, sizes, dtype)
    expected, log_expected = exact(parts)
    weights, log_mass = softmax(parts)
    assert [p.shape for p in weights] == [s.shape for s in parts]
    assert {p.dtype for p in weights} == {dtype} and log_mass.dtype == F32
    close(np.concatenate([host(p) for p in weights], -1), expected, STEP[dtype] / 2 + 1e-6, "weights")
    close(host(log_mass), log_expected, 1e-6, "log mass")
    twin, log_mass = softmax_plain(backend(), parts)
    assert [p.shape for p in twin] == [s.shape for s in parts]
    close(np.concatenate([host(p) for p in twin], -1), expected, STEP[dtype] / 2 + 1e-5, "twin")
    close(host(log_mass), log_expected, 1e-6, "twin's log mass")


def test_softmax_of_several_parts() -> None:
    """Each as it is alone."""
    (parts,) = scores(2, 3, (40,), F32, 3)
    for run in (softmax, lambda scores: softmax_plain(backend(), scores)):
        (weights,), log_mass = run([parts])
        for i in range(3):
            (alone,), log_alone = run([parts[:, i : i + 1]])
            np.testing.assert_array_equal(host(weights[:, i : i + 1]), host(alone))
            np.testing.assert_array_equal(host(log_mass[:, i : i + 1]), host(log_alone))


def test_a_score_of_nan_stays_in_its_row() -> None:
    parts = scores(2, 3, (40, 9), F32)
    clean = softmax(parts)
    parts[1][1, 0, 2, 3] = np.nan
    dirty = softmax(parts)
    for a, b in zip([*clean[0], clean[1]], [*dirty[0], dirty[1]], strict=True):
        a, b = host(a), host(b)
        assert np.isnan(b[1, 0, 2]).all()
        b[1, 0, 2] = a[1, 0, 2]
        np.testing.assert_array_equal(a, b)


# ---- merging ---------------------------------------------------------------------------------------


def weighed_rows(N: int, dtype: mx.Dtype, C: int = 20) -> Weighed:
    """Means of 4 × N × 5 rows, of which the last is nearly all that there is in its first part."""
    rng = np.random.default_rng(N)
    y, log_mass = rng.standard_normal((4, N, 5, C)), 3 * rng.standard_normal((4, N, 5, 1))
    log_mass[:, 0, 4] = 30
    return Weighed(put(y, dtype), put(log_mass))


@formats
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("before", [False, True])
def test_merge(dtype: mx.Dtype, N: int, before: bool) -> None:
    new, total = weighed_rows(N, dtype), weighed_rows(1, F32) if before else None
    each = [new] if total is None else [total, new]
    y, logs = (np.concatenate([host(getattr(w, name)) for w in each], 1) for name in ("y", "log_mass"))
    top = logs.max(1, keepdims=True)
    mass = np.exp(logs - top).sum(1, keepdims=True)
    expected = (y * np.exp(logs - top) / mass).sum(1, keepdims=True)
    for run in (merged, merged_plain):
        out = run(backend(), total, new)
        close(host(out.y), expected, 1e-6, run.__name__)
        close(host(out.log_mass), top + np.log(mass), 1e-6, "log")


def test_a_merge_keeps_nan_to_its_row() -> None:
    new, total = weighed_rows(2, F32), weighed_rows(1, F32)
    for spoiled in (new.y, new.log_mass, total.y, total.log_mass):
        clean = host(merged(backend(), total, new).y)
        kept = spoiled[1, 0, 2]
        spoiled[1, 0, 2] = np.nan
        dirty = host(merged(backend(), total, new).y)
        assert np.isnan(dirty[1, 0, 2]).all()
        dirty[1, 0, 2] = clean[1, 0, 2]
        np.testing.assert_array_equal(dirty, clean)
        spoiled[1, 0, 2] = kept


# ---- temporaries -----------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize(("P", "most"), [(1023, 64 << 20), (1024, 64 << 20), (1 << 17, 256_000_000)])
def test_the_largest_temporary_of_the_released_model(dtype: mx.Dtype, P: int, most: int) -> None:
    """By the shapes that are weighed: 16 heads and a canvas of 256. Nothing is computed."""
    H, L, size = 16, 256, MlxOps.piece_slots
    q, own = mx.zeros((H, L, 512), dtype), (mx.zeros((2, L, 512), dtype),) * 2
    past = [(mx.zeros((2, min(size, P - a), 512), dtype),) * 2 for a in range(0, P, size)]
    seen: list[int] = []

    def weigh(ops: Any, x: mx.array, parts: Any) -> Weighed:
        assert x.shape == (2, 1, H // 2 * L, 512)
        (_, N, n, _) = parts[0][0].shape
        seen.append(N * n)
        assert all(dtype.size * x.size // 512 * k.shape[1] * k.shape[2] <= most for k, _ in parts)
        return Weighed(x, x[..., :1])

    ops = MlxOps(F32, frozenset())
    ops.score_bytes = MlxOps.score_bytes  # as on a GPU
    attention._attend(ops, q, own, past, Path(ops.scores_at_once, weigh, lambda ops, total, new: new))
    assert sum(seen) == P
    if P > 1024:  # 16 parts: three at once are a whole piece, the last one goes with the canvas
        assert len(seen) == (6 if dtype.size == 2 else 16)


@pytest.mark.parametrize("P", [8192, 16384])
def test_memory_does_not_grow_with_the_context(P: int) -> None:
    """Operations are in flight on a CPU, each with a part's scores."""
    case = Case.of(8, 1, 32, (P,), 16)
    q, own, past = case.arrays()
    past = [(mx.contiguous(k), mx.contiguous(v)) for k, v in past]
    ops = parts_of(case, 256)
    mx.eval(q, own, past)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend_row_plain(ops, q, own, past, Mask()))
    assert mx.get_peak_memory() - before <= 16 * ops.score_bytes  # the scores of 4,096 slots


# ---- what only the simulator can tell --------------------------------------------------------------

LAUNCHES = {  # sizes of what is weighed together, and how many parts of the first
    "a pair": ((33, 7), 1),
    "one part": ((40,), 1),
    "three parts": ((40,), 3),
    "more than a simdgroup": ((290, 20), 1),
}
named = pytest.mark.parametrize("name", [*LAUNCHES, "merge"])


def outputs(name: str, dtype: mx.Dtype = BF16) -> list[mx.array]:
    """Of one launch."""
    if name == "merge":
        out = merged(backend(), weighed_rows(1, F32), weighed_rows(3, dtype))
        return [out.y, out.log_mass]
    sizes, N = LAUNCHES[name]
    weights, log_mass = softmax(scores(4, 2, sizes, dtype, N))
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
        softmax(scores(1, 1, (3, 2), F32))
        one = Weighed(mx.ones((1, 2, 1, 3)), mx.ones((1, 2, 1, 1)))
        merged(backend(), None, one)
        merged(backend(), Weighed(one.y[:, :1], one.log_mass[:, :1]), one)
    assert [simulator.typecheck(call) for call in calls] == [[]] * 3


@named
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers(simulated: None, name: str, sanitizer: str) -> None:
    assert simulator.sanitize(launched(name), sanitizer) == []


def test_one_launch_a_group(simulated: None) -> None:
    """And another for its merge, but where it is alone; eight scores a thread at most, as released."""
    for past, n, at_once, groups in (
        ((30,), 1024, 1, 1), ((30,), 30, 1, 1), ((30,), 10, 1, 3), ((30,), 10, 2, 2),
        ((30,), 7, 1, 5), ((30,), 7, 3, 3), ((30, 3), 10, 3, 2), ((31, 20, 3), 10, 3, 4), ((3, 3), 10, 3, 2),
    ):  # fmt: skip
        case = Case.of(2, 1, 3, past, 8)
        with simulator.recording() as calls:
            attend_row(parts_of(case, n, at_once), *case.arrays(), Mask())
        names = Counter(call.kernel.name for call in calls)
        assert names["dgemma_attention_softmax"] == groups, (past, n, at_once)
        # The first group needs no merge where it is one part.
        several = past[0] > n and at_once > 1
        assert names["dgemma_attention_merge"] == groups - (not several), (past, n, at_once)
    with simulator.recording() as calls:
        softmax(scores(1, 2, (1024, 256), BF16))
    assert dict(calls[0].template)["HELD"] == 5 and calls[0].threadgroup == (256, 1, 1)


def test_nothing_is_joined(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of a cache: neither way concatenates."""

    def refuse(*args: Any) -> None:
        raise AssertionError("keys or values were joined")

    case = Case.of(4, 2, 5, (12, 30), 8)
    ops = parts_of(case, 8)
    monkeypatch.setattr(Ops, "attend_row", refuse)
    monkeypatch.setattr(mx, "concatenate", refuse)
    for run in (attend_row, attend_row_plain):
        run(ops, *case.arrays(), Mask())
