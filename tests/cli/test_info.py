"""`dgemma info`: the arithmetic against numbers worked out by hand or published, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.cli import main
from dgemma.files import load_json
from dgemma.network import memory
from dgemma.network.config import Config, read_config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.spec import text_parameters
from dgemma.released import RELEASED_DIR
from dgemma.reports import info
from dgemma.reports.tables import amount
from dgemma.tiny import MODEL_DIR
from dgemma_convert import stream
from dgemma_convert.plan import make_plan
from tests.checkpoints import SMALL_VISION, make_checkpoint, small

BF16, F32, F64 = memory.FORMATS


@pytest.fixture(scope="module")
def released() -> Config:
    return read_config(load_json(RELEASED_DIR / "config.json"))


def test_the_released_model_has_its_published_size(released: Config) -> None:
    report = info.describe(RELEASED_DIR)
    assert report["tensors"] == 1047
    assert report["bfloat16_bytes"]["total"] == 51_647_562_456
    assert round(report["parameters"]["total"] / 1e9, 2) == 25.82
    assert abs(report["parameters"]["active"] / 1e9 - 3.85) < 0.02
    assert report["stored_bytes"] is None
    assert report["geometry"]["full_attention_layers"] == [5, 11, 17, 23, 29]
    assert sum(info.parameter_counts(released).values()) == report["parameters"]["total"]


def test_experts_count_as_active_by_the_share_a_token_takes(released: Config) -> None:
    stored, active = info.parameter_counts(released), info.active_parameters(released)
    assert active["experts"] * 16 == stored["experts"] == 30 * 128 * 3 * 704 * 2816
    assert "vision" not in active
    assert {name: n for name, n in stored.items() if name not in ("vision", "experts")} == {
        name: n for name, n in active.items() if name != "experts"
    }


def test_keys_and_values_by_hand(released: Config) -> None:
    # 25 sliding layers of 8 × 256, 5 full ones of 2 × 512; two arrays, two bytes.
    sliding, full = 25 * 2 * 8 * 256 * 2, 5 * 2 * 2 * 512 * 2
    assert memory.kv_bytes(released, 2, 100) == 100 * (sliding + full)
    assert memory.kv_bytes(released, 2, 100_000) == (1023 + 256) * sliding + 100_000 * full
    assert memory.kv_bytes(released, 4, 5000) == 2 * memory.kv_bytes(released, 2, 5000)
    assert info.memory(released, BF16)["kv_per_1k_tokens_full"] == 1024 * full


def test_the_vocabulary_plane_is_one_canvas_of_float32(released: Config) -> None:
    assert (
        memory.vocabulary_plane(released, BF16) == memory.vocabulary_plane(released, F32) == 256 * 262_144 * 4
    )
    assert memory.vocabulary_plane(replace(released, canvas_length=64), F64) == 64 * 262_144 * 8
    assert memory.vocabulary_plane(replace(released, canvas_length=999), BF16) == 256 * 262_144 * 4


def test_contexts_end_where_the_model_does(released: Config) -> None:
    assert list(info.memory(released, BF16)["kv"]) == [1024, 8192, 32768, 131072]
    assert list(info.memory(replace(released, max_positions=4096), BF16)["kv"]) == [1024, 4096]
    assert list(info.memory(replace(released, max_positions=1000), BF16)["kv"]) == [1000]


@pytest.mark.parametrize("tokens", [5, 11, 40, 100])
def test_what_numpy_holds_is_what_is_said(tokens: int, tmp_path: Path) -> None:
    from dgemma.model import Model

    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    ops = NumpyOps()
    model = Model(ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), None)
    (context,) = model.encode([np.arange(tokens) % 50])
    held = sum(context.arrays().values())
    assert held == memory.kv_bytes(checkpoint.config, 8, tokens)
    loaded = sum(param.size for param in text_parameters(checkpoint.config)) * 8
    assert memory.weight_bytes(checkpoint.config, F64) == loaded


def test_the_router_is_wide(tmp_path: Path) -> None:
    config = read_config(small())
    router = info.parameter_counts(config)["router"]
    total = sum(info.parameter_counts(config).values())
    assert memory.weight_bytes(config, BF16) == 2 * total + 2 * router
    assert memory.weight_bytes(config, F32) == 4 * total


def test_bytes_on_disk_are_those_of_the_files(tmp_path: Path) -> None:
    config = small() | {"vision_config": SMALL_VISION}
    report = info.describe(make_checkpoint(tmp_path, config, dtype="F32", shards=2))
    counts = report["parameters"]["by_class"]
    assert counts["vision"] > 0
    assert report["stored_bytes"]["by_class"] == {name: 4 * n for name, n in counts.items()}
    assert "on disk" in info.text(report)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (268435456, "268.4 MB"), (51647562456, "51.65 GB")],
)
def test_amounts(value: int, text: str) -> None:
    assert amount(value) == text


def test_a_quantized_checkpoint_needs_what_its_records_take(tmp_path: Path) -> None:
    """Packed weights stay packed: the report says so, and names the format."""
    plain = info.describe(make_checkpoint(tmp_path / "in", small(hidden_size=64, moe_intermediate_size=64)))
    plan, checkpoint = make_plan(tmp_path / "in", "nvfp4")
    assert checkpoint
    stream.convert(plan, checkpoint, tmp_path / "out")
    packed = info.describe(tmp_path / "out")
    assert (plain["format"], packed["format"]) == ("unquantized", "modelopt")
    experts = plain["parameters"]["by_class"]["experts"]
    saved = plain["memory"][0]["weights"] - packed["memory"][0]["weights"]
    assert saved == experts * 2 - experts * (4 + 8 / 16) / 8
    assert "modelopt" in info.text(packed)


def test_the_command_prints_a_report_and_json() -> None:
    runner = CliRunner()
    text = runner.invoke(main, ["info", str(RELEASED_DIR)])
    assert text.exit_code == 0
    for part in ("25.82 B", "51.65 GB", "full attention in 5, 11, 17, 23, 29", "268.4 MB", "all at 128k"):
        assert part in text.stdout
    assert max(map(len, text.stdout.splitlines())) < 120
    report = json.loads(runner.invoke(main, ["info", str(RELEASED_DIR), "--json"]).stdout)
    assert report["memory"][0]["dtype"] == "bfloat16"
    assert report["memory"][0]["total"]["1024"] > 50e9


def test_a_run_is_predicted_by_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a process is measured, here by a stand-in: NumPy's is known, PyTorch is not installed."""
    monkeypatch.setattr(info, "bare_process", lambda backend, folder: {"numpy": 5_000_000}.get(backend))
    command, runner = ["info", str(MODEL_DIR), "--context", "100", "--rows", "3"], CliRunner()
    report = json.loads(runner.invoke(main, [*command, "--json"]).stdout)["run"]
    assert (report["rows"], report["context"]) == (3, 100)
    peaks = {(p["backend"], p["device"], p["dtype"]): p for p in report["peaks"]}
    numpy, torch = peaks["numpy", "CPU", "float64"], peaks["cuda", "CPU", "float32"]
    config = read_config(load_json(MODEL_DIR / "config.json"))
    assert numpy["contexts"] == 3 * memory.kv_bytes(config, 8, 100) and torch["process"] is None
    parts = ("weights", "contexts", "canvases", "temporaries", "process")
    assert all(p["total"] == sum(p[part] or 0 for part in parts) for p in peaks.values())
    text = runner.invoke(main, command).stdout
    assert "peak of 3 × 100 tokens" in text and "? is the process" in text and "5.0 MB" in text
    assert max(map(len, text.splitlines())) < 140
    assert json.loads(runner.invoke(main, ["info", str(MODEL_DIR), "--json"]).stdout)["run"] is None


def test_a_process_without_a_model_is_measured() -> None:
    assert 2e7 < (info.bare_process("numpy", MODEL_DIR) or 0) < 2e8
    assert info.bare_process("nothing", MODEL_DIR) is None


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--rows", "2"], 2, "--rows needs --context"),
        (["--context", "4097"], 1, "--context 4097 exceeds the 4096 positions"),
        (["--context", "0"], 2, "--context"),
    ],
)
def test_runs_that_cannot_be(options: list[str], code: int, part: str) -> None:
    result = CliRunner().invoke(main, ["info", str(MODEL_DIR), *options])
    assert result.exit_code == code and part in result.stderr and not result.stdout


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("./nope", "no such folder"),
        ("a b", "neither a folder"),
        ("no-such-org/none", "not wholly in the cache"),
    ],
)
def test_bad_models_end_in_one_line(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(main, ["info", name])
    assert result.exit_code == 1
    assert result.stderr.startswith("dgemma: error: ")
    assert result.stderr.count("\n") == 1
    assert part in result.stderr


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr == f"dgemma: error: {tmp_path / 'config.json'}: no such file\n"


@pytest.mark.parametrize(
    "broken", ["model.safetensors", "generation_config.json", "model.safetensors.index.json"]
)
def test_config_alone_is_enough_where_the_rest_is_broken(broken: str, tmp_path: Path) -> None:
    whole = info.describe(make_checkpoint(tmp_path))
    (tmp_path / broken).write_text("{")
    report = info.describe(tmp_path)
    assert whole["weights_fault"] is None and broken in report["weights_fault"]
    for key in ("geometry", "parameters", "memory"):
        assert report[key] == whole[key]
    result = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert result.exit_code == 0 and "The weights do not open" in result.stdout


def test_a_name_that_a_terminal_would_obey_is_made_visible(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a\x1b[31mb", small())
    for command in (["info", str(folder)], ["verify", str(folder), "--against", str(folder), "--no-logits"]):
        result = CliRunner().invoke(main, command)
        assert "a\\x1b[31mb" in result.output and "\x1b" not in result.output
