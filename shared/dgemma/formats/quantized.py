"""Quantized weights as records: the stored fields of a matrix, and the forms that they have.

A record is a type of weight. `Ops.linear` and `Ops.expert_linear` accept it in place of an array, and the
graph cannot tell. One kind of record covers every format on the hub:

    value = code · scale (+ bias) · factor        (or / factor, in compressed-tensors)

Each group of adjacent inputs has a scale (and bias), each matrix or row a float32 factor. Formats differ in
how they write code and scale. `dgemma.network.ops.decoding.dequantize` defines the decoding,
`dgemma.formats.encode.quantize` the encoding.

    O outputs (rows)  I inputs  E experts
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dgemma.errors import ConfigError

Array = Any

# Number types of codes and of scales by mode. None: codes count from 0 (affine), scales are floats or absent.
MODES: dict[str, tuple[str | None, str | None]] = {
    "affine": (None, None),
    "mxfp4": ("E2M1", "E8M0"),
    "mxfp8": ("E4M3", "E8M0"),
    "nvfp4": ("E2M1", "E4M3"),
    "fp8": ("E4M3", None),
}
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass(frozen=True)
class Form:
    """How a matrix is quantized: mode, bits of a code, and inputs that share a scale (0: the whole row)."""

    mode: str
    bits: int
    group: int

    def __str__(self) -> str:
        return f"{self.bits}bit-g{self.group}" if self.is_affine else self.mode

    @property
    def code_type(self) -> str | None:
        """The number type of a code, "E2M1" or "E4M3"; None if codes count from 0."""
        return MODES[self.mode][0]

    @property
    def scale_type(self) -> str | None:
        """The number type of a group's scale, "E4M3" or "E8M0"; None if it is a float or absent."""
        return MODES[self.mode][1]

    @property
    def is_affine(self) -> bool:
        """Whether a group has a scale and a bias, both floats, and codes count from 0."""
        return self.code_type is None

    @property
    def scales_rows(self) -> bool:
        """Whether a row's factor is its only scale."""
        return self.group == 0

    def fits(self, inputs: int) -> bool:
        """Whether rows of `inputs` divide into whole groups and whole 32-bit words."""
        return inputs % (self.group or 1) == 0 and inputs * self.bits % 32 == 0


NVFP4, MXFP4, MXFP8 = Form("nvfp4", 4, 16), Form("mxfp4", 4, 32), Form("mxfp8", 8, 32)
FP8 = Form("fp8", 8, 0)
_NAMED = {"nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp8": MXFP8, "fp8": FP8}


def affine(bits: Any, group: Any) -> Form:
    """MLX's affine form; ConfigError for widths and groups that MLX lacks."""
    whole = type(bits) is int and type(group) is int  # a file may say 4.0, or true
    if not whole or bits not in AFFINE_BITS or group not in AFFINE_GROUPS:
        raise ConfigError(
            f"affine quantization with {reprlib.repr(bits)} bits in groups of {reprlib.repr(group)}; "
            f"supported: bits {', '.join(map(str, AFFINE_BITS))}, groups {', '.join(map(str, AFFINE_GROUPS))}"
        )
    return Form("affine", bits, group)


def parse_form(text: str) -> Form | None:
    """The form of a word on the command line, None for "bf16"; ConfigError names the known ones."""
    if text == "bf16":
        return None
    if text in _NAMED:
        return _NAMED[text]
    if match := re.fullmatch(r"(\d)bit(?:-g(\d+))?", text):
        return affine(int(match[1]), int(match[2] or 64))
    raise ConfigError(
        f"unknown format {text!r}; known: bf16, {', '.join(_NAMED)}, and affine ones as 4bit, 8bit, 6bit-g32"
    )


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized matrix [O, I] or stack [E, O, I]. Fields are `Stored`, NumPy or a backend's arrays."""

    form: Form
    codes: Array  # uint8 [..., O, I·bits/8], one stream of bits for each row
    scales: Array | None = None  # [..., O, I/group]: floats (affine), uint8 codes (mx and nv modes)
    biases: Array | None = None  # floats like scales, affine only
    factor: Array | None = None  # float32 [..., O] by row, or [..., 1] by matrix
    divides: bool = False  # whether the value is divided by the factor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., O, I] of the matrix or stack, not of the codes."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.form.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(x.nbytes for x in (self.codes, self.scales, self.biases, self.factor) if x is not None)

    def map(self, function: Callable[[Array], Array]) -> Quantized:
        """The record with `function` applied to each of its fields."""
        fields = {name: getattr(self, name) for name in ("codes", "scales", "biases", "factor")}
        return replace(self, **{name: function(x) for name, x in fields.items() if x is not None})

    def __getitem__(self, index: Array) -> Quantized:
        """Rows of a matrix, or experts of a stack: an index, a slice or an array of indices."""
        # The factor of a whole matrix holds for its rows, too: it is not indexed.
        shared = self.factor is not None and self.factor.shape == (1,)
        part = (replace(self, factor=None) if shared else self).map(lambda x: x[index])
        return replace(part, factor=self.factor) if shared else part

    def __len__(self) -> int:
        return self.shape[0]
