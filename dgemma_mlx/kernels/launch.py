"""Common to the kernels: a description that is made a Metal kernel at its first launch.

Nothing is constructed at import: `mx.fast.metal_kernel` is asked when a launch is due, so that a machine
without Metal imports everything, and a simulator can stand in for it (tests/metal/simulator). A kernel is
made once for each such function, because MLX keeps compiled libraries by object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

Shape = Sequence[int]
Template = int | bool | mx.Dtype


@dataclass(frozen=True)
class Kernel:
    """A Metal kernel's text: `source` is its body, `header` stands in front of it."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = ""

    def __call__(
        self,
        *inputs: mx.array,
        grid: tuple[int, int, int],
        group: tuple[int, int, int],
        shapes: Sequence[Shape],
        dtypes: Sequence[mx.Dtype],
        **template: Template,
    ) -> list[mx.array]:
        """Launch with `grid` threads in groups of `group`; outputs of `shapes` and `dtypes`.

        Each distinct set of `template` values and input types is compiled once: sizes that vary go in as
        arrays, or are read from their shapes.
        """
        return _made(mx.fast.metal_kernel, self)(
            inputs=list(inputs),
            template=list(template.items()),
            grid=grid,
            threadgroup=group,
            output_shapes=[tuple(shape) for shape in shapes],
            output_dtypes=list(dtypes),
        )


@cache
def _made(metal_kernel: Callable[..., Any], kernel: Kernel) -> Callable[..., list[mx.array]]:
    return metal_kernel(
        name=f"dgemma_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.source,
        header=kernel.header,
    )


def simd_groups(n: int, most: int) -> int:
    """Threads of a group for `n` items: whole simdgroups of 32, at most `most`."""
    return min(most, -(-n // 32) * 32)
