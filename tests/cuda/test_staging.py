"""Uploads in parts, on a CPU: every byte arrives, whatever its tensor's size is to the buffers'."""

from pathlib import Path

import numpy as np
import pytest

from dgemma.formats.stored import Stored

torch = pytest.importorskip("torch")

from dgemma_cuda.ops import CudaOps  # noqa: E402
from dgemma_cuda.staging import Staging  # noqa: E402


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_every_byte_arrives(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    staging = Staging(torch.device("cpu"), size=64)
    assert (staging.upload(data).numpy() == data).all()
    assert (staging.upload(data[::-1]).numpy() == data[::-1]).all()


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", "<u2"), ("F16", "<f2"), ("F32", "<f4")])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4,), (), (0, 3)])
def test_tensors_of_any_type_and_shape(dtype: str, kind: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    data = (x.view(np.uint32) >> 16).astype("<u2") if dtype == "BF16" else x.astype(kind)
    stored = Stored("x", dtype, shape, np.asarray(data).reshape(shape), Path("file"))
    loaded = CudaOps().load(stored)
    assert tuple(loaded.shape) == shape
    assert (loaded.numpy() == stored.to_float32()).all()


def test_nothing_of_the_source_is_kept() -> None:
    data = np.ones((2, 8), np.uint8)
    loaded = CudaOps().raw(data)
    data[:] = 0
    assert int(loaded.sum()) == 16
