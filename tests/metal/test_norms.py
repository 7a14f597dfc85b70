"""Norms by kernel against the composites: in float64 to one rounding, and on plain MLX to those it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma.network.ops import Ops
from dgemma.network.ops.layers import as_heads, rotary
from dgemma_mlx.kernels import norms
from dgemma_mlx.ops import MlxOps
from tests.compare import EPS, REFERENCE, close
from tests.metal import simulator

pytestmark = pytest.mark.usefixtures("metal")

ORDERS = ("forward", "backward", "shuffled")
F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16
STEP = {F32: EPS["float32"], BF16: EPS["bfloat16"], F16: 2.0**-10}
EPSILON = 1e-6

formats = pytest.mark.parametrize("dtype", STEP, ids=["float32", "bfloat16", "float16"])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def plain() -> Any:
    """MLX without a kernel of ours, whose composites are the twins."""
    return MlxOps(F32, frozenset())


def on_device(x: np.ndarray, dtype: mx.Dtype = F32) -> mx.array:
    return mx.array(x.astype(np.float32)).astype(dtype)


def host(x: mx.array) -> np.ndarray:
    """The same numbers in float64."""
    return np.array(x.astype(F32)).astype(np.float64)


def rounded_once(actual: mx.array, expected: np.ndarray, what: str, dtype: mx.Dtype | None = None) -> None:
    """Each value is within half a step of the format, but for what float32 is off: 1e-6 of the largest."""
    dtype = dtype or actual.dtype
    assert actual.dtype == dtype
    close(host(actual), expected, 0.5 * STEP[dtype] + 1e-6, what)
    off = np.abs(host(actual) - expected) - 1e-6 * np.abs(expected).max()
    # Below the normal numbers of float16 steps are 2⁻²⁴.
    allowed = np.maximum(0.501 * STEP[dtype] * np.abs(expected), 2.0**-25 if dtype == F16 else 0.0)
    assert (off <= allowed).all(), f"{what}: {np.max(off - allowed):.2e} more than one rounding"


# ---- rms_norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "D"),
    [*((F32, D) for D in (5, 13, 20, 96, 130, 3000)), *((d, D) for d in (BF16, F16) for D in (13, 2816))],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)], ids=str)
def test_rms_norm(rng: np.random.Generator, shape: tuple[int, ...], D: int, dtype: mx.Dtype) -> None:
    """Few values, which go another way into a kernel; odd sizes; more than a thread holds one of."""
    x = on_device(3 * rng.standard_normal((*shape, D)), dtype)
    w = 1 + rng.standard_normal(D)
    for weight in (None, on_device(w), on_device(w, dtype)):
        expected = REFERENCE.rms_norm(host(x), None if weight is None else host(weight), EPSILON)
        rounded_once(norms.rms_norm(x, weight, EPSILON), expected, "kernel", dtype)
        close(host(plain().rms_norm(x, weight, EPSILON)), expected, STEP[dtype] + 1e-6, "twin")


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_small_and_large_values(rng: np.random.Generator, scale: float) -> None:
    """Zeros stay zeros; squares of float16 values would overflow in float16."""
    x = on_device(scale * rng.standard_normal((3, 96)), F16 if scale == 1e4 else BF16)
    rounded_once(norms.rms_norm(x, None, EPSILON), REFERENCE.rms_norm(host(x), None, EPSILON), "rms_norm")


def test_a_canvas_of_the_released_size(rng: np.random.Generator) -> None:
    x, w = on_device(rng.standard_normal((256, 2816)), BF16), on_device(rng.standard_normal(2816), BF16)
    rounded_once(norms.rms_norm(x, w, EPSILON), REFERENCE.rms_norm(host(x), host(w), EPSILON), "canvas")


# ---- branches -----------------------------------------------------------------------------------------


def vectors(
    rng: np.random.Generator, D: int, count: int, dtype: mx.Dtype, wide: bool = False
) -> list[mx.array]:
    """Weights [D] around 1, of the compute type or float32."""
    return [on_device(1 + 0.5 * rng.standard_normal(D), F32 if wide else dtype) for _ in range(count)]


def opening(rng: np.random.Generator, rows: int, D: int, dtype: mx.Dtype) -> Any:
    """A list of h, a, post, mlp, experts and the router's scale, which is float32; and ε."""
    h, a = (on_device(scale * rng.standard_normal((rows, D)), dtype) for scale in (4, 0.2))
    return [h, a, *vectors(rng, D, 3, dtype), *vectors(rng, D, 1, dtype, wide=True), EPSILON]


@formats
@pytest.mark.parametrize(("rows", "D"), [(7, 13), (2, 2816)])
def test_open_branches(rng: np.random.Generator, rows: int, D: int, dtype: mx.Dtype) -> None:
    inputs = opening(rng, rows, D, dtype)
    h, a, post, mlp, experts, router = map(host, inputs[:-1])
    stream, x, y, routed = norms.open_branches(*inputs)
    rounded_once(stream, h + REFERENCE.rms_norm(a, post, EPSILON), "stream", dtype)
    # What follows are norms of the stream as it was rounded.
    rounded_once(x, REFERENCE.rms_norm(host(stream), mlp, EPSILON), "for the MLP", dtype)
    rounded_once(y, REFERENCE.rms_norm(host(stream), experts, EPSILON), "for the experts", dtype)
    expected = REFERENCE.rms_norm(host(stream), router, EPSILON) * D**-0.5
    rounded_once(routed, expected, "for the router", F32)
    twin = Ops.open_branches(plain(), *inputs)
    for ours, theirs in zip((stream, x, y, routed), twin, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        close(host(ours), host(theirs), 2 * STEP[dtype] + 1e-6, "twin")


def closing(rng: np.random.Generator, rows: int, D: int, dtype: mx.Dtype) -> Any:
    """A list of h, m, e, three weights and the scalar; and ε."""
    states = [on_device(scale * rng.standard_normal((rows, D)), dtype) for scale in (4, 0.2, 30)]
    return [*states, *vectors(rng, D, 3, dtype), on_device(np.array([0.7]), dtype), EPSILON]


@formats
@pytest.mark.parametrize(("rows", "D"), [(7, 13), (2, 2816)])
def test_join_branches(rng: np.random.Generator, rows: int, D: int, dtype: mx.Dtype) -> None:
    inputs = closing(rng, rows, D, dtype)
    exact: Any = [*map(host, inputs[:-1]), EPSILON]
    expected = REFERENCE.join_branches(*exact)
    rounded_once(norms.join_branches(*inputs), expected, "kernel", dtype)
    # The twin rounds both norms, their sum, its norm, the sum with the stream, and the product.
    close(host(Ops.join_branches(plain(), *inputs)), expected, 2 * STEP[dtype] + 1e-6, "twin")


# ---- heads ----------------------------------------------------------------------------------------------


def turn(positions: list[int], C: int) -> tuple[mx.array, mx.array]:
    """What `rotary` makes: the last quarter of the pairs does not turn."""
    frequencies = 1e4 ** (-2.0 * np.arange(C // 2) / C)
    frequencies[-(C // 8) :] = 0
    cosines, sines = rotary(plain(), mx.array(positions), mx.array(frequencies.astype(np.float32)))
    return cosines, sines


Geometry = tuple[int, int, int, int]  # N, H, G, C


def products(rng: np.random.Generator, geometry: Geometry, own_v: bool, dtype: mx.Dtype) -> Any:
    """A list: q, k and, on sliding layers, v side by side, their columns, both norms; ε and the rotation.

    Two rows of tokens lie one behind the other.
    """
    N, H, G, C = geometry
    columns = tuple(heads * C for heads in ((H, G, G) if own_v else (H, G)))
    y = on_device(3 * rng.standard_normal((N, sum(columns))), dtype)
    return [
        y,
        columns,
        *vectors(rng, C, 2, dtype),
        EPSILON,
        turn([*range(130_000, 130_000 + N // 2), *range(7, 7 + N - N // 2)], C),
    ]


def check_heads(y: mx.array, columns: tuple[int, ...], q_norm: mx.array, *rest: Any) -> None:
    """Against the composites on each part of y."""
    k_norm, eps, rotary = rest
    ours = norms.heads(y, columns, q_norm, k_norm, eps, rotary)
    C, parts = q_norm.shape[0], mx.split(y, np.cumsum(columns)[:-1].tolist(), -1)
    settings = [(parts[0], q_norm, rotary), (parts[1], k_norm, rotary), (parts[-1], None, None)]
    for found, (part, weight, turned), what in zip(ours, settings, "qkv", strict=True):
        exact: Any = None if turned is None else tuple(map(host, turned))
        expected = as_heads(REFERENCE, host(part), C, None if weight is None else host(weight), eps, exact)
        rounded_once(found, expected, f"{what} of the kernel", y.dtype)
        twin = as_heads(plain(), part, C, weight, eps, turned)
        close(host(twin), expected, 2 * STEP[y.dtype] + 1e-6, f"{what} of the twin")


GEOMETRIES = [(1, 1, 1, 2), (1, 2, 1, 20), (14, 3, 3, 20), (15, 4, 2, 96), (6, 5, 1, 130)]
RELEASED = [(9, 16, 8, 256), (2, 16, 2, 512)]
sharing = pytest.mark.parametrize("own_v", [True, False], ids=["own v", "k's v"])


@sharing
@pytest.mark.parametrize(
    ("geometry", "dtype"), [*((g, F32) for g in GEOMETRIES), *((g, BF16) for g in RELEASED)], ids=str
)
def test_heads(rng: np.random.Generator, geometry: Geometry, own_v: bool, dtype: mx.Dtype) -> None:
    check_heads(*products(rng, geometry, own_v, dtype))


@sharing
@formats
def test_heads_with_norms_of_either_type(rng: np.random.Generator, own_v: bool, dtype: mx.Dtype) -> None:
    y, columns, q_norm, k_norm, *rest = products(rng, (14, 4, 2, 20), own_v, dtype)
    for norms_dtype in (dtype, F32):
        check_heads(y, columns, q_norm.astype(norms_dtype), k_norm.astype(norms_dtype), *rest)


# ---- all of them --------------------------------------------------------------------------------------


def calls(dtype: mx.Dtype, D: int = 130) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """By the kernel's name, a function and arguments of few rows, the first of which is an array of rows."""
    rng = np.random.default_rng(1)
    x, w = on_device(rng.standard_normal((3, D)), dtype), vectors(rng, D, 1, dtype)[0]
    return {
        "dgemma_rms_norm": (norms.rms_norm, [x, w, EPSILON]),
        "dgemma_open_branches": (norms.open_branches, opening(rng, 3, D, dtype)),
        "dgemma_join_branches": (norms.join_branches, closing(rng, 3, D, dtype)),
        "dgemma_heads": (norms.heads, products(rng, (6, 2, 1, 20), True, dtype)),
    }


NAMES = tuple(f"dgemma_{name}" for name in ("rms_norm", "open_branches", "join_branches", "heads"))
each = pytest.mark.parametrize("name", NAMES)


def results(name: str, dtype: mx.Dtype, inputs: list[Any] | None = None) -> list[np.ndarray]:
    function, arguments = calls(dtype)[name]
    out = function(*(inputs or arguments))
    return [host(x) for x in (out if isinstance(out, tuple) else (out,))]


def rows_with_nan(name: str, arguments: list[Any], index: int) -> list[int]:
    """How many rows of each result a NaN at the state's flat `index` reaches; all others stay as they are."""
    clean = results(name, F32, arguments)
    x = np.array(arguments[0])
    x.reshape(-1)[index] = np.nan
    spoiled = results(name, F32, [mx.array(x), *arguments[1:]])
    counts = []
    for before, after in zip(clean, spoiled, strict=True):
        touched = np.isnan(after).any(-1)
        assert np.isfinite(after[~touched]).all()
        np.testing.assert_array_equal(after[~touched], before[~touched])
        counts.append(int(touched.sum()))
    return counts


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_nan_stays_in_its_row(name: str) -> None:
    _, arguments = calls(F32)[name]
    assert set(rows_with_nan(name, arguments, arguments[0].size // 2)) == {1}


@sharing
def test_a_nan_stays_in_its_head(rng: np.random.Generator, own_v: bool) -> None:
    """Of two of q and one each of k and v; k's is v's too where v has no columns."""
    arguments = products(rng, (6, 2, 1, 20), own_v, F32)
    last = [[0, 0, 1]] if own_v else []
    for head, wanted in enumerate([[1, 0, 0], [1, 0, 0], [0, 1, 0 if own_v else 1], *last]):
        row = 4 * sum(arguments[1])  # the second of the second row
        assert rows_with_nan("dgemma_heads", arguments, row + 20 * head + 7) == wanted


@each
def test_what_lies_around_the_inputs_does_not_leak(name: str) -> None:
    """States cut out of larger arrays, as a window of rows and columns."""
    _, arguments = calls(BF16)[name]

    def framed(x: Any) -> Any:
        if not isinstance(x, mx.array) or x.ndim < 2:
            return x
        wider = mx.pad(x, [(1, 2)] * x.ndim, constant_values=mx.array(np.nan, x.dtype))
        return wider[(slice(1, -2),) * x.ndim]

    clean = results(name, BF16)
    again = results(name, BF16, [framed(x) for x in arguments])
    for before, after in zip(clean, again, strict=True):
        np.testing.assert_array_equal(after, before)


@each
def test_results_repeat(name: str) -> None:
    for first, second in zip(results(name, BF16), results(name, BF16), strict=True):
        np.testing.assert_array_equal(first, second)


# ---- what only the simulator can tell -----------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_the_order_of_lanes_makes_no_difference(simulated: None, name: str, dtype: mx.Dtype) -> None:
    found = []
    for order in ORDERS:
        with simulator.installed(order=order):
            found.append(results(name, dtype))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def launched(name: str, dtype: mx.Dtype = BF16) -> simulator.Call:
    """The one call that a function makes."""
    with simulator.recording() as made:
        results(name, dtype)
    (call,) = made
    assert call.kernel.name == name
    return call


@each
@formats
def test_types(simulated: None, name: str, dtype: mx.Dtype) -> None:
    assert not simulator.typecheck(launched(name, dtype))


def test_types_of_the_smallest_inputs(simulated: None) -> None:
    """Inputs of fewer than 8 values are in another address space, and one number is a reference."""
    x = mx.ones((1, 5))
    with simulator.recording() as made:
        norms.rms_norm(x, x[0], EPSILON)
        norms.open_branches(x, x, x[0], x[0], x[0], x[0], EPSILON)
        norms.join_branches(x, x, x, x[0], x[0], x[0], mx.ones(1), EPSILON)
        norms.heads(mx.ones((1, 4)), (2, 2), *(mx.ones(2),) * 2, EPSILON, (mx.ones((1, 1)),) * 2)
    assert len(made) == 4
    for call in made:
        assert not simulator.typecheck(call)


@each
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers(simulated: None, name: str, sanitizer: str) -> None:
    assert simulator.sanitize(launched(name), sanitizer) == []


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_where_v_is_made_of_k(simulated: None, rng: np.random.Generator, sanitizer: str) -> None:
    with simulator.recording() as made:
        norms.heads(*products(rng, (6, 2, 1, 20), False, BF16))
    assert not simulator.typecheck(made[0]) and simulator.sanitize(made[0], sanitizer) == []


def test_groups_fit_every_chip(simulated: None) -> None:
    """At most 256 threads, and a value of a row is in one thread: 11 of 2816 each."""
    with simulator.recording() as made:
        norms.rms_norm(mx.ones((2, 2816)), None, EPSILON)
        norms.heads(mx.ones((9, 3 * 64)), (128, 64), *(mx.ones(64),) * 2, EPSILON, (mx.ones((9, 32)),) * 2)
    assert [call.threadgroup for call in made] == [(256, 1, 1)] * 2
    assert [call.grid for call in made] == [(256, 2, 1), (32 * 9 * 4, 1, 1)]
