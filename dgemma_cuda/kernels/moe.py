"""Experts in NVFP4 or FP8, activations in bfloat16: the kernels that replace the composite `Ops.experts`.

Four launches do a layer's experts: the plan, gate and up with GELU, down with the router's weight, and the
sum over picks. Weights are decoded in registers on their way to the tensor cores, so that a step reads each
chosen expert once, as it is stored. Arrays between the launches are bfloat16, as between the composite's
products. Sums are float32, and the last one has a fixed order: a result does not depend on scheduling, as it
would with atomic additions. The price: weights come in the order of `layout`.

    N tokens  K picks a token  E experts  D hidden  M expert size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dgemma.formats.quantized import FP8, Quantized

from .launch import native, power_of_two
from .layout import Order, Tiled, tile, untile
from .plan import Plan, plan


@dataclass(frozen=True)
class Config:
    """How the products are compiled; rows of a block and of a tile come with their arguments."""

    swap: bool  # weights are the left operand: their 128 rows fill the tensor core's, few tokens would not
    warps: int = 4
    stages: int = 4
    unroll: int = 1  # 2 saves a tenth of the instructions for twice the registers


# Rows of a tile of gate_up (each part) and of down: 704 = 11 · 64 and 2,816 = 22 · 128 leave nothing to pad.
TILE_ROWS = {"gate_up": 64, "down": 128}
# Rows of a block that an architecture takes for a canvas's 16 picks an expert; see `block_rows`.
CANVAS_ROWS = {80: 32, 89: 16, 90: 32, 100: 32, 120: 16}
# Chosen by what compiles best without a GPU (tests/kernels/test_aot.py), not by timings. 64 rows also fill
# mma.sync and wgmma from the left, and then an instruction has more columns of weights.
CONFIGS: dict[tuple[int, int], Config] = {
    (arch, rows): Config(swap=rows < 64 or arch == 100, stages=3 if arch in (89, 120) else 4)
    for arch in CANVAS_ROWS
    for rows in (16, 32, 64)
}


def architecture(device: torch.device) -> int:
    """The key of CONFIGS for a device: the nearest architecture that is not newer. The oldest on a CPU."""
    if device.type != "cuda":
        return min(CANVAS_ROWS)
    major, minor = torch.cuda.get_device_capability(device)
    own = 10 * major + minor
    # 8.6 has the shared memory of 8.9.
    return 89 if own == 86 else max(known for known in CANVAS_ROWS if known <= own)


def block_rows(arch: int, picks: int, experts: int) -> int:
    """Rows of a block, from the mean picks an expert: few waste fewer, many decode a tile once."""
    mean = picks / experts
    if mean > 32:
        return 64
    return 16 if mean <= 8 else CANVAS_ROWS[arch]


def tile_stack(record: Quantized, name: str) -> Tiled:
    """A stack [E, O, I], "gate_up" (gate rows first) or "down", in the order that the kernels read."""
    return tile(record, TILE_ROWS[name], 2 if name == "gate_up" else 1, order(record.codes.device))


def order(device: torch.device) -> Order:
    """The order of words that a device's kernels decode with the fewest instructions."""
    return Order.NATIVE if native(architecture(device)) else Order.SHIFTED


def experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Tiled, down: Tiled
) -> torch.Tensor:
    """`Ops.experts` of x [N, D] bfloat16, weights [N, K] float32 and ids [N, K], without a host read.

    The interpreter takes float32 x, too. Not differentiable.
    """
    arch = architecture(x.device)
    rows = block_rows(arch, ids.numel(), gate_up.shape[0])
    config = CONFIGS[arch, rows]
    chosen = plan(ids, gate_up.shape[0], rows)
    h = gated(x, chosen, ids.shape[1], gate_up, config)
    y = projected(h, chosen, weights, down, config)
    return combined(y, ids.shape[1])


def experts_plain(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: Tiled, down: Tiled,
    widen: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
) -> torch.Tensor:  # fmt: skip
    """`experts` of the same arrays, in PyTorch on decoded weights, rounded where the kernels round.

    `widen` makes float32 of rows [n, ·] that go into a product.
    """
    wide_up, wide_down = untile(gate_up), untile(down)
    out = torch.zeros(x.shape, device=x.device)
    for expert in ids.unique().tolist():
        token, pick = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(widen(x[token]), wide_up[expert]).chunk(2, -1)
        h = (F.gelu(gate, approximate="tanh") * up).to(x.dtype)
        y = F.linear(widen(h), wide_down[expert]) * weights[token, pick][:, None]
        out.index_add_(0, token, y.to(x.dtype).float())
    return out.to(x.dtype)


# ---- the launches ---------------------------------------------------------------------------------


def gated(x: torch.Tensor, plan: Plan, K: int, w: Tiled, config: Config) -> torch.Tensor:
    """gelu(gate) · up of the planned rows of x [N, D]: [planned rows, M and zeros up to whole tiles]."""
    from . import device

    E, _, D = w.shape
    T, B = w.words.shape[1:3]
    assert w.parts == 2 and x.shape[1] == D and x.stride(1) == 1
    assert x.dtype == torch.bfloat16 or device.INTERPRET, x.dtype
    h = x.new_empty((plan.blocks * plan.rows, T * w.rows))
    with torch.cuda.device_of(x):
        device.gate_up[(plan.blocks * T,)](
            x, *fields(w), plan.slots, plan.experts, h, x.shape[0] * K, D, x.stride(0), B, T,
            E=E, K=K, M=plan.rows, WHOLE=D % 64 == 0, **compiled(w, x.device, config),
        )  # fmt: skip
    return h


def projected(h: torch.Tensor, plan: Plan, weights: torch.Tensor, w: Tiled, config: Config) -> torch.Tensor:
    """Rows of `gated` through the down projection, times their weight of weights [N, K]: [N·K, D]."""
    from . import device

    E, D, M = w.shape
    T, B = w.words.shape[1:3]
    assert w.parts == 1 and h.shape[1] >= M and weights.dtype == torch.float32, weights.dtype
    y = h.new_empty((weights.numel(), D))
    with torch.cuda.device_of(h):
        device.down[(plan.blocks * T,)](
            h, *fields(w), plan.slots, plan.experts, weights.contiguous(), y,
            len(y), M, h.stride(0), D, B, T,
            E=E, M=plan.rows, WHOLE=M % 64 == 0, **compiled(w, h.device, config),
        )  # fmt: skip
    return y


def combined(y: torch.Tensor, K: int) -> torch.Tensor:
    """The sum of each token's K rows of y [N·K, D], in their order and in float32: [N, D]."""
    from . import device

    out = y.new_empty((len(y) // K, y.shape[1]))
    columns = min(1024, power_of_two(y.shape[1]))
    with torch.cuda.device_of(y):
        device.combine[(len(out), -(-y.shape[1] // columns))](y, out, y.shape[1], K=K, C=columns)
    return out


def fields(w: Tiled) -> tuple[torch.Tensor, ...]:
    """Words, scales and factor of a `Tiled`; FP8 has no scales, and nothing reads what stands in for them."""
    return w.words, w.words if w.scales is None else w.scales, w.factor


def compiled(w: Tiled, place: torch.device, config: Config) -> dict[str, int | bool]:
    """What a product with these tiles is compiled for."""
    from . import device

    return {
        "R": w.rows,
        "FP8": w.form == FP8,
        "NATIVE": w.order is Order.NATIVE,
        "SWAP": config.swap,
        "UNROLL": config.unroll,
        "SM": architecture(place),
        "INTERPRET": device.INTERPRET,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
