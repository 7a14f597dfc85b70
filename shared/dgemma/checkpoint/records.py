"""From stored tensors to records.

O outputs (rows)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dgemma.checkpoint.layouts.base import Piece, Source
from dgemma.checkpoint.safetensors import Entry
from dgemma.formats.quantized import Form, Quantized
from dgemma.formats.stored import Stored


def make_record(source: Source, form: Form, entries: Mapping[str, Entry]) -> Quantized:
    """The record of a source's tensors, with `Stored` fields. A lone tensor stays a map of its file."""
    lead, inputs = source.param.shape[:-1], source.param.shape[-1]
    fields: dict[str, Stored] = {}
    for role, width in (
        ("codes", inputs * form.bits // 8),
        ("scales", inputs // (form.group or inputs)),
        ("biases", inputs // (form.group or inputs)),
    ):
        parts = [piece for piece in source.pieces if piece.role == role]
        if parts:
            fields[role] = _stack(parts, (*lead, width), entries)
    parts = [piece for piece in source.pieces if piece.role == "factor"]
    if parts:
        fields["factor"] = _factor(parts, lead, entries)
    return Quantized(form, **fields, divides=source.divides)


def _stack(parts: Sequence[Piece], shape: tuple[int, ...], entries: Mapping[str, Entry]) -> Stored:
    """One field of this shape: a lone tensor as it lies in its file, or a uint8 stack filled part by part."""
    first = entries[parts[0].name].read()
    if parts[0].place is None:
        # Words of codes become bytes. A view is enough, as both are little-endian.
        data = first.data.view(np.uint8) if parts[0].role == "codes" else first.data
        return replace(first, dtype="U8" if parts[0].role == "codes" else first.dtype, shape=shape, data=data)
    # The pieces cover the whole stack, and a missing one raises: no expert keeps random bytes.
    data = np.empty(shape, np.uint8)
    for piece in parts:
        data[piece.place] = entries[piece.name].read().data
    return Stored(first.name, "U8", shape, data, first.file)


def _factor(parts: Sequence[Piece], lead: tuple[int, ...], entries: Mapping[str, Entry]) -> Stored:
    """The factor [..., O] in float32, or [..., 1] if all rows of every matrix share theirs."""
    first = entries[parts[0].name].read()
    data = np.empty(lead, np.float32)
    for piece in parts:
        value = entries[piece.name].read().to_float32()
        part = ... if piece.place is None else piece.place
        if value.size == data[part].size:
            data[part] = value.reshape(data[part].shape)
        else:  # one number for each matrix
            data[part] = value if value.ndim == data[part].ndim else value.reshape(())
    # Equal factors shrink to one for each matrix, as `quantize` makes them.
    if (data == data[..., :1]).all():
        data = data[..., :1].copy()
    return Stored(first.name, "F32", data.shape, data, first.file)
