"""Common to the kernels: whether they run on a device, and Triton at the first launch.

Importing Triton takes a second and needs a machine that has it. So modules mark their kernels and the first
launch compiles them. A launch imports modules whose every line is Triton's (`device`, `device_fp4`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


def supported(device: torch.device) -> str | None:
    """Why the kernels do not run on `device`, in a sentence, or None where they do."""
    if find_spec("triton") is None:
        return "the kernels need Triton, which is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the kernels need an NVIDIA GPU, and the device is {str(device)!r}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0 or more, and this GPU has {major}.{minor}"
    return None


def native(arch: int) -> bool:
    """Whether the GPU's conversions of E2M1 and E4M3 to bfloat16 can be compiled for an architecture.

    Blackwell has them, and PTX 9.2 has names for them: Triton's assembler knows it from 3.8 on.
    """
    return arch >= 100 and triton_version() >= (3, 8)


def triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


MARKED: list[Callable[..., Any]] = []


def kernel(fn: Callable[..., Any]) -> Any:
    """Mark a function of any module for Triton, to which `load` hands it when a launch is due."""
    MARKED.append(fn)
    return fn


def load() -> None:
    """Import Triton, and replace what is marked by what it compiles."""
    if MARKED:
        import triton
        import triton.language
    while MARKED:
        fn = MARKED.pop()
        fn.__globals__["tl"] = triton.language
        fn.__globals__[fn.__name__] = triton.jit(fn)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose `tl.dot` takes bfloat16 for integers."""
    from triton import knobs

    return knobs.runtime.interpret


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a few for the interpreter, so that it cuts as well."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """The next power of two, at least `n`."""
    return 1 << (n - 1).bit_length()
