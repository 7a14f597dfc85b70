"""The tests' checkpoints: the benchmarks' random ones, also with a vision tower and at their smallest."""

from typing import Any

from benchmarks.random_checkpoint import (
    SMALL,
    SMALL_GENERATION,
    Edit,
    Tensor,
    encode,
    make_checkpoint,
    small,
    tame,
    write_file,
    write_json,
    write_raw,
    write_shards,
)

__all__ = [
    "SMALL",
    "SMALL_GENERATION",
    "SMALL_VISION",
    "Edit",
    "Tensor",
    "encode",
    "make_checkpoint",
    "minute",
    "small",
    "tame",
    "write_file",
    "write_json",
    "write_raw",
    "write_shards",
]

# A vision tower of two layers, to be set as SMALL's `vision_config`.
SMALL_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "patch_size": 2,
    "position_embedding_size": 10,
    "standardize": True,
}


def minute() -> dict[str, Any]:
    """The smallest model with every part: one layer of each kind, a few kilobytes."""
    return small(
        hidden_size=4,
        head_dim=2,
        global_head_dim=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2,
        moe_intermediate_size=2,
        num_experts=2,
        top_k_experts=1,
        vocab_size=128,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )
