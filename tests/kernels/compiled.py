"""What the kernels compile to, without a GPU: `python -m tests.kernels.compiled` prints a JSON line a kernel.

Triton's compiler and ptxas need no device, and the disassembler in Triton's wheel shows what they made:
registers, spills, shared memory, and the instructions of the main loop for each weight that it decodes. A
process of its own, because the tests beside it import Triton as an interpreter.

Options vary what is compiled: `--rows 16 --swap 0 --unroll 2 --stages 3 --arch 90`. Which products convert
codes natively, and which are in FP4, depends on the Triton that is imported; `--blackwell` leaves out the
rest.
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
from importlib import import_module
from pathlib import Path
from typing import Any

from dgemma_cuda.kernels import fp4, launch, linear, moe

# DiffusionGemma's: hidden size, expert size, experts, picks a token.
D, M, E, K = 2816, 704, 128, 8
POINTERS = {
    **dict.fromkeys(("x", "h", "y", "out"), "*bf16"),
    **dict.fromkeys(("words", "scales", "slots", "owners"), "*i32"),
    **dict.fromkeys(("factor", "shares"), "*fp32"),
    "ids": "*i64",
}
FP4_POINTERS = POINTERS | dict.fromkeys(("codes", "marks", "words", "scales"), "*u8") | {"units": "*fp32"}
# What a launch finds divisible by 16, beside the pointers: Triton compiles for it then.
DIVISIBLE = {"picks", "inputs", "outputs", "stride_x", "stride_h", "width"}
FORMS = ("nvfp4", "fp8")
MODULES = {"quantize": "device_fp4"}  # of kernels that are not in `device`
PRODUCTS = ("gate_up", "down", "linear")
# What else than the table's architecture its configurations are for, with instructions of its own.
RELATIVES = {100: (100, 103), 120: (120, 121)}
DECODED = 2  # weights that one multiplication by scales makes


def compile_for(
    name: str, arch: int, constants: dict[str, Any], module: str = "device", **options: int
) -> Any:
    """Triton's compiled kernel of a module of `dgemma_cuda.kernels`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"dgemma_cuda.kernels.{module}"), name)
    names, pointers = kernel.arg_names, FP4_POINTERS if module == "device_fp4" else POINTERS
    types = {arg: "constexpr" if arg in constants else pointers.get(arg, "i32") for arg in names}
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


def native(arch: int, form: str) -> bool:
    """Whether a product for weights of this form has the GPU convert them."""
    return form == "nvfp4" and launch.native(arch)


def targets(arch: int, form: str) -> tuple[int, ...]:
    """The architectures to compile for, of those that share an entry of the table."""
    return RELATIVES[arch] if native(arch, form) else (arch,)


def product(arch: int, name: str, rows: int, form: str, config: moe.Config, target: int) -> dict[str, Any]:
    """The report of a product, with the instructions of its main loop a weight."""
    height = linear.tile_rows(arch) if name == "linear" else moe.TILE_ROWS[name]
    parts = 2 if name == "gate_up" else 1
    constants = {
        "M": rows, "R": height, "FP8": form == "fp8", "NATIVE": native(arch, form), "WHOLE": True,
        "SWAP": config.swap, "UNROLL": config.unroll, "SM": arch, "INTERPRET": False,
        **({"K": K, "E": E} if name == "gate_up" else {"E": E} if name == "down" else {}),
    }  # fmt: skip
    kernel = compile_for(name, target, constants, num_warps=config.warps, num_stages=config.stages)
    found = report(kernel)
    weights = 64 * height * parts * config.unroll // (32 * config.warps)  # in a loop, a thread
    loop = main_loop(found.pop("sass"), weights // DECODED)
    units = {op.split(".")[0] for op in loop} & {"HMMA", "HGMMA", "UTCHMMA"}
    return {
        "arch": target, "kernel": name, "form": form, "rows": rows,
        "native": any(op.startswith("F2FP.BF16.E2M1") for op in loop), "swap": config.swap,
        "unroll": config.unroll, "stages": config.stages, **found, "unit": "+".join(sorted(units)),
        "per_weight": round(len(loop) / weights, 2),
    }  # fmt: skip


def fp4_product(target: int, name: str, rows: int) -> dict[str, Any]:
    """The report of a product in FP4; its unit is every operation that multiplies matrices."""
    height = moe.TILE_ROWS[name]
    constants = {
        "E": E, "M": rows, "R": height, "S": fp4.STEP, "INTERPRET": False,
        "WHOLE": (D if name == "gate_up" else M) % (64 * fp4.STEP) == 0,
        **({"K": K} if name == "gate_up" else {}),
    }  # fmt: skip
    options = {"num_warps": fp4.WARPS, "num_stages": fp4.STAGES}
    kernel = compile_for(name, target, constants, "device_fp4", **options)
    found = report(kernel)
    sass = found.pop("sass")
    units = {op for _, op, _ in operations(sass) if MATRIX.match(op)}
    loop = min((body for body in loops(sass) if units & set(body)), key=len)
    weights = 64 * fp4.STEP * 128 // (32 * fp4.WARPS)
    return {
        "arch": target, "kernel": name, "form": "w4a4", "rows": rows, **found,
        "unit": "+".join(sorted({op.removesuffix(".reuse") for op in units})),
        "scales": scale_format(kernel.asm["ptx"]), "per_weight": round(len(loop) / weights, 2),
    }  # fmt: skip


def scale_format(ptx: str) -> str:
    """What the tensor cores take the bytes of scales for: tcgen05 is told by bit 23 of its descriptor."""
    found = set(re.findall(r"mma\.sync\S*kind::mxf4nvf4\S*\.(ue\w+)", ptx))
    for register in re.findall(r"tcgen05\.mma\S*kind::mxf4nvf4\S* [^;]*?%rd\d+, %rd\d+, (%r\d+),", ptx):
        (value,) = re.findall(rf"mov\.b32\s+{register}, (-?\d+);", ptx)
        found.add("ue8m0" if int(value) >> 23 & 1 else "ue4m3")
    return "+".join(sorted(found))


MATRIX = re.compile(r"(UTC)?[A-Z]?MMA(?!\w)")


def main_loop(sass: str, products: int) -> list[str]:
    """The operations of the shortest loop with that many bfloat16 multiplications: it is what decodes.

    Below sm_90 they are HFMA2, and on sm_100 ptxas makes every second one an HFMA2.
    """
    multiplies = ("HMUL2.BF16", "HFMA2.BF16", "HFMA2.MMA.BF16")
    found = [body for body in loops(sass) if sum(op.startswith(multiplies) for op in body) >= products]
    assert found, f"no loop with {products} multiplications"
    return min(found, key=len)


def operations(sass: str) -> list[tuple[int, str, str]]:
    """Address, operation and operands of every instruction."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", sass)
    return [(int(address, 16), operation, rest) for address, operation, rest in lines]


def loops(sass: str) -> Iterator[list[str]]:
    """The operations from where a branch goes back to, up to the branch."""
    code = operations(sass)
    for end, operation, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if operation.startswith("BRA") else None
        if target is not None and int(target[1], 16) < end:
            yield [op for address, op, _ in code if int(target[1], 16) <= address <= end]


def choices(rows: int) -> list[tuple[str, str]]:
    """Products and forms of weights for blocks of so many rows; linears in the blocks of a canvas only."""
    return [choice for choice in itertools.product(PRODUCTS, FORMS) if choice[0] != "linear" or rows == 64]


def fp4_targets(arch: int) -> list[int]:
    """The architectures with products in FP4 that this Triton compiles, of those that share an entry."""
    relatives = RELATIVES.get(arch, ())
    return [x for x in relatives if launch.triton_version() >= fp4.oldest(divmod(x, 10))]


def everything(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Reports of all products that a backend may launch, with `options` in place of the table's."""
    for (arch, rows), config in moe.CONFIGS.items():
        if options.arch in (None, arch) and options.rows in (None, rows):
            changed = {name: getattr(options, name) for name in ("swap", "unroll", "stages")}
            config = replace(config, **{k: v for k, v in changed.items() if v is not None})
            for name, form in choices(rows):
                if options.form in (None, form) and (native(arch, form) or not options.blackwell):
                    for target in targets(arch, form):
                        yield product(arch, name, rows, form, config, target)
            if options.form in (None, "w4a4"):
                for target, name in itertools.product(fp4_targets(arch), moe.TILE_ROWS):
                    yield fp4_product(target, name, rows)
    if options.rows is None and not options.blackwell:
        yield from others([arch for arch in moe.CANVAS_ROWS if options.arch in (None, arch)])


def others(archs: list[int]) -> Iterator[dict[str, Any]]:
    """Reports of what surrounds the products."""
    for arch in archs:
        cases: dict[str, dict[str, int]] = {
            "plan": {"E": E, "BINS": E, "M": 16}, "combine": {"K": K, "C": 1024},
            **({"quantize": {"E": E, "M": 32, "C": 4096}} if fp4_targets(arch) else {}),
        }  # fmt: skip
        for name, constants in cases.items():
            found = report(compile_for(name, arch, constants, MODULES.get(name, "device")))
            del found["sass"]
            yield {"arch": arch, "kernel": name, **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("arch", "rows", "swap", "unroll", "stages"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--form", choices=(*FORMS, "w4a4"))
    parser.add_argument("--blackwell", action="store_true")
    for line in everything(parser.parse_args()):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
