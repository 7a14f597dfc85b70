"""Weights on a device: from stored tensors and records to arrays, and the products that read them.

A weight is an array or a record (`dgemma.formats.quantized`); `linear` and `expert_linear` take both, and the
graph cannot tell them apart.

    O outputs (rows)  I inputs  E experts  R rows of experts
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dgemma.formats.nvfp4 import TABLES
from dgemma.formats.quantized import Quantized
from dgemma.formats.stored import Stored
from dgemma.network.ops.arrays import Array
from dgemma.network.ops.runtime import Runtime


class Decoding(Runtime):
    """Loading weights, and products with them."""

    def load(self, stored: Stored, wide: bool = False) -> Array:
        """A stored tensor to the device, in the compute or the wide type; never a view of the mapped file."""
        raise NotImplementedError

    def raw(self, x: np.ndarray) -> Array:
        """Bytes (uint8) to the device as they are; never a view of `x`, which may map a file."""
        raise NotImplementedError

    def integer(self, x: Array) -> Array:
        """Unsigned integers as a signed type in which they can be shifted and looked up."""
        raise NotImplementedError

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """x [..., I] times weight [O, I] transposed, plus bias [O] -> [..., O]. Takes a record, too."""
        raise NotImplementedError

    def expert_linear(self, x: Array, weight: Array, experts: Array) -> Array:
        """Row r of x [R, I] times weight[experts[r]] transposed -> [R, O]; weight [E, O, I], experts [R] int.

        `experts` ascends. The weight may be a record: at most one expert is widened at a time then.
        """
        raise NotImplementedError

    def upload(self, record: Quantized) -> Quantized:
        """A record of `Stored` fields to the device. Scales of a type wider than bfloat16 stay wide."""

        def field(stored: Stored) -> Array:
            if stored.data.dtype == np.uint8:
                return self.raw(stored.data)
            return self.load(stored, wide=stored.dtype != "BF16")

        return record.map(field)

    def arrange(self, record: Quantized, name: str) -> Any:
        """An uploaded matrix, or a stack of experts ("gate_up", "down"), as its product reads it fastest."""
        return record


def unpack(ops: Decoding, codes: Array, bits: int) -> Array:
    """Integer codes [..., n] of bytes [..., n·bits/8], low bits first: eight codes fill `bits` bytes."""
    octets = ops.integer(codes)
    if bits == 8:
        return octets
    count = 8 // np.gcd(8, bits)  # codes in the shortest run of whole bytes
    octets = octets.reshape(*octets.shape[:-1], -1, count * bits // 8)
    parts = []
    for start in range(0, count * bits, bits):
        byte, shift = divmod(start, 8)
        part = octets[..., byte] >> shift
        if shift + bits > 8:  # a code of 3, 5 or 6 bits may cross into the next byte
            part = part | octets[..., byte + 1] << (8 - shift)
        parts.append((part & (2**bits - 1))[..., None])
    return ops.concat(parts, -1).reshape(*octets.shape[:-2], -1)


def dequantize(ops: Decoding, w: Quantized) -> Array:
    """The matrix [O, I] or stack [E, O, I] of a record, wide: code · scale (+ bias), times or by the factor.

    This body on NumPy is exact and defines each format (`dgemma.formats.quantized`, checkpoints.md).
    """
    y = unpack(ops, w.codes, w.form.bits)
    y = ops.to_wide(y) if w.form.is_affine else ops.take(ops.constant(TABLES[w.form.code_type or ""]), y)
    if w.scales is not None:
        s = w.scales
        kind = w.form.scale_type
        s = ops.to_wide(s) if kind is None else ops.take(ops.constant(TABLES[kind]), ops.integer(s))
        grouped = y.reshape(*s.shape, w.form.group) * s[..., None]
        if w.biases is not None:
            grouped = grouped + ops.to_wide(w.biases)[..., None]
        y = grouped.reshape(y.shape)
    if w.factor is None:
        return y
    return y / w.factor[..., None] if w.divides else y * w.factor[..., None]


def dense(ops: Decoding, weight: Array) -> Array:
    """A weight as an array of its own shape. A record is decoded to the compute type, an array passes."""
    return ops.to_compute(dequantize(ops, weight)) if isinstance(weight, Quantized) else weight
