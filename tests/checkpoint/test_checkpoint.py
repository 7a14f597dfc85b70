"""Checkpoints that are in order: what the table says of the released one, and what a load hands out."""

import copy
import gc
import json
import weakref
from collections import Counter
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.safetensors import Entry
from dgemma.formats.stored import Stored
from dgemma.network.config import read_config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Ops
from dgemma.network.spec import Param, is_skipped, parameters, text_parameters
from dgemma.network.weights import Weights
from dgemma.released import RELEASED_DIR
from dgemma.settings import read_generation_config
from tests.checkpoints import SMALL, SMALL_VISION, Tensor, encode, make_checkpoint, small, tame


def released() -> dict[str, Any]:
    return json.loads((RELEASED_DIR / "config.json").read_text())


def cuda_ops() -> Ops:
    pytest.importorskip("torch")
    from dgemma_cuda.ops import CudaOps

    return CudaOps()


BACKENDS = pytest.mark.parametrize("make_ops", [NumpyOps, cuda_ops])
DTYPES = pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])


def leaves(node: Any, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Any]:
    """The arrays of a weight tree by path; fields that are None are left out."""
    children: dict[Any, Any]
    if is_dataclass(node):
        children = {f.name: getattr(node, f.name) for f in fields(node)}
    elif isinstance(node, tuple):
        children = dict(enumerate(node))
    elif isinstance(node, dict):
        children = node
    else:
        return {} if node is None else {path: node}
    return {k: v for name, child in children.items() for k, v in leaves(child, (*path, name)).items()}


# ---- the released checkpoint --------------------------------------------------------------------


def test_the_table_has_the_released_totals() -> None:
    table = parameters(read_config(released()))
    assert len(table) == len({param.name for param in table}) == 1047
    assert 2 * sum(param.size for param in table) == 51_647_562_456
    assert sum(param.name.startswith("model.decoder.") for param in table) == 661
    assert sum(param.name.startswith("model.encoder.vision_tower.") for param in table) == 355


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.decoder.embed_tokens.weight", (262144, 2816)),
        ("model.decoder.self_conditioning.down_proj.weight", (2816, 2112)),
        ("model.decoder.self_conditioning.pre_norm.weight", (2816,)),
        ("model.decoder.layers.0.self_attn.v_proj.weight", (2048, 2816)),
        ("model.decoder.layers.5.self_attn.q_proj.weight", (8192, 2816)),
        ("model.decoder.layers.5.self_attn.k_proj.weight", (1024, 2816)),
        ("model.decoder.layers.29.self_attn.k_norm.weight", (512,)),
        ("model.decoder.layers.7.experts.gate_up_proj", (128, 1408, 2816)),
        ("model.decoder.layers.7.experts.down_proj", (128, 2816, 704)),
        ("model.decoder.layers.7.router.per_expert_scale", (128,)),
        ("model.decoder.layers.7.post_feedforward_layernorm_1.weight", (2816,)),
        ("model.encoder.language_model.layers.29.layer_scalar", (1,)),
        ("model.encoder.embed_vision.embedding_projection.weight", (2816, 1152)),
        ("model.encoder.vision_tower.patch_embedder.position_embedding_table", (2, 10240, 1152)),
        ("model.encoder.vision_tower.encoder.layers.26.mlp.down_proj.linear.weight", (1152, 4304)),
    ],
)
def test_the_table_has_the_released_names(name: str, shape: tuple[int, ...]) -> None:
    assert {param.name: param.shape for param in parameters(read_config(released()))}[name] == shape


def test_full_layers_have_no_v_proj() -> None:
    names = {param.name for param in parameters(read_config(released()))}
    with_v = {i for i in range(30) if f"model.decoder.layers.{i}.self_attn.v_proj.weight" in names}
    assert with_v == set(range(30)) - {5, 11, 17, 23, 29}


@pytest.mark.parametrize("name", [param.name for param in parameters(read_config(released()))][::50])
def test_no_name_of_the_table_is_skipped(name: str) -> None:
    assert not is_skipped(name)


def test_the_released_generation_config() -> None:
    config = read_generation_config(json.loads((RELEASED_DIR / "generation_config.json").read_text()), 262144)
    assert config.stop_ids == (1, 106, 50)
    assert (config.steps, config.t_max, config.t_min) == (48, 0.8, 0.4)
    assert (config.entropy_bound, config.stability, config.confidence) == (0.1, 1, 0.005)


# ---- the spellings of config.json ---------------------------------------------------------------


def respelled(config: dict[str, Any], key: str = "{}", both: bool = False) -> dict[str, Any]:
    """The config with its full layers described by per_layer_config, as transformers saves it."""
    config = copy.deepcopy(config)
    text = config["text_config"]
    take = text.get if both else text.pop
    entry = {"head_dim": take("global_head_dim"), "num_key_value_heads": take("num_global_key_value_heads")}
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    text["per_layer_config"] = {key.format(i): dict(entry) for i in full}
    return config


@pytest.mark.parametrize("key", ["{}", "{:02}"])
@pytest.mark.parametrize("both", [False, True])
def test_both_spellings_give_the_same_config(key: str, both: bool) -> None:
    other = respelled(released(), key, both)
    assert read_config(other) == read_config(released())
    full = read_config(other).layers[5]
    assert (full.head_dim, full.kv_heads, full.rope_pairs, full.window) == (512, 2, 64, None)


def test_an_entry_leaves_out_what_equals_the_common_value() -> None:
    config = small(num_global_key_value_heads=2)
    other = respelled(config)
    del other["text_config"]["per_layer_config"]["3"]["num_key_value_heads"]
    assert read_config(other) == read_config(config)
    config = small(num_global_key_value_heads=2, global_head_dim=16)
    other = respelled(config)
    other["text_config"]["per_layer_config"] = {}
    assert read_config(other) == read_config(config)


def test_transformers_own_spelling() -> None:
    pytest.importorskip("transformers")
    from transformers.models.diffusion_gemma import DiffusionGemmaConfig

    saved = json.loads(DiffusionGemmaConfig(**released()).to_json_string())
    assert "global_head_dim" not in saved["text_config"]
    assert read_config(saved) == read_config(released())


def test_null_global_kv_heads_means_those_of_sliding_layers() -> None:
    assert {layer.kv_heads for layer in read_config(small(num_global_key_value_heads=None)).layers} == {2}


def test_no_sliding_layers() -> None:
    config = small(layer_types=["full_attention"] * 4)
    for key in ("sliding_window", "head_dim"):
        del config["text_config"][key]
    assert read_config(config).window is None


# ---- loading ------------------------------------------------------------------------------------


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shards", [1, 3])
def test_load_gives_the_stored_values(tmp_path: Path, make_ops: Any, dtype: str, shards: int) -> None:
    """Every leaf against its bytes, decoded here and in the order of the table."""
    written: dict[str, np.ndarray] = {}

    def keep(tensors: dict[str, Any]) -> None:
        written.update({name: decode(dtype, tensor.raw, tensor.shape) for name, tensor in tensors.items()})

    folder = make_checkpoint(tmp_path, seed=1, dtype=dtype, shards=shards, edit=keep)
    checkpoint = Checkpoint.open(folder)
    ops = make_ops()
    found = leaves(checkpoint.load(ops))
    for param in text_parameters(checkpoint.config):
        np.testing.assert_array_equal(ops.to_numpy(found[param.path]), written[param.name], param.name)
    assert len(written) + len(("embed_scale", "sliding", "full")) == len(found)


def decode(dtype: str, raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == "BF16":
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").reshape(shape).astype(np.float32)


def test_constants(tmp_path: Path) -> None:
    weights = Checkpoint.open(make_checkpoint(tmp_path)).load(NumpyOps())
    assert weights.embed_scale == 8.0
    assert {kind: len(f) for kind, f in weights.frequencies.items()} == {
        "sliding_attention": 8,
        "full_attention": 16,
    }
    np.testing.assert_array_equal(weights.frequencies["full_attention"][4:], 0)


def test_the_router_stays_wide(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from dgemma_cuda.ops import CudaOps

    weights = Checkpoint.open(make_checkpoint(tmp_path)).load(CudaOps("cpu", torch.bfloat16))
    wide = {path for path, leaf in leaves(weights).items() if getattr(leaf, "dtype", None) == torch.float32}
    routers = {("layers", i, "router", name) for i in range(4) for name in ("proj", "scale", "expert_scale")}
    assert wide == routers | {("frequencies", kind) for kind in ("sliding_attention", "full_attention")}
    assert weights.embed.dtype == torch.bfloat16


class Witness(NumpyOps):
    """Notes what is loaded, and how many tensors are mapped at that moment."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.maps: list[Any] = []
        self.alive = 0

    def load(self, stored: Stored, wide: bool = False) -> Any:
        assert not stored.data.flags.writeable
        self.maps.append(weakref.ref(stored))
        self.alive = max(self.alive, sum(ref() is not None for ref in self.maps))
        self.seen.append((stored.file.name, stored.name))
        return super().load(stored, wide)


def test_each_tensor_is_read_once_and_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read = Entry.read
    monkeypatch.setattr(Entry, "read", lambda self: (reads.update([self.name]), read(self))[1])
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, shards=3))
    assert not reads
    ops, calls = Witness(), []
    checkpoint.load(ops, lambda done, total: calls.append((done, total)))
    expected = Counter(param.name for param in text_parameters(checkpoint.config))
    assert reads == expected
    files = [file for file, _ in ops.seen]
    assert files == sorted(files) and len(set(files)) == 3
    assert [name for _, name in ops.seen] == [
        entry.name for entry in sorted(checkpoint.entries.values(), key=lambda e: (e.file.name, e.offset))
    ]
    assert ops.alive == 1, "an earlier tensor's map was still open"
    total = sum(entry.nbytes for entry in checkpoint.entries.values())
    assert len(calls) == len(expected) and calls[-1] == (total, total)
    assert calls == sorted(calls)


@BACKENDS
@DTYPES
def test_weights_do_not_depend_on_the_file(tmp_path: Path, make_ops: Any, dtype: str) -> None:
    folder = make_checkpoint(tmp_path, dtype=dtype)
    ops = make_ops()
    weights = Checkpoint.open(folder).load(ops)
    before = {path: np.array(ops.to_numpy(x)) for path, x in leaves(weights).items() if hasattr(x, "shape")}
    gc.collect()
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)  # in place: a map that is still open would show it
    for path, x in leaves(weights).items():
        if path in before:
            np.testing.assert_array_equal(ops.to_numpy(x), before[path])


def test_stored_is_a_read_only_view(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    stored = checkpoint.entries["model.decoder.norm.weight"].read()
    assert (stored.dtype, stored.shape, stored.data.dtype) == ("BF16", (64,), np.uint16)
    assert stored.file == tmp_path / "model.safetensors"
    values = stored.to_float32()
    assert values.flags.writeable and values.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        stored.data[0] = 0


def test_special_values_survive() -> None:
    """bf16 widening keeps infinities, NaN, negative zero and subnormals."""
    bits = np.array([0x7F80, 0xFF80, 0x7FC0, 0x8000, 0x0001], np.uint16)
    x = Stored("x", "BF16", (5,), bits, Path("f")).to_float32()
    np.testing.assert_array_equal(x.view(np.uint32), bits.astype(np.uint32) << 16)


def test_the_writer_agrees_with_safetensors(tmp_path: Path) -> None:
    """The test writer's files are read by the format's own library."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    param = Param("x.weight", (5, 7), "mlp")
    x = tame(param, np.random.default_rng(0))
    expected = torch.from_numpy(x).bfloat16().view(torch.uint8).numpy().tobytes()
    assert encode(x, "BF16").raw == expected
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.float().numpy(), checkpoint.entries[name].read().to_float32())


# ---- what a checkpoint may lack or have besides -------------------------------------------------


def test_vision_may_be_there_or_be_absent(tmp_path: Path) -> None:
    config = {**SMALL, "vision_config": SMALL_VISION}
    whole = Checkpoint.open(make_checkpoint(tmp_path / "whole", config))
    assert any("vision_tower" in name for name in whole.entries)
    assert isinstance(whole.load(NumpyOps()), Weights)

    def text_only(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "vision" in name]:
            del tensors[name]

    Checkpoint.open(make_checkpoint(tmp_path / "text", config, edit=text_only))


def test_tied_copies_are_left_unread(tmp_path: Path) -> None:
    def tie(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
        for name in list(tensors):
            if name.startswith("model.decoder.layers.") and not name.endswith("layer_scalar"):
                tensors[name.replace("model.decoder", "model.encoder.language_model")] = tensors[name]
        tensors["model.decoder.rotary_emb.inv_freq"] = Tensor("I32", (3,), bytes(12))

    Checkpoint.open(make_checkpoint(tmp_path, edit=tie)).load(NumpyOps())


def test_attention_bias(tmp_path: Path) -> None:
    weights = Checkpoint.open(make_checkpoint(tmp_path, small(attention_bias=True))).load(NumpyOps())
    for own in ("bias", "encoder_bias"):  # transformers ties no bias
        assert leaves(weights)["layers", 0, own, "v"].shape == (32,)
    assert weights.layers[3].bias.v is None and weights.layers[3].encoder_bias.v is None
    assert not np.array_equal(weights.layers[0].bias.q, weights.layers[0].encoder_bias.q)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_single_file_needs_no_index(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    (folder / "._x.safetensors").write_bytes(b"left by a Mac")
    Checkpoint.open(folder)


def test_with_a_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, small(vocab_size=480), tokenizer=True)
    assert (folder / "tokenizer.json").exists() and (folder / "chat_template.jinja").exists()
    Checkpoint.open(folder)
