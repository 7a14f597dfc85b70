"""What each class of weight becomes: presets, and what a user sets on top of them.

Forms go by class of weight and not by one number of bits for all, because classes differ in what they
bear. Error costs denoising steps and not only quality. The router's picks change first, then the table that
is embedding, head and self-conditioning at once, then attention and the dense MLP. Experts, nine tenths of
the bytes, come last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dgemma.checkpoint.layouts.base import is_linear, module
from dgemma.errors import ConfigError
from dgemma.formats.quantized import Form, parse_form
from dgemma.network.spec import GROUPS, Param

CLASSES = tuple(group for group in GROUPS if group != "norm")
VISION_PROJECTION = "model.encoder.embed_vision.embedding_projection"

Words = Mapping[str, str]  # class or module -> name of a form

# For MLX. "balanced" is mlx-community's 4-bit pattern, number for number.
MLX_PRESETS: dict[str, Words] = {
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
}
# For ModelOpt. "balanced" is NVIDIA's published choice: FP4 experts, all else as it was.
NVFP4_PRESETS: dict[str, Words] = {
    "quality": {"experts": "nvfp4"},
    "balanced": {"experts": "nvfp4"},
    "small": {"experts": "nvfp4", "mlp": "nvfp4", "attention": "nvfp4"},
}
BF16_PRESETS: dict[str, Words] = {"quality": {}, "balanced": {}, "small": {}}


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


def recipe(preset: Words, settings: Sequence[str], table: Sequence[Param], known: Sequence[str]) -> Recipe:
    """The preset with settings `class=form` or `module=form` on top.

    `table` holds the modules that there are, `known` the modes that the target stores. ConfigError
    says what is wrong with a setting.
    """
    words = dict(preset)
    for setting in settings:
        name, equals, word = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected class=format, such as experts=nvfp4")
        words[name] = word
    modules = {module(param): param for param in table if is_linear(param)}
    forms: dict[str, Form | None] = {}
    for name, word in words.items():
        if name not in CLASSES and name not in modules and name != VISION_PROJECTION:
            raise ConfigError(f"no class or module {name!r}; classes: {', '.join(CLASSES)}")
        forms[name] = form = parse_form(word)
        if form is not None and form.mode not in known:
            raise ConfigError(f"{name}={word}: this target stores {', '.join(['bf16', *known])}")
        is_router = name == "router" or (name in modules and modules[name].wide)
        if form is not None and is_router and form.bits < 8:
            raise ConfigError(
                f"{name}={word}: the router is never quantized below 8 bit, as a pick that changes changes a "
                "token's experts: int4 picks agree with bf16 on 86 % of them; take 8bit or bf16"
            )
    return Recipe(forms)
