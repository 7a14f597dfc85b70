"""`dgemma bench` on a CPU and a small geometry: the figures are a CPU's, the arithmetic is not."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from dgemma.cli import main
from dgemma.errors import BackendError
from dgemma.files import load_json
from dgemma.formats.quantized import Quantized
from dgemma.network.config import read_config
from dgemma.network.ops.decoding import dense
from dgemma.released import RELEASED_DIR
from dgemma.tiny import MODEL_DIR

torch = pytest.importorskip("torch")

from dgemma_cuda import bench  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402

TINY = read_config(load_json(MODEL_DIR / "config.json"))


@pytest.mark.parametrize("form", ["nvfp4", "fp8", "bf16"])
def test_random_weights_compute_ordinary_numbers(form: str) -> None:
    made = bench.prepare(CudaOps(), TINY, form, context=70, rows=2, skew=0.5)
    logits = made.model.logits(made.contexts, made.canvas)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
    experts = made.model.weights.layers[0].experts.gate_up
    assert isinstance(experts, Quantized) == (form != "bf16")


def test_random_weights_have_the_size_of_decoded_ones() -> None:
    ops = CudaOps()
    for form in ("nvfp4", "fp8"):
        weights = bench.prepare(ops, TINY, form, context=8, rows=1, skew=0.0).model.weights
        for w in (weights.layers[0].experts.gate_up, weights.layers[0].experts.down):
            values = dense(ops, w)
            assert float(values.std()) == pytest.approx(values.shape[-1] ** -0.5, rel=0.1)


def test_skew_concentrates_the_picks() -> None:
    def largest_share(skew: float) -> float:
        made = bench.prepare(CudaOps(), TINY, "bf16", context=8, rows=1, skew=skew)
        h, w = torch.randn(2000, TINY.hidden_size), made.model.weights.layers[0].router
        _, ids = made.ops.router(h, w.proj, w.expert_scale, TINY.top_k)
        return float(torch.bincount(ids.flatten()).max()) / ids.numel()

    assert largest_share(0.0) < largest_share(1.5)


def test_the_report_adds_up() -> None:
    report = bench.run(CudaOps(), TINY, "nvfp4", context=40, rows=2, steps=3)
    parts = {part["name"]: part for part in report["parts"]}
    assert set(parts) == {"experts", "attention", "projections", "dense MLP", "vocabulary"}
    assert report["floor_ms"] == pytest.approx(sum(part["floor_ms"] for part in parts.values()))
    assert report["step_ms"]["median"] == pytest.approx(
        sum(part["ms"] for part in parts.values()) + report["rest_ms"]
    )
    tokens, layers = 2 * TINY.canvas_length, len(TINY.layers)
    assert parts["experts"]["flops"] == 6 * layers * tokens * TINY.top_k * TINY.hidden_size * TINY.expert_size
    table = 4 * TINY.vocab_size * TINY.hidden_size  # float32 on a CPU
    assert parts["vocabulary"]["nbytes"] == 2 * table + 6 * tokens * TINY.vocab_size
    assert report["tokens_per_s"][16] == pytest.approx(2 * 16e3 / report["step_ms"]["median"])


def test_the_released_experts_have_the_bytes_of_the_analysis() -> None:
    """12.85 GB of NVFP4 experts: what every step of the release has to read."""
    config = read_config(load_json(RELEASED_DIR / "config.json"))
    weights = 3 * len(config.layers) * config.num_experts * config.hidden_size * config.expert_size
    assert weights * (4 + 8 / 16) / 8 == pytest.approx(12.85e9, rel=1e-3)


def test_a_device_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaOps, "free_memory", lambda self: 10**9)
    config = read_config(load_json(RELEASED_DIR / "config.json"))
    with pytest.raises(BackendError, match=r"nvfp4 weights .* need .* GB, and 1.00 GB are free on cpu"):
        bench.check_room(CudaOps(), config, "nvfp4")


def test_the_command() -> None:
    args = ["--geometry", "tiny", "--random-weights", "--context", "20", "--steps", "2", "--device", "cpu"]
    shown = CliRunner().invoke(main, ["bench", *args])
    assert shown.exit_code == 0, shown.stderr
    assert "vocabulary" in shown.stdout and "tokens/s by tokens a forward" in shown.stdout
    report = json.loads(CliRunner().invoke(main, ["bench", *args, "--json"]).stdout)
    assert report["format"] == "nvfp4"
    assert CliRunner().invoke(main, ["bench", "--geometry", "tiny"]).exit_code == 2  # no --random-weights
    wrong = CliRunner().invoke(main, ["bench", "--random-weights", "--geometry", "/nowhere"])
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
