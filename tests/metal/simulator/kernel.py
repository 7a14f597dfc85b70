"""A kernel with MLX's interface that runs on the CPU, and how it takes the place of MLX's own.

Launches are eager: a call evaluates its inputs and returns finished arrays. So a simulated kernel cannot be
traced, and `installed` turns `mx.compile` off for as long as it lasts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .call import Call
from .launch import ORDERS, launch, schedule

_make_real: Any = mx.fast.metal_kernel


# ---- What is installed.

_recorders: list[list[Call]] = []


def active() -> bool:
    """Whether `mx.fast.metal_kernel` makes simulated kernels at present."""
    return mx.fast.metal_kernel is Kernel


@contextmanager
def installed(order: str = "forward", seed: int = 0) -> Iterator[None]:
    """Let `mx.fast.metal_kernel` make simulated kernels, whose lanes and groups run in `order`.

    The order is that of every launch within, also of kernels made before. `seed` is for "shuffled".
    """
    if order not in ORDERS:
        raise ValueError(f"order is one of {', '.join(ORDERS)}, not {order!r}")
    before = mx.fast.metal_kernel, schedule.order, schedule.seed
    compiles = not active() and "MLX_DISABLE_COMPILE" not in os.environ
    mx.fast.metal_kernel = Kernel
    schedule.order, schedule.seed = order, seed
    mx.disable_compile()
    try:
        yield
    finally:
        mx.fast.metal_kernel, schedule.order, schedule.seed = before
        if compiles:
            mx.enable_compile()


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Collect the calls of simulated kernels that are made within, with their arguments."""
    calls: list[Call] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders[:] = [each for each in _recorders if each is not calls]


# ---- Kernels.


class Kernel:
    """What `mx.fast.metal_kernel` returns while the simulator is installed; see there for the arguments."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: object = None,
    ):
        self.name = name
        self.input_names = list(input_names)
        self.output_names = list(output_names)
        self.ensure_row_contiguous = ensure_row_contiguous
        self.real = _make_real(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
            compile_options=compile_options,
        )
        self.sources: dict[object, str] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        call = Call(
            kernel=self,
            inputs=[x if isinstance(x, mx.array) else mx.array(x) for x in inputs],
            template=list(template or []),
            grid=tuple(grid),
            threadgroup=tuple(threadgroup),
            output_shapes=[tuple(shape) for shape in output_shapes],
            output_dtypes=list(output_dtypes),
            init_value=init_value,
        )
        if verbose:
            print(call.source)
        for calls in _recorders:
            calls.append(call)
        return launch(call)
