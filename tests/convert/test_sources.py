"""Quantized sources as exporters leave them: what passes through, and what is written for what they lack."""

from pathlib import Path

import numpy as np
import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.formats.quantized import NVFP4, Quantized
from dgemma_convert import stream
from dgemma_convert.encode import values
from dgemma_convert.plan import make_plan
from tests.formats.writers import CASES


def convert(case: str, tmp_path: Path, to: str, *settings: str) -> tuple[Checkpoint, Checkpoint]:
    """A case's checkpoint and what becomes of it."""
    plan, before = make_plan(CASES[case]().write(tmp_path / "source"), to, "balanced", settings)
    assert before is not None and stream.convert(plan, before, tmp_path / "out")
    return before, Checkpoint.open(tmp_path / "out")


NVFP4_SOURCES = [case for case in CASES if case.startswith(("modelopt ", "compressed nvfp4"))]


@pytest.mark.parametrize(
    "case", [case for case in NVFP4_SOURCES if "spared" not in case and "mlp" not in case]
)
def test_nvfp4_has_every_scale_that_it_announces(case: str, tmp_path: Path) -> None:
    """vLLM waits for a scale of activations where a file announces them: the source's own, or one. A cache's
    scales are announced no more, and gone."""
    settings = ["mlp=nvfp4"] if case.startswith("compressed") else []
    before, after = convert(case, tmp_path, "nvfp4", *settings)
    own = {name for name in before.entries if name.endswith(".input_scale")}
    for source in after.sources.values():
        if source.form is None:
            continue
        record, old = after.read(source.param.name), before.read(source.param.name)
        assert isinstance(record, Quantized) and isinstance(old, Quantized) and record.form == NVFP4
        np.testing.assert_array_equal(record.codes.data, old.codes.data)
        np.testing.assert_allclose(values(record), values(old), rtol=1e-6)
        for name in (piece.name for piece in source.pieces if piece.role == "unused"):
            expected = before.entries[name].read().data.item() if name in own else 1.0
            assert after.entries[name].read().data.item() == expected, name
    assert not [
        name for name in after.entries if ".self_attn." in name and "proj" not in name and "norm" not in name
    ]
    announced = after.config.quantization
    assert announced is not None and announced["quant_algo"] == "NVFP4" and "kv_cache_scheme" not in announced


@pytest.mark.parametrize(
    ("case", "form"),
    [
        ("compressed int4 g32 BF16", "4bit-g32"),
        ("compressed int4 g128 F16", "4bit-g128"),
        ("compressed int4 row F32", "4bit-g32"),
        ("compressed int8 row BF16", "8bit-g128"),
    ],
)
def test_packed_integers_become_mlxs_words(case: str, form: str, tmp_path: Path) -> None:
    """Bit for bit, with scales and biases of one type, as MLX's products need them."""
    before, after = convert(case, tmp_path, "mlx", f"experts={form}", f"mlp={form}")
    for name in ("layers.1.experts.gate_up_proj", "layers.0.mlp.down_proj.weight"):
        old, new = (checkpoint.read(f"model.decoder.{name}") for checkpoint in (before, after))
        assert isinstance(old, Quantized) and isinstance(new, Quantized) and old.form == new.form
        np.testing.assert_array_equal(old.codes.data, new.codes.data)
        np.testing.assert_array_equal(values(old), values(new))
        assert new.scales is not None and new.biases is not None and new.scales.dtype == new.biases.dtype


def test_scales_of_another_meaning_are_not_taken_over(tmp_path: Path) -> None:
    """FP8 has an input_scale, too, of another type."""
    case = CASES["compressed fp8 BF16"]()
    scales = [name for name in case.tensors if name.endswith(".weight_scale")]
    one = next(tensor for name, tensor in case.tensors.items() if name.endswith("layer_scalar"))
    case.tensors |= {name.replace("weight_scale", "input_scale"): one for name in scales}
    plan, before = make_plan(case.write(tmp_path / "source"), "nvfp4", "balanced", ())
    assert before is not None and stream.convert(plan, before, tmp_path / "out")
    after = Checkpoint.open(tmp_path / "out")
    written = [entry for name, entry in after.entries.items() if name.endswith(".input_scale")]
    assert written and all(entry.read().data.item() == 1.0 for entry in written)
