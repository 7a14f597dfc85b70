"""What a checkpoint's config.json says, as frozen dataclasses. `dgemma.settings` reads the sampler's file.

Only this module reads the Hugging Face dictionary. The reference's class defaults differ from the released
values, so a missing key is an error and no default: a wrong window or head size would still produce text,
only worse. Two keys are excepted, `canvas_length` and `final_logit_softcapping`: the reference's default is
the released value, and its own files may lack the second. The full-attention geometry has two published
spellings, `global_head_dim` and `per_layer_config`. Both are accepted; where both are, the second holds.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgemma.errors import ConfigError
from dgemma.files import Reader

MODEL_TYPE = "diffusion_gemma"
SLIDING, FULL = "sliding_attention", "full_attention"

# No model comes near these, and tables grow with them: a false number must not keep a reader busy.
MAX_LAYERS, MAX_EXPERTS = 1000, 10_000


@dataclass(frozen=True)
class LayerConfig:
    """Attention geometry of one layer.

    `window` is None on full layers; it counts the query itself. `rope_pairs` of the `head_dim / 2` frequency
    pairs rotate; the exponents run over the whole head (model.md: "proportional"). `shares_kv`: V is the raw
    k_proj output, before k_norm and RoPE.
    """

    kind: str
    head_dim: int
    kv_heads: int
    window: int | None
    rope_theta: float
    rope_pairs: int
    rope_factor: float
    shares_kv: bool

    @property
    def past(self) -> int | None:
        """Tokens of a context that a pass may see: window − 1, as it counts the query; None for all."""
        return None if self.window is None else self.window - 1


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower, for its parameter table. The tower itself does not run yet."""

    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    patch_size: int
    positions: int
    standardize: bool


@dataclass(frozen=True)
class Config:
    """Geometry of a DiffusionGemma checkpoint. Letters in comments elsewhere: D, V, H, E, K, F, M."""

    hidden_size: int  # D
    vocab_size: int  # V
    heads: int  # H
    mlp_size: int  # F
    num_experts: int  # E
    top_k: int  # K
    expert_size: int  # M
    canvas_length: int
    max_positions: int
    softcap: float | None  # None: logits are as the head gives them
    rms_eps: float
    attention_bias: bool
    pad_id: int
    image_token_id: int | None
    layers: tuple[LayerConfig, ...]
    vision: VisionConfig | None
    quantization: Mapping[str, Any] | None  # the raw announcement, if any

    @property
    def window(self) -> int | None:
        """Window of the sliding layers, None without such layers."""
        return next((layer.window for layer in self.layers if layer.window), None)


def read_config(data: Mapping[str, Any], where: str = "config.json") -> Config:
    """Config from the dictionary of config.json; ConfigError names `where` and the key."""
    top = Reader(data, where)
    if (model_type := top.get("model_type", str)) != MODEL_TYPE:
        raise ConfigError(
            f"{where}: model_type is {reprlib.repr(model_type)}; this program runs {MODEL_TYPE!r}"
        )
    text = top.sub("text_config")
    _check_variants(top, text)
    heads = text.size("num_attention_heads")
    config = Config(
        hidden_size=text.size("hidden_size"),
        vocab_size=text.size("vocab_size"),
        heads=heads,
        mlp_size=text.size("intermediate_size"),
        num_experts=_limited(text, "num_experts", MAX_EXPERTS),
        top_k=text.size("top_k_experts"),
        expert_size=text.size("moe_intermediate_size"),
        canvas_length=top.size("canvas_length") if "canvas_length" in data else 256,
        max_positions=text.size("max_position_embeddings"),
        softcap=_softcap(text),
        rms_eps=text.positive("rms_norm_eps"),
        attention_bias=text.get("attention_bias", bool),
        # Padding is masked wherever it stands, so that any token will do.
        pad_id=text.get("pad_token_id", (int, type(None)), 0) or 0,
        image_token_id=top.get("image_token_id", (int, type(None)), None),
        layers=_layers(text, heads),
        vision=_vision(top),
        # MLX writes the first key, Hugging Face the second.
        quantization=top.optional("quantization") or top.optional("quantization_config"),
    )
    if config.top_k > config.num_experts:
        raise ConfigError(
            f"{text.where}: top_k_experts {config.top_k} exceeds num_experts {config.num_experts}"
        )
    if not 0 <= config.pad_id < config.vocab_size:
        raise text.unusable("pad_token_id")
    return config


def _check_variants(top: Reader, text: Reader) -> None:
    """Refuse variants that the reference supports and this program does not."""
    if text.get("hidden_activation", str) != "gelu_pytorch_tanh":
        raise text.unusable("hidden_activation")
    for reader in (top, text):
        if not reader.get("tie_word_embeddings", bool, True):
            raise ConfigError(f"{reader.where}: untied embeddings are not supported")
    if text.data.get("use_bidirectional_attention") not in (None, "vision"):
        raise text.unusable("use_bidirectional_attention")
    for key in ("rope_scaling", "partial_rotary_factor"):  # in rope_parameters they are read
        if text.data.get(key) is not None:
            raise ConfigError(f"{text.where}: {key!r} beside rope_parameters is not supported")


def _limited(reader: Reader, key: str, most: int) -> int:
    """A positive integer; ConfigError that states the limit for one above `most`."""
    if (value := reader.size(key)) > most:
        raise ConfigError(f"{reader.where}: {key!r} is {value:,}; at most {most:,} are supported")
    return value


def _softcap(text: Reader) -> float | None:
    """The cap of logits, None for null. The reference leaves the key out of its files for its default."""
    key = "final_logit_softcapping"
    return None if text.get(key, (int, float, type(None)), 30.0) is None else text.positive(key, 30.0)


def _layers(text: Reader, heads: int) -> tuple[LayerConfig, ...]:
    own = _per_layer(text)
    layers = tuple(
        _layer(text, kind, index, heads, None if own is None else own.get(index, Reader({}, text.where)))
        for index, kind in enumerate(_layer_types(text))
    )
    for kind in (SLIDING, FULL):  # the graph makes one rotation for each kind
        if len(sizes := {layer.head_dim for layer in layers if layer.kind == kind}) > 1:
            raise ConfigError(f"{text.where}: {kind} layers have several head sizes: {sorted(sizes)}")
    return layers


def _layer_types(text: Reader) -> list[str]:
    kinds, layers = text.get("layer_types", list), _limited(text, "num_hidden_layers", MAX_LAYERS)
    if len(kinds) != layers:
        raise ConfigError(f"{text.where}: layer_types has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise ConfigError(f"{text.where}: layer_types has the unknown entry {reprlib.repr(kind)}")
    # The reference makes the last layer a full one, whatever the file says of it.
    return [*kinds[:-1], FULL]


def _per_layer(text: Reader) -> dict[int, Reader] | None:
    """The entries of `per_layer_config` by layer, None without it. Keys are written "5" or "05"."""
    if text.data.get("per_layer_config") is None:
        return None
    table = text.sub("per_layer_config")
    entries: dict[int, Reader] = {}
    for key in table.data:
        if not re.fullmatch("[0-9]{1,6}", str(key)) or int(key) >= text.size("num_hidden_layers"):
            raise ConfigError(f"{table.where}: {reprlib.repr(key)} is not a layer")
        if int(key) in entries:
            raise ConfigError(f"{table.where}: layer {int(key)} has two entries")
        entry = table.sub(key)
        if unknown := set(entry.data) - {"head_dim", "num_key_value_heads"}:
            raise ConfigError(f"{entry.where}: {reprlib.repr(min(unknown))} is not supported for one layer")
        entries[int(key)] = entry
    return entries


def _layer(text: Reader, kind: str, index: int, heads: int, own: Reader | None) -> LayerConfig:
    sliding = kind == SLIDING
    head_dim = _own_size(text, own, "head_dim", None if sliding else "global_head_dim")
    kv_heads = _own_size(text, own, "num_key_value_heads", None if sliding else "num_global_key_value_heads")
    rope = text.sub("rope_parameters").sub(kind)
    fraction = rope.positive("partial_rotary_factor", 1.0)
    rope_type = rope.get("rope_type", str)
    partial = rope_type == "proportional" and fraction <= 1.0
    if not partial and (rope_type, fraction) != ("default", 1.0):
        raise ConfigError(
            f"{rope.where}: rope_type {reprlib.repr(rope_type)} with factor {fraction} is not supported"
        )
    if heads % kv_heads or head_dim % 2:
        raise ConfigError(
            f"{text.where}: layer {index}: {heads} query heads, {kv_heads} KV heads, head size {head_dim}"
        )
    return LayerConfig(
        kind=kind,
        head_dim=head_dim,
        kv_heads=kv_heads,
        window=text.size("sliding_window") if sliding else None,
        rope_theta=rope.positive("rope_theta"),
        rope_pairs=int(fraction * head_dim // 2),
        rope_factor=rope.positive("factor", 1.0) if partial else 1.0,  # the default type has no factor
        shares_kv=not sliding,
    )


def _own_size(text: Reader, own: Reader | None, key: str, full_key: str | None) -> int:
    """Size `key` of one layer: from its own entry, the full layers' key, or the key common to all.

    `own` is None in a file without per_layer_config: the full layers' key must be there then, and a null
    number of KV heads means the common one. Beside that table it is not read, as in the reference: entries
    leave out the common value.
    """
    if own is not None:
        return own.size(key) if key in own.data else text.size(key)
    if full_key == "num_global_key_value_heads" and text.get(full_key, (int, type(None))) is None:
        return text.size(key)
    return text.size(full_key or key)


def _vision(top: Reader) -> VisionConfig | None:
    if top.data.get("vision_config") is None:
        return None
    vision = top.sub("vision_config")
    return VisionConfig(
        hidden_size=vision.size("hidden_size"),
        mlp_size=vision.size("intermediate_size"),
        layers=_limited(vision, "num_hidden_layers", MAX_LAYERS),
        heads=vision.size("num_attention_heads"),
        kv_heads=vision.size("num_key_value_heads"),
        head_dim=vision.size("head_dim"),
        patch_size=vision.size("patch_size"),
        positions=vision.size("position_embedding_size"),
        standardize=vision.get("standardize", bool),
    )
