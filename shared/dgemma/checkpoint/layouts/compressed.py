"""compressed-tensors' layouts (RedHatAI): NVFP4 with a global scale that divides, FP8 with scales of rows.

    nvfp4-pack-quantized: weight_packed U8 [O, I/2], weight_scale F8_E4M3 [O, I/16],
                          weight_global_scale F32 [1], input_global_scale F32 [1]
    float-quantized:      weight F8_E4M3 [O, I], weight_scale [O, 1]

Both take stacks of experts apart. `ignore` lists modules, or regular expressions after "re:".
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dgemma.checkpoint.layouts.base import (
    FLOATS,
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
from dgemma.formats.quantized import FP8, NVFP4, Form
from dgemma.network.spec import Param


class CompressedLayout(Layout):
    """What a compressed-tensors `quantization_config` announces; groups may mix the two formats."""

    name = "compressed-tensors"

    def __init__(self, announcement: Mapping[str, Any], where: str, names: Collection[str] = ()):
        super().__init__(names, where)
        groups = announcement.get("config_groups")
        groups = list(groups.values()) if isinstance(groups, Mapping) else []
        self.announced = {_group_form(group, announcement, where) for group in groups if group}
        if not self.announced:
            self.announced = {_format_form(announcement.get("format"), where)}
        patterns = [_wildcard(pattern) for pattern in strings(announcement.get("ignore"))]
        self.ignored = [pattern for pattern in patterns if pattern is not None]
        self.opaque = None in patterns

    def announces(self) -> bool:
        return True

    def divides(self, form: Form | None) -> bool:
        return form == NVFP4

    def form(self, param: Param) -> Form | None:
        if not is_linear(param) or param.group == "embed" or self._ignores(module(param)):
            return None
        first = next(linears(param))[0]
        if NVFP4 in self.announced and f"{first}.weight_packed" in self.names:
            return NVFP4
        if FP8 in self.announced and f"{first}.weight_scale" in self.names:
            return FP8
        # Experts must be quantized, so that the error lists each missing tensor.
        wanted = param.group == "experts" and not (self.opaque and param.name in self.names)
        return min(self.announced, key=str) if wanted else None  # a set's order differs from run to run

    def _ignores(self, path: str) -> bool:
        return any(matches(path, pattern) for pattern in self.ignored)

    def pieces(self, param: Param, form: Form | None) -> Iterator[Piece]:
        if form is None:
            yield from super().pieces(param, form)
            return
        check_experts(param, self.names, self.where)
        for path, place, (rows, inputs) in linears(param):
            if form == NVFP4:
                yield from nvfp4_pieces(path, place, (rows, inputs), _NVFP4_NAMES)
                continue
            yield Piece(f"{path}.weight", "codes", ("F8_E4M3",), ((rows, inputs),), place)
            yield Piece(f"{path}.weight_scale", "factor", FLOATS, ((rows, 1), (rows,)), place)


_NVFP4_NAMES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


def _wildcard(pattern: str) -> str | None:
    """An ignore entry as a wildcard; None for a regular expression that is more than one.

    Expressions come from a file and are never run: one can keep a matcher busy for ever. The tensors show
    what an unreadable entry leaves out.
    """
    if not pattern.startswith("re:"):
        return pattern
    plain = pattern[3:].removeprefix("^").replace(".*", "*").replace("\\.", ".")
    head, dollar = plain.removesuffix("$"), plain.endswith("$")
    return (head if dollar else f"{head}*") if re.fullmatch(r"[\w.*-]+", head) else None


_FORMATS = {"nvfp4-pack-quantized": NVFP4, "float-quantized": FP8}


def _format_form(name: Any, where: str) -> Form:
    if not isinstance(name, str) or name not in _FORMATS:
        raise unsupported(where, f"compressed-tensors format {reprlib.repr(name)}")
    return _FORMATS[name]


def _group_form(group: Any, announcement: Mapping[str, Any], where: str) -> Form:
    """The form of one entry of `config_groups`, whose own numbers must be those of the format."""
    if not isinstance(group, Mapping) or not isinstance(weights := group.get("weights"), Mapping):
        raise unsupported(where, f"an unreadable compressed-tensors group {reprlib.repr(group)}")
    form = _format_form(group.get("format") or announcement.get("format"), where)
    wanted = {"num_bits": form.bits, "type": "float"}
    wanted |= {"group_size": 16} if form == NVFP4 else {"strategy": "channel"}
    for key, value in wanted.items():
        if weights.get(key, value) != value:
            raise unsupported(where, f"compressed-tensors {key} {reprlib.repr(weights[key])}")
    return form
