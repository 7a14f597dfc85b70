"""Picks and their order by kernel, and by the twins: against the composite and a sort in NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels.plan import Plan, plan, plan_plain, route, route_plain
from tests.compare import REFERENCE, close
from tests.metal import simulator

pytestmark = pytest.mark.usefixtures("metal")

FIELDS = ("order", "inverse", "offsets", "tokens", "rows")
ORDERS = ("forward", "backward", "shuffled")


# ---- the plan -------------------------------------------------------------------------------------


def routing(name: str) -> tuple[np.ndarray, int]:
    """Ids [N, K] and how many experts there are."""
    rng = np.random.default_rng(0)
    if name == "one token":
        return np.array([[4, 0, 2]]), 5
    if name == "one pick":
        return np.array([[1]]), 3
    if name == "one expert takes all":
        return np.full((300, 1), 3), 7
    if name == "most experts have no rows":
        return rng.choice([9, 17, 255], (21, 1)), 256
    if name == "zipf":
        return np.minimum(rng.zipf(1.5, (300, 4)) - 1, 15), 16
    if name == "a canvas":
        return np.argsort(rng.random((256, 128)), -1)[:, :8], 128
    if name == "more than eight canvases":
        return np.argsort(rng.random((2051, 9)), -1)[:, :8], 9
    return np.argsort(rng.random((24, 12)), -1)[:, :4], 12


NAMES = (
    "one token",
    "one pick",
    "one expert takes all",
    "most experts have no rows",
    "zipf",
    "a canvas",
    "more than eight canvases",
    "random",
)


def check(found: Plan, ids: np.ndarray, experts: int) -> None:
    """Against NumPy's stable sort."""
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    expected = {
        "order": order,
        "inverse": np.argsort(order),
        "offsets": np.searchsorted(flat[order], np.arange(experts + 1)),
        "tokens": order // ids.shape[1],
        "rows": flat[order],
    }
    for name in FIELDS:
        field = getattr(found, name)
        assert field.dtype == (mx.uint32 if name in ("tokens", "rows") else mx.int32), name
        np.testing.assert_array_equal(np.array(field), expected[name], name)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan(name: str) -> None:
    ids, experts = routing(name)
    check(plan(mx.array(ids.astype(np.int32)), experts), ids, experts)


@pytest.mark.parametrize("name", NAMES)
def test_the_twin(name: str) -> None:
    ids, experts = routing(name)
    check(plan_plain(mx.array(ids.astype(np.int32)), experts), ids, experts)


def test_strides_and_integer_types_make_no_difference() -> None:
    ids, experts = routing("random")
    wide = np.concatenate([ids, ids], 1)
    for dtype in (np.int32, np.uint32, np.int64):
        check(plan(mx.array(wide.astype(dtype))[:, : ids.shape[1]], experts), ids, experts)


def test_ids_out_of_range_stay_within_the_arrays() -> None:
    """They count for the nearest expert: every place is written, none twice."""
    ids = np.array([[0, -1], [3, 7], [2**31 - 1, 1], [-(2**31), 2]])
    check(plan(mx.array(ids.astype(np.int32)), 4), np.clip(ids, 0, 3), 4)


# ---- the route --------------------------------------------------------------------------------------


def definition(logits: np.ndarray, scale: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The composite: with the identity for a projection, `r` are the logits."""
    r = logits.astype(np.float64)
    return REFERENCE.router(r, np.eye(r.shape[1]), scale.astype(np.float64), k)


def compare(logits: np.ndarray, scale: np.ndarray, k: int, what: str) -> None:
    weights, ids = definition(logits, scale, k)
    for name, function in (("kernel", route), ("twin", route_plain)):
        ours, picks = function(mx.array(logits), mx.array(scale), k)
        assert ours.dtype == mx.float32 and picks.dtype == mx.int32
        np.testing.assert_array_equal(np.array(picks), ids, f"{what}, {name}")
        close(np.array(ours), weights, 1e-6, f"{what}, {name}")


SIZES = ((1, 4, 4), (1, 1, 1), (5, 40, 3), (7, 33, 1), (33, 128, 8), (3, 256, 9), (3, 200, 200), (2, 64, 33))


@pytest.mark.parametrize(("N", "E", "K"), SIZES)
def test_route(N: int, E: int, K: int) -> None:
    rng = np.random.default_rng([N, E, K])
    logits = (3 * rng.standard_normal((N, E))).astype(np.float32)
    compare(logits, rng.uniform(0.5, 2, E).astype(np.float32), K, f"{K} of {E}")


@pytest.mark.parametrize(("N", "E", "K"), [(9, 128, 8), (5, 40, 40)])
def test_ties_go_to_the_lower_id(N: int, E: int, K: int) -> None:
    rng = np.random.default_rng(0)
    logits = np.round(rng.standard_normal((N, E))).astype(np.float32)  # a handful of values
    logits[0] = 1.25
    compare(logits, np.ones(E, np.float32), K, "ties")


def test_what_underflows_is_equal() -> None:
    """The definition's order is that of probabilities: ids 0 and 1, though 1's logit is the greater."""
    logits = np.full((2, 33), -500, np.float32)
    logits[0, [32, 5, 1]] = 3, 2, -400
    logits[1, 7] = 1e4
    _, ids = route(mx.array(logits), mx.ones(33), 4)
    _, twins = route_plain(mx.array(logits), mx.ones(33), 4)
    np.testing.assert_array_equal(np.array(ids), [[32, 5, 0, 1], [7, 0, 1, 2]])
    np.testing.assert_array_equal(np.array(twins), np.array(ids))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
def test_scales_of_other_types(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 12)).astype(np.float32)
    scale = mx.array(rng.uniform(0.5, 2, 12).astype(np.float32)).astype(dtype)
    weights, _ = route(mx.array(logits), scale, 3)
    expected, _ = definition(logits, np.array(scale.astype(mx.float32)), 3)
    close(np.array(weights), expected, 1e-6, "scales")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_names_experts_that_exist(bad: float) -> None:
    """With weights of NaN, as the composite's, and without touching its neighbours."""
    logits = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    scale = mx.ones(40)
    before = [np.array(x) for x in route(mx.array(logits), scale, 8)]
    logits[1, 37] = bad
    weights, ids = (np.array(x) for x in route(mx.array(logits), scale, 8))
    assert np.isnan(weights[1]).all()
    np.testing.assert_array_equal(ids[1], np.arange(8))
    for row in (0, 2):
        np.testing.assert_array_equal(weights[row], before[0][row])
        np.testing.assert_array_equal(ids[row], before[1][row])


# ---- what only the simulator can tell -----------------------------------------------------------------


def launches() -> list[mx.array]:
    """Both kernels on odd sizes: every output."""
    rng = np.random.default_rng(0)
    logits = mx.array(np.round(2 * rng.standard_normal((11, 40))).astype(np.float32))
    weights, ids = route(logits, mx.array(rng.uniform(0.5, 2, 40).astype(np.float32)), 7)
    found = plan(ids, 40)
    return [weights, ids, *(getattr(found, name) for name in FIELDS)]


def test_the_order_of_lanes_makes_no_difference(simulated: None) -> None:
    results = []
    for order in ORDERS:
        with simulator.installed(order=order):
            results.append([np.array(x) for x in launches()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_sanitizers_and_types(simulated: None) -> None:
    with simulator.recording() as calls:
        launches()
    assert len(calls) == 2
    for call in calls:
        assert simulator.sanitize(call, "thread") == []
        assert simulator.sanitize(call, "address") == []
        assert not simulator.typecheck(call)
