"""What a conversion would write: recipes, figures of the released geometry, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma.errors import ConfigError
from dgemma.formats.quantized import MXFP4, NVFP4, Form
from dgemma.network.spec import Param
from dgemma.released import RELEASED_DIR
from dgemma_convert.plan import Plan, make_plan, report, text
from tests.checkpoints import SMALL_VISION, make_checkpoint, small, write_json


def plan(folder: Path, to: str, *settings: str, preset: str = "balanced") -> Plan:
    return make_plan(folder, to, preset, settings)[0]


def forms(plan: Plan) -> dict[str, Form | None]:
    return {job.param.name: job.form for job in plan.jobs}


# ---- the released geometry, from config.json alone ------------------------------------------------


@pytest.mark.parametrize(
    ("to", "tensors", "nbytes", "shards"),
    [
        ("nvfp4", 47_067, 18_818_050_776, 4),  # nvidia's checkpoint
        ("mlx", 1_647, 16_542_844_632, 4),  # mlx-community's 4-bit one
        ("bf16", 1_047, 51_647_562_456, 11),  # google's
    ],
)
def test_the_released_figures(to: str, tensors: int, nbytes: int, shards: int) -> None:
    made = plan(RELEASED_DIR, to)
    names = [output.name for job in made.jobs for output in job.outputs]
    assert (made.tensors, made.nbytes, len(made.shards())) == (tensors, nbytes, shards)
    assert len(set(names)) == tensors
    assert all(sum(job.nbytes for job in jobs) <= 5e9 for _, jobs in made.shards())


def test_modelopt_names_types_and_shapes() -> None:
    outputs = {o.name: o for job in plan(RELEASED_DIR, "nvfp4").jobs for o in job.outputs}
    root = "model.decoder.layers.7.experts.31"
    found = {
        name: (outputs[f"{root}.{name}"].dtype, outputs[f"{root}.{name}"].shape)
        for name in ("gate_proj.weight", "up_proj.weight_scale", "down_proj.weight", "down_proj.weight_scale")
    }
    assert found == {
        "gate_proj.weight": ("U8", (704, 1408)),
        "up_proj.weight_scale": ("F8_E4M3", (704, 176)),
        "down_proj.weight": ("U8", (2816, 352)),
        "down_proj.weight_scale": ("F8_E4M3", (2816, 44)),
    }
    for scalar in ("weight_scale_2", "input_scale"):
        assert (outputs[f"{root}.gate_proj.{scalar}"].dtype, outputs[f"{root}.up_proj.{scalar}"].shape) == (
            "F32",
            (),
        )
    assert outputs["model.decoder.layers.7.router.proj.weight"].dtype == "BF16"


def test_mlx_announcement_is_mlx_communitys() -> None:
    made = plan(RELEASED_DIR, "mlx").config
    q = made["quantization"]
    assert {k: q[k] for k in ("group_size", "bits", "mode")} == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    eight = {"group_size": 64, "bits": 8}
    layer = "model.decoder.layers.5"
    overridden = {path.removeprefix(f"{layer}.") for path in q if path.startswith(f"{layer}.")}
    assert overridden == {
        *(f"self_attn.{p}_proj" for p in "qko"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        "router.proj",
    }
    assert all(value == eight for value in q.values() if isinstance(value, dict))
    assert q["model.decoder.embed_tokens"] == eight
    assert made["quantization_config"] == q
    assert made["generation_config"] == json.loads((RELEASED_DIR / "generation_config.json").read_text())


def test_modelopt_announcements_agree() -> None:
    made = plan(RELEASED_DIR, "nvfp4")
    own = made.config["quantization_config"]
    beside = made.files["hf_quant_config.json"]["quantization"]
    assert (own["quant_method"], own["quant_algo"], beside["quant_algo"]) == ("modelopt", "NVFP4", "NVFP4")
    assert own["ignore"] == beside["exclude_modules"]
    kept_out = ("lm_head", "embed_vision", "mlp", "router", "self_attn", "self_conditioning", "vision_tower")
    assert all(any(word in pattern for pattern in own["ignore"]) for word in kept_out)
    assert not any("experts" in pattern for pattern in own["ignore"])


# ---- recipes ------------------------------------------------------------------------------------


def group_forms(made: Plan, group: str) -> set[Form | None]:
    def matrix(param: Param) -> bool:
        return len(param.shape) > 1

    return {job.form for job in made.jobs if job.param.group == group and matrix(job.param)}


def test_settings_go_by_class_and_by_module() -> None:
    module = "model.decoder.layers.3.self_attn.q_proj"
    made = plan(RELEASED_DIR, "mlx", "experts=nvfp4", "attention=mxfp4", "embed=bf16", f"{module}=8bit-g32")
    assert group_forms(made, "experts") == {NVFP4}
    assert group_forms(made, "embed") == {None}
    assert group_forms(made, "attention") == {MXFP4, Form("affine", 8, 32)}
    assert forms(made)[f"{module}.weight"] == Form("affine", 8, 32)
    q = made.config["quantization"]
    assert (q["mode"], q[module]) == ("nvfp4", {"group_size": 32, "bits": 8, "mode": "affine"})


def test_rows_that_do_not_divide(tmp_path: Path) -> None:
    """Groups of 32 where 64 does not divide; bfloat16 where 32 does not."""
    write_json(tmp_path / "config.json", small(hidden_size=96, moe_intermediate_size=24))
    made = plan(tmp_path, "mlx")
    assert group_forms(made, "embed") == {Form("affine", 8, 32)}
    assert group_forms(made, "experts") == {Form("affine", 4, 32), None}


@pytest.mark.parametrize(
    ("to", "setting", "fault"),
    [
        ("mlx", "router=4bit", "never quantized below 8 bit"),
        ("mlx", "model.decoder.layers.0.router.proj=mxfp4", "never quantized below 8 bit"),
        ("mlx", "router", "expected class=format"),
        ("mlx", "expert=4bit", "no class or module 'expert'"),
        ("mlx", "experts=5bits", "unknown format '5bits'"),
        ("mlx", "experts=7bit", "7 bits"),
        ("mlx", "experts=4bit-g48", "groups of 48"),
        ("mlx", "experts=fp8", "this target stores bf16, affine, mxfp4, mxfp8, nvfp4"),
        ("nvfp4", "experts=4bit", "this target stores bf16, nvfp4"),
        ("nvfp4", "embed=nvfp4", "no quantized embed"),
        ("nvfp4", "model.decoder.layers.0.mlp.up_proj=nvfp4", "all of mlp in nvfp4 or none"),
        ("bf16", "experts=8bit", "this target stores bf16"),
    ],
)
def test_settings_that_are_refused(to: str, setting: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        plan(RELEASED_DIR, to, setting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", ["quality", "balanced", "small"])
@pytest.mark.parametrize("to", ["mlx", "nvfp4", "bf16"])
def test_presets_keep_the_router_at_8_bit_or_more(to: str, preset: str) -> None:
    made = plan(RELEASED_DIR, to, preset=preset)
    assert all(form is None or form.bits >= 8 for form in group_forms(made, "router"))


def test_presets_are_ordered_by_size() -> None:
    sizes = [plan(RELEASED_DIR, "mlx", preset=preset).nbytes for preset in ("quality", "balanced", "small")]
    assert sizes == sorted(sizes, reverse=True)


# ---- the report ---------------------------------------------------------------------------------


def test_the_report_adds_up() -> None:
    facts: dict[str, Any] = report(plan(RELEASED_DIR, "nvfp4"))
    assert sum(c["bytes_after"] for c in facts["classes"]) == facts["bytes_after"] == 18_818_050_776
    assert sum(c["bytes_before"] for c in facts["classes"]) == facts["bytes_before"] == 51_647_562_456
    # The vision tower is not loaded, and routers are held in float32.
    held = facts["memory"][0]
    assert (held["dtype"], held["weights"]) == ("bfloat16", pytest.approx(17.69e9, rel=1e-3))
    assert held["total"][1024] == held["weights"] + held["vocabulary_plane"] + held["kv"][1024]
    assert "47,067 tensors, 18,818,050,776 bytes in 4 files" in text(facts)


def test_a_vision_tower_stays_as_it_is(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, small() | {"vision_config": SMALL_VISION})
    made = plan(folder, "mlx")
    assert all(
        job.form is None for job in made.jobs if job.param.name.startswith("model.encoder.vision_tower.")
    )
    assert made.config["vision_config"] == SMALL_VISION
