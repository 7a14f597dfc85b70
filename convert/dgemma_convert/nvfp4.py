"""nvfp4: NVIDIA ModelOpt's layout (`dgemma.checkpoint.layouts.modelopt`), with its two announcements.

`input_scale` is for engines that quantize activations to 4 bits. There is no calibration here: it is 1,
which leaves the scale of activations to the blocks of 16; a ModelOpt source keeps its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import dgemma
from dgemma.checkpoint.faults import HF_QUANT_CONFIG
from dgemma.checkpoint.layouts.base import Layout, is_linear
from dgemma.checkpoint.layouts.modelopt import ModelOptLayout
from dgemma.checkpoint.presets import PRESETS
from dgemma.errors import ConfigError
from dgemma.formats.quantized import NVFP4, Form
from dgemma.network.spec import Param

from .target import Forms, Target

# NVIDIA's list as patterns, by the class of weight that each keeps out; vLLM matches them with fnmatch.
_EXCLUDES = {
    "embed": ("lm_head*", "*embed_tokens*"),
    "vision": ("*embed_vision*", "*vision_tower*"),
    "mlp": ("*.mlp.*",),
    "router": ("*.router*",),
    "attention": ("*.self_attn*",),
    "self_conditioning": ("*self_conditioning*",),
    "experts": ("*.experts*",),
}
_MAY = ("experts", "mlp", "attention", "self_conditioning")


class Nvfp4Target(Target):
    name = "nvfp4"
    stores = ("nvfp4",)
    presets = PRESETS["nvfp4"]

    def check(self, table: Sequence[Param], forms: Forms) -> None:
        for param in table:
            if forms[param.name] is not None and param.group not in _MAY:
                raise ConfigError(f"ModelOpt's layout has no quantized {param.group}; only {', '.join(_MAY)}")
        for group in _MAY:
            own = {forms[param.name] for param in table if param.group == group and is_linear(param)}
            if len(own) > 1:
                raise ConfigError(
                    f"ModelOpt's exclusions go by class: all of {group} in nvfp4 or none of it; some of its "
                    "rows do not divide into groups of 16"
                )

    def layout(self, table: Sequence[Param], forms: Forms, factored: Collection[str]) -> Layout:
        return ModelOptLayout({}, "")

    def factored(self, form: Form | None) -> bool:
        return form == NVFP4

    def announce(self, config: dict[str, Any], table: Sequence[Param], forms: Forms) -> dict[str, Any]:
        if not any(forms.values()):
            return config
        four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        return config | {
            "quantization_config": {
                "config_groups": {
                    "group_0": {"input_activations": four, "weights": four, "targets": ["Linear"]}
                },
                "ignore": _excluded(table, forms),
                "quant_algo": "NVFP4",
                "group_size": 16,
                "producer": _PRODUCER,
                "quant_method": "modelopt",
            }
        }

    def files(self, table: Sequence[Param], forms: Forms) -> Mapping[str, Any]:
        if not any(forms.values()):
            return {}
        quantization = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": _excluded(table, forms),
        }
        return {HF_QUANT_CONFIG: {"producer": _PRODUCER, "quantization": quantization}}


_PRODUCER = {"name": "dgemma", "version": dgemma.__version__}


def _excluded(table: Sequence[Param], forms: Forms) -> list[str]:
    """Patterns of the classes that stay as they are."""
    quantized = {param.group for param in table if forms[param.name] is not None}
    return [pattern for group, own in _EXCLUDES.items() if group not in quantized for pattern in own]
