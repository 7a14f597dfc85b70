"""`load`: from a folder or hub id to a `Model`. Backends are imported in the branch that needs them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.hub import resolve
from dgemma.errors import BackendError
from dgemma.files import Progress
from dgemma.model import Model
from dgemma.network.ops import Ops
from dgemma.text.tokenizer import Tokenizer
from dgemma.tiny import MODEL_DIR

BACKENDS = ("auto", "mlx", "cuda", "numpy")
DTYPES = ("float32", "bfloat16", "nvfp4")
FRAMEWORKS = {"mlx": "mlx", "cuda": "torch"}  # what a backend imports


def load(
    model: str | Path | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """A model ready to run. `model` is a folder or a hub id; None means the embedded one.

    `backend` is "mlx", "cuda", "numpy" or "auto"; `dtype` "float32" or "bfloat16" (default: bfloat16 on
    a GPU, float32 on a CPU), or "nvfp4": bfloat16, but of experts in NVFP4 what goes in is quantized, too,
    on Blackwell. `device` is a torch device. `progress(done, total)` counts weight bytes.
    Raises DgemmaError with one line for anything that is wrong with the files or the machine.
    """
    backend = choose(backend, dtype, device)
    checkpoint = Checkpoint.open(resolve(MODEL_DIR if model is None else model))
    tokenizer = Tokenizer.open(checkpoint.folder)
    ops = make_ops(backend, dtype, device)  # after the files: a framework takes seconds to import
    weights = checkpoint.load(ops, progress)
    return Model(ops, checkpoint.config, checkpoint.generation, weights, tokenizer)


def make_ops(backend: str = "auto", dtype: str | None = None, device: str | None = None) -> Ops:
    """The `Ops` of a backend; BackendError says how to get it where it is missing."""
    backend = choose(backend, dtype, device)
    if backend == "numpy":
        from dgemma.network.numpy_ops import NumpyOps

        return NumpyOps()
    if backend == "mlx":
        from dgemma_mlx.ops import make as make_mlx

        return make_mlx(dtype)
    from dgemma_cuda.ops import make as make_cuda

    return make_cuda(dtype, device)


def choose(backend: str, dtype: str | None, device: str | None) -> str:
    """The backend that a choice means; BackendError if it cannot be had. Imports no framework."""
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if dtype is not None and dtype not in DTYPES:
        raise BackendError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    backend = _choose() if backend == "auto" else backend
    if device is not None and backend != "cuda":
        raise BackendError(f"a device can be chosen for the cuda backend only, not for {backend}")
    if dtype == "nvfp4" and backend != "cuda":
        raise BackendError(f"activations in NVFP4 are for the cuda backend only, not for {backend}")
    framework = FRAMEWORKS.get(backend)
    if framework and find_spec(framework) is None:
        raise BackendError(
            f"the {backend} backend needs {framework}, which is not installed: "
            f"pip install 'dgemma[{backend}]'"
        )
    return backend


def _choose() -> str:
    """MLX on a Mac, PyTorch where it is installed, then MLX on a CPU, then NumPy."""
    order = ("mlx", "cuda") if sys.platform == "darwin" else ("cuda", "mlx")
    return next((backend for backend in order if find_spec(FRAMEWORKS[backend])), "numpy")
