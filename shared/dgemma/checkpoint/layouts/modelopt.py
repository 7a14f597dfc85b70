"""NVIDIA ModelOpt's NVFP4 layout: four tensors for each expert's projection, the rest as it was.

    weight U8 [O, I/2]  weight_scale F8_E4M3 [O, I/16]  weight_scale_2 F32 []  input_scale F32 []

The input scale is for calibrated 4-bit activations, which this program does not have: it is checked and left
unread. config.json ("ignore") or hf_quant_config.json ("exclude_modules") lists the excluded modules. Other
experts must be quantized, as the format is made for them. The tensors decide for all remaining modules,
because exporters write their lists in several dialects.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dgemma.checkpoint.layouts.base import (
    Layout,
    Piece,
    check_experts,
    is_linear,
    linears,
    matches,
    module,
    nvfp4_pieces,
    strings,
    unsupported,
)
from dgemma.formats.quantized import NVFP4, Form
from dgemma.network.spec import Param


class ModelOptLayout(Layout):
    """What a ModelOpt `quantization_config` announces."""

    name = "modelopt"

    def __init__(self, announcement: Mapping[str, Any], where: str, names: Collection[str] = ()):
        super().__init__(names, where)
        for key, supported in (("quant_algo", "NVFP4"), ("group_size", 16)):
            if announcement.get(key, supported) != supported:
                raise unsupported(where, f"ModelOpt {key} {reprlib.repr(announcement[key])}")
        self.excluded = [
            pattern for key in ("ignore", "exclude_modules") for pattern in strings(announcement.get(key))
        ]

    def announces(self) -> bool:
        return True

    def form(self, param: Param) -> Form | None:
        if not is_linear(param) or any(matches(module(param), pattern) for pattern in self.excluded):
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
