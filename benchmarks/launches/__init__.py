"""Launches, bytes and temporaries of one denoising step at the released geometry, counted and not timed.

    python -m benchmarks.launches                              # ours and mlx-vlm, both formats, 1k and 128k
    python -m benchmarks.launches --format bf16 --context 1024 --kinds
    python -m benchmarks.launches --context 1024 --rows 1 --rows 16   # rows that share a step

It needs no Mac and no weights: a step is traced over arrays that are never made, `mx.export_function` tells
its primitives in the order of evaluation, and what MLX's Metal backend launches for each is a table, `rules`.
The table was read from MLX's sources (0.32) and is checked against MLX where Linux can (what is fused).

The steps that are compared: `Model.refine` with self-conditioning, past `mx.compile` as on a GPU; and one
turn of mlx-vlm's `stream_diffusion_generate`, put together from its own functions, with the released sampler
(entropy bound, temperature 1) and the defaults for all else. Both end with a new soft embedding or what the
next step makes it from. Noise and acceptance are the device's there and the host's here. bf16 means bf16
throughout; 4bit is mlx-community's pattern, which is our preset "balanced": experts and self-conditioning
4-bit, all else 8-bit, groups of 64.

The rules:

- No launch: transposes, slices, splits, broadcasts, new and dropped axes, reshapes of what lies in rows,
  changes of type without conversion, `depends`. Layouts are followed with NumPy's strides.
- One launch: an elementwise operation or conversion, a product, norm, rope, softmax, log-sum-exp, argmax,
  gather, cumulative sum, range, fill, random bits, sort of up to 2,048 numbers a row, custom kernel.
- Two: products split along their inner dimension (few tiles: the rules of a Max or Ultra of M1 to M4),
  scatters and updates of slices (a copy first), pads (a fill first), sums of a whole array beyond 4,096.
- One for each input: concatenation. One more: what must lie in rows and does not, or must have rows of its
  own (norms of transposed heads, reshapes that cannot be strides, inputs of custom kernels).
- 2 + 2 log2(blocks): longer sorts.
- Attention of more than 8 queries with heads of 256 or 512 has no fused kernel: it is MLX's own fallback
  (product, mask, softmax, product), and its scores are arrays.
- What is compiled is fused as `mx.compile` does it: chains of elementwise operations over one shape, at most
  11 deep and 24 inputs wide, where all readers of a value lie within. Our step of one row is compiled as a
  whole, that of several in GELU only, and mlx-vlm's in GeGLU and the softcap. Export always removes common
  subexpressions, so from all.
- The launch in which MLX 0.32.4 finds each expert's first row is not counted: its host code was not read.

Bytes are those of each launch's inputs and outputs, once each. A broadcast array counts as what it was made
from, a gather as the rows that it picks, and a stack of experts as those that can be touched: the 2,048 picks
of one canvas can touch all 128. Temporaries are
the outputs, copies and partial sums of launches. FLOPs are 2·M·N·K of products. Reads of the embedding table
are the bytes of it that products and kernels read, over its own; rows that are looked up are not counted.

A step passes through the files so: `ours` and `peer` make a `step`, `graph` traces it with the stand-ins of
`metal`, `fusion` merges what `mx.compile` would, `walk` goes through the nodes and adds to a `count` what
`rules` say of each, and `report` tells it.
"""
