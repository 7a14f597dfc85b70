"""MLX: mlx-community's convention, as mlx-vlm and mlx-lm read it (layout: `dgemma.checkpoint.layouts.mlx`).

The experts' form is the default in config.json, and every other quantized module has an override. Modules
that stay bfloat16 have none: MLX knows them by their lack of scales.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import MappingProxyType
from typing import Any

from dgemma.checkpoint.layouts.base import Layout, module
from dgemma.checkpoint.layouts.mlx import FACTOR, MlxLayout
from dgemma.checkpoint.presets import PRESETS
from dgemma.formats.quantized import Form
from dgemma.network.spec import Param

from .target import Forms, Target


class MlxTarget(Target):
    name = "mlx"
    stores = ("affine", "mxfp4", "mxfp8", "nvfp4")
    presets = PRESETS["mlx"]
    metadata = MappingProxyType({"format": "mlx"})

    def layout(self, table: Sequence[Param], forms: Forms, factored: Collection[str]) -> Layout:
        names = {f"{module(param)}.{FACTOR}" for param in table if param.name in factored}
        names |= {f"{param.name}.weight" for param in table if param.group == "experts"}
        if not any(forms.values()):
            return Layout(names)
        return MlxLayout(_announcement(table, forms), "", names)

    def announce(self, config: dict[str, Any], table: Sequence[Param], forms: Forms) -> dict[str, Any]:
        if not any(param.group == "vision" for param in table):
            config = config | {"vision_config": None}  # else mlx-vlm waits for the tower's tensors
        if not any(forms.values()):
            return config
        announcement = _announcement(table, forms)
        return config | {"quantization": announcement, "quantization_config": announcement}


def _announcement(table: Sequence[Param], forms: Forms) -> dict[str, Any]:
    """The default and the overrides; quantized experts are the default, or else the first form there is."""
    experts = next((form for p in table if p.group == "experts" and (form := forms[p.name])), None)
    default = experts or next(form for param in table if (form := forms[param.name]))
    overrides = {
        module(param): _entry(form, explicit=not default.is_affine)
        for param in table
        if (form := forms[param.name]) is not None and form != default
    }
    return _entry(default, explicit=True) | overrides


def _entry(form: Form, explicit: bool = True) -> dict[str, Any]:
    """A form as MLX writes it: a mode that is not given means affine."""
    entry: dict[str, Any] = {"group_size": form.group, "bits": form.bits}
    return entry | ({"mode": form.mode} if explicit or not form.is_affine else {})
