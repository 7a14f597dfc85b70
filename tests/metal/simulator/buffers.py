"""The memory behind a kernel's parameters.

What a call reads and writes is copied between margins, so that the ends of an array are noticed even without
a sanitizer. The exception are inputs that need not be contiguous: their strides must stay what MLX made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import mlx.core as mx
import numpy as np

from .call import Call
from .source import Signature

MOST_BUFFERS = 31  # of a kernel, on every GPU that MLX runs on


def view(x: mx.array) -> np.ndarray:
    """The memory of `x`, with its strides, without a copy; bfloat16 as uint16."""
    if x.dtype == mx.bfloat16:
        x = x.view(mx.uint16)
    mx.eval(x)
    return np.asarray(memoryview(x))  # type: ignore[arg-type]


class Guarded:
    """A new array of bytes 0xFF between margins: a kernel that reads beyond an end reads NaN, and one that
    writes there is found out.
    """

    # NaN in every floating type, but not the one that comes out when a kernel computes with an element that
    # was never written.
    margin = np.tile(np.array([0xA5, 0xFF], np.uint8), 2048)

    def __init__(self, shape: Sequence[int], dtype: np.dtype):
        size = prod(shape) * dtype.itemsize
        self._whole = np.concatenate([self.margin, np.full(size, 0xFF, np.uint8), self.margin])
        self.array = self._whole[self.margin.size : self.margin.size + size].view(dtype).reshape(shape)

    def intact(self) -> bool:
        """Whether the margins are as they were."""
        before, after = self._whole[: self.margin.size], self._whole[-self.margin.size :]
        return np.array_equal(before, self.margin) and np.array_equal(after, self.margin)


def _guarded_copy(array: np.ndarray) -> np.ndarray:
    copy = Guarded(array.shape, array.dtype).array
    copy[...] = array
    return copy


def input_buffers(call: Call) -> dict[str, np.ndarray]:
    """The arrays behind every parameter that is not an output, by name."""
    buffers = {}
    for name, x in zip(call.kernel.input_names, call.inputs, strict=True):
        # Strides must stay MLX's own, so what need not be contiguous is not copied.
        array = _guarded_copy(view(x)) if call.kernel.ensure_row_contiguous else view(x)
        strides = [stride // array.itemsize for stride in array.strides]
        buffers[f"{name}_shape"] = np.array(array.shape, np.int32)
        buffers[f"{name}_strides"] = np.array(strides, np.int64)
        buffers[f"{name}_ndim"] = np.array(array.ndim, np.int32)
        buffers[name] = array
    return buffers


def outputs(call: Call) -> dict[str, Guarded]:
    """New outputs by name, filled with the initial value if there is one."""
    made = {}
    declared = zip(call.kernel.output_names, call.output_shapes, call.output_dtypes, strict=True)
    for name, shape, dtype in declared:
        made[name] = Guarded(shape, view(mx.zeros((1,), dtype)).dtype)
        if call.init_value is not None:
            made[name].array[...] = view(mx.array(call.init_value, dtype))
    return made


def in_order(called: Signature, buffers: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The arrays as the kernel's parameters want them."""
    return [buffers[parameter.name] for parameter in called.parameters if parameter.attribute == "buffer"]
