"""Launching: a call's source compiled, its memory passed to it, its errors raised.

The structures repeat those of metal/scheduler.h.
"""

from __future__ import annotations

import ctypes
import re
import threading
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import build
from .buffers import MOST_BUFFERS, Guarded, in_order, input_buffers, outputs
from .call import Call
from .errors import SimulatorError
from .source import Signature, signature, translate

ORDERS = ("forward", "backward", "shuffled")
MOST_THREADS = 1024  # of a threadgroup, on every GPU that MLX runs on

_launching = threading.Lock()  # a library keeps its lanes in global variables


@dataclass
class Schedule:
    """The order in which lanes and groups run, in every launch; `seed` is for "shuffled"."""

    order: str = "forward"
    seed: int = 0


schedule = Schedule()


@dataclass(frozen=True)
class Statistics:
    """Of one launch: groups run, barriers and simdgroup operations completed in all of them together, and
    bytes of threadgroup memory of one group."""

    groups: int
    barriers: int
    simd_ops: int
    threadgroup_bytes: int


# The last launch of each kernel, by the kernel's name.
statistics: dict[str, Statistics] = {}


class Launch(ctypes.Structure):
    """Grid and threadgroup in threads, and the order of lanes."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
    )


class _Outcome(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("simd_ops", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("line", ctypes.c_int32),
        ("text", ctypes.c_char * 484),
    )


def requested(call: Call) -> Launch:
    """The launch, once its grid and threadgroup are what Metal accepts."""
    for what, sizes in [("grid", call.grid), ("threadgroup", call.threadgroup)]:
        if len(sizes) != 3 or min(sizes) < 1:
            raise call.error(f"{what} is three positive numbers of threads, not {sizes}")
    if (threads := prod(call.threadgroup)) > MOST_THREADS:
        raise call.error(f"a threadgroup of {threads} threads, and the most is {MOST_THREADS}")
    triple = ctypes.c_uint32 * 3
    return Launch(triple(*call.grid), triple(*call.threadgroup), ORDERS.index(schedule.order), schedule.seed)


_COMPILER_ERROR = re.compile(r"^.*?(?:kernel\.metal:(\d+):\d+: )?(?:fatal )?error: (.*)$", re.MULTILINE)
_REQUIRED_BY = re.compile(r"^kernel\.metal:(\d+):\d+: +required from", re.MULTILINE)


def compile_error(call: Call, error: SimulatorError) -> SimulatorError:
    """The compiler's error as one of the kernel, at the line of the first complaint."""
    found = _COMPILER_ERROR.search(str(error))
    if found is None:
        return call.error(f"it does not compile: {error}")
    # An error within a header has the kernel's line before it.
    line = found[1] or next(iter(_REQUIRED_BY.findall(str(error))), "0")
    return call.error(f"it does not compile: {found[2]}\n{error}", int(line))


@cache
def _load(path: Path) -> Any:
    return ctypes.CDLL(str(path)).simulate


@cache
def _prepare(source: str) -> tuple[Signature, Any]:
    """The signature and the entry point of a source."""
    return signature(source), _load(build.library(translate(source)))


def launch(call: Call) -> list[mx.array]:
    """Run the call and return its outputs; SimulatorError if the kernel does what Metal leaves undefined."""
    what = requested(call)
    try:
        called, simulate = _prepare(call.source)
    except SimulatorError as error:
        raise compile_error(call, error) from error
    made = outputs(call)
    arrays = in_order(called, input_buffers(call) | {name: each.array for name, each in made.items()})
    if len(arrays) > MOST_BUFFERS:
        raise call.error(f"{len(arrays)} buffers, and the most is {MOST_BUFFERS}")
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    outcome = _Outcome()
    with _launching:
        failed = simulate(pointers, ctypes.byref(what), ctypes.byref(outcome))
    statistics[call.kernel.name] = Statistics(
        outcome.groups, outcome.barriers, outcome.simd_ops, outcome.threadgroup_bytes
    )
    if failed:
        raise call.error(outcome.text.decode(), outcome.line)
    return [_taken(call, *each) for each in zip(made.items(), call.output_dtypes, strict=True)]


def _taken(call: Call, output: tuple[str, Guarded], dtype: mx.Dtype) -> mx.array:
    name, guarded = output
    if not guarded.intact():
        raise call.error(f"it writes outside of its output {name}; sanitize(call, 'address') says where")
    result = mx.array(guarded.array)
    return result.view(mx.bfloat16) if dtype == mx.bfloat16 else result
