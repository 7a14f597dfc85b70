"""One launch of a kernel, and the source that MLX generates for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from .errors import SimulatorError
from .source import generated


class Callee(Protocol):
    """What a call needs of its kernel: the arguments that it was made with, MLX's own, and sources so far."""

    name: str
    input_names: list[str]
    output_names: list[str]
    ensure_row_contiguous: bool
    real: Any
    sources: dict[object, str]


@dataclass(frozen=True, eq=False)
class Call:
    """One launch of a kernel: what it was called with."""

    kernel: Callee
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
        if key not in self.kernel.sources:
            self.kernel.sources[key] = self._generate()
        return self.kernel.sources[key]

    def _generate(self) -> str:
        def real(*inputs: mx.array) -> Any:
            return self.kernel.real(
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
