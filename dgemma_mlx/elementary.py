"""exp and tanh on MLX's CPU from its sums and products, in a third of the time.

MLX's build for Linux calls the C library, one number after the other. Sums and products run through the
vector unit, though each writes an array. Two dozen of them in a row are still faster where those arrays fit
the cache, and slower where they do not.

exp(x) = 2^n · (1 + m): n is the integer nearest to x / ln 2, and m a polynomial for expm1 of what is left.
Its coefficients are the minimax fit on ±ln 2 / 2, relative to exp and with 1 for the first: 1.1e-7 off at
most. tanh is expm1(2x) / (expm1(2x) + 2), and so keeps its relative accuracy near 0.
"""

from __future__ import annotations

import mlx.core as mx

from dgemma.network.ops import Array

# ln 2 = HIGH + LOW. HIGH has so few bits that its product with n is exact.
LN2, HIGH, LOW = 0.6931471805599453, 0.693359375, -2.1219444005469057e-4
# Added to a small number, it leaves n + 127 in the lowest bits: the exponent of 2^n where a float has it.
SHIFT = 1.5 * 2**23 + 127
COEFFICIENTS = (0.00831247779524008, 0.041890550637291746, 0.1666711631480332, 0.49999228820964187, 1.0)


def exp(x: Array) -> Array:
    """exp of x [...] float32, to 4e-7 of it: 0 where that would be below 2^-126.5, inf above 2^127.5."""
    power, m = _parts(mx.clip(x, -127 * LN2, 128 * LN2))
    return power * (1.0 + m)


def tanh(x: Array) -> Array:
    """tanh of x [...] float32, to 1e-6 of it."""
    power, m = _parts(mx.clip(2.0 * x, -40.0, 40.0))
    m = power * m + (power - 1.0)
    return m / (m + 2.0)


def _parts(x: Array) -> tuple[Array, Array]:
    """2^n, and exp(x) / 2^n − 1, for x [...] float32."""
    shifted = x * (1 / LN2) + SHIFT
    n = shifted - SHIFT
    r = x - n * HIGH - n * LOW
    m = r * COEFFICIENTS[0]
    for c in COEFFICIENTS[1:]:
        m = (m + c) * r
    return (shifted.view(mx.int32) << 23).view(mx.float32), m
