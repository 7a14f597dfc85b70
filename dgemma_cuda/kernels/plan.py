"""Which rows a block of the grouped matmul computes: picks sorted by expert, each expert's padded to a block.

Everything stays on the device and every size follows from shapes, so that a CUDA graph can hold it. Buffers
are for the worst case, and blocks that a routing leaves over say so and return at once. It is one launch,
where each expert's program counts all picks again; a chain of sorts, sums and scatters (the plain twin) is a
dozen launches, for every layer of every step.

    N tokens  K picks a token  E experts  R rows of a block  B blocks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .launch import power_of_two


@dataclass(frozen=True, eq=False)
class Plan:
    """Slot n·K + k is pick k of token n. Blocks are in the order of experts, slots of an expert ascend."""

    slots: torch.Tensor  # int32 [B·R]: the slot of a row; N·K where an expert's last block has none
    experts: torch.Tensor  # int32 [B]: a block's expert; E where none is left, and slots are undefined
    rows: int  # R

    @property
    def blocks(self) -> int:
        return len(self.experts)


def blocks(picks: int, experts: int, rows: int) -> int:
    """Most blocks that so many picks can need: every expert that is picked at all may fill one badly."""
    return (picks + min(experts, picks) * (rows - 1)) // rows


def plan(ids: torch.Tensor, experts: int, rows: int) -> Plan:
    """The plan of ids [N, K] (any integer type, below `experts`) in blocks of `rows`, by one launch."""
    from . import device

    count = blocks(ids.numel(), experts, rows)
    slots = torch.empty(count * rows, dtype=torch.int32, device=ids.device)
    owners = torch.empty(count, dtype=torch.int32, device=ids.device)
    ids = ids.contiguous()
    bins = power_of_two(experts)
    with torch.cuda.device_of(ids):
        device.plan[(experts,)](ids, slots, owners, ids.numel(), count, E=experts, BINS=bins, M=rows)
    return Plan(slots, owners, rows)


def plan_plain(ids: torch.Tensor, experts: int, rows: int) -> Plan:
    """`plan` of ids [N, K] in PyTorch, and as fit for a CUDA graph; left-over slots are N·K here."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    of_row = flat[order]  # expert of the sorted picks
    everyone = torch.arange(experts, device=ids.device, dtype=flat.dtype)
    first = torch.searchsorted(of_row, everyone)
    counts = torch.searchsorted(of_row, everyone, right=True) - first
    filled = (counts + rows - 1) // rows
    ends = torch.cumsum(filled, 0)
    places = (ends - filled)[of_row] * rows + torch.arange(len(flat), device=ids.device) - first[of_row]
    count = blocks(len(flat), experts, rows)
    slots = torch.full((count * rows,), len(flat), dtype=torch.int32, device=ids.device)
    slots[places] = order.int()
    owners = torch.searchsorted(ends, torch.arange(count, device=ids.device), right=True)
    return Plan(slots, owners.int(), rows)
