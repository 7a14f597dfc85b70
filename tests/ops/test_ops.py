"""Every composite of every backend against its definition on NumPy float64.

The same rounded numbers go in on both sides, so that an error is the computation's own. Bounds follow
from the format: float32 results may be off by 1e-5 (sums of a few hundred terms), bfloat16 results by
one or a few roundings of 2⁻⁸, as each test says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.formats.encode import quantize
from dgemma.formats.quantized import MXFP4, NVFP4, Form, affine
from dgemma.formats.stored import Stored
from dgemma.network.ops import Mask, Ops
from dgemma.network.ops.decoding import dense, dequantize
from dgemma.network.ops.layers import geglu, rope, rotary, top_k
from dgemma.network.ops.vocabulary import embed, logits
from dgemma.network.weights import AttentionWeights, BiasWeights, LayerWeights, MlpWeights
from tests.compare import EPS, REFERENCE, backends, close, make, pair, rounding

BF16 = EPS["bfloat16"]


@pytest.fixture(params=backends("float32", "bfloat16"))
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


@pytest.fixture(params=backends("float32", reference=True))
def any_ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def tolerance(ops: Ops, roundings: float) -> float:
    """1e-5, or for bfloat16 so many roundings of half an EPS."""
    return max(1e-5, roundings * rounding(ops) / 2)


# ---- primitives ---------------------------------------------------------------------------------


def test_sorting_is_stable_and_indices_are_signed(any_ops: Ops, rng: np.random.Generator):
    x = rng.integers(0, 4, (7, 300)).astype(np.float32)
    device = any_ops.aswide(x)
    for axis in (0, 1):
        order = any_ops.argsort(device, axis)
        assert np.array_equal(any_ops.to_numpy(order), np.argsort(x, axis, kind="stable"))
        best = any_ops.argmax(device, axis)
        assert np.array_equal(any_ops.to_numpy(best), np.argmax(x, axis))  # the first of equals
        assert any_ops.to_numpy(best - 1000).max() < 0
        assert any_ops.to_numpy(order - 1000).max() < 0
    taken = any_ops.take_along(device, any_ops.argsort(device, 1), 1)
    assert np.array_equal(any_ops.to_numpy(taken), np.sort(x, 1))


def test_counting_and_indexing(any_ops: Ops, rng: np.random.Generator):
    x = rng.standard_normal((5, 9)).astype(np.float32)
    device = any_ops.aswide(x)
    count = any_ops.to_numpy(any_ops.sum(device > 0, -1))
    assert count.dtype.kind == "i"
    assert np.array_equal(count, (x > 0).sum(-1))
    ids = any_ops.asarray(np.array([[4, 0], [2, 2]]))
    assert np.array_equal(any_ops.to_numpy(any_ops.take(device, ids)), x[[[4, 0], [2, 2]]])
    assert np.array_equal(any_ops.to_numpy(any_ops.take(device[:, 0], ids)), x[:, 0][[[4, 0], [2, 2]]])
    assert np.array_equal(any_ops.to_numpy(any_ops.where(device > 0, device, -1.0)), np.where(x > 0, x, -1.0))
    close(any_ops.to_numpy(any_ops.cumsum(device, 1)), np.cumsum(x.astype(float), 1), 1e-6, "cumsum")
    assert np.array_equal(any_ops.to_numpy(any_ops.arange(4) - 5), [-5, -4, -3, -2])


def test_python_numbers_do_not_widen(ops: Ops, rng: np.random.Generator):
    x = ops.asarray(rng.standard_normal((3, 4)))
    for y in (x * 2.0, 2 * x, x / 3.0, x + 0.0, x * ops.rounded(53.0660), ops.like(ops.to_wide(x), x)):
        assert y.dtype == x.dtype
    assert ops.to_wide(x).dtype == ops.aswide(np.zeros(1)).dtype


def test_linear(ops: Ops, rng: np.random.Generator):
    (x, w, b), reference = pair(
        ops, rng.standard_normal((2, 3, 33)), rng.standard_normal((5, 33)), np.ones(5)
    )
    rtol = tolerance(ops, 2)  # the product, then the sum with the bias
    close(ops.to_numpy(ops.linear(x, w)), REFERENCE.linear(*reference[:2]), rtol, "linear")
    close(ops.to_numpy(ops.linear(x, w, b)), REFERENCE.linear(*reference), rtol, "linear with bias")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("wide", [False, True])
def test_load(ops: Ops, rng: np.random.Generator, dtype: str, wide: bool):
    values = rng.standard_normal((4, 6)).astype(np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)  # exact in bfloat16
    raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    data: np.ndarray = {"BF16": raw, "F16": values.astype(np.float16), "F32": values}[dtype]
    file = np.concatenate([np.zeros(1, np.uint8), data.reshape(-1).view(np.uint8)])
    view = file[1:].view(data.dtype).reshape(data.shape)  # unaligned, as a file may have it
    view.flags.writeable = False
    loaded = ops.load(Stored("w", dtype, data.shape, view, Path("w.safetensors")), wide)
    expected = data.astype(np.float32) if dtype == "F16" else values
    file[:] = 0  # nothing may still look at the file
    assert loaded.dtype == (ops.aswide(values) if wide else ops.asarray(values)).dtype
    assert np.array_equal(ops.to_numpy(loaded), expected)


# ---- norms, activations, rotation ---------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm(ops: Ops, rng: np.random.Generator, scale: float):
    (x, w), (rx, rw) = pair(ops, scale * rng.standard_normal((2, 3, 5, 33)), 1 + rng.standard_normal(33))
    for weight, reference in ((None, None), (w, rw)):
        y = ops.rms_norm(x, weight, 1e-6)
        assert y.dtype == x.dtype
        expected = REFERENCE.rms_norm(rx, reference, 1e-6)
        close(ops.to_numpy(y), expected, tolerance(ops, 1), "rms_norm")
        # One rounding at the end, none before the weight.
        off = np.abs(ops.to_numpy(y) - expected) / np.abs(expected)
        assert off.max() <= max(1e-5, 1.01 * rounding(ops) / 2)


def test_gelu(ops: Ops):
    # Left of zero 1 + tanh cancels; element by element, a rounding for each of GELU and the product.
    (x, up), (rx, rup) = pair(ops, np.linspace(-4, 4, 257), np.linspace(1, 2, 257))
    for actual, expected in (
        (ops.gelu(x), REFERENCE.gelu(rx)),
        (geglu(ops, x, up), geglu(REFERENCE, rx, rup)),
    ):
        assert actual.dtype == x.dtype
        error = np.abs(ops.to_numpy(actual) - expected) / np.maximum(np.abs(expected), 1e-3)
        assert error.max() <= max(1e-4, 1.1 * rounding(ops))


def test_softmax(ops: Ops, rng: np.random.Generator):
    x = 30 * rng.standard_normal((3, 4096)).astype(np.float32)
    for axis in (0, 1):
        p = ops.to_numpy(ops.softmax(ops.aswide(x), axis))
        close(p, REFERENCE.softmax(REFERENCE.asarray(x), axis), 1e-5, "softmax")
        close(p.sum(axis), np.ones(x.shape[1 - axis]), 1e-5, "sum of softmax")


@pytest.mark.parametrize("starts", [(0, 3, 9), (150_000, 131_071, 5)])
def test_rope(ops: Ops, rng: np.random.Generator, starts: tuple[int, ...]):
    """Tokens of rows that start anywhere, one row behind the other."""
    C, L = 32, 7
    frequencies = 1e4 ** (-2.0 * np.arange(C // 2) / C)
    frequencies[10:] = 0  # these pairs do not rotate
    positions = np.concatenate([start + np.arange(L) for start in starts])
    (x,), (rx,) = pair(ops, rng.standard_normal((2, len(positions), C)))
    wide = ops.aswide(frequencies)
    y = rope(ops, x, rotary(ops, ops.asarray(positions), wide))
    assert y.dtype == x.dtype
    exact = rotary(REFERENCE, positions, REFERENCE.asarray(ops.to_numpy(wide)))
    # float32 rounds an angle by half an EPS of its size, and the angle is the position in pair 0.
    angle = EPS["float32"] * positions.max()
    close(ops.to_numpy(y), rope(REFERENCE, rx, exact), tolerance(ops, 1) + angle, "rope")
    still = np.r_[10 : C // 2, C // 2 + 10 : C]
    assert np.array_equal(ops.to_numpy(y)[..., still], rx[..., still])


# ---- attention ----------------------------------------------------------------------------------

# L queries, the last of S tokens, and what they may see.
SHAPES: dict[str, tuple[int, int, Mask]] = {
    "canvas": (5, 12, Mask()),
    "canvas alone": (6, 6, Mask()),
    "causal": (9, 9, Mask(True)),
    "causal after a past": (5, 14, Mask(True)),
    "one query": (1, 14, Mask(True, 4)),
    "window": (11, 11, Mask(True, 4)),
    "window of one": (6, 6, Mask(True, 1)),
    "window as long": (8, 8, Mask(True, 8)),
    "window longer": (8, 8, Mask(True, 50)),
    "window after a past": (9, 12, Mask(True, 4)),
    "window of no effect on a canvas": (5, 12, Mask(False, 4)),
}
HEADS = [(4, 4), (4, 2), (4, 1)]


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: Mask) -> np.ndarray:
    """model.md's words, one pair at a time: which of S keys each of the last L tokens may look at."""
    L, S = q.shape[1], k.shape[1]
    seen = np.zeros((L, S), bool)
    for i in range(L):
        at = S - L + i
        for j in range(S):
            seen[i, j] = not mask.causal or (j <= at and (mask.window is None or at - mask.window < j))
    shared = len(q) // len(k)
    k, v = np.repeat(k, shared, 0), np.repeat(v, shared, 0)
    e = np.where(seen, np.exp(q @ k.swapaxes(1, 2)), 0)
    return e / e.sum(-1, keepdims=True) @ v


def attention_tolerance(ops: Ops, q: np.ndarray, k: np.ndarray, roundings: int) -> float:
    """For q [H, L, C] and k [G, S, C]: weights, output and what else is rounded.

    A rounded score (some kernels keep them in bfloat16) moves its weight by the score's error, and the sum of
    weights by as much.
    """
    return tolerance(ops, roundings + 2 * np.abs(q @ np.repeat(k, len(q) // len(k), 0).swapaxes(1, 2)).max())


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("block", [None, 2])
def test_attention(ops: Ops, rng: np.random.Generator, case: str, heads: tuple[int, int], block: int | None):
    (L, S, mask), (H, G) = SHAPES[case], heads
    if block is not None and hasattr(ops, "score_bytes"):  # else queries are never split
        ops.score_bytes = 4 * H * block * S
    (q, k, v), exact = pair(ops, *(0.5 * rng.standard_normal((*n, 16)) for n in ((H, L), (G, S), (G, S))))
    y = ops.attention(q, k, v, mask)
    assert y.dtype == q.dtype
    expected = exact_attention(*exact, mask)
    close(REFERENCE.attention(*exact, mask), expected, 1e-12, f"{case}, definition")
    close(ops.to_numpy(y), expected, attention_tolerance(ops, exact[0], exact[1], 2), case)


# Rows as the layers have them: each one's new tokens, and the pieces of its past. Full layers have pieces of
# any sizes; sliding ones have one, of window − 1 tokens at most.
ROWS: dict[str, tuple[Mask, list[tuple[int, tuple[int, ...]]]]] = {
    "canvases": (Mask(), [(5, (30,)), (5, ()), (5, (7, 1, 22)), (5, (3, 9))]),
    "canvases, sliding": (Mask(False, 8), [(5, (7,)), (5, (2,)), (5, ())]),
    "one canvas": (Mask(), [(5, (8, 8, 8, 6))]),
    "one canvas, one piece": (Mask(), [(5, (30,))]),
    "prompts": (Mask(True), [(9, ()), (1, (13, 4)), (4, (6,)), (1, ())]),
    "prompts, sliding": (Mask(True, 8), [(11, (7,)), (1, (7,)), (3, ()), (20, (2,))]),
    "one prompt": (Mask(True), [(6, (5, 17))]),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("slots", [None, 8])
def test_rows_over_their_pasts(
    ops: Ops, rng: np.random.Generator, case: str, heads: tuple[int, int], slots: int | None
):
    """`attend`: each row sees its own past and itself. MLX weighs so many keys at once, and merges."""
    (mask, rows), (H, G) = ROWS[case], heads
    lengths = [n for n, _ in rows]
    if slots is not None and hasattr(ops, "score_bytes"):
        ops.score_bytes = 4 * H * max(lengths) * slots

    def draw(heads: int, n: int) -> tuple[Any, np.ndarray]:
        (device,), (exact,) = pair(ops, 0.5 * rng.standard_normal((heads, n, 16)))
        return device, exact

    (q, exact_q), *own = (draw(heads, sum(lengths)) for heads in (H, G, G))
    past = [[(draw(G, n), draw(G, n)) for n in pieces] for _, pieces in rows]
    layer = [[(k[0], v[0]) for k, v in pieces] for pieces in past]
    y = ops.attend(q, (own[0][0], own[1][0]), ops.pasts([layer], lengths)[0], lengths, mask)
    assert y.dtype == q.dtype and tuple(y.shape) == (H, sum(lengths), 16)
    start = 0
    for row, (n, pieces) in enumerate(zip(lengths, past, strict=True)):
        at = slice(start, start := start + n)
        k, v = (
            np.concatenate([*(piece[part][1] for piece in pieces), own[part][1][:, at]], 1) for part in (0, 1)
        )
        expected = exact_attention(exact_q[:, at], k, v, mask)
        # The sums over a past and over the row itself are rounded apart.
        rtol = attention_tolerance(ops, exact_q[:, at], k, 3)
        close(ops.to_numpy(y)[:, at], expected, rtol, f"{case}, row {row}, {slots} keys at once")


# ---- experts ------------------------------------------------------------------------------------


def test_top_k_ties_go_to_the_lower_id(any_ops: Ops, rng: np.random.Generator):
    x = rng.integers(0, 5, (50, 128)) / 8
    values, ids = top_k(any_ops, any_ops.aswide(x), 8)
    order = np.argsort(-x, -1, kind="stable")[:, :8]
    assert np.array_equal(any_ops.to_numpy(ids), order)
    assert np.array_equal(any_ops.to_numpy(values), np.take_along_axis(x, order, -1))


def test_router(ops: Ops, rng: np.random.Generator):
    N, D, E, K = 23, 32, 12, 3
    arrays = rng.standard_normal((N, D)), rng.standard_normal((E, D)), rng.random(E)
    device, reference = pair(ops, *arrays)
    weights, ids = ops.router(ops.to_wide(device[0]), *device[1:], K)
    expected, picks = REFERENCE.router(*reference, K)
    # All of it is wide: float32 bounds, whatever the compute type.
    assert weights.dtype == ops.aswide(np.zeros(1)).dtype
    assert np.array_equal(ops.to_numpy(ids), picks)
    close(ops.to_numpy(weights), expected, 1e-5, "router")


@pytest.mark.parametrize("N", [1, 2, 19])
@pytest.mark.parametrize("D, M", [(24, 16), (20, 6), (13, 7)])
def test_experts(ops: Ops, rng: np.random.Generator, N: int, D: int, M: int):
    E, K = 6, 2
    ids = np.array([[0, 5], [5, 2], [2, 0]])[rng.integers(0, 3, N)]  # experts 1, 3 and 4 have no rows
    gate_up = rng.standard_normal((E, 2 * M, D)) / D**0.5
    (x, gate_up, down), reference = pair(
        ops, rng.standard_normal((N, D)), gate_up, rng.standard_normal((E, D, M))
    )
    weights = rng.random((N, K)).astype(np.float32)
    y = ops.experts(x, ops.aswide(weights), ops.asarray(ids), gate_up, down)
    assert y.dtype == x.dtype
    rx, rg, rd = reference
    expected = np.zeros((N, D))
    for n in range(N):
        for weight, expert in zip(weights[n], ids[n], strict=True):
            gate, up = np.split(rg[expert] @ rx[n], 2)
            expected[n] += weight * (rd[expert] @ geglu(REFERENCE, gate, up))
    close(REFERENCE.experts(rx, weights, ids, rg, rd), expected, 1e-12, "definition")
    # gate, up, GELU, product, down and the sum are rounded in turn.
    close(ops.to_numpy(y), expected, tolerance(ops, 6), "experts")


# ---- vocabulary ---------------------------------------------------------------------------------


def test_embedding_logits_and_soft_embedding(ops: Ops, rng: np.random.Generator):
    N, V, D = 7, 37, 24
    (h, table), (rh, rtable) = pair(ops, rng.standard_normal((N, D)), 3 * rng.standard_normal((V, D)))
    ids = rng.integers(0, V, (2, 5))
    assert np.array_equal(ops.to_numpy(embed(ops, table, ops.asarray(ids))), rtable[ids])
    assert np.array_equal(ops.to_numpy(table[30:99]), rtable[30:])
    z = logits(ops, h, table, 30.0)
    assert z.dtype == ops.aswide(np.zeros(1)).dtype
    close(ops.to_numpy(z), logits(REFERENCE, rh, rtable, 30.0), tolerance(ops, 2), "logits")
    p = rng.dirichlet(np.ones(V), N)
    soft = ops.soft_embedding(ops.aswide(p), table)
    close(ops.to_numpy(soft), p @ rtable, tolerance(ops, 2), "soft embedding")


# ---- MLX ----------------------------------------------------------------------------------------


def test_mlx_refuses_float16():
    mx = pytest.importorskip("mlx.core")
    from dgemma.errors import BackendError
    from dgemma_mlx.ops import MlxOps

    with pytest.raises(BackendError, match="not float16"):
        MlxOps(mx.float16)


def test_mlx_does_as_suits_its_device(monkeypatch: pytest.MonkeyPatch):
    """Default format and sizes follow the device, unless a caller knows better."""
    mx = pytest.importorskip("mlx.core")
    from dgemma_mlx import ops as module

    sizes = {}
    for kind, dtype in ((mx.cpu, mx.float32), (mx.gpu, mx.bfloat16)):
        monkeypatch.setattr(mx, "default_device", lambda kind=kind: mx.Device(kind))
        ops, on_gpu = module.make(), kind == mx.gpu
        assert (ops.on_gpu, ops.dtype) == (on_gpu, dtype)
        sizes[on_gpu] = ops.vocab_tile, ops.score_bytes
    assert sizes[False] < sizes[True]
    for on_gpu in (False, True):
        ops = module.MlxOps(on_gpu=on_gpu)
        assert (ops.on_gpu, ops.vocab_tile, ops.score_bytes) == (on_gpu, *sizes[on_gpu])


def test_mlx_never_has_all_scores_at_once():
    """Up to ten operations are in flight, each with a sixteenth of them; unchained it is all."""
    mx = pytest.importorskip("mlx.core")
    from dgemma_mlx.ops import MlxOps

    ops, scores = MlxOps(), 4 * 4 * 256 * 1024
    ops.score_bytes = scores // 16
    q, k = mx.ones((4, 256, 8)), mx.ones((1, 1024, 8))
    mx.eval(q, k)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(ops.attention(q, k, k, Mask()))
    assert mx.get_peak_memory() - before < 0.8 * scores


def test_mlx_on_a_cpu_never_has_a_whole_stack_decoded(monkeypatch: pytest.MonkeyPatch):
    """26 tiles of outputs, of which a few are in memory at once: decoded, multiplied, let go."""
    mx = pytest.importorskip("mlx.core")
    from dgemma_mlx import arrays

    ops, (E, O, I) = arrays.MlxArrays(), (4, 1664, 256)
    monkeypatch.setattr(arrays, "DECODED", 4 * E * I * 64)
    w = np.random.default_rng(0).standard_normal((E, O, I)).astype(np.float32)
    record = quantize(w, MXFP4)
    packed = record.map(lambda f: on_device(ops, f))
    experts, x = np.array([0, 0, 1, 3]), mx.ones((4, I))
    mx.eval(x, packed.codes, packed.scales)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    y = ops.expert_linear(x, packed, mx.array(experts))
    mx.eval(y)
    assert mx.get_peak_memory() - before < 0.4 * w.nbytes
    close(
        ops.to_numpy(y),
        dequantize(REFERENCE, record)[experts].sum(-1),
        1e-5,
        "decoded experts",
    )


@pytest.mark.parametrize("forms", [(None, None), (NVFP4, NVFP4), (NVFP4, MXFP4), (MXFP4, None)], ids=str)
def test_gated(any_ops: Ops, rng: np.random.Generator, forms: tuple[Form | None, Form | None]):
    """Whatever a backend makes of the matrices when they are loaded, of one form or of two."""
    D, F = 64, 32
    x, arrays, exact = rng.standard_normal((2, 3, D)), [], []
    for form in forms:
        w = rng.standard_normal((F, D)).astype(np.float32) / 8
        record = None if form is None else quantize(w, form)
        arrays.append(any_ops.aswide(w) if record is None else record.map(lambda f: on_device(any_ops, f)))
        exact.append(w.astype(np.float64) if record is None else dequantize(REFERENCE, record))
    mlp = any_ops.layer_weights(layer_of(any_ops, mlp=MlpWeights(*arrays, any_ops.aswide(np.eye(F))))).mlp
    y = any_ops.gated(any_ops.aswide(x), mlp.gate, mlp.up)
    close(any_ops.to_numpy(y), geglu(REFERENCE, x @ exact[0].T, x @ exact[1].T), 1e-5, f"gated, {forms}")


def layer_of(ops: Ops, **parts: Any) -> LayerWeights:
    """A layer of which these weights alone matter."""
    blank: dict[str, Any] = {field.name: None for field in fields(LayerWeights)}
    one = ops.aswide(np.ones((1, 1)))
    small = {
        "mlp": MlpWeights(one, one, one),
        "attention": AttentionWeights(*[one] * 5),
        "bias": BiasWeights(),
    }
    return LayerWeights(**(blank | small | parts))


def stored(ops: Ops, rng: np.random.Generator, rows: int, form: Form | None) -> tuple[Any, np.ndarray]:
    """A random matrix of 64 inputs in a form, None for an array; and what it stands for."""
    w = rng.standard_normal((rows, 64)).astype(np.float32) / 8
    if form is None:
        return ops.aswide(w), w.astype(np.float64)
    record = quantize(w, form)
    return record.map(lambda field: on_device(ops, field)), dequantize(REFERENCE, record)


FORMS = {
    "arrays": (None, None, None),
    "4bit": (affine(4, 32),) * 3,
    "nvfp4": (NVFP4,) * 3,  # with factors, which differ
    "two forms": (NVFP4, NVFP4, MXFP4),
    "array among records": (MXFP4, None, MXFP4),
}


@pytest.mark.parametrize("own_v", [True, False], ids=["own v", "k's v"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("forms", FORMS)
def test_heads(any_ops: Ops, rng: np.random.Generator, forms: str, biased: bool, own_v: bool):
    """Whatever a backend makes of the matrices when they are loaded; tokens stand at any positions."""
    H, G, C = 4, 2, 6
    positions = np.array([7, 8, 9, 0, 1, 41, 2])
    matrices = [stored(any_ops, rng, n * C, form) for n, form in zip((H, G, G), FORMS[forms], strict=True)]
    vectors = [rng.standard_normal(n).astype(np.float32) for n in (C, C, H * C, G * C, G * C)]
    x = rng.standard_normal((len(positions), 64)).astype(np.float32)
    frequencies = (10.0 ** -np.arange(C // 2)).astype(np.float32)

    def run(ops: Ops, place: Callable[[np.ndarray], Any], which: int) -> list[np.ndarray]:
        q, k, v = (matrix[which] for matrix in matrices)
        q_norm, k_norm, *biases = map(place, vectors)
        w = AttentionWeights(q, k, None, q_norm, k_norm, v if own_v else None)
        bias = BiasWeights(*biases[: 3 if own_v else 2]) if biased else BiasWeights()
        turned = rotary(ops, ops.asarray(positions), place(frequencies))
        w = ops.layer_weights(layer_of(ops, attention=w, bias=bias)).attention
        given = place(x), w, bias, 1e-6, turned
        return [ops.to_numpy(y) for y in (*ops.heads(*given), *ops.keys_values(*given))]

    expected = run(REFERENCE, lambda y: y.astype(np.float64), 1)
    assert [y.shape for y in expected] == [(H, len(positions), C), *[(G, len(positions), C)] * 4]
    for found, wanted, what in zip(run(any_ops, any_ops.aswide, 0), expected, "qkvkv", strict=True):
        close(found, wanted, 1e-5, what)


def test_mlx_stacks_what_is_of_one_form(rng: np.random.Generator):
    """One matrix of all rows, in memory of its own; biases and other forms stay apart."""
    pytest.importorskip("mlx.core")
    ops = make(("mlx", "float32"))
    for name, forms in FORMS.items():
        for own_v in (True, False):
            matrices = [stored(ops, rng, n, form)[0] for n, form in zip((8, 4, 4), forms, strict=True)]
            q, k, v = matrices
            w = AttentionWeights(q, k, None, None, None, v if own_v else None)
            assert ops.layer_weights(layer_of(ops, attention=w, bias=BiasWeights(q=1))).attention is w
            got = ops.layer_weights(layer_of(ops, attention=w)).attention
            if name == "array among records" or (name == "two forms" and own_v):
                assert got is w
                continue
            assert got.k is None and got.v is None and got.rows == ((8, 4, 4) if own_v else (8, 4))
            parts = [q, k, v][: len(got.rows)]
            whole = [ops.to_numpy(dense(ops, part)) for part in parts]
            assert np.array_equal(ops.to_numpy(dense(ops, got.q)), np.concatenate(whole))


def on_device(ops: Ops, field: np.ndarray) -> Any:
    return ops.raw(field) if field.dtype == np.uint8 else ops.aswide(field)
