"""Random checkpoints, for tests and to time engines on, through a safetensors writer of their own.

The writer follows the format's description and shares nothing with `dgemma.checkpoint`, so that the
two check each other. Values are tame: activations keep their size through the layers, the router has
clear favourites, and encoder and decoder scalars differ, so that a mix-up of the two shows.
"""

import copy
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tiny import tokenizer as tiny_tokenizer
from dgemma.network.config import read_config
from dgemma.network.spec import Param, parameters

# Three sliding layers and a full one, both windows shorter than a short text.
SMALL: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": 16,
    "dtype": "bfloat16",
    "eos_token_id": [1, 106],
    "image_token_id": None,
    "tie_word_embeddings": True,
    "vision_config": None,
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 32,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "max_position_embeddings": 1024,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 12,
        "tie_word_embeddings": True,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
        "vocab_size": 200,
    },
}

SMALL_GENERATION: dict[str, Any] = {
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106, 50],
    "max_denoising_steps": 48,
    "max_new_tokens": 256,
    "pad_token_id": 0,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "t_max": 0.8,
    "t_min": 0.4,
}


@dataclass
class Tensor:
    """A tensor as it goes to a file: raw little-endian bytes and what the header says of them."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes


Edit = Callable[[dict[str, Tensor]], None]


def small(**text: Any) -> dict[str, Any]:
    """A copy of SMALL with keys of text_config changed."""
    config = copy.deepcopy(SMALL)
    config["text_config"].update(text)
    return config


def make_checkpoint(
    folder: Path,
    config: Mapping[str, Any] = SMALL,
    seed: int = 0,
    dtype: str = "BF16",
    shards: int = 1,
    edit: Edit | None = None,
    tokenizer: bool = False,
) -> Path:
    """Write a random checkpoint of this geometry and return its folder.

    `dtype` is "BF16", "F16" or "F32". `edit` may change the tensors by name before they are written.
    Tensors lie in random order. `tokenizer` adds that of `tiny`, whose vocabulary has 480 entries.
    """
    rng = np.random.default_rng(seed)
    table = parameters(read_config(config))
    tensors = {param.name: encode(tame(param, rng), dtype) for param in table}
    if edit:
        edit(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", SMALL_GENERATION)
    names = [str(name) for name in rng.permutation(sorted(tensors))]
    write_shards(folder, {name: tensors[name] for name in names}, shards)
    if tokenizer:
        tiny_tokenizer.write(folder)
    return folder


def tame(param: Param, rng: np.random.Generator) -> np.ndarray:
    """Random values of a parameter, float32 of its shape."""
    z = rng.standard_normal(param.shape)
    if param.name.endswith("layer_scalar"):
        x = rng.uniform(0.7, 1.2, param.shape)
    elif param.name.endswith("q_norm.weight"):
        # Scores have no 1/√head_size: the softmax would pick one key if norms were 1.
        x = 0.3 * (1 + 0.1 * z)
    elif param.name.endswith("router.proj.weight"):
        x = 20 * z / np.sqrt(param.shape[-1])
    elif param.name.endswith(".bias"):
        x = 0.1 * z
    elif len(param.shape) == 1:
        x = 1 + 0.1 * z
    else:
        x = z / np.sqrt(param.shape[-1])
    return x.astype(np.float32)


def encode(x: np.ndarray, dtype: str) -> Tensor:
    """Values x [...] float32 in a type of the format; BF16 rounds to nearest, ties to even."""
    if dtype == "BF16":
        bits = x.astype("<f4").view("<u4")
        raw = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    else:
        raw = x.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
    return Tensor(dtype, x.shape, raw)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """One file, or several with an index."""
    if shards == 1:
        return write_file(folder / "model.safetensors", tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = list(tensors)[shard::shards]
        write_file(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    size = sum(len(tensor.raw) for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, in the order of `tensors`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.raw)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    write_raw(path, json.dumps(header), b"".join(tensor.raw for tensor in tensors.values()))


def write_raw(path: Path, header: str, data: bytes) -> None:
    """A file of the format with this header, whatever it says; padded to 8 bytes as writers do."""
    raw = header.encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
