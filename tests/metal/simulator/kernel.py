"""A kernel with MLX's interface that runs on the CPU, and how it takes the place of MLX's own.

Launches are eager: a call evaluates its inputs and returns finished arrays. So a simulated kernel cannot be
traced, and `installed` turns `mx.compile` off for as long as it lasts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .errors import SimulatorError
from .launch import ORDERS, launch, schedule
from .source import generated

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


# ---- Kernels and calls.


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
        self._real = _make_real(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
            compile_options=compile_options,
        )
        self._generated: dict[object, str] = {}

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


@dataclass(frozen=True, eq=False)
class Call:
    """One launch of a kernel: what it was called with."""

    kernel: Kernel
    inputs: list[mx.array]
    template: list[tuple[str, Any]]
    grid: tuple[int, ...]
    threadgroup: tuple[int, ...]
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]
    init_value: float | None

    @property
    def source(self) -> str:
        """The Metal source that MLX generates for this call."""
        # As far as the source depends on them: MLX puts inputs of less than 8 elements into constant memory.
        inputs = tuple((x.dtype, x.ndim == 0, x.size < 8) for x in self.inputs)
        template = tuple((name, type(value), value) for name, value in self.template)
        key = inputs, template, tuple(self.output_dtypes)
        if key not in self.kernel._generated:
            self.kernel._generated[key] = self._generate()
        return self.kernel._generated[key]

    def _generate(self) -> str:
        def real(*inputs: mx.array) -> Any:
            return self.kernel._real(
                inputs=list(inputs),
                template=self.template,
                grid=self.grid,
                threadgroup=self.threadgroup,
                output_shapes=self.output_shapes,
                output_dtypes=self.output_dtypes,
                init_value=self.init_value,
                verbose=True,
            )

        return generated(self.kernel.name, real, self.inputs)

    def error(self, text: str, line: int = 0) -> SimulatorError:
        """An error of this kernel, at a line of its source if it is not 0."""
        if not line:
            return SimulatorError(f"kernel {self.kernel.name}: {text}")
        quoted = self.source.splitlines()[line - 1].strip()
        return SimulatorError(f"kernel {self.kernel.name}, line {line}: {text}\n    {quoted}", line)
