"""NVIDIA ModelOpt's NVFP4 layout: four tensors for each expert's projection, the rest as it was.

    weight U8 [O, I/2]  weight_scale F8_E4M3 [O, I/16]  weight_scale_2 F32 []  input_scale F32 []

The input scale is for calibrated 4-bit activations, which this program does not have: it is checked and left
unread, and may be missing. config.json ("ignore") or hf_quant_config.json ("exclude_modules") lists the
excluded modules. Other experts must be quantized, as the format is made for them. The tensors decide for all
remaining modules, because exporters write their lists in several dialects.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dgemma.checkpoint.layouts.announced import Patterns, refuse_changes, strings, unsupported
from dgemma.checkpoint.layouts.base import (
    Layout,
    Piece,
    check_experts,
    is_linear,
    linears,
    module,
    nvfp4_pieces,
)
from dgemma.files import whole
from dgemma.formats.quantized import NVFP4, Form
from dgemma.network.spec import Param


class ModelOptLayout(Layout):
    """What a ModelOpt `quantization_config` announces."""

    name = "modelopt"

    def __init__(self, announcement: Mapping[str, Any], where: str, names: Collection[str] = ()):
        super().__init__(names, where)
        refuse_changes(announcement, where, "ModelOpt")
        # W4A16: the same weights without scales of activations.
        _check(announcement, {"quant_algo": ("NVFP4", "W4A16_NVFP4"), "group_size": (16,)}, where)
        groups = announcement.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping):
                _check(weights, {"num_bits": (4,), "type": ("float",), "group_size": (16,)}, where)
        keys = ("ignore", "exclude_modules")
        listed = [pattern for key in keys for pattern in strings(announcement.get(key), where, key)]
        self.excluded = Patterns(listed, where)

    def announces(self) -> bool:
        return True

    def form(self, param: Param) -> Form | None:
        if not is_linear(param) or self.excluded.match(module(param)):
            return None
        if param.group == "experts":
            return NVFP4
        return NVFP4 if f"{module(param)}.weight_scale" in self.names else None

    def pieces(self, param: Param, form: Form | None) -> Iterator[Piece]:
        if form is None:
            yield from super().pieces(param, form)
            return
        check_experts(param, self.names, self.where)
        for path, place, shape in linears(param):
            yield from nvfp4_pieces(path, place, shape, _NAMES)


_NAMES = ("weight", "weight_scale", "weight_scale_2", "input_scale")


def quantizes_nothing(announcement: Mapping[str, Any]) -> bool:
    """Whether a ModelOpt announcement is of the KV cache alone: its algorithm for weights is null."""
    named = announcement.get("quant_algo", "") is not None
    return not named and not announcement.get("config_groups")


def _check(found: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """CheckpointError for a key whose value is neither one of those that are wanted nor null."""
    for key, values in wanted.items():
        if (value := whole(found.get(key))) is not None and value not in values:
            raise unsupported(where, f"ModelOpt {key} {reprlib.repr(value)}")
