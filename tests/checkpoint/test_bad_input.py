"""Damaged, foreign and malicious input: always one line of DgemmaError, never anything else."""

import copy
import json
import math
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import INDEX
from dgemma.checkpoint.safetensors import read_header
from dgemma.errors import CheckpointError, ConfigError, DgemmaError
from dgemma.network.build import rope_frequencies
from dgemma.network.config import read_config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.spec import parameters
from dgemma.released import RELEASED_DIR
from dgemma.settings import read_generation_config
from tests.checkpoints import (
    SMALL,
    SMALL_GENERATION,
    SMALL_VISION,
    Tensor,
    make_checkpoint,
    minute,
    small,
    write_file,
    write_json,
    write_raw,
)

NORM = "model.decoder.norm.weight"


def refused(call: Callable[[], Any], *parts: str, kind: type[DgemmaError] = CheckpointError) -> str:
    """The message of the error that `call` raises: one line that has all `parts`."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# ---- headers ------------------------------------------------------------------------------------

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header(tmp_path: Path, text: Any, data: bytes = b"") -> Path:
    file = tmp_path / "h.safetensors"
    write_raw(file, text if isinstance(text, str) else json.dumps(text), data)
    return file


def test_a_header_in_order(tmp_path: Path) -> None:
    file = header(
        tmp_path,
        {
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]},
            "a": F32,
            "empty": {"dtype": "F16", "shape": [3, 0], "data_offsets": [8, 8]},
        },
        struct.pack("<2fq", 1, 2, 3),
    )
    entries = read_header(file)
    assert [entry.name for entry in entries] == ["a", "empty", "b"]
    assert [entry.read().data.tolist() for entry in entries] == [[1, 2], [[], [], []], 3]


def test_unaligned_data(tmp_path: Path) -> None:
    file = tmp_path / "u.safetensors"
    text = json.dumps(
        {"c": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": F32 | {"data_offsets": [1, 9]}}
    )
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"\1" + struct.pack("<2f", 1, 2))
    assert read_header(file)[1].read().to_float32().tolist() == [1, 2]


BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "not an object": (3, "unreadable entry 3"),
    "no dtype": ({"shape": [2], "data_offsets": [0, 8]}, "dtype None"),
    "foreign dtype": (F32 | {"dtype": "F7"}, "dtype 'F7'"),
    "dtype of a wrong type": (F32 | {"dtype": ["F32"]}, "dtype ['F32']"),
    "no shape": ({"dtype": "F32", "data_offsets": [0, 8]}, "shape None"),
    "negative size": (F32 | {"shape": [-2]}, "shape [-2]"),
    "fractional size": (F32 | {"shape": [2.0]}, "shape [2.0]"),
    "bool size": (F32 | {"shape": [2, True]}, "shape [2, True]"),
    "huge size": (F32 | {"shape": [2**70]}, "shape"),
    "product above 64 bits": (F32 | {"shape": [2**62, 2**62, 2**62]}, "bytes"),
    "many axes": (F32 | {"shape": [2] + [1] * 100}, "shape [2, 1, 1"),
    "shape and bytes differ": (F32 | {"shape": [3]}, "takes 12 bytes"),
    "no offsets": ({"dtype": "F32", "shape": [2]}, "data_offsets None"),
    "one offset": (F32 | {"data_offsets": [8]}, "data_offsets [8]"),
    "three offsets": (F32 | {"data_offsets": [0, 8, 8]}, "data_offsets [0, 8, 8]"),
    "end before begin": (F32 | {"data_offsets": [8, 0]}, "takes 8 bytes"),
    "negative offset": (F32 | {"data_offsets": [-8, 0]}, "data_offsets [-8, 0]"),
    "text offsets": (F32 | {"data_offsets": ["0", "8"]}, "data_offsets ['0', '8']"),
    "beyond the file": (F32 | {"shape": [3], "data_offsets": [0, 12]}, "truncated"),
    "hole": (F32 | {"shape": [1], "data_offsets": [4, 8]}, "leaves a hole"),
}


@pytest.mark.parametrize(("entry", "part"), BAD_ENTRIES.values(), ids=list(BAD_ENTRIES))
def test_bad_entries_name_file_and_tensor(tmp_path: Path, entry: Any, part: str) -> None:
    file = header(tmp_path, {"some.tensor": entry}, bytes(8))
    refused(lambda: read_header(file), str(file), "'some.tensor'", part)


def test_overlap(tmp_path: Path) -> None:
    file = header(tmp_path, {"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12))
    refused(lambda: read_header(file), str(file), "'b'", "overlaps")


def test_same_bytes_twice(tmp_path: Path) -> None:
    refused(lambda: read_header(header(tmp_path, {"a": F32, "b": F32}, bytes(8))), "'b'", "overlaps")


def test_trailing_bytes(tmp_path: Path) -> None:
    refused(lambda: read_header(header(tmp_path, {"a": F32}, bytes(9))), "h.safetensors: 1 bytes", "'a'")


def test_name_twice(tmp_path: Path) -> None:
    text = f'{{"a": {json.dumps(F32)}, "a": {json.dumps(F32)}}}'
    refused(lambda: read_header(header(tmp_path, text, bytes(8))), "h.safetensors", "'a' occurs twice")


def test_a_name_with_a_line_break_stays_on_one_line(tmp_path: Path) -> None:
    refused(lambda: read_header(header(tmp_path, {"a\nb\ud800": 1})), r"a\nb\ud800")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"a": }', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00{}"]
)
def test_headers_that_are_no_object(tmp_path: Path, text: str) -> None:
    file = header(tmp_path, text)
    refused(lambda: read_header(file), str(file), "not a safetensors file")


def test_header_in_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    file.write_bytes(struct.pack("<Q", 4) + b"{\xff\xfe}")
    refused(lambda: read_header(file), str(file), "unreadable header")


@pytest.mark.parametrize("size", range(9))
def test_files_too_short_for_a_header(tmp_path: Path, size: int) -> None:
    file = tmp_path / "h.safetensors"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0"[:size] + b"{" * (size == 8))
    refused(lambda: read_header(file), str(file), "truncated")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 150_000_000, 9])
def test_absurd_header_lengths_allocate_nothing(tmp_path: Path, length: int) -> None:
    file = tmp_path / "h.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", length))
        stream.truncate(200_000_000 if length == 150_000_000 else 16)  # sparse: takes no room on the disk
    tracemalloc.start()
    try:
        refused(lambda: read_header(file), str(file))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_git_lfs_pointer(tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(lambda: read_header(file), str(file), "git lfs pull")


def test_a_file_that_shrinks_after_it_was_checked(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(lambda: checkpoint.load(NumpyOps()), "model.safetensors", "cannot be read")
    (tmp_path / "model.safetensors").unlink()
    refused(lambda: checkpoint.load(NumpyOps()), "model.safetensors", "o such file")


def test_fuzzed_files_load_or_are_refused(tmp_path: Path) -> None:
    """Bytes of header and length flipped, replaced, cut: 300 files, nothing but DgemmaError."""
    folder = make_checkpoint(tmp_path, minute(), dtype="F32")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng(7)
    loaded = 0
    for _ in range(300):
        file.write_bytes(mutated(whole, end, rng))
        try:
            Checkpoint.open(folder).load(NumpyOps())
            loaded += 1
        except DgemmaError as error:
            assert "\n" not in str(error)
    assert loaded < 150  # else the mutations miss what is checked


def mutated(whole: bytes, end: int, rng: np.random.Generator) -> bytes:
    data = bytearray(whole)
    kind = rng.integers(5)
    if kind == 0:  # the length
        data[rng.integers(8)] ^= 1 << rng.integers(8)
    elif kind == 1:  # bits of the header
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(8, end)] ^= 1 << rng.integers(8)
    elif kind == 2:  # digits of shapes and offsets
        digits = [i for i in range(8, end) if chr(data[i]).isdigit()]
        data[rng.choice(digits)] = rng.choice(list(b"0123456789-.e]"))
    elif kind == 3:  # a cut
        del data[rng.integers(len(data)) :]
    else:  # a piece lost from the middle
        at = rng.integers(len(data))
        del data[at : at + rng.integers(1, 64)]
    return bytes(data)


# ---- folders and indexes ------------------------------------------------------------------------


def opened(folder: Path) -> Callable[[], Any]:
    return lambda: Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_missing_or_broken_json_file(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path)
    if name == "config.json":
        (folder / name).unlink()
        refused(opened(folder), str(folder / name), "no such file", kind=ConfigError)
    (folder / name).write_text("{")
    refused(opened(folder), str(folder / name), "not readable as JSON", kind=ConfigError)
    (folder / name).write_text("[]")
    refused(opened(folder), str(folder / name), "expected a JSON object", kind=ConfigError)


def test_no_weights(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    refused(opened(folder), str(folder), "no .safetensors file")


def test_several_files_need_an_index(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    (folder / INDEX).unlink()
    refused(opened(folder), INDEX, "2 .safetensors files")


def test_missing_shard(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(opened(folder), "model-00002-of-00003.safetensors", "missing shard")


def test_truncated_shard(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    last = read_header(file)[-1].name
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    refused(opened(folder), str(file), "truncated", repr(last))


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
)
def test_unusable_index(tmp_path: Path, index: str) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    (folder / INDEX).write_text(index)
    refused(opened(folder), INDEX)


@pytest.mark.parametrize(
    "shard",
    ["../m.safetensors", "/etc/m.safetensors", "a\\m.safetensors", "..", "", "m.bin", "a\n.safetensors"],
)
def test_an_index_must_not_leave_its_folder(tmp_path: Path, shard: str) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    edit_index(folder, lambda weight_map: weight_map.update({NORM: shard}))
    refused(opened(folder), INDEX, repr(NORM), repr(shard))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / INDEX).read_text())
    edit(data["weight_map"])
    write_json(folder / INDEX, data)


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    edit_index(folder, lambda weight_map: weight_map.update(ghost="model-00001-of-00002.safetensors"))
    refused(opened(folder), "model-00001-of-00002.safetensors", "'ghost'")


def test_index_lacks_a_tensor(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    edit_index(folder, lambda weight_map: weight_map.pop(NORM))
    refused(opened(folder), repr(NORM), "is not in", INDEX)


def test_index_puts_a_tensor_in_the_wrong_shard(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    edit_index(folder, lambda weight_map: weight_map.update({NORM: files[weight_map[NORM] == files[0]]}))
    refused(opened(folder), repr(NORM), "model-0000")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    norm = Tensor("BF16", (64,), bytes(128))
    write_file(folder / "model-00003.safetensors", {NORM: norm, "other": norm})
    edit_index(folder, lambda weight_map: weight_map.update(other="model-00003.safetensors"))
    refused(opened(folder), repr(NORM), "model-00003.safetensors", "in both")


# ---- tensors against the configuration ----------------------------------------------------------


def edited(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], config: Any = SMALL
) -> Callable[[], Any]:
    return opened(make_checkpoint(tmp_path, config, edit=edit))


def test_missing_tensor(tmp_path: Path) -> None:
    refused(edited(tmp_path, lambda t: t.pop(NORM)), "model.safetensors", "1 tensor missing", repr(NORM))


def test_unknown_tensor(tmp_path: Path) -> None:
    extra = Tensor("F32", (), bytes(4))
    call = edited(tmp_path, lambda t: t.update({"model.decoder.extra.weight": extra}))
    refused(call, "1 tensor unknown", "'model.decoder.extra.weight' in model.safetensors")


def test_many_faults_are_counted_and_three_are_named(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name]:
            tensors[f"x.{name}"] = tensors.pop(name)

    message = refused(edited(tmp_path, rename), "8 tensors missing", "8 tensors unknown", "…")
    assert message.count("experts.") == 6


def test_wrong_shape(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[NORM] = Tensor("BF16", (32, 2), tensors[NORM].raw)

    refused(
        edited(tmp_path, edit), "model.safetensors", repr(NORM), "(32, 2), not (64,)", "1 tensor of the wrong"
    )


def test_wrong_type(tmp_path: Path) -> None:
    call = edited(tmp_path, lambda t: t.update({NORM: Tensor("F64", (64,), bytes(512))}))
    refused(call, "model.safetensors", f"{NORM!r} is F64", "BF16, F16, F32")


def test_part_of_the_vision_tower(tmp_path: Path) -> None:
    name = "model.encoder.vision_tower.std_bias"
    call = edited(tmp_path, lambda t: t.pop(name), {**SMALL, "vision_config": SMALL_VISION})
    refused(call, "1 tensor missing", repr(name))


def test_vision_tensors_without_a_vision_config(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, {**SMALL, "vision_config": SMALL_VISION})
    write_json(folder / "config.json", SMALL)
    refused(opened(folder), "tensors unknown", "vision")


@pytest.mark.parametrize(
    ("key", "announcement", "fault"),
    [
        ("quantization", {"group_size": 64, "bits": 4, "mode": "affine"}, "no tensor is"),
        ("quantization", {"group_size": 64, "bits": 7}, "affine quantization with 7 bits"),
        ("quantization", {"group_size": 48, "bits": 4}, "groups of 48"),
        ("quantization", {"group_size": 32, "bits": 4, "mode": "nvfp4"}, "mode 'nvfp4' with 4 bits"),
        ("quantization", {"group_size": 32, "bits": 4, "mode": ["a"]}, "mode ['a']"),
        ("quantization_config", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "288 tensors missing"),
        (
            "quantization_config",
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            "ModelOpt quant_algo 'FP8'",
        ),
        ("quantization_config", {"quant_method": "modelopt", "group_size": 32}, "ModelOpt group_size 32"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "compressed-tensors format None"),
        (
            "quantization_config",
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors format 'pack-quantized'",
        ),
        ("quantization_config", {"quant_method": "a\nb"}, r"quant_method 'a\nb'"),
        (
            "quantization_config",
            {"bits": [1] * 1000},
            "with [1, 1, 1, 1, 1, 1, ...] bits",
        ),
    ],
)
def test_announced_quantization(tmp_path: Path, key: str, announcement: Any, fault: str) -> None:
    refused(opened(make_checkpoint(tmp_path, {**SMALL, key: announcement})), fault)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.decoder.layers.0.mlp.up_proj.scales", "BF16"),
        ("model.decoder.layers.0.mlp.up_proj.biases", "BF16"),
        ("model.decoder.layers.0.experts.3.up_proj.weight_scale", "F8_E4M3"),
        ("model.decoder.layers.0.experts.3.up_proj.weight_scale_2", "F32"),
        ("model.decoder.layers.0.experts.3.up_proj.input_scale", "F32"),
        ("model.decoder.layers.0.mlp.up_proj.weight_packed", "U8"),
        ("model.decoder.layers.0.mlp.up_proj.weight", "U32"),
        (NORM, "I8"),
    ],
)
def test_quantization_that_is_not_announced(tmp_path: Path, name: str, dtype: str) -> None:
    size = {"F": 4, "B": 2, "U": 4, "I": 1}[dtype[0]]
    size = 1 if dtype in ("U8", "F8_E4M3") else size
    call = edited(tmp_path, lambda t: t.update({name: Tensor(dtype, (3,), bytes(3 * size))}))
    refused(
        call,
        "quantized with a method that config.json does not announce",
        f"{name!r} is {dtype} in model.safetensors",
    )


# ---- config.json --------------------------------------------------------------------------------

TEXT_KEYS = [
    "attention_bias",
    "global_head_dim",
    "head_dim",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_global_key_value_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "top_k_experts",
    "vocab_size",
]
MISSING = (
    [(key,) for key in ("model_type", "text_config")]
    + [("text_config", key) for key in TEXT_KEYS]
    + [("text_config", "rope_parameters", kind) for kind in ("full_attention", "sliding_attention")]
    + [("text_config", "rope_parameters", "full_attention", key) for key in ("rope_theta", "rope_type")]
    + [("vision_config", key) for key in SMALL_VISION if key != "model_type"]
)


@pytest.mark.parametrize("path", MISSING, ids=".".join)
def test_missing_config_keys(path: tuple[str, ...]) -> None:
    data = copy.deepcopy({**SMALL, "vision_config": SMALL_VISION})
    del node_at(data, path[:-1])[path[-1]]
    refused(lambda: read_config(data, "f/config.json"), "f/config.json", repr(path[-1]), kind=ConfigError)


def test_numbers_that_a_generation_config_leaves_out() -> None:
    """transformers saves nulls, mlx-community puts the file into config.json: neither is an error."""
    released = read_generation_config(
        json.loads((RELEASED_DIR / "generation_config.json").read_text()), 262144
    )
    nulls = dict.fromkeys([*SMALL_GENERATION, "sampler_config"])
    embedded = {"generation_config": {"eos_token_id": [1, 106, 50]}, "eos_token_id": 1}
    for data, config in (({"eos_token_id": [1, 106, 50]}, None), (None, embedded)):
        assert read_generation_config(data, 262144, config=config) == released
    assert read_generation_config(nulls, 200).stop_ids == ()
    assert read_generation_config(nulls, 200, config={"eos_token_id": [1, 106]}).stop_ids == (1, 106)
    assert read_generation_config({"t_max": 0.9, "t_min": 0.3}, 200).t_max == 0.9


def node_at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def entry(**own: Any) -> dict[str, Any]:
    return {"per_layer_config": {"3": {"head_dim": 32, "num_key_value_heads": 1} | own}}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "3 entries for 4 layers"),
        ({"layer_types": ["sliding_attention"] * 3 + ["linear_attention"]}, "'linear_attention'"),
        ({"top_k_experts": 9}, "top_k_experts 9 exceeds num_experts 8"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"tie_word_embeddings": False}, "untied"),
        ({"use_bidirectional_attention": "all"}, "'all'"),
        ({"num_key_value_heads": 3}, "4 query heads, 3 KV heads"),
        ({"head_dim": 15}, "head size 15"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"per_layer_config": {"9": {}}}, "'9' is not a layer"),
        ({"per_layer_config": {"x\n": {}}}, r"'x\n' is not a layer"),
        (entry(sliding_window=5), "'sliding_window'"),
        (entry(head_dim=None), "head_dim"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "several head sizes"),
    ],
)
def test_configs_that_cannot_be_served(text: dict[str, Any], part: str) -> None:
    refused(lambda: read_config(small(**text)), part, kind=ConfigError)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("full_attention", {"rope_type": "yarn"}),
        ("full_attention", {"partial_rotary_factor": 1.5}),
        ("full_attention", {"partial_rotary_factor": 0}),
        ("full_attention", {"factor": 0}),
        ("full_attention", {"rope_theta": math.inf}),
        ("sliding_attention", {"rope_theta": -1.0}),
        ("sliding_attention", {"partial_rotary_factor": 0.5}),
    ],
)
def test_rope_that_cannot_be_served(kind: str, change: dict[str, Any]) -> None:
    data = small()
    data["text_config"]["rope_parameters"][kind].update(change)
    refused(lambda: read_config(data), kind, kind=ConfigError)


def test_another_model() -> None:
    message = refused(lambda: read_config({**SMALL, "model_type": "gemma4"}), "'gemma4'", kind=ConfigError)
    assert "diffusion_gemma" in message


def test_an_endless_vision_tower() -> None:
    data = {**SMALL, "vision_config": {**SMALL_VISION, "num_hidden_layers": 1001}}
    refused(lambda: read_config(data), "vision_config", "num_hidden_layers", kind=ConfigError)


def test_long_values_are_cut() -> None:
    message = refused(lambda: read_config(small(vocab_size="v" * 10_000)), "vocab_size", kind=ConfigError)
    assert len(message) < 200


JUNK: list[Any] = [
    None,
    [],
    {},
    "x",
    "",
    -1,
    0,
    1.5,
    True,
    False,
    math.nan,
    math.inf,
    10**400,
    [[]],
    {"a": 1},
    ["x"],
    [True],
]


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value inside a JSON value."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def fuzzed(data: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    for path in paths(data):
        for junk in JUNK:
            changed = copy.deepcopy(data)
            node_at(changed, path[:-1])[path[-1]] = junk
            yield path, junk, changed


FULL_CONFIG = {
    **small(per_layer_config={"3": {"head_dim": 32, "num_key_value_heads": 1}}),
    "vision_config": SMALL_VISION,
    "quantization": None,
    "quantization_config": None,
}


@pytest.mark.parametrize("config", [FULL_CONFIG, SMALL])
def test_fuzzed_config_is_read_or_refused(config: dict[str, Any]) -> None:
    """Every value replaced by every kind of junk; what is accepted must make a usable table."""
    for path, junk, changed in fuzzed(config):
        try:
            read = read_config(changed)
        except ConfigError as error:
            assert "\n" not in str(error)
            continue
        assert all(param.size > 0 for param in parameters(read)), (path, junk)
        for layer in read.layers:
            assert np.isfinite(rope_frequencies(layer)).all(), (path, junk)


def test_fuzzed_generation_config_is_read_or_refused() -> None:
    for path, junk, changed in fuzzed(SMALL_GENERATION):
        try:
            read = read_generation_config(changed, 200)
        except ConfigError as error:
            assert "\n" not in str(error)
            continue
        numbers = (read.t_max, read.t_min, read.entropy_bound, read.confidence)
        assert all(math.isfinite(number) for number in numbers), (path, junk)
        assert all(type(stop) is int for stop in read.stop_ids), (path, junk)
