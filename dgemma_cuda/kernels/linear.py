"""Linears in NVFP4 or FP8, activations in bfloat16: replaces `Ops.linear` of a record; the experts' product.

The alternative is to decode the matrix into bfloat16 and to call cuBLAS. Decoding at every call moves eight
times the matrix's bytes or more; decoding at load takes the memory that the format was chosen to save. Here
a tile is decoded again for every 64 rows of x, four times for a canvas: 9 µs of instructions, as counted, for
11.5 M weights on an H100, where cuBLAS waits 7 µs for them in bfloat16. No GPU has measured it.

    N rows of x  O outputs  I inputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dgemma.formats.quantized import Quantized

from .layout import Tiled, tile, untile
from .moe import CONFIGS, architecture, block_rows, compiled, fields, order


def tile_rows(arch: int) -> int:
    """Low tiles are more programs, of which a canvas has few; tcgen05 multiplies 128 rows at a time."""
    return 128 if arch == 100 else 64


def tile_matrix(record: Quantized) -> Tiled:
    """The tiles of a matrix [O, I] in the order that its device's kernel reads."""
    device = record.codes.device
    return tile(record, tile_rows(architecture(device)), order=order(device))


def linear(x: torch.Tensor, w: Tiled) -> torch.Tensor:
    """x [..., I] bfloat16 through a matrix [O, I]: [..., O]. The interpreter takes float32, too."""
    from . import device

    O, I = w.shape
    flat = x.reshape(-1, I)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    assert x.dtype == torch.bfloat16 or device.INTERPRET, x.dtype
    y = x.new_empty((len(flat), O))
    arch = architecture(x.device)
    rows = block_rows(arch, len(flat), 1)
    T, B = w.words.shape[1:3]
    blocks = -(-len(flat) // rows)
    with torch.cuda.device_of(x):
        device.linear[(T * blocks,)](
            flat, *fields(w), y, len(flat), I, O, flat.stride(0), blocks, B,
            M=rows, WHOLE=I % 64 == 0, **compiled(w, x.device, CONFIGS[arch, rows]),
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], O)


def linear_plain(x: torch.Tensor, w: Tiled) -> torch.Tensor:
    """`linear` of x [..., I] in PyTorch on decoded weights: [..., O]."""
    return F.linear(x.float(), untile(w)).to(x.dtype)
