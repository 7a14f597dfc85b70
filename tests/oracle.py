"""The graph's oracle: transformers' DiffusionGemma on small random models, and ours on the same weights.

The random weights are *tame*: attention looks at several keys, logits spread, the router is decided, and
every norm, scale and scalar differs from one and from its neighbours, so that no bug hides behind a
weight that does nothing. Everything here runs on the CPU in milliseconds.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from dgemma.model import Model
from dgemma.network import build, spec
from dgemma.network.config import Config, read_config
from dgemma.network.ops import Ops
from dgemma.settings import GenerationConfig

# Matrices this small gain nothing from a second thread, and on a busy machine wait 50 times as long for it.
torch.set_num_threads(1)

S, F = "sliding_attention", "full_attention"

GENERATION = GenerationConfig(
    steps=8,
    t_max=0.8,
    t_min=0.4,
    entropy_bound=2.0,
    stability=1,
    confidence=0.005,
    max_new_tokens=24,
    stop_ids=(),
)

TEXT: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "layer_types": [S, S, S, F],
    "sliding_window": 12,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# What each configuration changes of TEXT; `canvas` goes to the top of the file.
CONFIGS: dict[str, dict[str, Any]] = {
    "window": {},  # shorter than the tests' prompts
    "wide": {"sliding_window": 64},
    "full": {"num_hidden_layers": 2, "layer_types": [F, F]},
    "bias": {"attention_bias": True},
    "one_kv": {"num_key_value_heads": 1, "num_attention_heads": 6},
    "odd": {
        "hidden_size": 60,
        "intermediate_size": 41,
        "vocab_size": 197,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "global_head_dim": 14,
        "num_experts": 5,
        "top_k_experts": 3,
        "moe_intermediate_size": 13,
        "sliding_window": 7,
        "final_logit_softcapping": 11.5,
        "canvas": 11,
    },
    "deep": {
        "num_hidden_layers": 7,
        "layer_types": [S, S, F, S, S, S, F],
        "num_global_key_value_heads": None,
        "sliding_window": 5,
        "top_k_experts": 8,
    },
    "scaled_rope": {
        "rope_parameters": {
            S: {"rope_type": "default", "rope_theta": 100.0},
            F: {
                "rope_type": "proportional",
                "rope_theta": 3000.0,
                "partial_rotary_factor": 0.5,
                "factor": 2.0,
            },
        },
    },
}
# A named configuration as transformers' own generation config says it; see `save`.
_HF_GENERATION = {
    "max_new_tokens": GENERATION.max_new_tokens,
    "max_denoising_steps": GENERATION.steps,
    "t_max": GENERATION.t_max,
    "t_min": GENERATION.t_min,
    "stability_threshold": GENERATION.stability,
    "confidence_threshold": GENERATION.confidence,
    "eos_token_id": [1],
}


@dataclass(frozen=True, eq=False)
class Oracle:
    """A transformers model, our reading of its config.json, and its weights by name, float32."""

    hf: DiffusionGemmaForBlockDiffusion
    config: Config
    state: dict[str, np.ndarray]

    @property
    def vocab(self) -> int:
        return self.config.vocab_size

    def bfloat16(self) -> DiffusionGemmaForBlockDiffusion:
        """transformers' model in bfloat16."""
        other = DiffusionGemmaForBlockDiffusion(self.hf.config).eval()
        other.load_state_dict(self.hf.state_dict())
        return other.to(torch.bfloat16)

    def save(self, folder: Any) -> None:
        """A checkpoint folder as transformers writes it, without a tokenizer."""
        sampler = EntropyBoundSamplerConfig(GENERATION.entropy_bound)
        self.hf.generation_config = DiffusionGemmaGenerationConfig(**_HF_GENERATION, sampler_config=sampler)
        self.hf.save_pretrained(folder)


@cache
def oracle(name: str = "window", seed: int = 0, bfloat16: bool = False, **changes: Any) -> Oracle:
    """The random model of a named configuration. `bfloat16`: with weights that bfloat16 holds exactly."""
    text = TEXT | CONFIGS[name] | changes
    canvas = text.pop("canvas", 16)
    if text["num_global_key_value_heads"] is None:
        del text["num_global_key_value_heads"]
    config = DiffusionGemmaConfig(text_config=text, vision_config=VISION, canvas_length=canvas)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = DiffusionGemmaForBlockDiffusion._from_config(config, experts_implementation="eager").eval()
        with torch.no_grad():
            for key, tensor in [*hf.named_parameters(), *hf.named_buffers()]:
                _tame(key, tensor)
                if bfloat16:
                    tensor.copy_(tensor.to(torch.bfloat16))
    state = {key: tensor.detach().numpy() for key, tensor in hf.state_dict().items()}
    return Oracle(hf, read_config(json.loads(json.dumps(config.to_dict(), default=str))), state)


def _tame(key: str, x: torch.Tensor) -> None:
    """Random values for one tensor of the text model."""
    if "vision" in key or "inv_freq" in key or "embed_scale" in key:
        return
    if "layer_scalar" in key:  # a buffer of the encoder and one of the decoder
        x.uniform_(0.7, 1.3)
    elif "q_norm" in key:
        x.normal_(0.3, 0.05)
    elif key.endswith("bias"):  # transformers ties weights and scales, but no bias
        x.normal_(0, 0.3)
    elif x.ndim == 1:  # norms, router.scale, per_expert_scale
        x.normal_(1, 0.2)
    elif "router.proj" in key:  # its input has length 1
        x.normal_(0, 2)
    elif "embed_tokens" in key:  # logits spread by about 3
        x.normal_(0, 3 * x.shape[-1] ** -0.5)
    else:
        x.normal_(0, x.shape[-1] ** -0.5)


def released_spelling(hf: DiffusionGemmaForBlockDiffusion) -> dict[str, Any]:
    """The model's config.json as the released file spells it: `global_head_dim`, no `per_layer_config`."""
    data = json.loads(json.dumps(hf.config.to_dict(), default=str))
    text = data["text_config"]
    full = text.pop("per_layer_config")[str(text["layer_types"].index(F))]
    text["global_head_dim"] = full.get("head_dim", text["head_dim"])
    text["num_global_key_value_heads"] = full.get("num_key_value_heads")
    return data


# ---- transformers, driven as its own `generate` drives it ---------------------------------------

_FORWARD = inspect.signature(DiffusionGemmaForBlockDiffusion.forward).parameters
CACHE = "cache" if "cache" in _FORWARD else "past_key_values"  # its name since 5.24, and before


class Reference:
    """Contexts and canvases with transformers; all rows have one length."""

    def __init__(self, hf: DiffusionGemmaForBlockDiffusion):
        self.hf = hf
        self.cache = DynamicCache(config=hf.config.text_config)
        self.length = 0

    def encode(self, tokens: np.ndarray) -> Reference:
        """Read tokens [B, L] into the cache."""
        ids = torch.as_tensor(np.asarray(tokens))
        total = self.length + ids.shape[1]
        positions = torch.arange(self.length, total)[None]
        with torch.no_grad():
            self.hf.model.encoder(
                input_ids=ids, attention_mask=None, position_ids=positions, **{CACHE: self.cache}
            )
        self.length = total
        return self

    def logits(self, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        """Softcapped logits [B, L, V]; `previous` are the last step's processed logits."""
        ids = torch.as_tensor(np.asarray(canvas))
        signal = None if previous is None else torch.as_tensor(previous).to(self.hf.dtype)
        with torch.no_grad():
            return self.hf(
                decoder_input_ids=ids,
                self_conditioning_logits=signal,
                decoder_attention_mask=None,
                decoder_position_ids=torch.arange(self.length, self.length + ids.shape[1])[None],
                **{CACHE: self.cache},
            ).logits.numpy()


# ---- ours ---------------------------------------------------------------------------------------


# Error relative to the largest logit, in float32 (NumPy: float64) against transformers in float32.
TOLERANCE = {"numpy": 1e-5, "cuda": 2e-5, "mlx": 2e-4}


def our_model(ops: Ops, source: Oracle, config: Config | None = None, **generation: Any) -> Model:
    """Our model on the oracle's weights; `generation` changes fields of GENERATION."""
    config = config or source.config

    def leaf(param: spec.Param) -> Any:
        place = ops.aswide if param.group == "router" else ops.asarray
        return place(source.state[param.name])

    constants = {
        "embed_scale": ops.rounded(config.hidden_size**0.5),
        "frequencies": {layer.kind: ops.aswide(build.rope_frequencies(layer)) for layer in config.layers},
    }
    tree = build.build(config, spec.text_parameters(config), leaf, constants, ops)
    return Model(ops, config, replace(GENERATION, **generation), tree, None)


# ---- numbers ------------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    e = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropies(logits: np.ndarray) -> np.ndarray:
    """Nats per position, float64."""
    p = softmax(logits)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


def tokens(seed: int, *shape: int, vocab: int = 190) -> Any:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, vocab, shape)
