"""Names of devices that hold no data or are not there are refused in one line."""

import pytest

torch = pytest.importorskip("torch")

from dgemma.errors import BackendError  # noqa: E402
from dgemma_cuda.ops import make  # noqa: E402

NAMES = [
    *("meta", "meta:0", "cuda:99", "cuda:-1", "cuda:", "cuda:x", "cuda:0:1", "cuda:99999999999999999999"),
    *("cpu:1", "cpu:7", "cpu:127", "cpu:-1", "cpu\n", " cpu", "CPU", "gpu", "hpu", "xla", "vulkan", "ipu"),
    *("privateuseone", "lazy", "maia", "mtia", "mkldnn", "opengl", "", " ", "x" * 5000, "caf\udce9", "\0"),
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_devices_that_are_none(name: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(BackendError) as error:
        make(None, name)
    text = str(error.value)
    assert text.startswith("device ") and " is not usable: " in text
    assert len(text) < 300 and "\n" not in text
    assert not recwarn.list


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_cpu_is_a_device(name: str) -> None:
    assert make(None, name).device.type == "cpu"
