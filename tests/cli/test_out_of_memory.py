"""Memory that is not there ends in one line, whoever asked for it."""

import errno
import mmap
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dgemma.commands.errors import OUT_OF_MEMORY, OneLine, is_out_of_memory

HUGE = 1 << 50  # bytes, more than any address space holds


def _torch() -> None:
    pytest.importorskip("torch").empty(HUGE, dtype=pytest.importorskip("torch").int8)


def _numpy() -> None:
    np.empty(HUGE, np.int8)


def _mmap() -> None:
    mmap.mmap(-1, HUGE)


def _bytes() -> None:
    bytearray(HUGE)


@pytest.mark.parametrize("allocate", [_torch, _numpy, _mmap, _bytes])
def test_memory_that_is_really_not_there(allocate: Any) -> None:
    result = CliRunner().invoke(OneLine("allocate", callback=allocate), [])
    assert result.exit_code == 1, result.exception
    (line,) = result.stderr.splitlines()
    assert line.startswith("dgemma: error: out of memory")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.63 GB …)"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4398046511104 bytes."),
        RuntimeError("unable to mmap 52428800 bytes from file </m>: Cannot allocate memory (12)"),
        RuntimeError("[malloc] Unable to allocate 34359738368 bytes."),
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:k…OutOfMemory)"),
        RuntimeError("kIOGPUCommandBufferCallbackErrorOutOfMemory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        MemoryError(),
        MemoryError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError("libtorch_cpu.so: cannot allocate memory in static TLS block"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_what_frameworks_say_without_memory(error: Exception) -> None:
    assert isinstance(error, OUT_OF_MEMORY) and is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(errno.ENOENT, "No such file or directory", "out/of/memory.json"),
        ImportError("No module named 'tokenizers'"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space that holds")
def test_a_framework_that_finds_no_room_for_itself() -> None:
    pytest.importorskip("torch")
    code = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (300 << 20,) * 2)
from dgemma.__main__ import main
main()
"""
    run = [sys.executable, "-c", code, "generate", "--backend", "cuda", "a"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("dgemma: error: out of memory (")
    assert "Traceback" not in done.stderr
