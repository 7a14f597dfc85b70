"""exp and tanh of MLX on a CPU against NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx

from dgemma_mlx import elementary
from dgemma_mlx.ops import MlxOps

# Everywhere, about every power of two, and where the power of two of the result changes.
RNG = np.random.default_rng(0)
X = np.concatenate([
    np.linspace(-87, 88, 200_001),
    RNG.choice([-1, 1], 100_000) * 2.0 ** RNG.uniform(-120, 6.4, 100_000),
    (np.arange(-126, 127)[:, None] + 0.5 + np.linspace(-1e-5, 1e-5, 21)).ravel() * np.log(2),
    [0.0],
]).astype(np.float32)  # fmt: skip


def test_exp_is_within_three_roundings() -> None:
    got = np.array(elementary.exp(mx.array(X)), np.float64)
    assert np.abs(got / np.exp(X.astype(np.float64)) - 1).max() < 4e-7


def test_tanh_keeps_its_relative_accuracy() -> None:
    x = X[X != 0]
    got = np.array(elementary.tanh(mx.array(x)), np.float64)
    assert np.abs(got / np.tanh(x.astype(np.float64)) - 1).max() < 1e-6
    assert np.abs(got).max() <= 1
    assert np.array(elementary.tanh(mx.array(np.zeros(3, np.float32)))).tolist() == [0.0] * 3


def test_beyond_the_range_and_nan() -> None:
    x = mx.array([-np.inf, -3e38, -200.0, -88.0, 88.73, 200.0, 3e38, np.inf, np.nan])
    exp, tanh = np.array(elementary.exp(x)), np.array(elementary.tanh(x))
    assert np.array_equal(exp, [0, 0, 0, 0, np.inf, np.inf, np.inf, np.inf, np.nan], equal_nan=True)
    assert np.array_equal(tanh, [-1, -1, -1, -1, 1, 1, 1, 1, np.nan], equal_nan=True)


def test_the_backend_uses_them_for_large_float32_only() -> None:
    ops = MlxOps()
    x = mx.array(RNG.standard_normal(5000).astype(np.float32))
    assert np.array_equal(np.array(ops.exp(x)), np.array(elementary.exp(x)))
    assert np.array_equal(np.array(ops.tanh(x[:10])), np.array(mx.tanh(x[:10])))
    assert ops.exp(x.astype(mx.bfloat16)).dtype == mx.bfloat16
