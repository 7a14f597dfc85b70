"""A layout: how a format names, types and cuts the tensors of a parameter.

A layout is one description for both directions. `form` says how a parameter is stored: config.json announces
it and the tensors' names confirm it. `pieces` lists the tensors of a parameter, each with its name, type,
shape and place in the record. The reader puts the pieces together (`dgemma.checkpoint.records`), a converter
cuts them out, and any difference from the list is an error. So no format needs its own reading or writing
loop.

    O outputs (rows)  I inputs  E experts  M expert size
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dgemma.errors import CheckpointError
from dgemma.formats.quantized import Form
from dgemma.network.spec import Param

FLOATS = ("BF16", "F16", "F32")
Place = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """One stored tensor: the record's field `role`, or the part of it at `place`.

    Roles are the fields of `Quantized`, "value" for a tensor that is not quantized, and "unused" for one that
    this program does not need and that may be missing. The first of `dtypes` and `shapes` is written; all of
    them are read.
    """

    name: str
    role: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    place: Place | None = None  # None: the whole field


@dataclass(frozen=True)
class Source:
    """The storage of a parameter: its form (None: not quantized) and its tensors."""

    param: Param
    form: Form | None
    pieces: tuple[Piece, ...]
    divides: bool = False  # whether values are divided by the factor (compressed-tensors)


class Layout:
    """A format, for a checkpoint with tensors of these `names`. They confirm the announcement in `where`.

    This base is the unquantized one: every parameter is one tensor under Hugging Face's name. MLX adds
    `.weight` to the names of experts, quantized or not.
    """

    name = "unquantized"

    def __init__(self, names: Collection[str] = (), where: str = ""):
        self.names, self.where = names, where

    def form(self, param: Param) -> Form | None:
        """The form of `param`, None for not quantized."""
        return None

    def pieces(self, param: Param, form: Form | None) -> Iterator[Piece]:
        """The tensors of a parameter stored in this form."""
        of_mlx = param.group == "experts" and f"{param.name}.weight" in self.names
        yield Piece(f"{param.name}.weight" if of_mlx else param.name, "value", FLOATS, (param.shape,))

    def source(self, param: Param) -> Source:
        """The storage of `param`, tensor by tensor."""
        form = self.form(param)
        return Source(param, form, tuple(self.pieces(param, form)), self.divides(form))

    def divides(self, form: Form | None) -> bool:
        """Whether values of this form are divided by their factor."""
        return False

    def announces(self) -> bool:
        """Whether config.json says that something is quantized."""
        return False


def module(param: Param) -> str:
    """The module of a parameter: its name without `.weight`; experts are modules themselves."""
    return param.name.removesuffix(".weight")


def is_linear(param: Param) -> bool:
    """Whether the parameter is a matrix of a linear layer, an embedding or a stack of experts."""
    stacked = param.group == "experts"
    return stacked or (len(param.shape) == 2 and param.name.endswith(".weight"))


def check_experts(param: Param, names: Collection[str], where: str) -> None:
    """CheckpointError for more experts than tensors: a false number must not make a list of that length."""
    if names and param.group == "experts" and param.shape[0] > len(names):
        raise CheckpointError(
            f"{where}: announces {param.shape[0]} experts for {param.name!r}, but the files hold "
            f"{len(names)} tensors in all"
        )


def linears(param: Param) -> Iterator[tuple[str, Place | None, tuple[int, int]]]:
    """The separate linear layers of a parameter: module, place in the stack, shape [O, I].

    Formats that quantize layer by layer take stacks of experts apart, and separate gate from up.
    """
    if param.group != "experts":
        yield module(param), None, (param.shape[0], param.shape[1])
        return
    root, _, stack = param.name.rpartition(".")
    experts, rows, inputs = param.shape
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[stack]
    height = rows // len(names)
    for expert in range(experts):
        for part, name in enumerate(names):
            place = (expert, slice(part * height, (part + 1) * height))
            yield f"{root}.{expert}.{name}", place, (height, inputs)


def nvfp4_pieces(
    path: str, place: Place | None, shape: tuple[int, int], names: tuple[str, str, str, str]
) -> Iterator[Piece]:
    """The tensors of one NVFP4 linear layer [O, I] under their four names: codes, block scales, factor, and
    the unused scale of activations, which weight-only files and experts that calibration never reached lack.
    Scalars are written as [] and read as [] or [1].
    """
    rows, inputs = shape
    codes, scales, factor, unused = (f"{path}.{name}" for name in names)
    scalar: tuple[tuple[int, ...], ...] = ((), (1,))
    yield Piece(codes, "codes", ("U8",), ((rows, inputs // 2),), place)
    yield Piece(scales, "scales", ("F8_E4M3",), ((rows, inputs // 16),), place)
    yield Piece(factor, "factor", ("F32",), scalar, place)
    yield Piece(unused, "unused", ("F32",), scalar, place)
