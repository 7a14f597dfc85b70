"""Linears of tiled matrices against their records' values in float64."""

from typing import Any

import numpy as np
import pytest

from dgemma.formats.quantized import FP8, NVFP4, Form, Quantized
from dgemma.network.ops.decoding import dequantize
from tests.compare import EPS, REFERENCE, close
from tests.kernels.test_layout import random_record

torch = pytest.importorskip("torch")

from dgemma_cuda.kernels import linear, moe  # noqa: E402
from dgemma_cuda.kernels.layout import Order  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402

FORMS = pytest.mark.parametrize("form", [NVFP4, FP8], ids=str)


def inputs(place: Any, record: Quantized, *lead: int, dtype: Any = None) -> tuple[Any, Any]:
    """x [*lead, I] of unit normals and the tiles; float32 where only the interpreter runs."""
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    x = np.random.default_rng(0).standard_normal((*lead, record.shape[1])).astype(np.float32)
    tiles = linear.tile_matrix(record.map(lambda field: torch.from_numpy(field).to(place)))
    return torch.from_numpy(x).to(place, dtype), tiles


def check(x: Any, record: Quantized, ours: Any, what: str) -> None:
    wanted = x.double().cpu().numpy() @ dequantize(REFERENCE, record).T
    assert ours.dtype == x.dtype
    close(
        ours.double().cpu().numpy(), wanted, 1e-5 if x.dtype == torch.float32 else 2 * EPS["bfloat16"], what
    )


@FORMS
@pytest.mark.parametrize(
    ("O", "I", "lead"),
    [
        (64, 64, (16,)),
        (128, 192, (2, 9)),
        (70, 80, (5,)),  # neither a whole tile nor a whole block
        (3, 16, (1,)),
        (130, 48, (1, 33)),
        (64, 96, (70,)),  # two blocks of 64 rows
    ],
)
def test_linear(place: Any, O: int, I: int, lead: tuple[int, ...], form: Form) -> None:
    record = random_record((O, I), form=form)
    x, tiles = inputs(place, record, *lead)
    ours = linear.linear(x, tiles)
    assert ours.shape == (*lead, O)
    check(x, record, ours, "kernel")
    check(x, record, linear.linear_plain(x, tiles), "plain twin")


def test_native_order(place: Any, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "native", lambda arch: True)
    record = random_record((130, 80))
    x, tiles = inputs(place, record, 9)
    assert tiles.order is Order.NATIVE
    check(x, record, linear.linear(x, tiles), "native")


@FORMS
def test_bfloat16(place: Any, form: Form) -> None:
    record = random_record((70, 80), form=form)
    x, tiles = inputs(place, record, 7, dtype=torch.bfloat16)
    check(x, record, linear.linear(x, tiles), "bfloat16")


@pytest.mark.parametrize("arch", [100, 120])
def test_tiles_of_other_architectures(place: Any, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "architecture", lambda device: arch)
    record = random_record((130, 80))
    x, tiles = inputs(place, record, 40)
    assert tiles.rows == (128 if arch == 100 else 64)
    if place.type == "cpu":  # a GPU has its own
        check(x, record, linear.linear(x, tiles), f"as on {arch}")


def test_what_lies_around_x_does_not_leak(place: Any) -> None:
    """NaN beside and under the rows; strides of rows are free."""
    record = random_record((70, 80))
    x, tiles = inputs(place, record, 5)
    around = x.new_full((7, 150), torch.nan)
    around[1:6, :80] = x
    check(x, record, linear.linear(around[1:6, :80], tiles), "NaN around x")
    check(x, record, linear.linear(x.T.contiguous().T, tiles), "transposed")


def test_the_backend_takes_it_for_a_linear(place: Any) -> None:
    """Through `Ops.arrange` and `Ops.linear`, with a bias; a CPU keeps the record."""
    record = random_record((70, 80))
    fields = record.map(lambda field: torch.from_numpy(field).to(place))
    assert isinstance(CudaOps(torch.device("cpu")).arrange(fields, "q"), Quantized)
    ops = CudaOps(place, torch.bfloat16 if place.type == "cuda" else torch.float32, kernels=True)
    x, tiles = inputs(place, record, 2, 3)
    bias = torch.arange(70, device=place).to(x.dtype)
    got = ops.linear(x, ops.arrange(fields, "q"), bias)
    assert torch.equal(got, linear.linear(x, tiles) + bias)
    damaged = random_record((70, 80), form=FP8)
    damaged.codes[0, 0] = 0x7F
    assert isinstance(ops.arrange(damaged.map(lambda f: torch.from_numpy(f).to(place)), "q"), Quantized)


def test_every_number_of_rows_has_a_configuration() -> None:
    rows = {moe.block_rows(arch, n, 1) for arch in moe.CANVAS_ROWS for n in (1, 8, 16, 32, 256, 4096)}
    assert {(arch, count) for arch in moe.CANVAS_ROWS for count in rows} <= set(moe.CONFIGS)
