"""The backends by name: each is a package, imported only when a caller asks for it.

A backend is one line of `PACKAGES` and a package with `ops.make(dtype, device, activations, notices)`, which
returns its `Ops`. A package with kernels has `selftest.check_all(device, progress)`, too
(`dgemma.reports.selftest`).
"""

from __future__ import annotations

import reprlib
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dgemma.errors import BackendError
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Notices, Ops

DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("nvfp4",)


@dataclass(frozen=True)
class Package:
    """A package, the framework that it imports, and whether it offers devices and activations."""

    name: str
    framework: str
    choices: bool = False


PACKAGES = {"mlx": Package("dgemma_mlx", "mlx"), "cuda": Package("dgemma_cuda", "torch", choices=True)}
BACKENDS = ("auto", *PACKAGES, "numpy")  # NumPy is the reference and needs no package


def make_ops(
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    activations: str | None = None,
    notices: Notices | None = None,
) -> Ops:
    """The `Ops` of a backend; BackendError says how to install a missing one."""
    backend = choose(backend, dtype, device, activations)
    if backend == "numpy":
        return NumpyOps(notices)
    ops: Ops = part(backend, "ops").make(dtype, device, activations, notices)
    return ops


def part(backend: str, module: str) -> Any:
    """A module of a backend's package; BackendError without one. This imports the framework."""
    if backend not in PACKAGES:
        raise BackendError(f"the {backend} backend has no {module}")
    return import_module(f"{PACKAGES[backend].name}.{module}")


def choose(
    backend: str, dtype: str | None = None, device: str | None = None, activations: str | None = None
) -> str:
    """The backend that a choice means; BackendError if it is not here. This imports no framework."""
    for what, value, known in (
        ("backend", backend, BACKENDS),
        ("dtype", dtype, (*DTYPES, None)),
        ("activations", activations, (*ACTIVATIONS, None)),
    ):
        names = ", ".join(name for name in known if name)
        # By type first: NumPy's types equal their names.
        if not isinstance(value, str | None):
            raise BackendError(f"{what} must be a name, not {type(value).__name__}; known: {names}")
        if value not in known:
            raise BackendError(f"unknown {what} {reprlib.repr(value)}; known: {names}")
    if not isinstance(device, str | None):
        raise BackendError(f"device must be a name such as 'cuda:0', not {type(device).__name__}")
    backend = _best() if backend == "auto" else backend
    package = PACKAGES.get(backend)
    if not (package and package.choices):
        able = ", ".join(name for name, other in PACKAGES.items() if other.choices)
        if device is not None:
            raise BackendError(f"a device can be chosen for the {able} backend only, not for {backend}")
        if activations is not None:
            raise BackendError(f"activations in NVFP4 are for the {able} backend only, not for {backend}")
    if package and find_spec(package.framework) is None:
        raise BackendError(
            f"the {backend} backend needs {package.framework}, which is not installed: "
            f"pip install 'dgemma[{backend}]'"
        )
    return backend


def _best() -> str:
    """MLX on a Mac, elsewhere PyTorch, then MLX on a CPU, then NumPy: the first that is installed."""
    order = ("mlx", "cuda") if sys.platform == "darwin" else ("cuda", "mlx")
    return next((backend for backend in order if find_spec(PACKAGES[backend].framework)), "numpy")
