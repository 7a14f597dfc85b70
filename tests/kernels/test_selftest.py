"""`dgemma selftest`: what it says where kernels run (interpreted, at a small geometry), and where not."""

from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from dgemma.cli import main
from dgemma.network.config import read_config
from dgemma.reports.selftest import text
from tests.checkpoints import small

torch = pytest.importorskip("torch")

# The interpreter's NumPy says so of log2(0), where a split of the keys has none.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

from dgemma_cuda import selftest  # noqa: E402
from dgemma_cuda.kernels import fp4, vocabulary  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402

CONFIG = read_config(small(vocab_size=300))


@pytest.fixture
def ops(place: Any, monkeypatch: pytest.MonkeyPatch) -> CudaOps:
    monkeypatch.setattr(selftest, "REPEATS", 1)
    return CudaOps(place, torch.bfloat16 if place.type == "cuda" else torch.float32)


def test_kernels_agree_with_their_twins(ops: CudaOps) -> None:
    report = selftest.run(ops, CONFIG, context=20)
    assert report["ok"] is True
    names = [check["name"] for check in report["checks"]]
    assert names == [
        "experts, nvfp4",
        "linear, nvfp4",
        "experts, fp8",
        "linear, fp8",
        *(["experts, nvfp4, W4A4"] if fp4.unsupported(ops.device) is None else []),
        "attention, heads of 16",
        "attention, heads of 32",
        "vocabulary, entropy",
        "vocabulary, soft",
        "vocabulary, soft with a bias",
    ]
    assert all(0 <= check["error"] <= check["bound"] for check in report["checks"])
    assert text(report).count(" ok") == len(names)


def test_a_kernel_that_is_wrong_is_found(ops: CudaOps, monkeypatch: pytest.MonkeyPatch) -> None:
    right = vocabulary.vocabulary_plain

    def wrong(*args: Any) -> Any:
        guess = right(*args)
        return replace(guess, entropy=guess.entropy * float("nan"))

    monkeypatch.setattr(vocabulary, "vocabulary_plain", wrong)
    report = selftest.run(ops, CONFIG, context=20)
    assert report["ok"] is False
    assert [check["name"] for check in report["checks"] if not check["ok"]] == ["vocabulary, entropy"]
    assert "wrong by nan" in text(report)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    shown = CliRunner().invoke(main, ["selftest", "--device", "cpu"])
    assert shown.exit_code == 0
    assert "no kernel was checked, because" in shown.stdout
