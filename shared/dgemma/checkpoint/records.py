"""From stored tensors to records.

O outputs (rows)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dgemma.checkpoint.layouts.base import Piece, Source
from dgemma.checkpoint.safetensors import Entry
from dgemma.errors import CheckpointError
from dgemma.formats.encode import bf16_bits
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
    if form.is_affine and "biases" not in fields:
        fields["biases"] = _middle(fields["scales"], form)
    parts = [piece for piece in source.pieces if piece.role == "factor"]
    if parts:
        fields["factor"] = _factor(parts, lead, entries)
    return Quantized(form, **fields, divides=source.divides)


def _stack(parts: Sequence[Piece], shape: tuple[int, ...], entries: Mapping[str, Entry]) -> Stored:
    """One field of this shape: a lone tensor as it lies in its file, or a stack filled part by part.

    Words of codes become bytes; a view is enough, as both are little-endian. A scale of a row counts for each
    of its groups.
    """
    first = entries[parts[0].name].read()
    types = {entries[piece.name].dtype for piece in parts}
    codes, mixed = parts[0].role == "codes", len(types) > 1

    def rows(piece: Piece, count: tuple[int, ...]) -> np.ndarray:
        stored = entries[piece.name].read()
        data = stored.data.view(np.uint8) if codes else stored.to_float32() if mixed else stored.data
        data = data.reshape(*count, -1)
        return data if data.shape[-1] == shape[-1] else np.repeat(data, shape[-1], -1)

    if parts[0].place is None:
        data = rows(parts[0], shape[:-1])
    else:
        # The pieces cover the whole stack, and a missing one raises: no expert keeps random bytes.
        data = np.empty(shape, np.uint8 if codes else np.float32 if mixed else first.data.dtype)
        for piece in parts:
            data[piece.place] = rows(piece, data[piece.place].shape[:-1])
    return Stored(first.name, "U8" if codes else "F32" if mixed else first.dtype, shape, data, first.file)


def _middle(scales: Stored, form: Form) -> Stored:
    """The biases of symmetric integers, which are stored without a sign: −2^(bits − 1) · scale, of its type.

    CheckpointError for scales whose biases that type does not have.
    """
    values = scales.to_float32() * np.float32(-(2 ** (form.bits - 1)))
    data = bf16_bits(values) if scales.dtype == "BF16" else values.astype(scales.data.dtype)
    biases = replace(scales, data=data)
    if not np.isfinite(biases.to_float32()).all():
        raise CheckpointError(
            f"{scales.file}: tensor {scales.name!r} has scales that are too large or not finite"
        )
    return biases


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
