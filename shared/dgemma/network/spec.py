"""Every parameter of the model: its Hugging Face name, its place in our tree, its shape and its class.

One table drives loading, checking, counting and converting. A name outside the table is an error. Only
tied copies, which some exports store, are skipped by name. The price: every architecture change needs a
release. The gain: no weight is ever silently random.

    D hidden  V vocabulary  H heads  G KV heads  C head size  F dense MLP  E experts  M expert size
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from dgemma.network.config import Config, LayerConfig, VisionConfig

# The classes of weights in presets, memory estimates and reports.
GROUPS = ("embed", "attention", "mlp", "experts", "router", "self_conditioning", "norm", "vision")

# Some exports store these, though they repeat another tensor or are computed. They are skipped by name, as
# are the scales of an 8-bit KV cache: ours holds the compute type.
_SKIPPED = re.compile(
    r"lm_head\.\w+"
    r"|model\.encoder\.language_model\.(embed_tokens|norm)\.\w+"
    r"|model\.encoder\.language_model\.layers\.\d+\.(?!layer_scalar$)[\w.]+(?<!_proj\.bias)"
    r"|model\.(encoder|decoder)\.([\w.]+\.)?rotary_emb\.[\w.]+"
    r"|model\.decoder\.embed_tokens\.embed_scale"
    r"|model\.decoder\.layers\.\d+\.self_attn\.(kv_cache\.\w+"
    r"|(\w+\.)?([qkv]_(scale|zero_point|global_scale)|output_scale|kv_scale|kv_cache_scaling_factor))"
)


@dataclass(frozen=True)
class Param:
    """One stored tensor. `path` is its place in `dgemma.network.weights`, empty for the vision tower."""

    name: str
    shape: tuple[int, ...]
    group: str
    path: tuple[str | int, ...] = ()

    @property
    def wide(self) -> bool:
        """Whether the device holds it wide. The router's logits tie in bfloat16, and a tie flips a pick."""
        return self.group == "router"

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def is_skipped(name: str) -> bool:
    """Whether `name` is a tied copy, a computed buffer or a cache's scale, which a loader leaves unread."""
    return _SKIPPED.fullmatch(name) is not None


def parameters(config: Config) -> list[Param]:
    """The parameter table of a checkpoint with this geometry, vision tower included."""
    table = list(_decoder(config))
    for index, layer in enumerate(config.layers):
        table += _layer(config, index, layer)
    if config.vision:
        table += _vision(config.vision, config.hidden_size)
    return table


def text_parameters(config: Config) -> list[Param]:
    """The part of the table that the text model loads."""
    return [param for param in parameters(config) if param.group != "vision"]


def _decoder(config: Config) -> Iterator[Param]:
    D, V, F = config.hidden_size, config.vocab_size, config.mlp_size
    root, own = "model.decoder", "self_conditioning"
    yield Param(f"{root}.embed_tokens.weight", (V, D), "embed", ("embed",))
    yield Param(f"{root}.norm.weight", (D,), "norm", ("norm",))
    yield Param(f"{root}.{own}.pre_norm.weight", (D,), "norm", (own, "pre_norm"))
    yield Param(f"{root}.{own}.gate_proj.weight", (F, D), own, (own, "gate"))
    yield Param(f"{root}.{own}.up_proj.weight", (F, D), own, (own, "up"))
    yield Param(f"{root}.{own}.down_proj.weight", (D, F), own, (own, "down"))


def _layer(config: Config, index: int, layer: LayerConfig) -> Iterator[Param]:
    D, F, E, M = config.hidden_size, config.mlp_size, config.num_experts, config.expert_size
    root = f"model.decoder.layers.{index}"

    def param(name: str, shape: tuple[int, ...], group: str, *path: str) -> Param:
        return Param(f"{root}.{name}", shape, group, ("layers", index, *path))

    yield from _attention(config, layer, param)
    yield param("mlp.gate_proj.weight", (F, D), "mlp", "mlp", "gate")
    yield param("mlp.up_proj.weight", (F, D), "mlp", "mlp", "up")
    yield param("mlp.down_proj.weight", (D, F), "mlp", "mlp", "down")
    yield param("experts.gate_up_proj", (E, 2 * M, D), "experts", "experts", "gate_up")
    yield param("experts.down_proj", (E, D, M), "experts", "experts", "down")
    yield param("router.proj.weight", (E, D), "router", "router", "proj")
    yield param("router.scale", (D,), "router", "router", "scale")
    yield param("router.per_expert_scale", (E,), "router", "router", "expert_scale")
    for name, own in _LAYER_NORMS.items():
        yield param(f"{name}.weight", (D,), "norm", own)
    yield param("layer_scalar", (1,), "norm", "scalar")
    # The encoder shares everything with the decoder but this one number for each layer, and the biases,
    # which transformers does not tie. The two scalars differ in the released model.
    root = f"model.encoder.language_model.layers.{index}"
    yield Param(f"{root}.layer_scalar", (1,), "norm", ("layers", index, "encoder_scalar"))
    if config.attention_bias:
        for name, shape in _projections(config, layer).items():
            where = ("layers", index, "encoder_bias", name)
            yield Param(f"{root}.self_attn.{name}_proj.bias", shape[:1], "attention", where)


_LAYER_NORMS = {
    "input_layernorm": "pre_attention",
    "post_attention_layernorm": "post_attention",
    "pre_feedforward_layernorm": "pre_mlp",
    "post_feedforward_layernorm_1": "post_mlp",
    "pre_feedforward_layernorm_2": "pre_experts",
    "post_feedforward_layernorm_2": "post_experts",
    "post_feedforward_layernorm": "post_feedforward",
}


def _projections(config: Config, layer: LayerConfig) -> dict[str, tuple[int, int]]:
    """Shapes [O, I] of the attention's matrices; full layers have no v_proj."""
    D, Q, KV = config.hidden_size, config.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    shapes = {"q": (Q, D), "k": (KV, D), "v": (KV, D), "o": (D, Q)}
    if layer.shares_kv:
        del shapes["v"]
    return shapes


def _attention(config: Config, layer: LayerConfig, param: Callable[..., Param]) -> Iterator[Param]:
    for name, shape in _projections(config, layer).items():
        yield param(f"self_attn.{name}_proj.weight", shape, "attention", "attention", name)
        if config.attention_bias:
            yield param(f"self_attn.{name}_proj.bias", shape[:1], "attention", "bias", name)
    for name in ("q_norm", "k_norm"):
        yield param(f"self_attn.{name}.weight", (layer.head_dim,), "norm", "attention", name)


def _vision(vision: VisionConfig, hidden_size: int) -> Iterator[Param]:
    D, F = vision.hidden_size, vision.mlp_size
    Q, KV, C = vision.heads * vision.head_dim, vision.kv_heads * vision.head_dim, vision.head_dim
    root = "model.encoder.vision_tower"
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedder.input_proj.weight": (D, 3 * vision.patch_size**2),
        "patch_embedder.position_embedding_table": (2, vision.positions, D),
    }
    if vision.standardize:
        shapes |= {"std_bias": (D,), "std_scale": (D,)}
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
    for index in range(vision.layers):
        layer = f"encoder.layers.{index}"
        shapes |= {f"{layer}.{norm}.weight": (D,) for norm in (*norms, "post_feedforward_layernorm")}
        shapes |= {f"{layer}.self_attn.q_proj.linear.weight": (Q, D)}
        shapes |= {f"{layer}.self_attn.{p}_proj.linear.weight": (KV, D) for p in "kv"}
        shapes |= {f"{layer}.self_attn.o_proj.linear.weight": (D, Q)}
        shapes |= {f"{layer}.self_attn.{p}_norm.weight": (C,) for p in "qk"}
        shapes |= {f"{layer}.mlp.{p}_proj.linear.weight": (F, D) for p in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.linear.weight": (D, F)}
    for name, shape in shapes.items():
        yield Param(f"{root}.{name}", shape, "vision")
    yield Param("model.encoder.embed_vision.embedding_projection.weight", (hidden_size, D), "vision")
