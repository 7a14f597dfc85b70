"""`dgemma verify`: planted damage is found and named, and planted differences are measured as they are."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dgemma.checkpoint import values
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.layouts.base import Layout, Piece
from dgemma.checkpoint.layouts.compressed import CompressedLayout
from dgemma.checkpoint.layouts.mlx import MlxLayout
from dgemma.checkpoint.layouts.modelopt import ModelOptLayout
from dgemma.cli import main
from dgemma.formats import nvfp4
from dgemma.formats.encode import bf16_bits, blocks, quantize
from dgemma.formats.quantized import FP8, MXFP4, MXFP8, NVFP4, Form, Quantized, affine
from dgemma.formats.stored import Stored
from dgemma.network.config import read_config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops.decoding import dequantize
from dgemma.network.spec import parameters
from dgemma.reports import against, verify
from dgemma.reports.ties import twin
from tests.checkpoints import SMALL_VISION, Edit, Tensor, make_checkpoint, small, write_json

EMBED = "model.decoder.embed_tokens.weight"
NORM = "model.decoder.norm.weight"
GATE_UP = "model.decoder.layers.0.experts.gate_up_proj"
EXPERT = "model.decoder.layers.1.experts.3.down_proj"
WORDS = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}


def run(*args: object) -> Result:
    result = CliRunner().invoke(main, ["verify", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def findings(folder: Path, *args: object) -> list[dict[str, Any]]:
    """What the command finds wrong, after checks that hold for every report."""
    result = run(folder, "--json", *args)
    report = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert result.exit_code == (1 if report["findings"] else 0)
    assert report["ok"] == (not report["findings"])
    assert all("\n" not in finding["text"] for finding in report["findings"])
    return report["findings"]


def only(folder: Path) -> dict[str, Any]:
    found = findings(folder)
    assert len(found) == 1, found
    return found[0]


def put(tensor: Tensor, index: int, value: int, word: str | None = None) -> None:
    """Overwrite one element, counted flat, with these bits."""
    data = np.frombuffer(tensor.raw, word or WORDS.get(tensor.dtype, "u1")).copy()
    data[index] = value
    tensor.raw = data.tobytes()


# ---- quantized checkpoints by hand --------------------------------------------------------------

MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
COMPRESSED_FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}
FORMATS: dict[str, tuple[Form, type[Layout], str, dict[str, Any]]] = {
    "modelopt": (NVFP4, ModelOptLayout, "quantization_config", MODELOPT),
    "compressed": (NVFP4, CompressedLayout, "quantization_config", COMPRESSED),
    "fp8": (FP8, CompressedLayout, "quantization_config", COMPRESSED_FP8),
    "affine": (affine(4, 32), MlxLayout, "quantization", {"group_size": 32, "bits": 4}),
    "mlx-nvfp4": (NVFP4, MlxLayout, "quantization", {"group_size": 16, "bits": 4, "mode": "nvfp4"}),
    "mxfp4": (MXFP4, MlxLayout, "quantization", {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
    "mxfp8": (MXFP8, MlxLayout, "quantization", {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
}


def make_quantized(folder: Path, name: str, edit: Edit | None = None, shards: int = 1) -> Path:
    """A checkpoint with quantized experts; `edit` changes its tensors as they are stored."""
    form, layout, key, announcement = FORMATS[name]
    config = small() | {key: announcement}

    def pack(tensors: dict[str, Tensor]) -> None:
        written = layout(announcement, "config.json")  # type: ignore[call-arg]
        for param in parameters(read_config(config)):
            if param.group == "experts":
                data = np.frombuffer(tensors.pop(param.name).raw, "<u2").astype(np.uint32) << 16
                values = data.view(np.float32).reshape(param.shape)
                plain = layout is MlxLayout and form == NVFP4  # no factor
                record = blocks(values, form, None) if plain else quantize(values, form)
                for piece in written.pieces(param, form):
                    tensors[piece.name] = stored(piece, record, layout is CompressedLayout and form == NVFP4)
        if edit:
            edit(tensors)

    return make_checkpoint(folder, config, edit=pack, shards=shards)


def stored(piece: Piece, record: Quantized, divides: bool) -> Tensor:
    """A piece of a record as it goes to a file."""
    dtype, shape = piece.dtypes[0], piece.shapes[0]
    if piece.role == "unused":
        return Tensor(dtype, shape, np.ones(shape, "<f4").tobytes())
    field = getattr(record, piece.role)
    if piece.role == "factor":
        field = np.broadcast_to(field, record.shape[:-1])
        field = 1 / field if divides else field
    part = field if piece.place is None else field[piece.place]
    if piece.role == "factor" and np.prod(shape) != part.size:
        part = part.reshape(-1)[:1]
    if dtype in ("BF16", "F32"):
        part = bf16_bits(part) if dtype == "BF16" else part.astype("<f4")
    return Tensor(dtype, shape, np.ascontiguousarray(part).tobytes())


@pytest.mark.parametrize("name", FORMATS)
def test_clean_quantized_checkpoints_pass(name: str, tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, name, shards=2)
    result = run(folder)
    assert result.exit_code == 0, result.stdout
    assert "nothing wrong" in result.stdout and result.stderr == ""
    report = json.loads(run(folder, "--json").stdout)
    form, layout, *_ = FORMATS[name]
    assert report["format"] == layout.name and report["files"] == 2
    assert report["by_class"]["experts"]["forms"] == [str(form)]
    assert report["by_class"]["embed"]["forms"] == ["bf16"]
    assert report["bytes"] == sum(own["bytes"] for own in report["by_class"].values())


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_clean_checkpoint_passes(dtype: str, tmp_path: Path) -> None:
    config = small() | {"vision_config": SMALL_VISION}
    folder = make_checkpoint(tmp_path, config, dtype=dtype, shards=3)
    assert findings(folder) == []
    assert dtype.lower() in run(folder).stdout


NOT_FINITE = [
    ("BF16", 0x7FC0),
    ("BF16", 0x7F80),
    ("BF16", 0xFF81),
    ("F16", 0x7E00),
    ("F16", 0xFC00),
    ("F32", 0x7FC0_0000),
    ("F32", 0xFF80_0000),
    ("F32", 0x7F80_0001),
]


@pytest.mark.parametrize(("dtype", "bits"), NOT_FINITE)
def test_values_that_are_not_finite(dtype: str, bits: int, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        put(tensors[GATE_UP], 3 * 64 * 64 + 5 * 64 + 7, bits)
        put(tensors[GATE_UP], 7 * 64 * 64, bits)

    found = only(make_checkpoint(tmp_path, dtype=dtype, edit=edit))
    assert (found["kind"], found["tensor"], found["count"]) == ("non-finite", GATE_UP, 2)
    assert found["first"] == [3, 5, 7] and found["file"] == "model.safetensors"
    text = run(tmp_path).stdout
    assert f"'{GATE_UP}': 2 of 32,768 not finite, first at [3, 5, 7], in model.safetensors" in text


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_largest_values_of_a_type_are_finite(dtype: str, tmp_path: Path) -> None:
    largest = {"BF16": 0x7F7F, "F16": 0xFBFF, "F32": 0x7F7F_FFFF}[dtype]
    make_checkpoint(tmp_path, dtype=dtype, edit=lambda tensors: put(tensors[NORM], 0, largest))
    assert findings(tmp_path) == []


def test_the_vision_tower_is_looked_at(tmp_path: Path) -> None:
    name = "model.encoder.embed_vision.embedding_projection.weight"
    config = small() | {"vision_config": SMALL_VISION}
    found = only(make_checkpoint(tmp_path, config, edit=lambda tensors: put(tensors[name], 1, 0x7FC0)))
    assert (found["kind"], found["tensor"], found["first"]) == ("non-finite", name, [0, 1])


def test_chunks_meet_without_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [0, 99, 100, 199, 12799]

    def edit(tensors: dict[str, Tensor]) -> None:
        for place in places:
            put(tensors[EMBED], place, 0x7FC0)

    make_checkpoint(tmp_path, edit=edit)
    monkeypatch.setattr(values, "CHUNK", 100)
    assert only(tmp_path)["count"] == len(places)


F32 = {"zero": 0, "minus zero": 0x8000_0000, "negative": 0xBF80_0000, "inf": 0x7F80_0000, "nan": 0x7FC0_0000}
SCALE, DOUBLE, WHOLE = f"{EXPERT}.weight_scale", f"{EXPERT}.weight_scale_2", f"{EXPERT}.weight_global_scale"
STACK = f"{GATE_UP}.scales"
# Format, tensor, its bits at element 5 (0 of a single one), the kind of finding.
DAMAGE: list[tuple[str, str, int, str]] = [
    ("modelopt", SCALE, 0x00, "zero"),
    ("modelopt", SCALE, 0x80, "zero"),
    ("modelopt", SCALE, 0x7F, "non-finite"),
    ("modelopt", SCALE, 0xFF, "non-finite"),
    ("modelopt", SCALE, 0xB8, "negative"),
    ("modelopt", DOUBLE, F32["zero"], "zero"),
    ("modelopt", DOUBLE, F32["minus zero"], "zero"),
    ("modelopt", DOUBLE, F32["negative"], "negative"),
    ("modelopt", DOUBLE, F32["inf"], "non-finite"),
    ("modelopt", DOUBLE, F32["nan"], "non-finite"),
    ("modelopt", f"{EXPERT}.input_scale", F32["nan"], "non-finite"),
    ("compressed", SCALE, 0x00, "zero"),
    ("compressed", WHOLE, F32["zero"], "zero"),
    ("compressed", WHOLE, F32["negative"], "negative"),
    ("compressed", WHOLE, F32["inf"], "non-finite"),
    ("fp8", f"{EXPERT}.weight", 0x7F, "non-finite"),
    ("fp8", f"{EXPERT}.weight", 0xFF, "non-finite"),
    ("fp8", SCALE, 0x0000, "zero"),
    ("fp8", SCALE, 0xBF80, "negative"),
    ("fp8", SCALE, 0x7F80, "non-finite"),
    ("affine", STACK, 0x7FC0, "non-finite"),
    ("affine", STACK, 0x0000, "zero"),
    ("affine", f"{GATE_UP}.biases", 0xFF80, "non-finite"),
    ("mlx-nvfp4", STACK, 0x7F, "non-finite"),
    ("mlx-nvfp4", STACK, 0x00, "zero"),
    ("mlx-nvfp4", f"{GATE_UP}.weight_scale_2", F32["zero"], "zero"),
    ("mxfp4", STACK, 0xFF, "non-finite"),
    ("mxfp8", STACK, 0xFF, "non-finite"),
]


def with_factor(tensors: dict[str, Tensor]) -> None:
    """A factor an expert beside MLX's NVFP4 tensors."""
    tensors[f"{GATE_UP}.weight_scale_2"] = Tensor("F32", (8, 1), np.ones(8, "<f4").tobytes())


@pytest.mark.parametrize(("name", "tensor", "bits", "kind"), DAMAGE)
def test_damage_to_quantized_tensors(name: str, tensor: str, bits: int, kind: str, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        if name == "mlx-nvfp4":
            with_factor(tensors)
        put(tensors[tensor], 0 if len(tensors[tensor].raw) == 4 else 5, bits)

    found = only(make_quantized(tmp_path, name, edit))
    assert (found["kind"], found["tensor"], found["count"]) == (kind, tensor, 1)


def test_codes_of_mxfp8_are_numbers_too(tmp_path: Path) -> None:
    name = f"{GATE_UP}.weight"
    found = only(make_quantized(tmp_path, "mxfp8", lambda tensors: put(tensors[name], 70, 0xFF, "u1")))
    assert (found["kind"], found["tensor"], found["first"]) == ("non-finite", name, [0, 1, 6])


ALLOWED = [
    ("modelopt", f"{EXPERT}.input_scale", F32["zero"]),
    ("modelopt", f"{EXPERT}.weight", 0xFF),  # two codes of -6
    ("modelopt", SCALE, 0x7E),  # 448
    ("affine", STACK, 0xBF80),  # the scale may run downwards
    ("mxfp4", STACK, 0x00),  # 2^-127, not zero
    ("mxfp4", STACK, 0xFE),
]


@pytest.mark.parametrize(("name", "tensor", "bits"), ALLOWED)
def test_what_is_no_damage(name: str, tensor: str, bits: int, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        put(tensors[tensor], 0 if len(tensors[tensor].raw) == 4 else 5, bits)

    assert findings(make_quantized(tmp_path, name, edit)) == []


@pytest.mark.parametrize(("name", "codes", "scales"), [("mlx-nvfp4", ".weight", ".scales")])
def test_a_block_of_zeros_may_have_a_scale_of_zero(
    name: str, codes: str, scales: str, tmp_path: Path
) -> None:
    # As MLX writes it; a code of -0 is zero, too.
    def edit(tensors: dict[str, Tensor]) -> None:
        for block in (5, 9):
            put(tensors[GATE_UP + scales], block, 0)
            for byte in range(8 * block, 8 * block + 8):
                put(tensors[GATE_UP + codes], byte, 0x88 if byte % 2 else 0, "u1")

    assert findings(make_quantized(tmp_path / "zeros", name, edit)) == []

    def spoil(tensors: dict[str, Tensor]) -> None:
        edit(tensors)
        put(tensors[GATE_UP + codes], 8 * 9 + 7, 0x10, "u1")

    found = only(make_quantized(tmp_path / "spoilt", name, spoil))
    assert (found["kind"], found["first"]) == ("zero", [0, 2, 1])


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, small(vocab_size=80_000), dtype="F32", edit=tie)
    monkeypatch.setattr(values, "CHUNK", 1 << 14)
    monkeypatch.setattr(against, "CHUNK", 1 << 14)
    checkpoint = Checkpoint.open(folder)
    tracemalloc.start()
    try:
        assert verify.inspect(folder)["ok"]
        assert against.compare(checkpoint, checkpoint)["embed"]["relative_rms"] == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert checkpoint.nbytes(EMBED) > 20e6
    assert peak < 3e6


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify.inspect(make_checkpoint(tmp_path), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (report["bytes"], report["bytes"])


# ---- tied copies --------------------------------------------------------------------------------

Q_PROJ = "layers.2.self_attn.q_proj.weight"


def tie(tensors: dict[str, Tensor]) -> None:
    """Copies as some exports store them."""
    for copy, own in (
        ("lm_head.weight", EMBED),
        (f"model.encoder.language_model.{Q_PROJ}", f"model.decoder.{Q_PROJ}"),
    ):
        t = tensors[own]
        tensors[copy] = Tensor(t.dtype, t.shape, t.raw)


def test_equal_copies_pass(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, edit=tie)
    assert findings(folder) == []
    assert json.loads(run(folder, "--json").stdout)["tied_copies"] == 2
    assert "2 of tied tensors" in run(folder).stdout


@pytest.mark.parametrize("copy", ["lm_head.weight", f"model.encoder.language_model.{Q_PROJ}"])
def test_copies_that_differ(copy: str, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tie(tensors)
        put(tensors[copy], 65, 0x3F81)
        put(tensors[copy], 300, 0x3F81)

    found = only(make_checkpoint(tmp_path, edit=edit))
    assert (found["kind"], found["tensor"], found["count"]) == ("tied", copy, 2)
    assert found["first"] == [1, 1]


def test_a_copy_of_another_type_is_held_against_the_values(tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor], change: int = 0) -> None:
        own = tensors[EMBED]
        data = np.frombuffer(own.raw, "<u2").astype("<u4") << 16
        data[7] += change
        tensors["lm_head.weight"] = Tensor("F32", own.shape, data.astype("<u4").tobytes())

    assert findings(make_checkpoint(tmp_path / "same", edit=widen)) == []
    found = only(make_checkpoint(tmp_path / "other", edit=lambda tensors: widen(tensors, 1)))
    assert (found["kind"], found["count"], found["first"]) == ("tied", 1, [0, 7])


def test_a_copy_of_another_shape(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = Tensor("BF16", (2,), bytes(4))

    assert "repeats" in only(make_checkpoint(tmp_path, edit=edit))["text"]


def test_a_copy_that_is_not_finite_is_found_in_itself(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        put(tensors[EMBED], 0, 0x7FC0)
        tie(tensors)

    found = findings(make_checkpoint(tmp_path, edit=edit))
    assert {(f["kind"], f["tensor"]) for f in found} == {
        ("non-finite", EMBED),
        ("non-finite", "lm_head.weight"),
    }


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("lm_head.scales", "model.decoder.embed_tokens.scales"),
        ("model.encoder.language_model.norm.weight", NORM),
        ("model.encoder.language_model.layers.0.layer_scalar", None),
        ("model.decoder.embed_tokens.embed_scale", None),
        (EMBED, None),
    ],
)
def test_which_tensor_a_name_repeats(name: str, own: str | None) -> None:
    assert twin(name) == own


# ---- names, types, shapes, files ----------------------------------------------------------------


def test_every_missing_and_every_unknown_tensor_is_listed(tmp_path: Path) -> None:
    gone = [f"model.decoder.layers.{i}.router.scale" for i in range(4)] + [NORM]

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in gone:
            del tensors[name]
        for i in range(4):
            tensors[f"extra.{i}"] = Tensor("F32", (2,), bytes(8))
        put(tensors["extra.1"], 1, F32["nan"])

    found = findings(make_checkpoint(tmp_path, edit=edit))
    named = {kind: {f["tensor"] for f in found if f["kind"] == kind} for kind in ("missing", "unknown")}
    assert named == {"missing": set(gone), "unknown": {f"extra.{i}" for i in range(4)}}
    assert [f["tensor"] for f in found if f["kind"] == "non-finite"] == ["extra.1"]
    assert len(found) == 10
    for name in gone:
        assert f"  missing: '{name}'\n" in run(tmp_path).stdout


def test_wrong_types_and_shapes(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[NORM] = Tensor("I32", (64,), bytes(256))
        tensors[EMBED] = Tensor("BF16", (64, 200), tensors[EMBED].raw)

    found = findings(make_checkpoint(tmp_path, edit=edit))
    assert {(f["kind"], f["tensor"]) for f in found} == {
        ("quantization", None),  # integers, and config.json announces nothing
        ("of the wrong type", NORM),
        ("of the wrong shape", EMBED),
    }
    assert "(64, 200), not (200, 64)" in run(tmp_path).stdout


def test_a_scale_beside_codes_of_a_wrong_shape(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{EXPERT}.weight"] = Tensor("U8", (3,), bytes(3))
        put(tensors[SCALE], 0, 0)

    found = findings(make_quantized(tmp_path, "modelopt", edit))
    assert {(f["kind"], f["tensor"]) for f in found} == {
        ("of the wrong shape", f"{EXPERT}.weight"),
        ("zero", SCALE),
    }


def test_a_missing_piece_of_a_quantized_tensor(tmp_path: Path) -> None:
    found = only(make_quantized(tmp_path, "modelopt", lambda tensors: tensors.__delitem__(DOUBLE)))
    assert (found["kind"], found["tensor"], found["file"]) == ("missing", DOUBLE, None)


def test_tensors_and_announcement_that_contradict(tmp_path: Path) -> None:
    make_quantized(tmp_path, "modelopt")
    write_json(tmp_path / "config.json", small())
    found = findings(tmp_path)
    assert found[0]["kind"] == "quantization" and "does not announce" in found[0]["text"]
    assert SCALE in {f["tensor"] for f in found if f["kind"] == "unknown"}
    assert next(f["tensor"] for f in found if f["kind"] == "missing") == GATE_UP
    make_checkpoint(tmp_path / "plain", small() | {"quantization": FORMATS["affine"][3]})
    assert "but no tensor is" in only(tmp_path / "plain")["text"]
    write_json(tmp_path / "config.json", small() | {"quantization_config": {"quant_method": "gptq"}})
    assert "'gptq'" in only(tmp_path)["text"]


def test_values_are_looked_at_in_a_checkpoint_that_does_not_open(tmp_path: Path) -> None:
    make_quantized(tmp_path, "modelopt", lambda tensors: put(tensors[SCALE], 0, 0x7F))
    (tmp_path / "config.json").write_text("{")
    first, second = findings(tmp_path)
    assert first["kind"] == "checkpoint" and "config.json" in first["text"]
    assert (second["kind"], second["tensor"]) == ("non-finite", SCALE)
    assert "by their types alone" in run(tmp_path).stdout


def test_every_broken_file_is_listed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=4, edit=lambda tensors: [put(t, 0, 0x7FC0) for t in tensors.values()])
    one, two, three, _ = sorted(tmp_path.glob("*.safetensors"))
    for file in (one, two):
        file.write_bytes(file.read_bytes()[:-10])
    three.unlink()
    found = findings(tmp_path)
    broken = [f for f in found if f["kind"] != "non-finite"]
    assert [(f["kind"], f["file"]) for f in broken] == [("file", f.name) for f in (one, two, three)]
    for finding, part in zip(broken, ("truncated", "truncated", "missing shard"), strict=True):
        assert part in finding["text"]
    # What the remaining file holds was looked at.
    assert {f["file"] for f in found if f["kind"] == "non-finite"} == {"model-00004-of-00004.safetensors"}


def test_a_truncated_file(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found = only(tmp_path)
    assert found["kind"] == "file" and "truncated" in found["text"] and str(file) in found["text"]


def test_an_index_that_disagrees(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"][NORM]
    write_json(index, data)
    assert NORM in only(tmp_path)["text"]
    index.write_text("[")
    assert "index" in only(tmp_path)["text"]


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", small())
    assert "no .safetensors file here" in only(tmp_path)["text"]
    assert "no such file" in only(make_empty(tmp_path / "empty"))["text"]


def make_empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("args", [["./nope"], ["a b"], ["./nope", "--against", "./nope"]])
def test_a_model_that_is_not_there(args: Sequence[str]) -> None:
    one_line_error(run(*args))


def one_line_error(result: Result) -> str:
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("dgemma: error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_help_imports_no_framework() -> None:
    program = """
import sys
from dgemma.cli import main
try:
    main(["verify", "--help"])
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "mlx"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


# ---- against another checkpoint -----------------------------------------------------------------


def compared(folder: Path, other: Path, *args: object) -> dict[str, Any]:
    result = run(folder, "--against", other, "--json", "--backend", "numpy", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["against"]


@pytest.mark.parametrize("name", ["modelopt", "affine", "fp8"])
def test_a_checkpoint_against_itself(name: str, tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, name)
    found = compared(folder, folder)
    assert set(found["weights"]) == {
        *("embed", "attention", "mlp", "experts", "router", "self_conditioning", "norm", "total")
    }
    for own in found["weights"].values():
        assert own["relative_rms"] == 0 and own["worst"]["relative_rms"] == 0
        assert own["cosine"] == pytest.approx(1, abs=1e-12)
    for step in ("first_step", "self_conditioned"):
        assert found["logits"][step] == {"kl_mean": 0, "kl_max": 0, "argmax_agreement": 1}
    assert found["logits"]["canvas_tokens"] == 16 and found["logits"]["prompt_tokens"] == 25


def scaled(names: Callable[[str], bool], factor: float) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if names(name):
                data = np.frombuffer(tensor.raw, "<f4") * np.float32(factor)
                tensor.raw = data.astype("<f4").tobytes()

    return edit


def test_a_planted_error_is_measured_in_its_class(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "original", dtype="F32")
    worst = "model.decoder.layers.2.experts.down_proj"

    def edit(tensors: dict[str, Tensor]) -> None:
        scaled(lambda name: ".experts." in name, 1.1)(tensors)
        scaled(lambda name: name == worst, 1.2 / 1.1)(tensors)

    found = compared(make_checkpoint(tmp_path / "changed", dtype="F32", edit=edit), original)
    experts = found["weights"]["experts"]
    # The sizes of the stacks are 64 × 64 and 64 × 32, of values of variance 1/64 and 1/32, in 4 layers.
    assert experts["relative_rms"] == pytest.approx(((7 * 0.01 + 0.04) / 8) ** 0.5, rel=0.01)
    assert experts["worst"] == {"tensor": worst, "relative_rms": pytest.approx(0.2, rel=1e-5)}
    assert 0.999 < experts["cosine"] < 1
    assert found["weights"]["total"]["worst"]["tensor"] == worst
    others = {g: own for g, own in found["weights"].items() if g not in ("experts", "total")}
    assert all(own["relative_rms"] == 0 for own in others.values())
    for step in ("first_step", "self_conditioned"):
        assert found["logits"][step]["kl_max"] >= found["logits"][step]["kl_mean"] > 0


def test_direction_other_is_the_reference(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "original", dtype="F32")
    doubled = make_checkpoint(tmp_path / "changed", dtype="F32", edit=scaled(lambda name: name == EMBED, 2))
    assert compared(doubled, original, "--no-logits")["weights"]["embed"]["relative_rms"] == 1
    found = compared(original, doubled, "--no-logits")
    assert found["weights"]["embed"]["relative_rms"] == 0.5 and "logits" not in found


@pytest.mark.parametrize("name", FORMATS)
def test_quantization_error_in_every_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_checkpoint(tmp_path / "original")
    folder = make_quantized(tmp_path / "quantized", name)
    found = compared(folder, original)["weights"]
    packed, plain, ops = Checkpoint.open(folder), Checkpoint.open(original), NumpyOps()
    error = norm = 0.0
    for param in parameters(packed.config):
        if param.group == "experts":
            a = dequantize(ops, ops.upload(packed.read(param.name)))  # type: ignore[arg-type]
            b = ops.load(plain.read(param.name))  # type: ignore[arg-type]
            error, norm = error + ((a - b) ** 2).sum(), norm + (b**2).sum()
    assert found["experts"]["relative_rms"] == pytest.approx((error / norm) ** 0.5, rel=1e-12)
    assert 0.01 < found["experts"]["relative_rms"] < 0.15
    assert found["router"]["relative_rms"] == 0
    monkeypatch.setattr(against, "CHUNK", 100)  # row by row, expert by expert: the same
    again = compared(folder, original, "--no-logits")["weights"]
    assert again["experts"]["relative_rms"] == pytest.approx(found["experts"]["relative_rms"], rel=1e-12)


def as_stored(x: np.ndarray) -> Stored:
    return Stored("x", "F32" if x.dtype == np.float32 else "U8", x.shape, x, Path("x"))


def test_factors_of_rows_and_matrices_are_cut_with_their_rows() -> None:
    ops, rng = NumpyOps(), np.random.default_rng(0)
    x = rng.standard_normal((6, 32)).astype(np.float32)
    for form in (NVFP4, FP8):
        record = quantize(x, form)
        kept = record.map(as_stored)
        whole = dequantize(ops, ops.upload(kept))
        parts = [against._decoded(ops, kept, slice(a, a + 4)) for a in (0, 4)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_the_report_shows_differences_and_they_change_no_exit_code(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "original", dtype="F32")
    changed = make_checkpoint(tmp_path / "changed", dtype="F32", edit=scaled(lambda n: n == EMBED, 1.1))
    result = run(changed, "--against", original, "--backend", "numpy")
    assert result.exit_code == 0
    for part in (f"against {original}", "rel. RMS error", "10 %", EMBED, "mean KL", "self-conditioned"):
        assert part in result.stdout


def test_findings_and_differences_together(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "original")
    damaged = make_checkpoint(tmp_path / "damaged", edit=lambda tensors: put(tensors[NORM], 3, 0x7FC0))
    result = run(damaged, "--against", original, "--json", "--backend", "numpy")
    assert result.exit_code == 1
    norm = json.loads(result.stdout)["against"]["weights"]["norm"]
    assert norm["relative_rms"] is None and norm["worst"] == {"tensor": NORM, "relative_rms": None}
    text = run(damaged, "--against", original, "--backend", "numpy").stdout
    assert "not finite" in text and "1 finding" in text


def test_the_vision_tower_is_compared_where_both_have_it(tmp_path: Path) -> None:
    config = small() | {"vision_config": SMALL_VISION}
    both = make_checkpoint(tmp_path / "both", config)
    text_only = make_checkpoint(tmp_path / "text")
    assert compared(both, both, "--no-logits")["weights"]["vision"]["relative_rms"] == 0
    assert "vision" not in compared(both, text_only, "--no-logits")["weights"]
    assert "vision" not in compared(text_only, both, "--no-logits")["weights"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"intermediate_size": 32}, "mlp_size"),
        ({"sliding_window": 8}, "layers"),
        ({"vocab_size": 150}, "vocab"),
    ],
)
def test_another_geometry_is_refused(change: dict[str, int], key: str, tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one")
    other = make_checkpoint(tmp_path / "other", small(**change))
    error = one_line_error(run(one, "--against", other))
    assert "another geometry" in error and key in error


def test_other_that_does_not_open(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one")
    other = make_checkpoint(tmp_path / "other", edit=lambda tensors: tensors.__delitem__(NORM))
    assert NORM in one_line_error(run(one, "--against", other))


def test_a_model_that_does_not_open_is_not_compared(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one", edit=lambda tensors: tensors.__delitem__(NORM))
    other = make_checkpoint(tmp_path / "other")
    result = run(one, "--against", other)
    assert result.exit_code == 1
    assert "not compared: the checkpoint does not open" in result.stdout
    assert NORM in result.stdout


# ---- logits -------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    p, q = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), np.log([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    found = against.divergence(p + 3, q - 7)  # logits: constants do not matter
    kl = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert found["kl_mean"] == pytest.approx(kl / 2) and found["kl_max"] == pytest.approx(kl)
    assert found["argmax_agreement"] == 0.5


def test_both_models_see_the_others_soft_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make_checkpoint(tmp_path / "original", dtype="F32")
    changed = make_checkpoint(tmp_path / "changed", dtype="F32", edit=scaled(lambda n: n == EMBED, 1.1))
    seen: list[Any] = []
    plain = against.Model.logits

    def spy(self: Any, context: Any, canvas: Any, soft: Any = None) -> np.ndarray:
        seen.append((canvas, soft))
        return plain(self, context, canvas, soft)

    monkeypatch.setattr(against.Model, "logits", spy)
    compared(changed, original)
    assert [soft is None for _, soft in seen] == [True, False, True, False]
    assert np.array_equal(seen[1][1], seen[3][1]) and np.abs(seen[1][1]).max() > 0
    assert all(np.array_equal(canvas, seen[0][0]) for canvas, _ in seen)


def test_the_probe_is_fixed_and_fits(tmp_path: Path) -> None:
    config = read_config(small(max_position_embeddings=20))
    a, b = (against.probe(config, config) for _ in range(2))
    assert a.prompt == b.prompt and np.array_equal(a.canvas, b.canvas)
    assert len(a.prompt) == 4 and a.canvas.shape == (1, 16) and a.canvas.max() < config.vocab_size
    assert a.prompt[0] == 2


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [(NumpyOps, "free_memory", lambda ops: 1000), (against, "NUMPY_LIMIT", 10)],
)
def test_logits_are_left_out_where_the_model_does_not_run(
    where: Any, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path)
    monkeypatch.setattr(where, name, value)
    assert set(compared(folder, folder)["logits"]) == {"skipped"}
    text = run(folder, "--against", folder, "--backend", "numpy").stdout
    assert "logits not compared: " in text and "nothing wrong" in text


def test_running_out_of_memory_keeps_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    folder = make_checkpoint(tmp_path)
    monkeypatch.setattr(against, "logits", fail)
    assert "out of memory" in compared(folder, folder)["logits"]["skipped"]


def test_memory_needed_covers_what_is_loaded(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    checkpoint, ops = Checkpoint.open(folder), NumpyOps()
    held = sum(param.size * 8 for param in parameters(checkpoint.config))
    assert held < against.memory_needed(checkpoint, ops) < 3 * held
    assert (ops.free_memory() or 0) > 1e6


def test_every_backend_compares_logits(tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, "modelopt")
    found = json.loads(run(folder, "--against", folder, "--json").stdout)["against"]["logits"]
    assert found["first_step"]["argmax_agreement"] == 1 and found["first_step"]["kl_mean"] < 1e-6


def test_tables_of_bits_are_those_of_the_formats() -> None:
    for name, table in (("F8_E4M3", nvfp4.E4M3), ("F8_E8M0", nvfp4.E8M0)):
        codes, bits = np.arange(256), values.BITS[name]
        assert np.array_equal((codes & bits.special) == bits.special, np.isnan(table))
        assert np.array_equal((codes & bits.sign) != 0, np.signbit(table) & (bits.sign > 0))
    every = np.arange(65536, dtype="<u2")
    assert np.array_equal((every & 0x7C00) == 0x7C00, ~np.isfinite(every.view("<f2")))


# ---- small files --------------------------------------------------------------------------------


def with_text(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, small(vocab_size=480), tokenizer=True)


def test_what_is_there_for_text_is_reported(tmp_path: Path) -> None:
    report = json.loads(run(with_text(tmp_path), "--json").stdout)
    assert report["text"]["chat_template"] is True and report["text"]["tokens"] > 100
    assert report["text"]["stop_ids"] >= 1 and report["notes"] == []
    assert " tokens, a chat template, " in run(tmp_path).stdout


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00" * 50, '{"model": {"type": "Nothing"}}'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_small_files_that_are_broken(name: str, content: str, tmp_path: Path) -> None:
    (with_text(tmp_path) / name).write_text(content)
    if name == "generation_config.json" and content.endswith("}}"):  # keys that nothing reads
        assert findings(tmp_path) == []
        return
    found = only(tmp_path)
    assert found["kind"] == "checkpoint" and name in found["text"]


def test_a_template_that_does_not_compile(tmp_path: Path) -> None:
    (with_text(tmp_path) / "chat_template.jinja").write_text("{% if %}")
    assert only(tmp_path)["kind"] == "checkpoint"


def test_each_broken_small_file_is_named(tmp_path: Path) -> None:
    folder = with_text(tmp_path)
    (folder / "generation_config.json").write_text("{")
    (folder / "tokenizer.json").write_text("{")
    texts = [finding["text"] for finding in findings(folder)]
    assert len(texts) == 2 and "generation_config.json" in texts[0] and "tokenizer.json" in texts[1]


def test_notes_are_no_findings(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    assert json.loads(run(folder, "--json").stdout)["notes"][0].startswith("no tokenizer.json")
    assert run(folder).exit_code == 0 and "note: no tokenizer.json" in run(folder).stdout
    folder = with_text(tmp_path / "text")
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "tokenizer_config.json", {})
    assert any("no chat template" in note for note in json.loads(run(folder, "--json").stdout)["notes"])
    # The tokenizer's own names stand in for ids that no configuration gives; without both there are none.
    folder = make_checkpoint(tmp_path / "endless", {**small(eos_token_id=None), "eos_token_id": None})
    write_json(folder / "generation_config.json", {})
    notes = json.loads(run(folder, "--json").stdout)["notes"]
    assert any("no token that ends a reply" in note for note in notes)


def test_logits_of_a_damaged_model_are_left_out(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path / "original")
    damaged = make_checkpoint(tmp_path / "damaged", edit=lambda tensors: put(tensors[NORM], 3, 0x7FC0))
    for one, other in ((damaged, original), (original, damaged)):
        found = json.loads(run(one, "--against", other, "--json", "--backend", "numpy").stdout)["against"]
        assert NORM in found["logits"]["skipped"] and found["weights"]["norm"]["relative_rms"] is None
