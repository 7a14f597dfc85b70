"""The machine under the arrays: memory, compiling, lazy evaluation, and what its user should know."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.network.ops.arrays import Array, Arrays


def process_peak() -> int:
    """Most bytes that this process has held; 0 where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Notices:
    """The one channel by which a backend tells its user something.

    Whoever makes the backend may give another: a terminal prints, a server must not. This one hands the text
    to the logger "dgemma", which Python prints to stderr unless the program says otherwise.
    """

    def say(self, text: str) -> None:
        """One sentence, without a full stop."""
        logging.getLogger("dgemma").warning(text)

    def working(self, what: str, progress: Callable[[], str]) -> AbstractContextManager[Any]:
        """Surrounds work that is done once and may take seconds, as compiling.

        `progress()` says how far it has come, after a comma, or nothing.
        """
        return nullcontext()


class Runtime(Arrays):
    """Memory, compiling and evaluation. The bodies are right for arrays of the host."""

    activations: str | None = None  # the format that activations of experts are quantized to, if any
    # What makes caches in place of the plain one: called with the backend and the configuration.
    cache_type: Callable[..., Any] | None = None

    def __init__(self, notices: Notices | None = None):
        self.notices = notices or Notices()
        self._constants: dict[int, tuple[np.ndarray, Array]] = {}

    def constant(self, values: np.ndarray) -> Array:
        """A constant of the formats, wide; placed once, as a recorded step must not copy from the host."""
        if id(values) not in self._constants:  # kept beside its copy, so that no other array gets its id
            self._constants[id(values)] = values, self.aswide(values)
        return self._constants[id(values)][1]

    def running(self) -> AbstractContextManager[None]:
        """What surrounds a generation: limits of the process that are put back afterwards."""
        return nullcontext()

    def peak_memory(self) -> int:
        """Most bytes in use since the process began: of the framework's arrays, or of the whole process."""
        return process_peak()

    def free_memory(self) -> int | None:
        """Bytes that weights may still take: of the device, or of the machine; None if nothing says."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            available = next(line for line in lines if line.startswith("MemAvailable:"))
            return 1024 * int(available.split()[1])
        except (OSError, StopIteration):  # not Linux: all of the memory but what the system is left
            if not hasattr(os, "sysconf"):  # Windows
                return None
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        """A pure function of arrays, traced and compiled where the backend can.

        `repeats`: it is called many times with the same shapes, and worth recording for each.
        """
        return fn

    def settle(self, arrays: Any) -> None:
        """Finish pending work on these arrays (lazy backends)."""

    def after(self, x: Array, *done: Array) -> Array:
        """`x`, to be used once `done` are computed: lazy backends would hold all tiles of a loop at once."""
        return x
