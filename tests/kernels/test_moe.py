"""The expert kernels against the composite `Ops.experts` on NumPy float64, from the records' own values.

Interpreted, activations may be float32: then sums of a few hundred terms agree to 1e-5, and a bit in the
wrong place shows. With bfloat16 activations every value that is stored is rounded to 2^-8 relatively, thrice
on the way (the interpreter cuts off instead, which is twice that).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from dgemma.formats.encode import quantize
from dgemma.formats.quantized import FP8, NVFP4, Form, Quantized
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops.decoding import dequantize
from tests.compare import EPS, close

torch = pytest.importorskip("torch")

from dgemma_cuda.kernels import launch, layout, moe  # noqa: E402
from dgemma_cuda.kernels.plan import plan, plan_plain  # noqa: E402


@dataclass
class Layer:
    """Experts as records of NumPy arrays, and inputs."""

    gate_up: Quantized
    down: Quantized
    x: np.ndarray
    weights: np.ndarray
    ids: np.ndarray

    def expected(self, x: Any) -> np.ndarray:
        """The composite on float64; `x` as the kernel reads it."""
        return NumpyOps().experts(
            np.asarray(x.cpu().double()), self.weights.astype(np.float64), self.ids, self.gate_up, self.down
        )


def layer(
    E: int, N: int, K: int, D: int, M: int, factor: str = "row", skip: int | None = None,
    forms: tuple[Form, Form] = (NVFP4, NVFP4),
) -> Layer:  # fmt: skip
    """Random experts, of which `skip` is never picked."""
    rng = np.random.default_rng([E, N, K, D, M])
    gate_up = quantize(rng.standard_normal((E, 2 * M, D)).astype(np.float32), forms[0])
    down = quantize(rng.standard_normal((E, D, M)).astype(np.float32), forms[1])
    if factor == "row":
        shape = {"gate_up": (E, 2 * M), "down": (E, D)}
        more = {name: rng.uniform(0.5, 2, size).astype(np.float32) for name, size in shape.items()}
        gate_up = replace(gate_up, factor=gate_up.factor * more["gate_up"])
        down = replace(down, factor=1 / (down.factor * more["down"]), divides=True)
    elif factor == "none":
        gate_up, down = replace(gate_up, factor=None), replace(down, factor=None)
    chosen = [expert for expert in range(E) if expert != skip]
    ids = np.stack([rng.permutation(chosen)[:K] for _ in range(N)])
    weights = rng.uniform(0.1, 1, (N, K)).astype(np.float32)
    scale = 1e-3 if factor == "none" else 1.0  # block scales without their factor are large
    x = (scale * rng.standard_normal((N, D)) / D**0.5).astype(np.float32)
    return Layer(gate_up, down, x, weights, ids)


def placed(part: Layer, place: Any, dtype: Any = None, kernels: Any = moe) -> tuple[Any, ...]:
    """x, weights, ids and the tiles of `kernels` on the device; float32 x where only the interpreter runs."""
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    records = (record.map(lambda x: torch.from_numpy(x).to(place)) for record in (part.gate_up, part.down))
    tiles = [kernels.tile_stack(record, name) for record, name in zip(records, moe.TILE_ROWS, strict=True)]
    x, weights, ids = (torch.from_numpy(x).to(place) for x in (part.x, part.weights, part.ids))
    return x.to(dtype), weights, ids, *tiles


def compare(actual: Any, expected: np.ndarray, what: str) -> None:
    bound = 1e-5 if actual.dtype == torch.float32 else 3 * EPS["bfloat16"]
    close(actual.float().cpu().numpy(), expected, bound, what)


def run(inputs: tuple[Any, ...], rows: int, config: moe.Config) -> Any:
    """`moe.experts` with a block and a configuration of our choice."""
    x, weights, ids, gate_up, down = inputs
    chosen = plan(ids, len(gate_up.words), rows)
    h = moe.gated(x, chosen, ids.shape[1], gate_up, config)
    return moe.combined(moe.projected(h, chosen, weights, down, config), ids.shape[1])


SMALL = {
    "whole tiles": dict(E=3, N=5, K=2, D=128, M=64),
    "odd sizes": dict(E=4, N=7, K=3, D=80, M=48),
    "an expert without rows": dict(E=4, N=9, K=2, D=64, M=80, skip=1),
    "one token, one pick": dict(E=2, N=1, K=1, D=64, M=64),
    "more than one block an expert": dict(E=2, N=40, K=1, D=64, M=64),
    "a factor a matrix": dict(E=3, N=4, K=2, D=64, M=64, factor="matrix"),
    "no factor": dict(E=3, N=4, K=2, D=64, M=64, factor="none"),
    "FP8": dict(E=3, N=5, K=2, D=128, M=64, forms=(FP8, FP8)),
    "FP8, odd sizes": dict(E=4, N=7, K=3, D=80, M=44, forms=(FP8, FP8)),
    "FP8, no factor": dict(E=3, N=4, K=2, D=64, M=64, factor="none", forms=(FP8, FP8)),
    "NVFP4, then FP8": dict(E=3, N=4, K=2, D=80, M=48, forms=(NVFP4, FP8)),
}


@pytest.mark.parametrize("name", SMALL)
def test_experts(place: Any, name: str) -> None:
    part = layer(**SMALL[name])
    inputs = placed(part, place)
    compare(moe.experts(*inputs), part.expected(inputs[0]), name)
    compare(moe.experts_plain(*inputs), part.expected(inputs[0]), f"{name}, the twin")


@pytest.mark.parametrize("name", ["odd sizes", "FP8, odd sizes"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_both_orders_of_operands(place: Any, rows: int, swap: bool, name: str) -> None:
    part = layer(**SMALL[name])
    inputs = placed(part, place)
    compare(run(inputs, rows, moe.Config(swap)), part.expected(inputs[0]), f"blocks of {rows}, swap {swap}")


@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("FP8")])
@pytest.mark.parametrize("swap", [False, True])
def test_native_order(
    place: Any, interpreter: None, swap: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words as a GPU converts them. Compiled for one that cannot, they would be decoded wrongly."""
    monkeypatch.setattr(moe, "native", lambda arch: True)
    part = layer(**SMALL[name])
    inputs = placed(part, place)
    assert inputs[3].order is layout.Order.NATIVE
    compare(run(inputs, 16, moe.Config(swap)), part.expected(inputs[0]), f"native, swap {swap}")
    compare(moe.experts_plain(*inputs), part.expected(inputs[0]), f"{name}, the twin")


@pytest.mark.parametrize("heights", [(128, 64), (64, 64)])
def test_other_heights_of_tiles(
    place: Any, heights: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "TILE_ROWS", dict(zip(("gate_up", "down"), heights, strict=True)))
    part = layer(**SMALL["odd sizes"])
    inputs = placed(part, place)
    for swap in (False, True):
        compare(run(inputs, 16, moe.Config(swap)), part.expected(inputs[0]), f"tiles {heights}, swap {swap}")


def test_unrolling_leaves_a_rest(place: Any) -> None:
    part = layer(E=2, N=3, K=1, D=192, M=64)
    inputs = placed(part, place)
    compare(run(inputs, 16, moe.Config(True, unroll=2)), part.expected(inputs[0]), "unrolled")


@pytest.mark.parametrize("name", ["odd sizes", "FP8, odd sizes"])
def test_bfloat16(place: Any, name: str) -> None:
    part = layer(**SMALL[name])
    inputs = placed(part, place, torch.bfloat16)
    actual = moe.experts(*inputs)
    assert actual.dtype == torch.bfloat16
    compare(actual, part.expected(inputs[0]), "bfloat16")
    close(
        actual.float().cpu().numpy(),
        moe.experts_plain(*inputs).float().cpu().numpy(),
        3 * EPS["bfloat16"],
        "against the twin",
    )


def test_what_lies_around_the_inputs_does_not_leak(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    part = layer(**SMALL["odd sizes"])
    x, weights, ids, *tiles = placed(part, place)
    N, D = x.shape
    around = x.new_full((N + 2, D + 64), torch.nan)
    around[1:-1, :D] = x
    # Memory that is allocated and not written must not matter, either.
    empty = torch.Tensor.new_empty

    def poisoned(self: Any, *args: Any, **more: Any) -> Any:
        fresh = empty(self, *args, **more)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    actual = moe.experts(around[1:-1, :D], weights, ids, *tiles)
    compare(actual, part.expected(x), "NaN around x")


def test_padded_columns_and_rows_of_the_middle_are_zeros(place: Any) -> None:
    part = layer(E=2, N=3, K=1, D=64, M=48)
    x, _, ids, gate_up, _ = placed(part, place)
    chosen = plan_plain(ids, 2, 16)
    h = moe.gated(x, chosen, 1, gate_up, moe.Config(True))
    assert h.shape == (chosen.blocks * 16, 64)
    empty = (chosen.slots == 3) & (chosen.experts < 2).repeat_interleave(16)
    assert not h[empty].any() and not h[chosen.slots < 3, 48:].any() and h[chosen.slots < 3, :48].any()


def test_results_repeat(place: Any) -> None:
    inputs = placed(layer(**SMALL["odd sizes"]), place)
    assert torch.equal(moe.experts(*inputs), moe.experts(*inputs))


ORDERS = [layout.Order.SHIFTED, layout.Order.NATIVE]


@pytest.mark.parametrize("order", ORDERS)
def test_a_dense_code_for_every_scale(place: Any, order: layout.Order) -> None:
    """Every pair of a code and a positive scale, through the kernel: identity activations read them out."""
    if place.type == "cuda" and order is not moe.order(place):
        pytest.skip("this GPU decodes another order")
    scales = np.resize(np.arange(1, 127, dtype=np.uint8), (1, 128, 4))
    codes = np.tile((np.arange(64, dtype=np.uint8) % 16).reshape(32, 2) @ [1, 16], (1, 128, 1)).astype(
        np.uint8
    )
    record = Quantized(NVFP4, codes, scales)
    tiled = layout.tile(record.map(lambda x: torch.from_numpy(x).to(place)), 128, order=order)
    one = torch.ones((64, 1), device=place)
    chosen = plan(torch.zeros((64, 1), dtype=torch.int64, device=place), 1, 16)
    h = torch.eye(64, device=place, dtype=torch.bfloat16 if place.type == "cuda" else torch.float32)
    y = moe.projected(h, chosen, one, tiled, moe.Config(True))
    np.testing.assert_array_equal(y.float().cpu().numpy().T, dequantize(NumpyOps(), record)[0])


def test_every_code_of_fp8(place: Any) -> None:
    """Through the kernel, by identity activations, subnormals among them."""
    codes = np.resize([code for code in range(256) if code & 127 != 127], (1, 128, 64)).astype(np.uint8)
    record = Quantized(FP8, codes)
    tiled = layout.tile(record.map(lambda x: torch.from_numpy(x).to(place)), 128)
    one = torch.ones((64, 1), device=place)
    chosen = plan(torch.zeros((64, 1), dtype=torch.int64, device=place), 1, 16)
    h = torch.eye(64, device=place, dtype=torch.bfloat16 if place.type == "cuda" else torch.float32)
    y = moe.projected(h, chosen, one, tiled, moe.Config(True))
    np.testing.assert_array_equal(y.float().cpu().numpy().T, dequantize(NumpyOps(), record)[0])


# ---- choices ----------------------------------------------------------------------------------------


def test_block_rows_follow_the_picks() -> None:
    assert moe.block_rows(90, 8, 128) == 16  # one token
    assert moe.block_rows(90, 2048, 128) == 32  # a canvas
    assert moe.block_rows(120, 2048, 128) == 16
    assert moe.block_rows(90, 8 * 2048, 128) == 64  # a long prompt


def test_every_choice_has_a_configuration() -> None:
    rows = {moe.block_rows(arch, picks, 128) for arch in moe.CANVAS_ROWS for picks in (8, 2048, 1 << 16)}
    assert {(arch, count) for arch in moe.CANVAS_ROWS for count in rows} <= set(moe.CONFIGS)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), 80),
        ((8, 6), 89),
        ((8, 7), 80),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 120),
        ((12, 1), 120),
    ],
)
def test_architecture(capability: tuple[int, int], arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert moe.architecture(torch.device("cuda")) == arch


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "'cpu'" in str(launch.supported(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in str(launch.supported(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert launch.supported(torch.device("cuda")) is None
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert "not installed" in str(launch.supported(torch.device("cuda")))
