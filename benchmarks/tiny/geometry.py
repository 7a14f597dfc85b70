"""Geometry of the embedded model: every feature of the released architecture, in 3.4 M parameters.

Sliding and full layers with K=V on the full one, experts beside the dense MLP, self-conditioning,
separate encoder scalars, softcap. The window (48) is shorter than the contexts it is trained on.
"""

from typing import Any

from benchmarks.tiny.tokenizer import VOCAB_SIZE
from dgemma.files import load_json
from dgemma.released import RELEASED_DIR

CONFIG: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": 32,
    "dtype": "bfloat16",
    "eos_token_id": [1, 106],
    "image_token_id": None,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 64,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 96,
        "num_attention_heads": 6,
        "num_experts": 8,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.5,
                "rope_theta": 100000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 48,
        "tie_word_embeddings": True,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
        "vocab_size": VOCAB_SIZE,
    },
}

# The released sampler, number for number.
GENERATION_CONFIG: dict[str, Any] = {
    name: value
    for name, value in load_json(RELEASED_DIR / "generation_config.json").items()
    if name != "transformers_version"
}
