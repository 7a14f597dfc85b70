"""What a checkpoint announces, or shows, that no layout here computes: one line that names it, at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.layouts.announced import Patterns
from dgemma.errors import DgemmaError
from tests.checkpoints import encode
from tests.formats import writers
from tests.formats.test_fuzz import LAYOUTS, TINY, small
from tests.formats.writers import Written


def refused(written: Written, tmp_path: Path, *parts: str) -> str:
    folder = written.write(tmp_path)
    with pytest.raises(DgemmaError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    for part in parts:
        assert part in message, message
    return message


def announcing(layout: str, change: dict[str, Any], weights: dict[str, Any] | None = None) -> Written:
    """A small checkpoint whose announcement has these keys as well, and its group these of its weights."""
    written = small(layout)
    own = written.config["quantization_config"]
    own.update(copy.deepcopy(change))
    for group in own.get("config_groups", {}).values():
        group["weights"].update(copy.deepcopy(weights or {}))
    return written


# ---- by name ------------------------------------------------------------------------------------

METHODS: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "fbgemm_fp8"},
    {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
    {"quant_method": "hqq"},
    {"quant_method": "quanto"},
    {"quant_method": "mxfp4", "modules_to_not_convert": []},
    {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True},
    {"quant_method": "fp_quant"},
    {"quant_method": "vptq"},
    {"quant_method": "gguf"},
    {"quant_method": "aqlm"},
    {"quant_method": "higgs"},
    {"quant_method": "quark"},
    {"quant_method": "eetq"},
    {"quant_method": "spqr"},
    {"quant_method": "NVFP4"},
    {"quant_method": ["modelopt"]},
    {"load_in_8bit": True},
]


@pytest.mark.parametrize("announcement", METHODS, ids=lambda a: str(a.get("quant_method")))
def test_methods_of_others(tmp_path: Path, announcement: dict[str, Any]) -> None:
    written = small("modelopt")
    written.config["quantization_config"] = announcement
    named = (
        f"quant_method {announcement['quant_method']!r}"
        if "quant_method" in announcement
        else "no quant_method"
    )
    refused(written, tmp_path, "config.json", named, "supported: MLX")


MODELOPT: list[tuple[dict[str, Any], str]] = [
    *(
        ({"quant_algo": algo}, f"quant_algo {algo!r}")
        for algo in (
            "NVFP4_AWQ", "W4A16_AWQ", "INT4_AWQ", "W4A8_AWQ", "FP8", "FP8_PB_WO", "MXFP4", "MXFP8", "INT8_SQ",
            "W4A8_NVFP4_FP8", "W8A16", "MIXED_PRECISION", "nvfp4", ["NVFP4"],
        )
    ),
    ({"group_size": 32}, "group_size 32"),
    ({"pre_quant_scale": True}, "pre_quant_scale True"),
    ({"has_zero_point": True}, "has_zero_point True"),
    ({"rotate": True}, "rotate True"),
    ({"rotation": {"enable": True, "rotate_fp32": False}}, "rotation {"),
    ({"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}}}, "num_bits 8"),
    ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}}, "type 'int'"),
    ({"config_groups": {"a": {"weights": {"num_bits": 4, "rotate": {"mode": "hadamard"}}}}}, "rotate {"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config {"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "named"), MODELOPT, ids=lambda x: str(x)[:40])
def test_what_modelopt_announces(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    refused(announcing("modelopt", change), tmp_path, "config.json", f"ModelOpt {named}", "supported: MLX")
    apart = small("modelopt apart")
    apart.files["hf_quant_config.json"]["quantization"].update(change)
    refused(apart, tmp_path / "apart", "hf_quant_config.json", f"ModelOpt {named}", "supported: MLX")


TRANSFORM = {
    "config_groups": {
        "u": {"type": "hadamard", "apply": [{"location": "weight_output", "targets": ["embed_tokens"]}]}
    }
}
COMPRESSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (layout, change, {}, named)
    for layout in ("compressed nvfp4", "compressed fp8", "compressed int")
    for change, named in (
        ({"transform_config": TRANSFORM}, "transform_config {"),
        ({"sparsity_config": {"format": "sparse-24-bitmask", "global_sparsity": 0.5}}, "sparsity_config {"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config {"),
    )
] + [
    ("compressed nvfp4", {}, {"symmetric": False}, "symmetric False"),
    ("compressed nvfp4", {}, {"group_size": 32}, "group_size 32"),
    ("compressed nvfp4", {}, {"num_bits": 8}, "num_bits 8"),
    ("compressed nvfp4", {}, {"type": "int"}, "type 'int'"),
    ("compressed fp8", {}, {"strategy": "block", "block_structure": [128, 128]}, "strategy 'block'"),
    ("compressed fp8", {}, {"strategy": "tensor"}, "strategy 'tensor'"),
    ("compressed int", {}, {"symmetric": False}, "symmetric False"),
    ("compressed int", {}, {"symmetric": False, "zp_dtype": "torch.int8"}, "symmetric False"),
    ("compressed int", {}, {"num_bits": 3}, "num_bits 3"),
    ("compressed int", {}, {"num_bits": "4"}, "num_bits '4'"),
    ("compressed int", {}, {"num_bits": None}, "num_bits None"),
    ("compressed int", {}, {"group_size": 16}, "group_size 16"),
    ("compressed int", {}, {"group_size": 256}, "group_size 256"),
    ("compressed int", {}, {"group_size": None}, "groups without a group_size"),
    ("compressed int", {}, {"strategy": "tensor"}, "strategy 'tensor'"),
    ("compressed int", {}, {"type": "float"}, "type 'float'"),
    *(("compressed int", {}, {"actorder": x}, f"actorder {x!r}") for x in ("group", "dynamic", True)),
    *(
        ("compressed int", {"format": name}, {}, f"format {name!r}")
        for name in (
            "int-quantized", "naive-quantized", "marlin-24", "mxfp4-pack-quantized", "dense", None,
            "mixed-precision",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "change", "weights", "named"), COMPRESSED, ids=lambda x: str(x)[:40])
def test_what_compressed_tensors_announces(
    tmp_path: Path, layout: str, change: dict[str, Any], weights: dict[str, Any], named: str
) -> None:
    written = announcing(layout, change, weights)
    refused(written, tmp_path, "config.json", f"compressed-tensors {named}", "supported: MLX")


@pytest.mark.parametrize("mode", ["mxfp6", "nf4", "", 3, ["affine"], {"a": 1}])
def test_modes_that_mlx_does_not_have(tmp_path: Path, mode: Any) -> None:
    written = small("affine")
    written.config["quantization"] = {**written.config["quantization"], "mode": mode}
    refused(written, tmp_path, "config.json", f"mode {mode!r}", "supported: affine")


HARMLESS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("modelopt", {"kv_cache_quant_algo": "FP8", "rotate": False, "has_zero_point": False}, {}),
    ("modelopt", {"quant_algo": "W4A16_NVFP4", "group_size": None, "pre_quant_scale": None}, {}),
    ("modelopt", {"sparsity_config": {"format": "dense", "ignore": [], "global_sparsity": 0.2}}, {}),
    (
        "compressed nvfp4",
        {"transform_config": {}, "sparsity_config": {}, "kv_cache_scheme": {"num_bits": 8}},
        {},
    ),
    ("compressed nvfp4", {"transform_config": {"config_groups": {}}, "sparsity_config": None}, {}),
    (
        "compressed int",
        {"kv_cache_scheme": None},
        {"actorder": "static", "num_bits": 4.0, "group_size": 32.0},
    ),
    ("compressed int", {"ignore": None, "version": "0.12.2"}, {"actorder": "weight", "strategy": None}),
    ("compressed fp8", {}, {"group_size": None, "symmetric": None, "scale_dtype": "torch.bfloat16"}),
]


@pytest.mark.parametrize(("layout", "change", "weights"), HARMLESS, ids=lambda x: str(x)[:40])
def test_what_changes_nothing(
    tmp_path: Path, layout: str, change: dict[str, Any], weights: dict[str, Any]
) -> None:
    Checkpoint.open(announcing(layout, change, weights).write(tmp_path))


# ---- by a tensor --------------------------------------------------------------------------------

ROOT = "model.decoder.layers.1.self_attn.q_proj"
TELLING = {
    "weight_g_idx": "actorder",
    "g_idx": "actorder",
    "pre_quant_scale": "AWQ",
    "input_quantizer.pre_quant_scale": "AWQ",
    "smooth_scale": "SmoothQuant",
    "smoothquant_scale": "SmoothQuant",
    "weight_zero_point": "zero points",
    "qzeros": "zero points",
    "qweight": "GPTQ",
    "weight_scale_inv": "FP8",
    "rotation": "rotations",
    "hadamard_K": "rotations",
    "R2_weight": "rotations",
    "weight_transform.weight": "rotations",
    "weight.absmax": "bitsandbytes",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes",
    "SCB": "bitsandbytes",
    "bitmask": "sparse",
    "centroids.weight": "codebooks",
}


@pytest.mark.parametrize("layout", ["modelopt", "compressed int", "affine", "plain"])
def test_tensors_that_tell(tmp_path: Path, layout: str) -> None:
    """Announced or not, the line says what such a tensor is for."""
    for index, (name, what) in enumerate(TELLING.items()):
        written = writers.by_linear(TINY, lambda param: None) if layout == "plain" else small(layout)
        written.tensors[f"{ROOT}.{name}"] = encode(np.ones(32, np.float32), "F32")
        refused(written, tmp_path / str(index), what, f"'{ROOT}.{name}'", "supported: MLX")


def test_mxfp4_stacks_of_another_layout(tmp_path: Path) -> None:
    written = writers.by_linear(TINY, lambda param: None)
    written.tensors["model.decoder.layers.0.experts.gate_up_proj_blocks"] = encode(
        np.ones(4, np.float32), "F32"
    )
    refused(written, tmp_path, "MXFP4", "gate_up_proj_blocks")


# ---- what would take for ever ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["modelopt", "compressed nvfp4", "compressed fp8", "compressed int"])
@pytest.mark.parametrize("value", ["x" * 200_000, "*", "", 3, True, {"a": 1}, 1.5])
def test_a_list_of_modules_that_is_none(tmp_path: Path, layout: str, value: Any) -> None:
    refused(announcing(layout, {"ignore": value}), tmp_path, "config.json", "'ignore' is not a list")


def test_lists_of_modules_without_end(tmp_path: Path) -> None:
    """Exact names are looked up, however many there are; wildcards are tried one after the other.

    Letter by letter, or name by name, each of these took minutes.
    """
    Checkpoint.open(announcing("modelopt", {"ignore": [f"a.{n}" for n in range(100_000)]}).write(tmp_path))
    Checkpoint.open(announcing("modelopt", {"ignore": ["*" + "y" * 200_000] * 50}).write(tmp_path / "long"))
    Checkpoint.open(
        announcing("modelopt", {"ignore": [f"*.x{n}.*" for n in range(1000)]}).write(tmp_path / "most")
    )
    many = announcing("modelopt", {"ignore": [f"*.x{n}.*" for n in range(1001)]})
    refused(many, tmp_path / "many", "1,001 wildcards; at most 1,000")


def test_patterns() -> None:
    """Paths, modules around, tails, and wildcards, all in one look."""
    path = "model.decoder.layers.0.self_attn.q_proj"
    for pattern in (
        path,
        "model.decoder.layers.0",
        "q_proj",
        "self_attn.q_proj",
        "*.self_attn*",
        "layers.?",
        "[m]odel",
    ):
        assert Patterns([pattern], "").match(path), pattern
    for pattern in ("q", "layers.1", "self_attn.k_proj", "*.mlp.*", "odel", ""):
        assert not Patterns([pattern, "z*"], "").match(path), pattern


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_countless_layers_and_experts(tmp_path: Path, layout: str, key: str) -> None:
    written = small(layout)
    written.config["text_config"] = {**written.config["text_config"], key: 1_000_000}
    refused(written, tmp_path, "config.json", f"'{key}' is 1,000,000; at most")


def test_sixty_thousand_layers_that_are_all_listed(tmp_path: Path) -> None:
    written = small("modelopt")
    kinds = ["sliding_attention"] * 59_999 + ["full_attention"]
    written.config["text_config"] = {
        **written.config["text_config"],
        "num_hidden_layers": 60_000,
        "layer_types": kinds,
    }
    refused(written, tmp_path, "'num_hidden_layers' is 60,000; at most 1,000")


def test_layers_times_experts(tmp_path: Path) -> None:
    """Each number may be within its bound, and their product not."""
    written = small("modelopt")
    kinds = ["full_attention"] * 1000
    own = {"num_hidden_layers": 1000, "layer_types": kinds, "num_experts": 90}
    written.config["text_config"] = {**written.config["text_config"], **own}
    refused(written, tmp_path, "tensors, but config.json asks for over")


def test_two_announcements(tmp_path: Path) -> None:
    """MLX's own programs read "quantization" where both are; the tensors must be what it says."""
    written, other = small("affine"), small("modelopt").config["quantization_config"]
    right = written.config["quantization"]
    written.config["quantization_config"] = other  # left over from the source of a conversion
    Checkpoint.open(written.write(tmp_path / "right"))
    written.config |= {"quantization": {**right, "bits": 8}, "quantization_config": right}
    refused(written, tmp_path / "wrong", "model.safetensors", "of the wrong shape")
    written.config["quantization"] = {}
    Checkpoint.open(written.write(tmp_path / "second"))
