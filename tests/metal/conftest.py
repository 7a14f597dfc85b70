"""Where kernels run in these tests: on the GPU where there is one, else in the simulator."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from tests.metal import simulator


@pytest.fixture
def metal() -> Iterator[None]:
    """Kernels run; a module asks for it with `pytestmark`."""
    if mx.default_device().type == mx.gpu:
        yield
        return
    if reason := simulator.available():
        pytest.skip(reason)
    with simulator.installed():
        yield


@pytest.fixture
def simulated(metal: None) -> None:
    """For tests of what only the simulator can tell."""
    if not simulator.active():
        pytest.skip("kernels run on a GPU here; this test is for the simulator")
