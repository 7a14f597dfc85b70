"""Experts with weights and activations in NVFP4 (W4A4): in place of `moe.experts`, and not with its results.

Blackwell's tensor cores multiply FP4 codes under E4M3 scales as they are stored, at four times the rate of
bfloat16. So activations are quantized on the way, as a checkpoint's weights are: a float32 factor a row, an
E4M3 scale for 16 inputs, E2M1 codes. That may save decoding, which binds W4A16 on a B200, and products of
bfloat16, which bind it on an RTX 5090; no GPU has timed it. The price: a layer's experts are off by 15 % on
random heavy-tailed data (tests/kernels/test_fp4.py), and a layer has two launches more. Hence an opt-in.

    N tokens  K picks a token  E experts  D hidden  M expert size
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dgemma.formats.encode import blocks
from dgemma.formats.quantized import NVFP4, Quantized
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops.decoding import dequantize

from . import moe
from .launch import power_of_two, supported, triton_version
from .layout import BLOCK, Order, Tiled, tile
from .plan import Plan, plan

STEP = 2  # blocks of inputs that a step multiplies: 1 halves what is in flight, 4 takes twice the memory
WARPS, STAGES = 4, 4


def unsupported(device: torch.device) -> str | None:
    """Why products in FP4 do not run on `device`, in a sentence, or None where they do."""
    if reason := supported(device):
        return reason
    if device.type != "cuda":  # interpreted
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 10:
        return f"products in FP4 need compute capability 10.0 or more, and this GPU has {major}.{minor}"
    least, found = oldest((major, minor)), triton_version()
    if found < least:
        return f"products in FP4 need Triton {least[0]}.{least[1]}, and {found[0]}.{found[1]} is installed"
    return None


def oldest(capability: tuple[int, int]) -> tuple[int, int]:
    """The oldest Triton that compiles them: 3.6 did for 10.0 only, and 3.7 does not for 12.1."""
    return (3, 8) if capability == (12, 1) else (3, 7)


def tile_stack(record: Quantized, name: str) -> Tiled:
    """A stack [E, O, I] in NVFP4, "gate_up" (gate rows first) or "down", in the order read here."""
    return tile(record, moe.TILE_ROWS[name], 2 if name == "gate_up" else 1, Order.UNSIGNED)


def block_rows(picks: int, experts: int) -> int:
    """Rows of a block, from the mean picks an expert: padding is cheap here, a tile read twice is not."""
    mean = picks / experts
    return 16 if mean <= 8 else 32 if mean <= 32 else 64


def experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Tiled, down: Tiled
) -> torch.Tensor:
    """`Ops.experts` of x [N, D], weights [N, K] float32 and ids [N, K], all products in FP4."""
    E, K = gate_up.shape[0], ids.shape[1]
    chosen = plan(ids, E, block_rows(ids.numel(), E))
    h = gated(quantized(x, x.shape[1]), chosen, K, gate_up, x.dtype)
    y = projected(quantized(h, down.shape[2], chosen, E), chosen, weights, down, x.dtype)
    return moe.combined(y, K)


def experts_plain(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Tiled, down: Tiled
) -> torch.Tensor:
    """`experts` of the same arrays, in PyTorch on decoded weights and activations: its definition."""
    return moe.experts_plain(x, weights, ids, gate_up, down, quantized_plain)


# ---- activations ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Quantized rows, filled up with zeros to whole steps of I inputs."""

    codes: torch.Tensor  # uint8 [N, I/2]: the first of two inputs in the lower bits
    scales: torch.Tensor  # uint8 [N, I/16]: E4M3, never zero
    factor: torch.Tensor  # float32 [N]


def quantized(x: torch.Tensor, width: int, plan: Plan | None = None, E: int = 0) -> Rows:
    """The first `width` inputs of the rows of x [N, …]. A row with NaN gets it for a factor.

    Rows that a plan for E experts leaves over stay undefined.
    """
    from . import device_fp4

    assert x.stride(1) == 1, x.stride()
    groups = -(-width // (STEP * BLOCK)) * (STEP * BLOCK // 16)
    codes, scales = (x.new_empty((len(x), groups * size), dtype=torch.uint8) for size in (8, 1))
    factor = x.new_empty(len(x), dtype=torch.float32)
    with torch.cuda.device_of(x):
        device_fp4.quantize[(len(x),)](
            x, factor if plan is None else plan.experts, codes, scales, factor, width, x.stride(0), groups,
            E=E, M=1 if plan is None else plan.rows, C=power_of_two(groups * 16),
        )  # fmt: skip
    return Rows(codes, scales, factor)


def quantized_plain(x: torch.Tensor) -> torch.Tensor:
    """The values [N, I] float32 of `quantized`, as the format's own encoder makes them on the host."""
    rows = x.float().cpu().numpy()
    factor = np.abs(rows).max(-1) / np.float32(2688)
    record = blocks(rows, NVFP4, np.where(factor == 0, np.float32(1), factor))
    return torch.from_numpy(dequantize(NumpyOps(), record).astype(np.float32)).to(x.device)


# ---- the launches ---------------------------------------------------------------------------------


def gated(x: Rows, plan: Plan, K: int, w: Tiled, dtype: torch.dtype) -> torch.Tensor:
    """As `moe.gated`: gelu(gate) · up of the planned rows of x, [planned rows, M and zeros]."""
    from . import device_fp4

    T = w.words.shape[1]
    assert w.parts == 2
    h = x.factor.new_empty((plan.blocks * plan.rows, T * w.rows), dtype=dtype)
    with torch.cuda.device_of(h):
        device_fp4.gate_up[(plan.blocks * T,)](
            x.codes, x.scales, x.factor, *fields(w), plan.slots, plan.experts, h, len(x.codes) * K,
            E=w.shape[0], K=K, M=plan.rows, **compiled(w),
        )  # fmt: skip
    return h


def projected(x: Rows, plan: Plan, weights: torch.Tensor, w: Tiled, dtype: torch.dtype) -> torch.Tensor:
    """As `moe.projected`: rows of `gated` through the down projection, times weights [N, K]: [N·K, D]."""
    from . import device_fp4

    E, D, _ = w.shape
    T = w.words.shape[1]
    assert w.parts == 1 and weights.dtype == torch.float32, weights.dtype
    y = x.factor.new_empty((weights.numel(), D), dtype=dtype)
    with torch.cuda.device_of(y):
        device_fp4.down[(plan.blocks * T,)](
            x.codes, x.scales, x.factor, *fields(w), plan.slots, plan.experts, weights.contiguous(), y,
            len(y), D, E=E, M=plan.rows, **compiled(w),
        )  # fmt: skip
    return y


def fields(w: Tiled) -> tuple[torch.Tensor, ...]:
    """Words and scales of a stack as bytes, and the factor: uint8 in the order of `Tiled`, float32."""
    assert w.order is Order.UNSIGNED and w.scales is not None, w.order
    return w.words.view(torch.uint8), w.scales.view(torch.uint8), w.factor


def compiled(w: Tiled) -> dict[str, int | bool]:
    """The sizes of these tiles, and what a product with them is compiled for."""
    from . import device

    T, B = w.words.shape[1:3]
    return {
        "B": B,
        "T": T,
        "R": w.rows,
        "S": STEP,
        "WHOLE": B % STEP == 0,
        "INTERPRET": device.INTERPRET,
        "num_warps": WARPS,
        "num_stages": STAGES,
    }
