"""Experts with products in FP4 against their twin, and the twin against exact activations.

Interpreted, a product decodes both operands into float32: that proves where bytes and scales lie, and not
what `tl.dot_scaled` makes of them. See test_aot.py for what it compiles to. Both operands have their codes in
the same order, so that a sum does not depend on which of two in a byte comes first.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from dgemma import backends
from dgemma.errors import BackendError
from dgemma.formats.encode import blocks, quantize
from dgemma.formats.quantized import FP8, NVFP4
from tests.compare import close
from tests.kernels import test_moe
from tests.kernels.test_layout import random_record
from tests.kernels.test_moe import SMALL, layer

torch = pytest.importorskip("torch")

from dgemma_cuda.kernels import fp4, launch, moe  # noqa: E402
from dgemma_cuda.kernels.layout import Order, untile  # noqa: E402
from dgemma_cuda.ops import CudaOps, make  # noqa: E402

CASES = {name: sizes for name, sizes in SMALL.items() if "FP8" not in name}
CASES["a last step that is half full"] = dict(E=2, N=5, K=2, D=192, M=192)


@pytest.fixture
def blackwell(place: Any) -> Any:
    """The device for launches; a skip on a GPU that has no such products."""
    if reason := fp4.unsupported(place):
        pytest.skip(reason)
    return place


placed = partial(test_moe.placed, kernels=fp4)


def heavy(*shape: int, seed: int = 0) -> np.ndarray:
    """Numbers of Student's t with three degrees of freedom: some are far out, as a model's are."""
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def decoded(rows: Any, width: int) -> tuple[np.ndarray, ...]:
    """Codes, scales and factor as NumPy arrays, without what fills up the last step."""
    return (
        rows.codes.cpu().numpy()[:, : width // 2],
        rows.scales.cpu().numpy()[:, : width // 16],
        rows.factor.cpu().numpy(),
    )


# ---- activations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 64, 80, 128, 704])
def test_activations_are_encoded_as_the_format_says(blackwell: Any, width: int) -> None:
    """Bit by bit, over many magnitudes, with zeros in a group and a row of them."""
    x = heavy(9, width) * np.float32(2.0) ** np.arange(-40, 41, 10, dtype=np.float32)[:, None]
    x[2, :16] = 0
    x[5] = 0
    x[7, :8] = np.float32(0.5) * np.arange(8)  # ties, if 6 were its largest
    x[7, 8:] = 6
    factor = np.abs(x).max(-1) / np.float32(2688)
    wanted = blocks(x, NVFP4, np.where(factor == 0, np.float32(1), factor))
    got = fp4.quantized(torch.from_numpy(x).to(blackwell), width)
    for mine, its in zip(decoded(got, width), (wanted.codes, wanted.scales, wanted.factor), strict=True):
        np.testing.assert_array_equal(mine, its)
    assert not got.codes[:, width // 2 :].any() and got.codes.shape[1] % 64 == 0


def test_the_first_inputs_of_longer_rows(blackwell: Any) -> None:
    """NaN behind them, and strides."""
    x = torch.full((5, 200), torch.nan, device=blackwell)
    x[:, :80] = torch.from_numpy(heavy(5, 80))
    one, other = fp4.quantized(x, 80), fp4.quantized(x[:, :80].contiguous(), 80)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.factor, other.factor)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_stay_visible(blackwell: Any) -> None:
    part = layer(E=2, N=3, K=1, D=64, M=64)
    inputs = placed(part, blackwell)
    for row, value in enumerate((torch.nan, torch.inf)):
        inputs[0][row, 5] = value
    finite = fp4.experts(*inputs).isfinite().all(-1).tolist()
    assert finite == [False, False, True]


# ---- experts ----------------------------------------------------------------------------------------


def run(inputs: tuple[Any, ...], place: Any) -> Any:
    y = fp4.experts(*inputs)
    assert y.dtype == inputs[0].dtype and y.shape == inputs[0].shape
    return y.float().cpu().numpy()


@pytest.mark.parametrize("name", CASES)
def test_experts(blackwell: Any, name: str) -> None:
    inputs = placed(layer(**CASES[name]), blackwell)
    # A sum in another order may round to another code of the second product's activations: half a step of 16.
    bound = 2e-2 if blackwell.type == "cuda" else 1e-2
    close(run(inputs, blackwell), fp4.experts_plain(*inputs).float().cpu().numpy(), bound, name)


@pytest.mark.parametrize("name", ["whole tiles", "odd sizes", "a last step that is half full"])
def test_a_product_is_that_of_the_decoded_values(interpreter: None, place: Any, name: str) -> None:
    """Without the second rounding: up to float32's own."""
    part = layer(**CASES[name])
    x, _, ids, gate_up, _ = placed(part, place)
    chosen = fp4.plan(ids, gate_up.shape[0], 16)
    h = fp4.gated(fp4.quantized(x, x.shape[1]), chosen, ids.shape[1], gate_up, x.dtype)
    wide, values = untile(gate_up), fp4.quantized_plain(x)
    M = gate_up.shape[1] // 2
    for row, slot in enumerate(chosen.slots.tolist()):
        expert = int(chosen.experts[row // 16])
        if expert < gate_up.shape[0] and slot < ids.numel():
            gate, up = (wide[expert] @ values[slot // ids.shape[1]]).chunk(2)
            wanted = torch.nn.functional.gelu(gate, approximate="tanh") * up
            close(h[row, :M].numpy(), wanted.numpy(), 1e-5, f"{name}, row {row}")


def test_nothing_behind_a_stack_is_read(blackwell: Any) -> None:
    """A last step that is half full ends with the stack: NaN lies behind its codes and scales."""
    *inputs, gate_up, down = placed(layer(**CASES["a last step that is half full"]), blackwell)
    expected = fp4.experts(*inputs, gate_up, down)

    def framed(x: Any) -> Any:
        room = torch.full((x.numel() + 4096,), 0x7F7F7F7F, dtype=torch.int32, device=x.device)
        room[: x.numel()] = x.flatten()
        return room[: x.numel()].view(x.shape)

    stacks = [replace(w, words=framed(w.words), scales=framed(w.scales)) for w in (gate_up, down)]
    assert torch.equal(fp4.experts(*inputs, *stacks), expected)


@pytest.mark.parametrize("picks", [8, 40, 200])
def test_every_height_of_a_block(blackwell: Any, picks: int) -> None:
    inputs = placed(layer(E=2, N=picks // 2, K=1, D=64, M=64), blackwell)
    close(run(inputs, blackwell), fp4.experts_plain(*inputs).float().cpu().numpy(), 2e-2, f"{picks} picks")


def test_negative_and_zero_scales(blackwell: Any) -> None:
    part = layer(E=2, N=5, K=1, D=80, M=48)
    part.gate_up, part.down = random_record((2, 96, 80), "none"), random_record((2, 80, 48), "none")
    part.x *= np.float32(1e-3)
    inputs = placed(part, blackwell)
    close(run(inputs, blackwell), fp4.experts_plain(*inputs).float().cpu().numpy(), 2e-2, "signs")


def test_results_repeat(blackwell: Any) -> None:
    inputs = placed(layer(**SMALL["odd sizes"]), blackwell)
    assert torch.equal(fp4.experts(*inputs), fp4.experts(*inputs))


def test_what_quantized_activations_cost() -> None:
    """Against exact activations, weights being the same: heavy tails in both."""
    part = layer(E=4, N=64, K=2, D=704, M=704)
    part.x = heavy(64, 704)
    part.gate_up = quantize(heavy(4, 1408, 704, seed=1) / 704**0.5, NVFP4)
    part.down = quantize(heavy(4, 704, 704, seed=2) / 704**0.5, NVFP4)
    inputs = placed(part, torch.device("cpu"))
    exact = moe.experts_plain(*inputs)
    error = (fp4.experts_plain(*inputs) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    print(f"W4A4 against W4A16: {error:.1%} of the root mean square")
    assert 0.05 < error < 0.2


# ---- the option -------------------------------------------------------------------------------------


def test_the_option_reaches_the_experts(interpreter: None, place: Any) -> None:
    part = layer(**SMALL["odd sizes"])
    records = [record.map(torch.from_numpy) for record in (part.gate_up, part.down)]
    ops = CudaOps(place, w4a4=True, kernels=True)
    tiles = [ops.arrange(record, name) for record, name in zip(records, moe.TILE_ROWS, strict=True)]
    assert [w.order for w in tiles] == [Order.UNSIGNED] * 2
    inputs = [torch.from_numpy(x) for x in (part.x, part.weights, part.ids)]
    assert torch.equal(ops.experts(*inputs, *tiles), fp4.experts(*inputs, *tiles))


def test_experts_in_another_form_are_an_error(interpreter: None, place: Any) -> None:
    """The option promises products in FP4."""
    ops = CudaOps(place, w4a4=True, kernels=True)
    x, weights, ids = torch.zeros(2, 64), torch.ones(2, 1), torch.zeros((2, 1), dtype=torch.int64)
    record = random_record((2, 64, 64), form=FP8).map(torch.from_numpy)
    for stack in (torch.zeros(2, 64, 64), ops.arrange(record, "down")):
        with pytest.raises(BackendError, match="need experts in NVFP4"):
            ops.experts(x, weights, ids, stack, stack)


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((9, 0), (3, 9), "need compute capability 10.0 or more, and this GPU has 9.0"),
        ((10, 0), (3, 6), "need Triton 3.7, and 3.6 is installed"),
        ((12, 1), (3, 7), "need Triton 3.8, and 3.7 is installed"),
        ((12, 0), (3, 7), None),
        ((12, 1), (3, 8), None),
    ],
)
def test_unsupported(
    capability: tuple[int, int],
    version: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp4, "triton_version", lambda: version)
    found = fp4.unsupported(torch.device("cuda"))
    assert found is None if reason is None else reason in str(found)


def test_the_option_on_a_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="NVFP4 are not possible here: the kernels need an NVIDIA GPU"):
        make(None, "cpu", "nvfp4")
    assert not make(None, "cpu").w4a4
    for backend in ("mlx", "numpy"):
        with pytest.raises(BackendError, match=f"cuda backend only, not for {backend}"):
            backends.choose(backend, activations="nvfp4")
