"""compressed-tensors' layouts (RedHatAI): NVFP4 with a global scale that divides, FP8 with scales of rows,
symmetric integers.

    nvfp4-pack-quantized: weight_packed U8 [O, I/2], weight_scale F8_E4M3 [O, I/16],
                          weight_global_scale F32 [1], input_global_scale F32 [1]
    float-quantized:      weight F8_E4M3 [O, I], weight_scale [O, 1]
    pack-quantized:       weight_packed I32 [O, I·bits/32], weight_scale [O, I/group] or [O, 1] for a row,
                          weight_shape I64 [2]; a code is the integer + 2^(bits − 1), the first one lowest

All take stacks of experts apart. `ignore` lists modules, or regular expressions after "re:". An integer is
MLX's affine form: its words are the same, and the bias is −2^(bits − 1) · scale.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dgemma.checkpoint.layouts.announced import Patterns, refuse_changes, strings, unsupported
from dgemma.checkpoint.layouts.base import (
    FLOATS,
    Layout,
    Piece,
    check_experts,
    is_linear,
    linears,
    module,
    nvfp4_pieces,
)
from dgemma.files import whole
from dgemma.formats.quantized import AFFINE_GROUPS, FP8, NVFP4, Form, affine
from dgemma.network.spec import Param


@dataclass(frozen=True)
class _Group:
    """An entry of `config_groups`: a kind of weights ("nvfp4", "fp8", "int") and the modules that have it."""

    kind: str
    bits: int
    size: int | None  # inputs that share a scale; None: the whole row
    targets: Patterns

    def form(self, inputs: int) -> Form:
        """The form of rows of so many `inputs`. A scale of a whole row counts for each of its groups."""
        if self.kind != "int":
            return NVFP4 if self.kind == "nvfp4" else FP8
        fitting = (size for size in reversed(AFFINE_GROUPS) if inputs % size == 0)
        return affine(self.bits, self.size or next(fitting, AFFINE_GROUPS[0]))


class CompressedLayout(Layout):
    """What a compressed-tensors `quantization_config` announces; groups may mix the formats."""

    name = "compressed-tensors"

    def __init__(self, announcement: Mapping[str, Any], where: str, names: Collection[str] = ()):
        super().__init__(names, where)
        refuse_changes(announcement, where, "compressed-tensors")
        entries = announcement.get("config_groups")
        entries = [entry for entry in entries.values() if entry] if isinstance(entries, Mapping) else []
        read = (_group(entry, announcement, where) for entry in entries)
        self.groups = [group for group in read if group is not None]
        if not self.groups:
            self.groups = [_group_of_format(announcement.get("format"), where)]
        patterns = [_wildcard(pattern) for pattern in strings(announcement.get("ignore"), where, "ignore")]
        self.ignored = Patterns([pattern for pattern in patterns if pattern is not None], where)
        self.opaque = None in patterns

    def announces(self) -> bool:
        return True

    def divides(self, form: Form | None) -> bool:
        return form == NVFP4

    def form(self, param: Param) -> Form | None:
        group = self._group(param)
        return group.form(param.shape[-1]) if group else None

    def _group(self, param: Param) -> _Group | None:
        if not is_linear(param) or param.group == "embed" or self.ignored.match(module(param)):
            return None
        first = next(linears(param))[0]
        if found := [group for group in self.groups if self._stores(group, first)]:
            return _chosen(found, first)
        # Experts must be quantized, so that the error lists each missing tensor.
        wanted = param.group == "experts" and not (self.opaque and param.name in self.names)
        return _chosen(self.groups, first) if wanted else None

    def _stores(self, group: _Group, path: str) -> bool:
        """Whether the names of a linear layer's tensors are those of a group's kind."""
        packed = f"{path}.weight_packed" in self.names
        if group.kind == "fp8":
            return f"{path}.weight_scale" in self.names and not packed
        # Where both packed kinds are announced, the global scale tells them apart.
        both = {"nvfp4", "int"} <= {own.kind for own in self.groups}
        return packed and (
            not both or (f"{path}.weight_global_scale" in self.names) == (group.kind == "nvfp4")
        )

    def pieces(self, param: Param, form: Form | None) -> Iterator[Piece]:
        group = self._group(param)
        if form is None or group is None:
            yield from super().pieces(param, form)
            return
        check_experts(param, self.names, self.where)
        for path, place, (rows, inputs) in linears(param):
            if form == NVFP4:
                yield from nvfp4_pieces(path, place, (rows, inputs), _NVFP4_NAMES)
                continue
            whole_row: tuple[tuple[int, ...], ...] = ((rows, 1), (rows,))
            if form == FP8:
                yield Piece(f"{path}.weight", "codes", ("F8_E4M3",), ((rows, inputs),), place)
                yield Piece(f"{path}.weight_scale", "factor", FLOATS, whole_row, place)
                yield Piece(f"{path}.input_scale", "unused", ("F32", "BF16", "F16"), ((1,), ()), place)
                continue
            words = (rows, inputs * form.bits // 32)
            scales = ((rows, inputs // form.group),) if group.size else whole_row
            yield Piece(f"{path}.weight_packed", "codes", ("I32",), (words,), place)
            yield Piece(f"{path}.weight_scale", "scales", FLOATS, scales, place)
            yield Piece(f"{path}.weight_shape", "unused", ("I64", "I32"), ((2,),), place)


_NVFP4_NAMES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


def _chosen(groups: list[_Group], path: str) -> _Group:
    """The first group with a target that names the module; the first of all if only classes are named."""
    return next((group for group in groups if group.targets.match(path)), groups[0])


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


_KINDS = {"nvfp4-pack-quantized": "nvfp4", "float-quantized": "fp8", "pack-quantized": "int"}


def _kind(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in _KINDS:
        raise unsupported(where, f"compressed-tensors format {reprlib.repr(name)}")
    return _KINDS[name]


def _group_of_format(name: Any, where: str) -> _Group:
    """The group of an announcement without any, whose format must say everything."""
    if (kind := _kind(name, where)) == "int":
        raise unsupported(where, f"compressed-tensors format {name!r} without the bits of a group")
    return _Group(kind, 4 if kind == "nvfp4" else 8, None, Patterns([], where))


# What a group may say of its weights, by kind. None stands for a missing key and for null.
_WANTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "nvfp4": {"num_bits": (4, None), "type": ("float", None), "group_size": (16, None)},
    "fp8": {"num_bits": (8, None), "type": ("float", None), "strategy": ("channel", None)},
    "int": {
        "num_bits": (4, 8),
        "type": ("int", None),
        "strategy": ("group", "channel", None),
        "group_size": (*AFFINE_GROUPS, -1, None),
    },
}


def _group(entry: Any, announcement: Mapping[str, Any], where: str) -> _Group | None:
    """A group from its entry; None for one that quantizes no weights, as for a KV cache."""
    weights = entry.get("weights") if isinstance(entry, Mapping) else None
    if isinstance(entry, Mapping) and "weights" in entry and weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise unsupported(where, f"an unreadable compressed-tensors group {reprlib.repr(entry)}")
    kind = _kind(entry.get("format") or announcement.get("format"), where)
    found = {
        key: whole(weights.get(key)) for key in ("num_bits", "type", "strategy", "group_size", "symmetric")
    }
    for key, values in {**_WANTED[kind], "symmetric": (True, None)}.items():
        if found[key] not in values:
            raise unsupported(where, f"compressed-tensors {key} {reprlib.repr(found[key])}")
    size = (
        None if found["group_size"] in (-1, None) or found["strategy"] == "channel" else found["group_size"]
    )
    if kind == "int" and found["strategy"] == "group" and size is None:
        raise unsupported(where, "compressed-tensors groups without a group_size")
    targets = [_wildcard(target) for target in strings(entry.get("targets"), where, "targets")]
    return _Group(kind, found["num_bits"], size, Patterns([t for t in targets if t is not None], where))
