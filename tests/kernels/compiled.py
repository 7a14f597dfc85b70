"""What the kernels compile to, without a GPU: `python -m tests.kernels.compiled` prints a JSON line a kernel.

Triton's compiler and ptxas need no device, and the disassembler in Triton's wheel shows what they made:
registers, spills, shared memory, and the instructions of the main loop for each weight that it decodes. A
process of its own, because the tests beside it import Triton as an interpreter.

Options vary what is compiled: `--rows 16 --swap 0 --unroll 2 --stages 3 --arch 90`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgemma_cuda.kernels import linear, moe

# DiffusionGemma's: hidden size, expert size, experts, picks a token.
D, M, E, K = 2816, 704, 128, 8
POINTERS = {
    **dict.fromkeys(("x", "h", "y", "out"), "*bf16"),
    **dict.fromkeys(("words", "scales", "slots", "owners"), "*i32"),
    **dict.fromkeys(("factor", "shares"), "*fp32"),
    "ids": "*i64",
}
# What a launch finds divisible by 16, beside the pointers: Triton compiles for it then.
DIVISIBLE = {"picks", "inputs", "outputs", "stride_x", "stride_h", "width"}
FORMS = ("nvfp4", "fp8")
PRODUCTS = ("gate_up", "down", "linear")
DECODED = 2  # weights that one multiplication by scales makes


def compile_for(name: str, arch: int, constants: dict[str, Any], **options: int) -> Any:
    """Triton's compiled kernel of `dgemma_cuda.kernels.device`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dgemma_cuda.kernels import device

    kernel = getattr(device, name)
    names = kernel.arg_names
    types = {arg: "constexpr" if arg in constants else POINTERS.get(arg, "i32") for arg in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(names)
        if types[arg].startswith("*") or arg in DIVISIBLE - set(constants)
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def report(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of a compiled kernel, and its code in `sass`."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        used, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", used)[0])
    shared = kernel.metadata.shared
    return {"registers": registers, "spilled": stack, "shared": shared, "sass": sass}


def product(arch: int, name: str, rows: int, form: str, config: moe.Config) -> dict[str, Any]:
    """The report of a product, with the instructions of its main loop a weight."""
    height = linear.tile_rows(arch) if name == "linear" else moe.TILE_ROWS[name]
    parts = 2 if name == "gate_up" else 1
    constants = {
        "M": rows, "R": height, "FP8": form == "fp8", "WHOLE": True, "SWAP": config.swap,
        "UNROLL": config.unroll, "SM": arch, "INTERPRET": False,
        **({"K": K, "E": E} if name == "gate_up" else {"E": E} if name == "down" else {}),
    }  # fmt: skip
    kernel = compile_for(name, arch, constants, num_warps=config.warps, num_stages=config.stages)
    found = report(kernel)
    weights = 64 * height * parts * config.unroll // (32 * config.warps)  # in a loop, a thread
    loop = main_loop(found.pop("sass"), weights // DECODED)
    units = {op.split(".")[0] for op in loop} & {"HMMA", "HGMMA", "UTCHMMA"}
    return {
        "arch": arch, "kernel": name, "form": form, "rows": rows, "swap": config.swap,
        "unroll": config.unroll, "stages": config.stages, **found, "unit": "+".join(sorted(units)),
        "per_weight": round(len(loop) / weights, 2),
    }  # fmt: skip


def main_loop(sass: str, products: int) -> list[str]:
    """The operations of the shortest loop with that many bfloat16 multiplications: it is what decodes.

    Below sm_90 they are HFMA2, and on sm_100 ptxas makes every second one an HFMA2.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", sass)
    code = [(int(address, 16), operation, rest) for address, operation, rest in lines]
    found: list[str] = []
    for end, operation, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if operation.startswith("BRA") else None
        if target is None or int(target[1], 16) >= end:
            continue
        body = [op for address, op, _ in code if int(target[1], 16) <= address <= end]
        count = sum(op.startswith(("HMUL2.BF16", "HFMA2.BF16", "HFMA2.MMA.BF16")) for op in body)
        if count >= products and (not found or len(body) < len(found)):
            found = body
    assert found, f"no loop with {products} multiplications"
    return found


def choices(rows: int) -> list[tuple[str, str]]:
    """Products and forms of weights for blocks of so many rows; linears in the blocks of a canvas only."""
    return [choice for choice in itertools.product(PRODUCTS, FORMS) if choice[0] != "linear" or rows == 64]


def everything(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Reports of all products that `moe.experts` may launch, with `options` in place of the table's."""
    for (arch, rows), config in moe.CONFIGS.items():
        if options.arch in (None, arch) and options.rows in (None, rows):
            changed = {name: getattr(options, name) for name in ("swap", "unroll", "stages")}
            config = replace(config, **{k: v for k, v in changed.items() if v is not None})
            for name, form in choices(rows):
                if options.form in (None, form):
                    yield product(arch, name, rows, form, config)
    for arch in moe.CANVAS_ROWS:
        if options.arch in (None, arch) and options.rows is None:
            for name, constants in (("plan", {"E": E, "BINS": E, "M": 16}), ("combine", {"K": K, "C": 1024})):
                found = report(compile_for(name, arch, constants))
                del found["sass"]
                yield {"arch": arch, "kernel": name, **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("arch", "rows", "swap", "unroll", "stages"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--form", choices=FORMS)
    for line in everything(parser.parse_args()):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
