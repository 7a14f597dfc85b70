"""A performance test without a GPU: what every shipped configuration compiles to, for every architecture.

Spills, too much shared memory for a multiprocessor, or a main loop that has grown by some instructions a
weight would each cost more than what a first measurement on a GPU could win back. See `compiled.py`.

Blackwell's own conversions need a newer Triton than the one that is installed here. `make triton-next` puts
one beside the environment, which compiles what is Blackwell's a second time.
"""

from __future__ import annotations

import itertools
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
from tests.kernels.compiled import RELATIVES, choices, targets

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
NEXT = Path(sys.prefix) / "triton-next"
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}  # KiB a block may have
# What multiplies: mma.sync; wgmma; tcgen05.
UNITS = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA", 120: "HMMA", 121: "HMMA"}
# Of FP4 with four scales for 64 inputs. On anything else Triton would fall back to, it is another operation.
OMMA = "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"
FP4_UNITS = {100: "UTCOMMA.4X", 103: "UTCOMMA.BLOCK16", 120: OMMA, 121: OMMA}

Reports = list[dict[str, Any]]


def compile_all(*options: str, path: str | None = None) -> Reports:
    """All lines of `compiled.py`, from a process without the interpreter; it imports from `path` first."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def installed() -> Reports:
    return compile_all()


@pytest.fixture(scope="module")
def newer() -> Reports:
    if not NEXT.is_dir():
        pytest.skip("there is no second Triton to compile with: `make triton-next` gets it")
    return compile_all("--blackwell", path=str(NEXT))


@pytest.fixture(params=["installed", "newer"])
def reports(request: pytest.FixtureRequest) -> Reports:
    return request.getfixturevalue(request.param)


def products(reports: Reports, *forms: str) -> list[tuple[Any, ...]]:
    """What was compiled of products for weights of these forms."""
    fields = ("arch", "rows", "kernel", "form")
    return [tuple(line[field] for field in fields) for line in reports if line.get("form") in forms]


def test_every_configuration_is_compiled(installed: Reports) -> None:
    wanted = [
        (target, rows, kernel, form)
        for arch, rows in moe.CONFIGS
        for kernel, form in choices(rows)
        for target in targets(arch, form)
    ]
    assert products(installed, "nvfp4", "fp8") == wanted
    others = {(line["arch"], line["kernel"]) for line in installed if "rows" not in line}
    assert others >= {(arch, name) for arch in moe.CANVAS_ROWS for name in ("plan", "combine")}


def test_blackwell_converts_itself(newer: Reports) -> None:
    wanted = [
        (target, rows, kernel, form)
        for arch, rows in moe.CONFIGS
        for kernel, form in choices(rows)
        for target in RELATIVES.get(arch, ())
        if form == "nvfp4"
    ]
    assert products(newer, "nvfp4") == wanted
    assert all(line["native"] for line in newer if line["form"] == "nvfp4")


def test_nothing_spills(reports: Reports) -> None:
    assert [line for line in reports if line["spilled"]] == []


def test_two_blocks_fit_a_multiprocessor(reports: Reports) -> None:
    assert [line for line in reports if 2 * line["shared"] > SHARED[line["arch"]] << 10] == []

    def bound(line: dict[str, Any]) -> int:
        """Of 65,536 registers, three blocks of 128 threads may have 168 a thread, two may have 255."""
        if line.get("rows") != 64:
            return 168
        return 255 if line["form"] == "w4a4" else 200

    assert [line for line in reports if line["registers"] > bound(line)] == []


def test_the_tensor_cores_multiply(reports: Reports) -> None:
    def unit(line: dict[str, Any]) -> str:
        return (FP4_UNITS if line["form"] == "w4a4" else UNITS)[line["arch"]]

    assert [line for line in reports if "unit" in line and line["unit"] != unit(line)] == []


def test_products_in_fp4(reports: Reports) -> None:
    """Compiled for what this Triton can, with scales as the weights have them, at an instruction a weight."""
    found = [line for line in reports if line.get("form") == "w4a4"]
    archs = {line["arch"] for line in found}
    assert archs in ({100, 103, 120}, {100, 103, 120, 121})
    wanted = set(itertools.product(archs, (16, 32, 64), moe.TILE_ROWS, ["w4a4"]))
    assert set(products(found, "w4a4")) == wanted
    assert [line for line in found if line["scales"] != "ue4m3" or line["per_weight"] > 1.3] == []


def test_instructions_a_weight(reports: Reports) -> None:
    def bound(line: dict[str, Any]) -> float:
        """mma.sync shares the loop with its operands: blocks of 64 rows are bound by it, not by decoding.

        A linear's tiles are half as high, so that activations cost twice as much a weight; not on sm_100.
        """
        synchronous = UNITS[line["arch"]] == "HMMA"
        tcgen05 = UNITS[line["arch"]] == "UTCHMMA"
        if line["form"] == "w4a4" or line["native"]:
            return 6.2 if line["kernel"] == "linear" and synchronous else 3.8 if line["rows"] == 64 else 3.0
        if line["kernel"] == "linear" and not tcgen05:
            return 11.8 if synchronous else 5.8
        if not synchronous or line["rows"] == 16:
            return 4.5 if line["rows"] == 64 else 4.2
        return 5.0 if line["rows"] == 32 else 8.2

    assert [line for line in reports if "per_weight" in line and line["per_weight"] > bound(line)] == []
