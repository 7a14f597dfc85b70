"""Which backends there are, and how their results are compared: one assertion, with maximum and RMS error."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import dgemma
from dgemma.backends import make_ops
from dgemma.model import Model
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Array, Notices, Ops

# Distance from 1 to the next number: rounding a value moves it by half of this at most, relatively.
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
REFERENCE = NumpyOps()
AS_ON_GPU = "mlx-as-on-gpu"  # see tests/as_on_gpu.py


def some_bias(rows: int, V: int, tables: int = 3, classes: int = 5) -> tuple[np.ndarray, ...]:
    """Classes [K, V], which [N] and values [N, C] of a bias.

    Row 0 forbids all tokens but one, row 1 adds nothing, others add some and forbid some.
    """
    rng = np.random.default_rng([rows, V])
    kinds = rng.integers(0, classes - 1, (tables, V))
    kinds[:, rng.integers(V)] = classes - 1  # this one has a class to itself
    values = np.where(rng.random((rows, classes)) < 0.3, -1e30, 4 * rng.standard_normal((rows, classes)))
    values[:, -1] = 1.0
    values[0, :-1] = -1e30
    values[1:2] = 0
    return kinds, np.arange(rows) % tables, values


def close(actual: Any, expected: Any, rtol: float, what: str, rms: float = np.inf) -> None:
    """Assert |actual − expected| ≤ rtol · max|expected| everywhere, and that nothing is inf or NaN.

    `rms` bounds the root of the mean square of the same errors.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: {np.count_nonzero(~np.isfinite(actual))} values not finite"
    scale = np.abs(expected).max(initial=0.0) or 1.0
    error = np.abs(actual - expected) / scale
    worst, mean = error.max(initial=0.0), np.sqrt(np.mean(error**2)) if error.size else 0.0
    report = (
        f"{what}: max error {worst:.2e}, RMS {mean:.2e}, allowed {rtol:.2e} (of the largest, {scale:.3g})"
    )
    print(report)
    assert worst <= rtol and mean <= rms, report


def backends(*dtypes: str, reference: bool = False) -> list[Any]:
    """Parameters (backend, dtype) for every `Ops` class of the packages beside this folder.

    A backend whose framework is missing is a skip that says so. `reference` adds NumPy itself. Where MLX has
    no GPU, what it does on one is an entry of its own, `AS_ON_GPU`.
    """
    missing = []
    for path in sorted(Path(__file__).parent.parent.glob("dgemma_*/ops.py")):
        try:
            import_module(f"{path.parent.name}.ops")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("dgemma"):
                raise
            reason = f"{path.parent.name} needs {error.name}, which is not installed"
            missing.append(
                pytest.param((path.parent.name, ""), marks=pytest.mark.skip(reason), id=path.parent.name)
            )
    found = [cls for cls in Ops.__subclasses__() if cls.__module__.startswith("dgemma_")]
    kinds = [cls.name for cls in found]
    if any(cls.name == "mlx" and not cls().on_gpu for cls in found):  # type: ignore[attr-defined]
        kinds.append(AS_ON_GPU)
    names = [(kind, dtype) for kind in kinds for dtype in dtypes]
    names += [("numpy", "float64")] if reference else []
    return [pytest.param(name, id="-".join(name)) for name in names] + missing


def make(backend: tuple[str, str]) -> Ops:
    """The `Ops` of a parameter of `backends`."""
    name, dtype = backend
    if name == AS_ON_GPU:
        from tests.as_on_gpu import AsOnGpu

        return AsOnGpu(dtype)
    return NumpyOps() if name == "numpy" else make_ops(name, dtype)


class Heard(Notices):
    """Notices into a list."""

    def __init__(self, said: list[str]):
        self.said = said

    def say(self, text: str) -> None:
        self.said.append(text)


def load(backend: tuple[str, str], folder: Path | None = None) -> Model:
    """`dgemma.load` on the backend of a parameter of `backends`."""
    name, dtype = backend
    if name == AS_ON_GPU:
        from tests.as_on_gpu import AsOnGpu

        with mock.patch("dgemma_mlx.ops.make", lambda dtype, *_: AsOnGpu(dtype)):
            return dgemma.load(folder, "mlx", dtype)
    return dgemma.load(folder, name, None if name == "numpy" else dtype)


def pair(ops: Ops, *arrays: np.ndarray) -> tuple[list[Array], list[Array]]:
    """Arrays on the device in the compute type, and the very same (rounded) numbers in float64."""
    device = [ops.asarray(x) for x in arrays]
    return device, [REFERENCE.asarray(ops.to_numpy(x)) for x in device]


def rounding(ops: Ops) -> float:
    """EPS of the compute type."""
    return EPS["float32"] if ops.rounded(1 + 2.0**-20) > 1 else EPS["bfloat16"]
