"""MLX's layout (mlx-community): `weight` words, `scales` and `biases` beside each other, experts stacked.

config.json has a default {group_size, bits, mode} under "quantization" and, by module path, an override or
false. A module without an override is quantized if it has `scales`: MLX itself reads the files so.

MLX has no place for NVFP4's factor. A converted checkpoint that needs one has `weight_scale_2`, which mlx-vlm
(0.7.10) reads too: one number, or one for each expert, or one for each row.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dgemma.checkpoint.layouts.base import FLOATS, Layout, Piece, is_linear, module
from dgemma.errors import CheckpointError, ConfigError
from dgemma.files import whole
from dgemma.formats.quantized import MXFP4, MXFP8, NVFP4, Form, affine
from dgemma.network.spec import Param

_FLOATING = {"mxfp4": MXFP4, "mxfp8": MXFP8, "nvfp4": NVFP4}
FACTOR = "weight_scale_2"


class MlxLayout(Layout):
    """What an MLX `quantization` entry announces."""

    name = "mlx"

    def __init__(self, announcement: Mapping[str, Any], where: str, names: Collection[str] = ()):
        super().__init__(names, where)
        self.default = self._form(announcement, "quantization")
        # mlx-vlm puts the name of the wrapper before some paths.
        self.overrides = {
            path.removeprefix("language_model."): value
            for path, value in announcement.items()
            if isinstance(value, Mapping | bool)
        }

    def announces(self) -> bool:
        return True

    def _form(self, entry: Mapping[str, Any], key: str) -> Form:
        """The form of {group_size, bits, mode}; the default mode is affine."""
        mode = "affine" if entry.get("mode") is None else entry["mode"]
        bits, group = whole(entry.get("bits")), whole(entry.get("group_size", 64))
        fault = f"{self.where}: {key}: "
        if mode == "affine":
            try:
                return affine(bits, group)
            except ConfigError as error:
                raise CheckpointError(fault + str(error)) from None
        form = _FLOATING.get(mode) if isinstance(mode, str) else None
        if form is None or (bits, group) != (form.bits, form.group):
            raise CheckpointError(
                f"{fault}mode {reprlib.repr(mode)} with {reprlib.repr(bits)} bits in groups of "
                f"{reprlib.repr(group)} is not supported; supported: affine, "
                + ", ".join(f"{f.mode} ({f.bits} bits in groups of {f.group})" for f in _FLOATING.values())
            )
        return form

    def form(self, param: Param) -> Form | None:
        if not is_linear(param):
            return None
        path = module(param)
        override = self.overrides.get(path)
        if isinstance(override, Mapping):
            return self._form(override, path)
        return self.default if override is not False and f"{path}.scales" in self.names else None

    def pieces(self, param: Param, form: Form | None) -> Iterator[Piece]:
        path = module(param)
        if form is None:
            yield from super().pieces(param, form)
            return
        *rows, inputs = param.shape
        yield Piece(f"{path}.weight", "codes", ("U32",), ((*rows, inputs * form.bits // 32),))
        scales = (*rows, inputs // form.group)
        types = FLOATS if form.is_affine else ("U8",)
        yield Piece(f"{path}.scales", "scales", types, (scales,))
        if form.is_affine:
            yield Piece(f"{path}.biases", "biases", types, (scales,))
        if form.mode == "nvfp4" and f"{path}.{FACTOR}" in self.names:
            whole = (*param.shape[:-2], 1)
            yield Piece(f"{path}.{FACTOR}", "factor", ("F32",), (tuple(rows), whole, ()))
