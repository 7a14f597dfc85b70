"""Every shipped configuration compiles for every architecture, without spills and within its shared memory.

No GPU is needed: Triton brings the assembler, and what it says of registers is what a GPU would be given.
Run as a script this prints what the test asserts on; the test runs it in a process of its own, because this
folder's conftest puts Triton into its interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

# Shared memory that a program may ask for, in KB, by compute capability.
LIMITS = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
V, D = 262144, 2816
SIXTEEN = [["tt.divisibility", 16]]

# How arguments of kernels are passed: what is in neither is an i32. Strides and sizes of the model are
# multiples of 16, which Triton is told at a launch, too.
POINTERS = {
    "logits": "*bf16", "p": "*bf16", "table": "*bf16", "soft": "*bf16", "q": "*bf16", "k": "*bf16",
    "v": "*bf16", "temperature": "*fp32", "parts": "*fp32", "values": "*fp32", "uniforms": "*fp32",
    "top": "*fp32", "total": "*fp32", "shares": "*fp32", "dropped": "*fp32", "few_shares": "*fp32",
    "missing": "*fp32", "partial": "*fp32", "sums": "*fp32", "places": "*i32", "few_ids": "*i32",
    "counts": "*i32", "few": "*i32", "dense": "*i32", "rows": "*i64", "ends": "*i64", "classes": "*i16",
    "which": "*i64", "out": "*fp32",
}  # fmt: skip
FLOATS = {"cap", "limit", "most", "trace"}
MULTIPLES = {"V", "D", "span", "keep", "window", "q_h", "q_n"}  # N is what a prompt leaves for a pass

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]


def vocabulary_cases() -> Iterator[Case]:
    """(name, kernel, types of some arguments, constants, options) of the vocabulary."""
    from dgemma_cuda.kernels import vocabulary as m

    splits = m.power_of_two(-(-V // m.WIDTH))
    whole = {"WIDTH": m.WIDTH, "TILE": m.TILE}
    runs = [whole | {"BIASED": biased} for biased in (False, True)]
    constants = {
        "_statistics": runs,
        "_draw": [run | {"SPLITS": splits} for run in runs],
        "_probabilities": [run | {"SOME": some} for run in runs for some in (False, True)],
        "_shortlist": runs,
        "_decide": [{"SPLITS": splits, "KEEP": m.power_of_two(m.Sparse().keep)}],
        "_product": [m.PRODUCT | {"EVEN": True, "INTERPRET": False}],
        "_collect": [{"COLUMNS": m.COLUMNS, "GATHERED": m.GATHERED}],
    }
    assert constants.keys() == m.OPTIONS.keys()
    for name, choices in constants.items():
        types = {"ids": "*i64"} if name == "_draw" else {"ids": "*i32"}
        for choice in choices:
            tag = name + "".join(f" {flag.lower()}" for flag in ("SOME", "BIASED") if choice.get(flag))
            # Without a bias any arrays stand in its place.
            none = {} if choice.get("BIASED") else {"classes": "*i64"}
            yield tag, getattr(m, name), types | none, choice, m.OPTIONS[name]


def attention_flags(C: int) -> Iterator[dict[str, bool]]:
    """What may be launched: prompts are causal, windowed on sliding layers, and few blocks are split."""
    for causal, split in product((False, True), repeat=2):
        yield {"CAUSAL": causal, "WINDOWED": causal and C == 256, "SPLIT": split}


def attention_cases(capability: int) -> Iterator[Case]:
    """The released model's groups of heads."""
    from dgemma_cuda.kernels import attention as m

    for C, group in ((512, 8), (256, 2)):
        tile = m.TILES[C, m.family(capability // 10)]
        sizes = {"REP": group, "C": C, "BM": tile.rows, "BN": tile.keys, "INTERPRET": False}
        for flags in attention_flags(C):
            types = {"out": "*fp32" if flags["SPLIT"] else "*bf16", "table": "*i64"}
            tag = " ".join([f"_attend {C}", *(name.lower() for name, on in flags.items() if on)])
            yield tag, m._attend, types, sizes | flags, tile.options
        yield (
            f"_merge {C}",
            m._merge,
            {"out": "*bf16"},
            {"C": C, "SPLITS": m.MOST},
            {"num_warps": m.MERGE_WARPS},
        )


def compiled(case: Case, capability: int, folder: Path) -> dict[str, Any]:
    """Registers and spilled bytes a thread, and shared bytes a program, of one kernel on one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, fn, types, constants, options = case
    signature, attributes = {}, {}
    for index, argument in enumerate(fn.arg_names):
        kind = types.get(argument) or POINTERS.get(argument) or ("fp32" if argument in FLOATS else "i32")
        signature[argument] = "constexpr" if argument in constants else kind
        if kind.startswith("*") or argument in MULTIPLES:
            attributes[(index,)] = SIXTEEN
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    assert found, said
    registers, stack, local = map(int, found.groups())
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", binary.asm["ptx"])
    return {
        "kernel": name,
        "sm": capability,
        "registers": registers,
        "spilled": stack + local,
        "shared": binary.metadata.shared,
        "copies": sorted({int(size, 16) for size in copies}),
    }


def report(capability: int) -> list[dict[str, Any]]:
    """Of each configuration on an architecture."""
    from dgemma_cuda.kernels import attention, vocabulary

    assert attention.kernel is vocabulary.kernel  # both are imported, hence all kernels marked
    vocabulary.load()
    with tempfile.TemporaryDirectory() as folder:
        cases = *vocabulary_cases(), *attention_cases(capability)
        return [compiled(case, capability, Path(folder)) for case in cases]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_configuration_fits_every_architecture() -> None:
    """Triton's own cache keeps what has not changed since the last run, by source, options and target."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {line["sm"] for line in lines} == set(LIMITS) and len(lines) == 23 * len(LIMITS)
    bad = [
        line
        for line in lines
        if line["spilled"] or line["shared"] > LIMITS[line["sm"]] * 1024 or line["registers"] > 255
    ]
    assert not bad, "\n".join(map(str, bad))
    # An address that is read from a table is aligned only if the kernel says so.
    narrow = [line for line in lines if line["kernel"].startswith("_attend") and line["copies"] != [16]]
    assert not narrow, "\n".join(map(str, narrow))


if __name__ == "__main__":
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for lines in pool.map(report, LIMITS):
            print("\n".join(map(json.dumps, lines)), flush=True)
