"""A target format, as the converter sees it: a layout to cut tensors by, and its place in config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dgemma.checkpoint.layouts.base import Layout
from dgemma.checkpoint.presets import Words
from dgemma.formats.quantized import Form
from dgemma.network.spec import Param

Forms = Mapping[str, Form | None]  # by parameter name


class Target:
    """Base of the formats that can be written; by itself the plain one, which quantizes nothing."""

    name = ""
    stores: tuple[str, ...] = ()  # modes beside bf16
    presets: Mapping[str, Words] = MappingProxyType({})
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"})  # of every safetensors file

    def check(self, table: Sequence[Param], forms: Forms) -> None:
        """ConfigError if the format cannot hold these forms."""

    def layout(self, table: Sequence[Param], forms: Forms, factored: Collection[str]) -> Layout:
        """The layout to cut tensors by; `factored`: names of the parameters whose records have a factor."""
        return Layout()

    def announce(self, config: dict[str, Any], table: Sequence[Param], forms: Forms) -> dict[str, Any]:
        """config.json of the output, from the source's without its own announcement."""
        return config

    def files(self, table: Sequence[Param], forms: Forms) -> Mapping[str, Any]:
        """Further JSON files by name."""
        return {}

    def factored(self, form: Form | None) -> bool:
        """Whether a parameter that is quantized anew gets a factor."""
        return False
