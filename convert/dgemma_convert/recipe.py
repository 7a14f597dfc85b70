"""A preset (`dgemma.checkpoint.presets`), and what a user sets on top of it."""

from __future__ import annotations

from collections.abc import Sequence

from dgemma.checkpoint.layouts.base import is_linear, module
from dgemma.checkpoint.presets import VISION_PROJECTION, Recipe, Words
from dgemma.errors import ConfigError
from dgemma.formats.quantized import Form, parse_form
from dgemma.network.spec import GROUPS, Param

CLASSES = tuple(group for group in GROUPS if group != "norm")


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
