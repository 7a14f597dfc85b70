"""Number formats of quantized weights: E2M1, E4M3 and E8M0 codes, and packed streams of codes.

All of it is NumPy on the host. The tables are the definitions; decoding is a lookup and therefore exact.
Encoding rounds to nearest, ties to even, and saturates, as the specification says (OCP Microscaling
Formats 1.0; NVFP4 is E2M1 with an E4M3 scale for 16 values).

Each row is packed as one little-endian stream of bits, for every width. The low nibble comes first for 4
bits. A stream of 32-bit words (MLX) has the same bytes as one of bytes (ModelOpt).
"""

from __future__ import annotations

import numpy as np

# The top bit of a code is the sign: bit 3 in E2M1, bit 7 in E4M3.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX = 6.0, 448.0


def _e4m3_table() -> np.ndarray:
    """Values [256] float32 of E4M3 codes."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1.0 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    magnitude[codes & 127 == 127] = np.nan  # the format has no infinity
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


def _e8m0_table() -> np.ndarray:
    """Values [256] float32 of E8M0 codes."""
    powers = np.ldexp(1.0, np.arange(255) - 127)
    return np.append(powers, np.nan).astype(np.float32)


# The float32 value of every code. Code 0 of E8M0 is 2^-127, a subnormal that a GPU may flush to zero.
E2M1 = np.array([*_E2M1_MAGNITUDES, *(-x for x in _E2M1_MAGNITUDES)], np.float32)
E4M3 = _e4m3_table()
E8M0 = _e8m0_table()
TABLES = {"E2M1": E2M1, "E4M3": E4M3, "E8M0": E8M0}


def encode_e2m1(x: np.ndarray) -> np.ndarray:
    """Nearest E2M1 codes of finite float32 `x` in its shape, ties to even, saturated at ±6; uint8 < 16."""
    return _encode(x, mantissa=1, bias=1, most=E2M1_MAX)


def encode_e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest E4M3 codes of finite float32 `x` in its shape, ties to even, saturated at ±448; uint8."""
    return _encode(x, mantissa=3, bias=7, most=E4M3_MAX)


def _encode(x: np.ndarray, mantissa: int, bias: int, most: float) -> np.ndarray:
    """Codes of sign, exponent and so many bits of mantissa; exponent 0 is that of subnormals."""
    x = np.ascontiguousarray(x, np.float32)
    y = np.minimum(np.abs(x), np.float32(most))
    bits, dropped = y.view(np.uint32), 23 - mantissa
    # The rest of float32's mantissa is rounded away. A carry moves into the exponent, as it should.
    rounded = (bits + ((1 << dropped - 1) - 1) + (bits >> dropped & 1)) >> dropped
    normal = rounded.view(np.int32) - (127 - bias << mantissa)
    subnormal = np.rint(y * np.float32(2.0 ** (mantissa + bias - 1)))
    code = np.where(y < np.float32(2.0 ** (1 - bias)), subnormal.astype(np.int32), normal).astype(np.uint8)
    sign = (x.view(np.uint32) >> 31).astype(np.uint8)
    return code | sign << (3 if most == E2M1_MAX else 7)


def encode_e8m0(x: np.ndarray) -> np.ndarray:
    """Codes of the least powers of two not below positive float32 `x`, in its shape; uint8 in 0…254."""
    mantissa, exponent = np.frexp(np.maximum(x, np.float32(2.0**-127)))  # mantissa in [0.5, 1)
    return (np.clip(exponent - 1 + (mantissa > 0.5), -127, 127) + 127).astype(np.uint8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes below 2^bits, uint8 [..., n] -> bytes uint8 [..., n·bits/8]; n·bits is a multiple of 8."""
    if bits == 8:
        return codes
    if bits in (2, 4):  # a byte holds whole codes
        per_byte = 8 // bits
        parts = codes.reshape(*codes.shape[:-1], -1, per_byte)
        packed = parts[..., 0].copy()
        for k in range(1, per_byte):
            packed |= parts[..., k] << (k * bits)
        return packed
    # Eight codes fill `bits` bytes.
    parts = codes.reshape(*codes.shape[:-1], -1, 8).astype("<u8")
    words = np.zeros(parts.shape[:-1], "<u8")
    for k in range(8):
        words |= parts[..., k] << np.uint64(k * bits)
    octets = words[..., None].view(np.uint8)[..., :bits]
    return octets.reshape(*codes.shape[:-1], -1)
