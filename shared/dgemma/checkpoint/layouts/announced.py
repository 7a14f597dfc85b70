"""What an announcement says beside a form: modules that it leaves out, and what no layout here computes."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from fnmatch import translate
from typing import Any

from dgemma.errors import CheckpointError

SUPPORTED = (
    "MLX (affine, mxfp4, mxfp8, nvfp4), ModelOpt NVFP4, and compressed-tensors NVFP4, FP8 with a scale a row "
    "and packed symmetric integers of 4 or 8 bits"
)

# Keys whose value changes what stored weights mean, or what they are multiplied with.
_CHANGES = re.compile(
    "transform_config|transforms$|rotat|hadamard|pre_quant|zero_?point|sparsity_config|actorder|desc_act"
    "|smooth_?quant|svd|low_?rank"
)
# Values of them that do not: the order in which columns were rounded, and weights that are stored whole.
_HARMLESS = ({"actorder": "weight"}, {"actorder": "static"}, {"sparsity_config": "dense"})

_LONGEST = 200  # characters beside "*" of a pattern that can name a module
_MOST = 1000  # wildcards of a list, which are tried one after the other


def unsupported(where: str, what: str) -> CheckpointError:
    """The error for a quantization that no layout here reads."""
    return CheckpointError(f"{where}: quantized with {what}, which is not supported; supported: {SUPPORTED}")


def refuse_changes(announcement: Mapping[str, Any], where: str, method: str) -> None:
    """CheckpointError for an announced rotation, sparsity, zero point or scale of inputs: none is read."""
    for key, value in _entries(announcement):
        if not _CHANGES.search(key.lower()) or not _says_something(value):
            continue
        plain = value.get("format") if isinstance(value, Mapping) else value
        if {key: plain} not in _HARMLESS:
            raise unsupported(where, f"{method} {key} {reprlib.repr(value)}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth, which may be deeper than Python calls."""
    rest = [value]
    while rest:
        node = rest.pop()
        if isinstance(node, Mapping):
            yield from node.items()
        rest += node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()


def _says_something(value: Any) -> bool:
    """Whether a value is neither null, false, zero nor empty, nor made of such values alone."""
    rest = [value]
    while rest:
        node = rest.pop()
        if not isinstance(node, Mapping | list) and node:
            return True
        rest += node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return False


def strings(value: Any, where: str, key: str) -> list[str]:
    """The strings of a list of modules; null is an empty one. CheckpointError for anything but a list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise CheckpointError(f"{where}: {key!r} is not a list of modules: {reprlib.repr(value)}")
    return [item for item in value if isinstance(item, str)]


class Patterns:
    """Modules as exporters list them: paths, tails of paths, names of classes, or wildcards.

    CheckpointError for more wildcards than a list has a use for.
    """

    def __init__(self, patterns: list[str], where: str):
        short = dict.fromkeys(p for p in patterns if len(p.replace("*", "")) <= _LONGEST)
        wild = [pattern for pattern in short if re.search(r"[*?\[]", pattern)]
        if len(wild) > _MOST:
            raise CheckpointError(f"{where}: lists {len(wild):,} wildcards; at most {_MOST:,} are read")
        self._plain = set(short) - set(wild)
        self._wild = re.compile("|".join(map(translate, wild))) if wild else None

    def match(self, path: str) -> bool:
        """Whether a pattern names a module, one around it, or the tail of either."""
        parts = path.split(".")
        names = {".".join(parts[start:end]) for end in range(1, len(parts) + 1) for start in range(0, end)}
        wild = self._wild
        return not self._plain.isdisjoint(names) or (wild is not None and any(map(wild.match, names)))
