"""Stand-ins for operations that are one kernel on Metal only, and for functions that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest import mock

import mlx.core as mx


def stand_in(name: str, inputs: Sequence[Any], shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """The array of `shape` [...] that a custom kernel would make; it is never launched."""
    names, one = [f"x{i}" for i in range(len(inputs))], (1, 1, 1)
    kernel: Any = mx.fast.metal_kernel(name=name, input_names=names, output_names=["y"], source="")
    (made,) = kernel(
        inputs=list(inputs), grid=one, threadgroup=one, output_shapes=[tuple(shape)], output_dtypes=[dtype]
    )
    return made


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    return stand_in("mlx_norm", [x] if weight is None else [x, weight], x.shape, x.dtype)


def _rope(x: mx.array, dims: int, **_: Any) -> mx.array:
    return stand_in("mlx_rope" if dims == x.shape[-1] else "mlx_partial_rope", [x], x.shape, x.dtype)


def _contiguous(x: mx.array, *_: Any, **__: Any) -> mx.array:
    return stand_in("mlx_contiguous", [x], x.shape, x.dtype)


def _dequantize(w: mx.array, scales: mx.array, biases: mx.array | None = None, *a: Any, **k: Any) -> mx.array:
    bits = k.get("bits", a[1] if len(a) > 1 else 4)
    inputs = [w, scales] if biases is None else [w, scales, biases]
    shape = (*w.shape[:-1], w.shape[-1] * 32 // bits)
    return stand_in("mlx_dequantize", inputs, shape, k.get("dtype") or scales.dtype)


_FALLBACK = mx.fast.scaled_dot_product_attention


def _attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
    """The fallback for q [B, H, L, C], which a build without Metal traces: Metal would take it here, too."""
    assert q.shape[2] > 8 and q.shape[3] in (256, 512), f"attention of {q.shape} has a fused kernel"
    return _FALLBACK(q, k, v, **options)


STAND_INS = (
    (mx.fast, "rms_norm", _rms_norm),
    (mx.fast, "rope", _rope),
    (mx.fast, "scaled_dot_product_attention", _attention),
    (mx, "contiguous", _contiguous),
    (mx, "dequantize", _dequantize),
)


@contextmanager
def as_on_metal() -> Iterator[None]:
    """Operations that a build without Metal takes apart become one node."""
    with ExitStack() as stack:
        for module, name, function in STAND_INS:
            stack.enter_context(mock.patch.object(module, name, function))
        yield


class Region:
    """A function given to `mx.compile`: within a step one node, whose graph is traced for itself."""

    calls: ClassVar[list[tuple[Callable[..., Any], list[mx.array]]]] = []
    live: ClassVar[bool] = False  # while a step is traced; a region within a region is part of it

    def __init__(self, function: Callable[..., Any], *_: Any, **__: Any):
        self.function = function

    def __call__(self, *arrays: Any) -> Any:
        if not Region.live:
            return self.function(*arrays)
        with mock.patch.object(Region, "live", False):
            made = self.function(*arrays)  # for its shape: nothing reads it
        Region.calls.append((self.function, [mx.zeros(x.shape, x.dtype) for x in arrays]))
        return stand_in(f"region{len(Region.calls) - 1}", arrays, made.shape, made.dtype)
