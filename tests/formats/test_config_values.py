"""Values of config.json and generation_config.json: what transformers makes of each, or one line of refusal.

The same value must never mean something else here than there. A whole number written 256.0 is the exception:
transformers refuses it, and it can mean but one thing.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DiffusionGemmaConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

import dgemma
from dgemma.errors import ConfigError, DgemmaError
from dgemma.network.build import rope_frequencies
from dgemma.network.config import Config, read_config
from dgemma.network.ops import Notices
from dgemma.settings import GenerationConfig, read_generation_config
from dgemma.tiny import MODEL_DIR
from tests.checkpoints import SMALL, SMALL_GENERATION, make_checkpoint, small

BASE: dict[str, Any] = {**json.loads((MODEL_DIR / "config.json").read_text()), "image_token_id": 7}
GENERATION: dict[str, Any] = json.loads((MODEL_DIR / "generation_config.json").read_text())


# ---- config.json --------------------------------------------------------------------------------

Facts = dict[str, Any]


def theirs(data: dict[str, Any]) -> Facts | None:
    """The geometry as transformers reads it; None where it refuses or could not run it."""
    try:
        config = DiffusionGemmaConfig.from_dict(copy.deepcopy(data))
        text = config.text_config
        rotary = DiffusionGemmaTextRotaryEmbedding(text)
    except Exception:  # it raises whatever comes; what matters is that it refuses
        return None
    return {
        "sizes": [text.hidden_size, text.vocab_size, text.num_attention_heads, text.intermediate_size],
        "experts": [text.num_experts, text.top_k_experts, text.moe_intermediate_size],
        "canvas_length": config.canvas_length,
        "softcap": text.final_logit_softcapping,
        "rms_eps": text.rms_norm_eps,
        "bias": text.attention_bias,
        "layers": [
            (kind, own.head_dim, own.num_key_value_heads, text.sliding_window if kind[0] == "s" else None)
            for kind, own in zip(text.layer_types, text.per_layer_config, strict=True)
        ],
        "frequencies": {
            kind: getattr(rotary, f"{kind}_inv_freq").double().numpy() for kind in rotary.layer_types
        },
    }


def ours(config: Config) -> Facts:
    return {
        "sizes": [config.hidden_size, config.vocab_size, config.heads, config.mlp_size],
        "experts": [config.num_experts, config.top_k, config.expert_size],
        "canvas_length": config.canvas_length,
        "softcap": config.softcap,
        "rms_eps": config.rms_eps,
        "bias": config.attention_bias,
        "layers": [(layer.kind, layer.head_dim, layer.kv_heads, layer.window) for layer in config.layers],
        "frequencies": {layer.kind: rope_frequencies(layer) for layer in config.layers},
    }


def same(mine: Facts, other: Facts) -> bool:
    turns = [(mine["frequencies"][kind], x) for kind, x in other["frequencies"].items()]
    return all(mine[key] == other[key] for key in mine if key != "frequencies") and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-6) for a, b in turns
    )


def read(data: dict[str, Any]) -> Config | None:
    try:
        return read_config(data)
    except ConfigError as error:
        assert "\n" not in str(error)
        return None


def places(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of every value under a key, at any depth."""
    for key, value in node.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


MISSING = object()


def changed(data: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(data)
    node = data
    for key in path[:-1]:
        node = node[key]
    if value is MISSING:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return data


def variants(value: Any) -> Iterator[tuple[str, Any]]:
    yield "null", None
    yield "missing", MISSING
    if type(value) in (int, float):
        yield from {"half": value + 0.5, "text": str(value), "true": True, "listed": [value]}.items()
    if type(value) is int:
        yield "whole", float(value)


PLACES = list(places(BASE))


@pytest.mark.parametrize("path", PLACES, ids=".".join)
def test_every_key_means_what_it_means_to_transformers(path: tuple[str, ...]) -> None:
    base = read(BASE)
    value = BASE
    for key in path:
        value = value[key]
    for name, variant in variants(value):
        data = changed(BASE, path, variant)
        mine = read(data)
        if name == "whole":
            assert mine is not None and ours(mine)["sizes"] == ours(base)["sizes"], name  # type: ignore[arg-type]
            assert mine == base or path[-1] == "eos_token_id"
        elif mine is not None:
            other = theirs(data)
            assert other is None or same(ours(mine), other), (name, ours(mine), other)
            # What transformers refuses may pass here only if nothing is made of it.
            assert other is not None or same(ours(mine), ours(base)), name  # type: ignore[arg-type]


TAKEN: dict[str, list[Any]] = {
    "text_config.pad_token_id": [None, MISSING, 0.0],
    "text_config.final_logit_softcapping": [None, MISSING, 30, 12.5],
    "canvas_length": [MISSING, 32.0],
    "text_config.hidden_size": [192.0],
    "image_token_id": [None, MISSING, 7.0],
    "text_config.use_bidirectional_attention": [None, MISSING],
    "text_config.num_global_key_value_heads": [None],
    # Keys that the embedded model has not.
    "text_config.per_layer_config": [None],
    "text_config.rope_scaling": [None],
    "vision_config": [None],
    "quantization_config": [None, {}],
}


@pytest.mark.parametrize("key", TAKEN)
def test_values_that_are_taken(key: str) -> None:
    for value in TAKEN[key]:
        read_config(changed(BASE, tuple(key.split(".")), value))


REFUSED: dict[str, dict[str, Any]] = {
    "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.25},
    "layer 3 has two entries": {"per_layer_config": {"3": {"head_dim": 64}, "03": {"head_dim": 32}}},
    "'num_hidden_layers' is 1,001; at most 1,000": {"num_hidden_layers": 1001},
    "'num_experts' is 10,001; at most 10,000": {"num_experts": 10_001},
    "use_bidirectional_attention": {"use_bidirectional_attention": "some"},
    "final_logit_softcapping": {"final_logit_softcapping": 0},
    "pad_token_id": {"pad_token_id": 480},
}


@pytest.mark.parametrize("part", REFUSED)
def test_values_that_are_refused(part: str) -> None:
    data = {**BASE, "text_config": {**BASE["text_config"], **REFUSED[part]}}
    with pytest.raises(ConfigError) as caught:
        read_config(data)
    assert part in str(caught.value)


def test_the_default_rotation_has_no_factor() -> None:
    """transformers reads one for the proportional rotation alone."""
    for kind in ("sliding_attention", "full_attention"):
        data = copy.deepcopy(BASE)
        data["text_config"]["rope_parameters"][kind]["factor"] = 8.0
        mine, other = read(data), theirs(data)
        assert mine is not None and other is not None and same(ours(mine), other)


def test_the_last_layer_is_a_full_one() -> None:
    """Whatever the file says of it, as transformers has it; tensors of a sliding one are an error then."""
    for kinds in (["sliding_attention"] * 4, ["full_attention"] * 3 + ["sliding_attention"]):
        data = changed(BASE, ("text_config", "layer_types"), kinds)
        mine, other = read(data), theirs(data)
        assert mine is not None and other is not None and same(ours(mine), other)


def test_entries_of_layers_win() -> None:
    """Beside per_layer_config the other spelling is not read, as in transformers."""
    for table in ({"3": {"head_dim": 64, "num_key_value_heads": 1}}, {"3": {"head_dim": 64}}, {"03": {}}, {}):
        data = {**BASE, "text_config": {**BASE["text_config"], "per_layer_config": table}}
        mine, other = read(data), theirs(data)
        assert mine is not None and other is not None and same(ours(mine), other), table


def random_config(rng: np.random.Generator) -> DiffusionGemmaConfig:
    """As a user of transformers makes one: some values are given, the others left to its defaults."""
    layers = int(rng.integers(1, 9))
    kinds = [str(kind) for kind in rng.choice(["sliding_attention", "full_attention"], layers)]
    kv = int(rng.choice([1, 2, 4]))
    given: dict[str, Any] = {
        "hidden_size": int(rng.choice([64, 2304])),
        "num_attention_heads": 8,
        "num_key_value_heads": kv,
        "head_dim": int(rng.choice([32, 256, 512])),
        "global_head_dim": int(rng.choice([32, 256, 512])),
        "num_global_key_value_heads": [None, 1, kv][rng.integers(3)],
        "num_hidden_layers": layers,
        "layer_types": kinds[:-1] + ["full_attention"],
        "final_logit_softcapping": [None, 30.0, 25.0][rng.integers(3)],
        "pad_token_id": [None, 0, 5][rng.integers(3)],
        "attention_bias": bool(rng.integers(2)),
        "sliding_window": int(rng.choice([512, 1024])),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
        "vocab_size": int(rng.choice([262_144, 500])),
        "eos_token_id": [None, 1, [1, 106]][rng.integers(3)],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
        },
    }
    names = [*given, "intermediate_size", "max_position_embeddings", "use_bidirectional_attention"]
    text = {key: given[key] for key in names if key in given and rng.random() < 0.6}
    if "num_hidden_layers" not in text or "layer_types" not in text:
        text.pop("num_hidden_layers", None), text.pop("layer_types", None)
    text |= {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16}
    top = {"canvas_length": int(rng.choice([256, 64]))} if rng.random() < 0.5 else {}
    return DiffusionGemmaConfig(text_config=text, **top)


@pytest.mark.parametrize("seed", range(40))
def test_what_transformers_saves_is_what_it_meant(seed: int, tmp_path: Path) -> None:
    """Its files leave out what equals a default of its own, so that the default is the meaning."""
    config = random_config(np.random.default_rng(seed))
    config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    other = theirs(data)
    assert other is not None
    assert same(ours(read_config(data)), other)


# ---- generation_config.json ---------------------------------------------------------------------


@pytest.mark.parametrize("key", ["max_denoising_steps", "max_new_tokens", "stability_threshold"])
def test_whole_numbers_of_the_sampler(key: str) -> None:
    assert read_generation_config({**GENERATION, key: 5.0}, 480) == read_generation_config(
        {**GENERATION, key: 5}, 480
    )
    for value in (5.5, "5", True, [5], math.inf, math.nan):
        with pytest.raises(ConfigError, match=key):
            read_generation_config({**GENERATION, key: value}, 480)


@pytest.mark.parametrize(
    ("data", "config", "expected"),
    [
        ({"eos_token_id": [1, 106, 50]}, {"eos_token_id": 3}, (1, 106, 50)),
        ({"eos_token_id": 106.0}, {}, (106,)),
        ({"eos_token_id": [1.0, 106]}, {}, (1, 106)),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": [1, 106]}, (1, 106)),
        ({"eos_token_id": []}, {"eos_token_id": [1, 106]}, (1, 106)),
        ({}, {"generation_config": {"eos_token_id": [1, 50]}, "eos_token_id": 3}, (1, 50)),
        (None, {"generation_config": {"eos_token_id": [1, 50]}, "eos_token_id": 3}, (1, 50)),
        (None, {"eos_token_id": None, "text_config": {"eos_token_id": 1}}, (1,)),
        ({}, {"generation_config": {}, "text_config": {"eos_token_id": [1, 106]}}, (1, 106)),
        ({}, {"text_config": {"eos_token_id": None}}, ()),
        ({}, {"text_config": {}}, ()),
        ({}, None, ()),
    ],
)
def test_stop_ids_wherever_they_are(
    data: dict[str, Any] | None, config: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    assert read_generation_config(data, 480, config=config).stop_ids == expected


@pytest.mark.parametrize("stops", [480, -1, True, "1", 1.5, [[1, 106]], [1, None], {"a": 1}, [True], 1e300])
@pytest.mark.parametrize("place", ["file", "embedded", "top", "text"])
def test_stop_ids_that_are_none(stops: Any, place: str) -> None:
    own = {"eos_token_id": stops}
    config = {"embedded": {"generation_config": own}, "top": own, "text": {"text_config": own}}.get(place)
    file = "f/generation_config.json" if place == "file" else "f/config.json"
    with pytest.raises(ConfigError, match=f"^{file}.*eos_token_id"):
        read_generation_config(own if place == "file" else None, 480, "f/generation_config.json", config)


class Said(Notices):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


def without_stop_ids(folder: Path, tokenizer: Callable[[Path], None]) -> tuple[GenerationConfig, list[str]]:
    """What a model stops at whose configuration names no token that ends a reply, and the notices."""
    config = copy.deepcopy(SMALL)
    config["eos_token_id"] = config["text_config"]["eos_token_id"] = None
    make_checkpoint(folder, config, tokenizer=True)
    own = {key: value for key, value in SMALL_GENERATION.items() if key != "eos_token_id"}
    (folder / "generation_config.json").write_text(json.dumps(own))
    tokenizer(folder)
    notices = Said()
    return dgemma.load(folder, backend="numpy", notices=notices).generation, notices.texts


def test_the_tokenizer_says_where_a_reply_ends(tmp_path: Path) -> None:
    def named(folder: Path, token: Any) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))

    folder = make_checkpoint(tmp_path / "x", SMALL, tokenizer=True)
    found = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in found["added_tokens"]}
    ends = tuple(ids[name] for name in ("<turn|>", "<|tool_response>") if name in ids)
    name, own = next(iter(ids.items()))
    for index, token in enumerate((name, {"content": name}, None, "no such")):
        generation, said = without_stop_ids(tmp_path / str(index), lambda folder: named(folder, token))  # noqa: B023
        assert generation.stop_ids == ((own,) if index < 2 else ()) + ends
        assert any("ends a reply" in text for text in said) == (not generation.stop_ids)


def test_a_reply_that_nothing_ends_is_a_notice(tmp_path: Path) -> None:
    generation, said = without_stop_ids(tmp_path, lambda folder: (folder / "tokenizer.json").unlink())
    assert generation.stop_ids == ()
    assert len(said) == 1 and "max_new_tokens" in said[0] and str(tmp_path) in said[0]


# ---- by chance ----------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JUNK = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)
DOCUMENTS = {
    "config.json": small(per_layer_config={"3": {"head_dim": 32}}),
    "generation_config.json": GENERATION,
}


@settings(
    max_examples=250, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_junk_is_read_or_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(DOCUMENTS)))
    document = DOCUMENTS[name]
    for _ in range(data.draw(st.integers(1, 2))):
        there = list(places(document)) or [("a",)]
        document = changed(document, data.draw(st.sampled_from(there)), data.draw(JUNK))
    try:
        if name == "config.json":
            read_config(document)
        read_generation_config(document if name != "config.json" else None, 480, config=document)
    except DgemmaError as error:
        assert "\n" not in str(error)
