"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest


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
