"""Metal kernels on a machine without Metal: run, checked for data races and types.

    with simulator.installed(order="backward"):
        ...  # library code that makes and calls kernels with mx.fast.metal_kernel, unmodified

The text that runs is the one MLX generates for a Mac, compiled as C++ against headers that give Metal's
names a meaning (`metal/`). One fiber runs for each thread of a threadgroup, and cooperation is executed, not
assumed: what a barrier or a simdgroup operation leaves undefined is an error with its line. The price is that
nothing is learned about speed, registers or what Apple's compiler accepts; only a Mac tells that.
"""

from .build import available
from .call import Call
from .check import Complaint, typecheck
from .errors import SimulatorError
from .kernel import active, installed, recording
from .launch import Statistics, statistics
from .sanitizers import Finding, sanitize

__all__ = [
    "Call",
    "Complaint",
    "Finding",
    "SimulatorError",
    "Statistics",
    "active",
    "available",
    "installed",
    "recording",
    "sanitize",
    "statistics",
    "typecheck",
]
