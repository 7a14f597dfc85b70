"""The layouts of quantized checkpoints, one module each, and how to tell them apart."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from dgemma.checkpoint.layouts.announced import unsupported
from dgemma.checkpoint.layouts.base import Layout
from dgemma.checkpoint.layouts.compressed import CompressedLayout
from dgemma.checkpoint.layouts.mlx import MlxLayout
from dgemma.checkpoint.layouts.modelopt import ModelOptLayout, quantizes_nothing


def detect(announcement: Mapping[str, Any] | None, where: str, names: Collection[str]) -> Layout:
    """The layout that a `quantization` or `quantization_config` entry of config.json announces.

    CheckpointError names `where`, the announcement and the supported ones.
    """
    if announcement is None:
        return Layout(names)
    method = announcement.get("quant_method")
    if method == "modelopt" and quantizes_nothing(announcement):
        return Layout(names)
    if method == "modelopt":
        return ModelOptLayout(announcement, where, names)
    if method == "compressed-tensors":
        return CompressedLayout(announcement, where, names)
    if method in (None, "mlx") and "bits" in announcement:
        return MlxLayout(announcement, where, names)
    if method is None:
        raise unsupported(
            where, "a method that it does not name: there is no quant_method, and no bits of MLX's"
        )
    raise unsupported(where, f"quant_method {reprlib.repr(method)}")
