"""What each class of weight becomes: presets, by target of a conversion.

Forms go by class of weight and not by one number of bits for all, because classes differ in what they
bear. Error costs denoising steps and not only quality. The router's picks change first, then the table that
is embedding, head and self-conditioning at once, then attention and the dense MLP. Experts, nine tenths of
the bytes, come last.

A load names the preset that would fit where a checkpoint does not, so the table is here and not beside the
converter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dgemma.checkpoint.layouts.base import is_linear, module
from dgemma.formats.quantized import Form, parse_form
from dgemma.network.spec import Param

VISION_PROJECTION = "model.encoder.embed_vision.embedding_projection"

Words = Mapping[str, str]  # class or module -> name of a form

# By target and name, the largest first. MLX's "balanced" is mlx-community's 4-bit pattern, number for number;
# nvfp4's is NVIDIA's published choice: FP4 experts, all else as it was.
PRESETS: dict[str, dict[str, Words]] = {
    "mlx": {
        "quality": {"experts": "8bit", "mlp": "8bit", "attention": "8bit"},
        "balanced": {
            "experts": "4bit",
            "self_conditioning": "4bit",
            "embed": "8bit",
            "attention": "8bit",
            "mlp": "8bit",
            "router": "8bit",
            VISION_PROJECTION: "4bit",
        },
        "small": {
            "experts": "3bit",
            "self_conditioning": "4bit",
            "embed": "6bit",
            "attention": "6bit",
            "mlp": "6bit",
            "router": "8bit",
            VISION_PROJECTION: "4bit",
        },
    },
    "nvfp4": {
        "quality": {"experts": "nvfp4"},
        "balanced": {"experts": "nvfp4"},
        "small": {"experts": "nvfp4", "mlp": "nvfp4", "attention": "nvfp4"},
    },
    "bf16": {"quality": {}, "balanced": {}, "small": {}},
}


@dataclass(frozen=True)
class Recipe:
    """Forms by class of weight, and by module where one differs from its class; None is bfloat16."""

    forms: Mapping[str, Form | None]

    def form(self, param: Param) -> Form | None:
        """What a parameter becomes. Rows that a form does not divide stay bfloat16, as MLX has it.

        Affine forms fall back on groups of 32 first.
        """
        own = self.forms.get(module(param), self.forms.get(param.group)) if is_linear(param) else None
        if own is None or own.fits(param.shape[-1]):
            return own
        finer = replace(own, group=32)
        return finer if own.is_affine and finer.fits(param.shape[-1]) else None


def preset_forms(words: Words, params: Sequence[Param]) -> dict[str, Form | None]:
    """The form of each parameter by name under a preset."""
    chosen = Recipe({name: parse_form(word) for name, word in words.items()})
    return {param.name: chosen.form(param) for param in params}
