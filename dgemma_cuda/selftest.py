"""The kernels on this machine's GPU, against their plain twins, at the released sizes with random data.

Each check says how far the kernel is from its twin, what the bound is, and what both cost. The report says
so where there is no GPU, and what was not checked: the test suite interprets kernels on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgemma.files import load_json
from dgemma.formats.quantized import FP8, NVFP4, Form
from dgemma.network.config import Config, read_config
from dgemma.network.ops import Bias, Mask, Prediction
from dgemma.network.ops.layers import top_k
from dgemma.network.spec import Param
from dgemma.released import RELEASED_DIR
from dgemma.reports.selftest import Check, difference, found, nothing

from .bench import ceilings, clock
from .kernels import attention, fp4, linear, moe, vocabulary
from .kernels.launch import supported
from .ops import CudaOps, make
from .synthetic import random_record

REPEATS = 10


def checks(ops: CudaOps, config: Config, context: int) -> Iterator[Check]:
    """The checks, one after the other, at this geometry."""
    generator = torch.Generator(ops.device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=ops.device, dtype=ops.dtype)

    for form in (NVFP4, FP8):
        yield _experts(ops, config, form, normal, generator)
        yield _linear(ops, config, form, normal, generator)
    if fp4.unsupported(ops.device) is None:
        yield _experts(ops, config, NVFP4, normal, generator, w4a4=True)
    for kind in ("sliding_attention", "full_attention"):
        yield _attention(ops, config, kind, context, normal)
    yield from _vocabulary(ops, config, normal)


def _timed(
    ops: CudaOps,
    kernel: str,
    what: str,
    bound: float,
    nbytes: int,
    run: Callable[[], Any],
    plain: Callable[[], Any],
) -> Check:
    """A kernel's `run` against its twin's `plain`, each timed."""
    error = difference([ops.to_numpy(run())], [ops.to_numpy(plain())])
    # Twins may read the host, which a recording must not: they are timed as they run.
    times = clock(ops, run, REPEATS), clock(ops, plain, 3, record=False)
    return Check(kernel, what, ops.dtype_name, error, bound, *times, nbytes)


Normal = Callable[..., torch.Tensor]


def _experts(
    ops: CudaOps, config: Config, form: Form, normal: Normal, generator: torch.Generator, w4a4: bool = False
) -> Check:
    """One layer's experts for one canvas. A code near a tie may differ from the twin's in W4A4."""
    kernels: Any = fp4 if w4a4 else moe
    D, M, E = config.hidden_size, config.expert_size, config.num_experts
    shapes = {"gate_up": (E, 2 * M, D), "down": (E, D, M)}
    stacks = [
        kernels.tile_stack(random_record(ops, Param(name, shape, "experts"), form, generator), name)
        for name, shape in shapes.items()
    ]
    x = normal(config.canvas_length, D)
    scores = torch.rand(len(x), E, generator=generator, device=ops.device)
    weights, ids = top_k(ops, torch.softmax(scores, -1), config.top_k)
    args = (x, weights.float(), ids, *stacks)
    nbytes = sum(stack.nbytes for stack in stacks)
    return _timed(
        ops,
        "experts",
        f"{form}" + ", W4A4" * w4a4,
        2**-4 if w4a4 else 2**-5,
        nbytes,
        lambda: kernels.experts(*args),
        lambda: kernels.experts_plain(*args),
    )


def _linear(ops: CudaOps, config: Config, form: Form, normal: Normal, generator: torch.Generator) -> Check:
    """The widest projection of a sliding layer, for one canvas."""
    shape = (config.heads * config.layers[0].head_dim, config.hidden_size)
    w = linear.tile_matrix(random_record(ops, Param("q", shape, "attention"), form, generator))
    x = normal(config.canvas_length, shape[1])
    nbytes = w.nbytes + x.nbytes + x.element_size() * len(x) * shape[0]
    return _timed(
        ops,
        "linear",
        f"{form}",
        2**-6,
        nbytes,
        lambda: linear.linear(x, w),
        lambda: linear.linear_plain(x, w),
    )


def _attention(ops: CudaOps, config: Config, kind: str, context: int, normal: Normal) -> Check:
    """A canvas over its context in two pieces, in a layer of this kind, and a short row without any."""
    layer = next(layer for layer in config.layers if layer.kind == kind)
    lengths, C, G = (config.canvas_length, config.canvas_length // 8), layer.head_dim, layer.kv_heads
    slots = context if layer.past is None else min(context, layer.past)
    q = normal(config.heads, sum(lengths), C) * C**-0.5
    own = normal(G, sum(lengths), C), normal(G, sum(lengths), C)
    sizes = slots // 3, slots - slots // 3
    past = [[(normal(G, n, C), normal(G, n, C)) for n in sizes], []]
    (there,) = attention.table([past], lengths, ops.device)
    mask = Mask(window=layer.window)
    nbytes = sum(x.nbytes for pair in (own, *past[0]) for x in pair) + 2 * q.nbytes
    return _timed(
        ops,
        "attention",
        f"heads of {C}",
        2**-6,
        nbytes,
        lambda: attention.attend(q, own, there, lengths, mask),
        lambda: attention.attend_plain(q, own, past, lengths, mask),
    )


def _vocabulary(ops: CudaOps, config: Config, normal: Normal) -> Iterator[Check]:
    """Entropy and soft embedding of one canvas; the soft embedding again with a bias."""
    D, V, N = config.hidden_size, config.vocab_size, config.canvas_length
    table, h = normal(V, D) * D**-0.5, normal(N, D)
    uniforms, heat = torch.rand(N, device=ops.device), torch.tensor(0.6, device=ops.device)
    args = (h, table, config.softcap or 30.0, heat, uniforms)  # the kernel always caps
    nbytes = 2 * table.nbytes + 3 * 2 * N * V
    classes = ops.asclasses(np.arange(V)[None] % 3)
    forbidden = torch.tensor([0.0, -1e30, 2.0], device=ops.device).expand(N, 3).contiguous()
    biased = Bias(classes, torch.zeros(N, dtype=torch.int64, device=ops.device), forbidden)
    for field, bound, bias in (("entropy", 1e-2, None), ("soft", 2**-5, None), ("soft", 2**-5, biased)):

        def call(run: Callable[..., Prediction], field: str = field, bias: Bias | None = bias) -> Tensor:
            said: Tensor = getattr(run(*args, bias), field)
            return said

        what = field if bias is None else f"{field} with a bias"
        ours, plain = partial(call, vocabulary.vocabulary), partial(call, vocabulary.vocabulary_plain)
        yield _timed(ops, "vocabulary", what, bound, nbytes, ours, plain)


Progress = Callable[[str], None]


def check_all(device: str | None = None, progress: Progress = lambda what: None) -> dict[str, Any]:
    """The whole report at the released sizes, ready for JSON (`dgemma.reports.selftest`)."""
    # Named, so that a machine without a GPU is told so once, by the report.
    ops = make(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return run(ops, read_config(load_json(RELEASED_DIR / "config.json")), progress=progress)


def run(
    ops: CudaOps, config: Config, context: int = 1024, progress: Progress = lambda what: None
) -> dict[str, Any]:
    """The report of a geometry."""
    if reason := supported(ops.device):
        return nothing(str(ops.device), reason)
    done = []
    with torch.inference_mode():
        limits = ceilings(ops)
        for check in checks(ops, config, context):
            progress(f"checked {check.kernel}, {check.what}")
            done.append(check)
    on_gpu = ops.device.type == "cuda"
    device = torch.cuda.get_device_name(ops.device) if on_gpu else "cpu, interpreted"
    return found(device, done, ceilings=limits)
