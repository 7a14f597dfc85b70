"""What we write for MLX, read by mlx-vlm: it loads, and says what we say. Needs the `bench` extra."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma_convert import stream
from dgemma_convert.plan import make_plan
from tests.checkpoints import SMALL_VISION, make_checkpoint, small

mlx_vlm_utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm comes with the bench extra")

VISION = SMALL_VISION | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "pooling_kernel_size": 3,
    "default_output_length": 10,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "hidden_activation": "gelu_pytorch_tanh",
    "use_clipped_linears": False,
}
# A prompt shorter than the window: mlx-vlm's own window differs past it.
CONFIG = small(
    hidden_size=128, intermediate_size=128, moe_intermediate_size=64, vocab_size=480, sliding_window=64
)
SETTINGS: list[list[str]] = [
    [],
    ["experts=mxfp4"],
    ["experts=mxfp8", "attention=mxfp8"],
    ["experts=nvfp4"],
    ["experts=3bit", "embed=6bit", "router=bf16"],
    ["experts=bf16"],
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CONFIG | {"vision_config": VISION}
    return make_checkpoint(tmp_path_factory.mktemp("source") / "small", config, tokenizer=True)


def convert(source: Path, dest: Path, to: str, settings: list[str]) -> Path:
    plan, checkpoint = make_plan(source, to, "balanced", settings)
    assert checkpoint
    stream.convert(plan, checkpoint, dest)
    return dest


def same_logits(folder: Path) -> None:
    import mlx.core as mx

    rng = np.random.default_rng(0)
    prompt, canvas = [2, *rng.integers(3, 400, 20).tolist()], rng.integers(3, 400, (1, 16))
    ours = dgemma.load(folder, "numpy")
    wanted = ours.logits(ours.encode([prompt]), canvas)
    theirs: Any = mlx_vlm_utils.load_model(folder)
    theirs.set_dtype(mx.float32)
    got = np.array(theirs(input_ids=mx.array([prompt]), canvas_ids=mx.array(canvas)).logits)
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_mlx_vlm_reads_what_we_write(source: Path, tmp_path: Path, settings: list[str]) -> None:
    same_logits(convert(source, tmp_path / "out", "mlx", settings))


def test_mlx_vlm_reads_factors_of_a_modelopt_source(source: Path, tmp_path: Path) -> None:
    """MLX's NVFP4 has no place for ModelOpt's factors; mlx-vlm reads them from tensors of their own."""
    packed = convert(source, tmp_path / "packed", "nvfp4", [])
    same_logits(convert(packed, tmp_path / "out", "mlx", ["experts=nvfp4"]))
