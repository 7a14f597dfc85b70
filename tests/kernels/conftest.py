"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, hence here and not in a fixture.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("torch") and find_spec("triton"):
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        import triton

        assert triton.knobs.runtime.interpret


@pytest.fixture
def place() -> Any:
    """The torch device for launches; a skip that says why where there can be none."""
    torch = pytest.importorskip("torch")
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def interpreter(place: Any) -> None:
    """For tests whose tensors are on the CPU: a skip where kernels are compiled for a GPU."""
    if place.type == "cuda":
        pytest.skip("kernels are compiled here, as there is a GPU; this test is for the interpreter")
