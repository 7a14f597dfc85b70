"""A performance test without a GPU: what every shipped configuration compiles to, for every architecture.

Spills, too much shared memory for a multiprocessor, or a main loop that has grown by some instructions a
weight would each cost more than what a first measurement on a GPU could win back. See `compiled.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from dgemma_cuda.kernels import moe
from tests.kernels.compiled import choices

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have
# What multiplies: mma.sync; wgmma; tcgen05.
UNITS = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """All lines of `compiled.py`, from a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_configuration_is_compiled(reports: list[dict[str, Any]]) -> None:
    products = [
        (line["arch"], line["rows"], line["kernel"], line["form"]) for line in reports if "rows" in line
    ]
    assert products == [(*key, *choice) for key in moe.CONFIGS for choice in choices(key[1])]
    others = {(line["arch"], line["kernel"]) for line in reports if "rows" not in line}
    assert others == {(arch, name) for arch in moe.CANVAS_ROWS for name in ("plan", "combine")}


def test_nothing_spills(reports: list[dict[str, Any]]) -> None:
    assert [line for line in reports if line["spilled"]] == []


def test_two_blocks_fit_a_multiprocessor(reports: list[dict[str, Any]]) -> None:
    assert [line for line in reports if 2 * line["shared"] > SHARED[line["arch"]] << 10] == []
    # Of 65,536 registers, three blocks of 128 threads may have 168 a thread, two may have 255.
    assert [line for line in reports if line["registers"] > (200 if line.get("rows") == 64 else 168)] == []


def test_the_tensor_cores_multiply(reports: list[dict[str, Any]]) -> None:
    assert [line for line in reports if "unit" in line and line["unit"] != UNITS[line["arch"]]] == []


def test_instructions_a_weight(reports: list[dict[str, Any]]) -> None:
    def bound(line: dict[str, Any]) -> float:
        """mma.sync shares the loop with its operands: blocks of 64 rows are bound by it, not by decoding.

        A linear's tiles are half as high, so that activations cost twice as much a weight; not on sm_100.
        """
        synchronous = UNITS[line["arch"]] == "HMMA"
        if line["kernel"] == "linear" and line["arch"] != 100:
            return 11.8 if synchronous else 5.8
        if not synchronous or line["rows"] == 16:
            return 4.5 if line["rows"] == 64 else 4.2
        return 5.0 if line["rows"] == 32 else 8.2

    assert [line for line in reports if "per_weight" in line and line["per_weight"] > bound(line)] == []
