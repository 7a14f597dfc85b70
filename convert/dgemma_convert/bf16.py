"""bf16: the layout of Google's release, every parameter one bfloat16 tensor under Hugging Face's name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from dgemma.layouts import Layout
from dgemma.spec import Param

from .recipe import BF16_PRESETS
from .target import Forms, Target


class Bf16Target(Target):
    name = "bf16"
    presets = BF16_PRESETS

    def layout(self, table: Sequence[Param], forms: Forms, factored: Collection[str]) -> Layout:
        return Layout()

    def announce(self, config: dict[str, Any], table: Sequence[Param], forms: Forms) -> dict[str, Any]:
        return config
