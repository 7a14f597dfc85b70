"""One parameter, or a part of it along its first axis, from how it is stored to how it is written.

Parts keep memory small whatever the size of a tensor: a few experts, or a block of rows. Records that pass
through keep their codes and scales bit for bit; all else goes through float32 values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from dgemma.errors import CheckpointError
from dgemma.formats.encode import bf16_bits, blocks, quantize
from dgemma.formats.quantized import Quantized
from dgemma.formats.stored import Stored
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops.decoding import dequantize

from .plan import Job, Output

PART_WEIGHTS = 1 << 22  # weights in a part: 16 MB of float32, an expert of the release
_OPS = NumpyOps()

Fields = Mapping[str, np.ndarray]  # by role, raw as written


def parts(job: Job) -> Iterator[tuple[int, int]]:
    """Ranges of the first axis to convert at a time.

    A factor that quantizing makes is one a matrix, so a lone matrix with one is not cut.
    """
    shape = job.param.shape
    whole = len(shape) == 1 or (job.factored and not job.kept and len(shape) == 2)
    rows = shape[0] if whole else max(1, PART_WEIGHTS * shape[0] // max(1, job.param.size))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def fields(stored: Stored | Quantized, job: Job, start: int, stop: int) -> Fields:
    """The fields of rows or experts start…stop as they are written; CheckpointError for values not finite."""
    part = stored[start:stop]
    if job.kept:
        assert isinstance(part, Quantized)
        return _kept(part, job)
    if job.form is None and isinstance(part, Stored) and part.dtype == "BF16":
        x, finite = part.data, ((part.data & 0x7F80) != 0x7F80).all()
    else:
        x = values(part)
        finite = np.isfinite(x).all()
    if not finite:
        name, file = _origin(stored)
        raise CheckpointError(
            f"{file}: tensor {name!r} has values that are not finite; `dgemma verify` says where"
        )
    if job.form is None:
        return {"value": x if x.dtype == np.uint16 else bf16_bits(x)}
    record = quantize(x, job.form) if job.factored or job.form.is_affine else blocks(x, job.form, None)
    made: dict[str, Any] = {"codes": record.codes}
    for role in ("scales", "biases"):
        if (field := getattr(record, role)) is not None:
            made[role] = bf16_bits(field) if job.form.is_affine else field
    return made | ({"factor": _rows(record.factor, x.shape[:-1])} if job.factored else {})


def values(stored: Stored | Quantized) -> np.ndarray:
    """The values [...] of a tensor or record, float32."""
    if isinstance(stored, Quantized):
        return np.asarray(dequantize(_OPS, _OPS.upload(stored)), np.float32)
    return stored.to_float32()


def cut(output: Output, made: Fields, start: int, stop: int) -> tuple[int, np.ndarray] | None:
    """The byte offset in the tensor `output` and what a part writes there; None if it has none of it."""
    data = made[output.role] if output.role in made else _constant(output, made)
    first, *rest = output.place or (None,)
    if first is None and prod(output.shape) > 1:
        return start * (output.nbytes // output.shape[0]), data
    if first is None:  # one number of a whole matrix: its first part writes it
        return (0, data.reshape(-1)[:1]) if start == 0 else None
    assert isinstance(first, int)
    if not start <= first < stop:
        return None
    piece = data[(first - start, *rest)]
    return 0, piece.reshape(-1)[:1] if output.role in ("factor", "unused") else piece


def _constant(output: Output, made: Fields) -> np.ndarray:
    """An input scale or a factor, which a layout asks for and a record may lack: a one for every row."""
    assert output.role in ("unused", "factor"), output
    return np.ones(made["codes"].shape[:-1], np.float32)


def _kept(record: Quantized, job: Job) -> Fields:
    """The fields of a record as they are; a factor becomes float32 that multiplies, one for every row."""
    made: dict[str, Any] = {"codes": record.codes.data}
    for role in ("scales", "biases"):
        if (field := getattr(record, role)) is not None:
            made[role] = field.data
    if job.factored and record.factor is not None:
        factor = record.factor.to_float32()
        made["factor"] = _rows(1 / factor if record.divides else factor, record.codes.shape[:-1])
    return made


def _rows(factor: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A factor [..., 1 or O] for every row: float32 of `shape` [..., O]."""
    return np.ascontiguousarray(np.broadcast_to(factor, shape), np.float32)


def _origin(stored: Stored | Quantized) -> tuple[str, Any]:
    first = stored.codes if isinstance(stored, Quantized) else stored
    return first.name, first.file
