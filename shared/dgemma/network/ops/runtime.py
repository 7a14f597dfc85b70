"""The machine under the arrays: memory, compiling, lazy evaluation, and notices to the user."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from dgemma import machine
from dgemma.network.ops.arrays import Array, Arrays, Past


def process_peak() -> int:
    """Most bytes that this process has held; 0 on Windows, which does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    # Linux lets a process begin with the most of whoever started it; only this is its own.
    own = machine.peak_memory()
    if own is not None:
        return own
    # macOS counts bytes, Linux kibibytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Notices:
    """The one channel by which a backend tells its user something.

    Callers may give a backend another one: a terminal prints, a server must not. This one passes the text
    to the logger "dgemma". Python prints that to stderr unless the program says otherwise.
    """

    def say(self, text: str) -> None:
        """One sentence, without a full stop."""
        logging.getLogger("dgemma").warning(text)

    def working(self, what: str, progress: Callable[[], str]) -> AbstractContextManager[Any]:
        """Surrounds one-time work that may take seconds, such as compiling.

        `progress()` returns how far it is, after a comma, or an empty string.
        """
        return nullcontext()


class Runtime(Arrays):
    """Memory, compiling and evaluation. The bodies fit arrays in host memory."""

    on_gpu = False  # whether arrays are in the memory of a GPU
    activations: str | None = None  # the format that activations of experts are quantized to, if any
    # Tokens of a piece of a context at most (`Context`).
    piece_slots = 1 << 30

    def __init__(self, notices: Notices | None = None):
        self.notices = notices or Notices()
        self._constants: dict[int, tuple[np.ndarray, Array]] = {}

    def constant(self, values: np.ndarray) -> Array:
        """A constant of the formats, wide; uploaded once, as a recorded step must not copy from the host."""
        if id(values) not in self._constants:  # kept beside its copy: a freed array's id is given out again
            self._constants[id(values)] = values, self.aswide(values)
        return self._constants[id(values)][1]

    def running(self) -> AbstractContextManager[None]:
        """Surrounds a generation: sets limits of the process and puts them back afterwards."""
        return nullcontext()

    def peak_memory(self) -> int:
        """Most bytes in use since the process began, by the framework's arrays or by the whole process."""
        return process_peak()

    def free_memory(self) -> int | None:
        """Bytes that weights may still take, on the device or the machine; None if unknown."""
        return machine.free_memory()

    def total_memory(self) -> int | None:
        """Bytes that weights could take with nothing else there; None if unknown."""
        return machine.total_memory()

    def pasts(self, layers: Sequence[Sequence[Past]], lengths: Sequence[int]) -> Any:
        """The past as `attend` takes it, by layer, for rows of so many new tokens.

        `layers` has the pieces of each row in each layer.
        """
        return layers

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        """A pure function of arrays, the first of which has its rows, traced and compiled if the backend can.

        `repeats`: callers call it many times with the same shapes, so recording each pays.
        """
        return fn

    def settle(self, arrays: Any) -> None:
        """Finish pending work on these arrays, nested or not. Only lazy backends have any."""

    def after(self, x: Array, *done: Array) -> Array:
        """`x`, usable once `done` are computed, so that lazy backends never hold all tiles of a loop."""
        return x
