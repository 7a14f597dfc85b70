"""Checks and times each Metal kernel on this machine against plain MLX, and keeps the verdict.

It runs on a Mac only, at the released sizes. A kernel is switched on if it is right in both number formats
and no slower than MLX's own operations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dgemma.files import load_json
from dgemma.formats.quantized import Form, Quantized, affine
from dgemma.network.build import rope_frequencies
from dgemma.network.config import Config, LayerConfig, read_config
from dgemma.network.ops import Bias, Mask
from dgemma.network.ops.layers import rotary
from dgemma.network.weights import AttentionWeights, BiasWeights
from dgemma.released import RELEASED_DIR
from dgemma.reports.selftest import Check, difference, found, nothing

from . import verdict
from .kernels import attention
from .ops import MlxOps, stacked_heads

# Largest difference over the largest value: a few roundings of the format.
BOUNDS = {mx.float32: 2e-5, mx.bfloat16: 2.0**-6}
CALLS, ROUNDS = 5, 5  # calls evaluated together, and how often that is timed


@dataclass(frozen=True)
class Case:
    """A composite's name, what it is called on here, and the call for an `MlxOps`."""

    kernel: str
    what: str
    call: Callable[[MlxOps], Any]
    needs: frozenset[str] = frozenset()  # kernels that are on also where `kernel` is off


# ---- cases ----------------------------------------------------------------------------------------


class Data:
    """Random inputs in one number format, at one geometry."""

    def __init__(self, config: Config, dtype: mx.Dtype, context: int):
        self.config, self.dtype, self.context = config, dtype, context
        self.rng = np.random.default_rng(0)
        self.ops = MlxOps(dtype, frozenset())

    def normal(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Normal numbers of `shape` [...] times `scale`, in the compute type."""
        return self.ops.asarray(scale * self.rng.standard_normal(shape))

    def record(self, form: Form, *shape: int) -> Quantized:
        """A stack of experts [E, O, I] as a record of MLX's own making."""
        x = mx.random.normal(shape, key=mx.random.key(len(shape))) * shape[-1] ** -0.5
        parts = mx.quantize(x.astype(self.dtype), form.group, form.bits, form.mode)
        octets = parts[0].view(mx.uint8)
        return Quantized(form, octets, parts[1], parts[2] if len(parts) > 2 else None)


def cases(data: Data) -> Iterator[Case]:
    """Every kernel on one canvas."""
    yield from _norms(data)
    for kind in dict.fromkeys(layer.kind for layer in data.config.layers):
        layer = next(layer for layer in data.config.layers if layer.kind == kind)
        yield _heads(data, layer)
        yield from _attention(data, layer)
    yield from _experts(data)
    yield from _vocabulary(data)


def _norms(data: Data) -> Iterator[Case]:
    config, eps = data.config, data.config.rms_eps
    D, L = config.hidden_size, config.canvas_length
    h, a, m = (data.normal(L, D, scale=3) for _ in range(3))
    w: list[Any] = [data.normal(D) for _ in range(4)]
    scalar = data.ops.asarray(np.array([0.7]))
    yield Case("rms_norm", f"rows of {D}", lambda ops: ops.rms_norm(h, w[0], eps))
    yield Case(
        "open_branches", f"rows of {D}", lambda ops: ops.open_branches(h, a, w[0], w[1], w[2], w[3], eps)
    )
    yield Case(
        "join_branches", f"rows of {D}", lambda ops: ops.join_branches(h, a, m, w[0], w[1], w[2], scalar, eps)
    )


def _heads(data: Data, layer: LayerConfig) -> Case:
    """Heads of a narrow stream: a wide one's products would take most of the time."""
    config, C, H, G, D = data.config, layer.head_dim, data.config.heads, layer.kv_heads, 32
    q, k, v = (data.normal(heads * C, D, scale=D**-0.5) for heads in (H, G, G))
    w = AttentionWeights(q, k, None, data.normal(C), data.normal(C), None if layer.shares_kv else v)
    w = stacked_heads(w)
    positions = data.ops.asarray(data.context + np.arange(config.canvas_length))
    turned = rotary(data.ops, positions, data.ops.aswide(rope_frequencies(layer)))
    x = data.normal(config.canvas_length, D)
    return Case("heads", f"heads of {C}", lambda ops: ops.heads(x, w, BiasWeights(), config.rms_eps, turned))


def _attention(data: Data, layer: LayerConfig) -> Iterator[Case]:
    """A canvas over the context; without a window also over two parts and a slot, which are merged."""
    if layer.window:
        yield _canvas(data, layer, min(data.context, layer.window - 1))
    else:
        yield _canvas(data, layer, data.context)
        scores = data.config.heads * data.config.canvas_length
        yield _canvas(data, layer, 2 * attention.slots(scores, data.ops.score_bytes) + 1)


def _canvas(data: Data, layer: LayerConfig, S: int) -> Case:
    C, G, L = layer.head_dim, layer.kv_heads, data.config.canvas_length
    q = data.normal(data.config.heads, L, C, scale=C**-0.5)
    own, past = [(data.normal(G, n, C), data.normal(G, n, C)) for n in (L, S)]
    mask = Mask(window=layer.window)
    what = f"heads of {C}, {S:,} slots"
    return Case("attend", what, lambda ops: ops.attend(q, own, [[past]], (L,), mask))


def _experts(data: Data) -> Iterator[Case]:
    config = data.config
    N, D, M, E, K = (
        config.canvas_length,
        config.hidden_size,
        config.expert_size,
        config.num_experts,
        config.top_k,
    )
    r, proj = (data.ops.aswide(data.rng.standard_normal(shape)) for shape in ((N, D), (E, D)))
    scale, x = data.ops.aswide(np.ones(E)), data.normal(N, D)
    yield Case("router", f"{K} of {E}", lambda ops: ops.router(r, proj, scale, K))
    weights, ids = data.ops.router(r, proj, scale, K)
    for form in (affine(4, 64 if D % 64 == M % 64 == 0 else 32), None):
        if form is None:
            stacks: Any = [data.normal(E, 2 * M, D, scale=D**-0.5), data.normal(E, D, M, scale=M**-0.5)]
        else:
            stacks = [data.record(form, E, 2 * M, D), data.record(form, E, D, M)]
        what = f"{E} experts, {form or 'plain'}"

        def call(ops: MlxOps, stacks: Any = stacks) -> Any:
            return ops.experts(x, weights, ids, *stacks)

        yield Case("experts", what, call)
        yield Case("gather", what, call, needs=frozenset({"experts"}))


def _vocabulary(data: Data) -> Iterator[Case]:
    config, N = data.config, data.config.canvas_length
    h = data.normal(N, config.hidden_size)
    table = data.normal(config.vocab_size, config.hidden_size, scale=config.hidden_size**-0.5)
    uniforms = data.ops.aswide(data.rng.random(N))

    classes = data.ops.asclasses(np.arange(config.vocab_size)[None] % 3)
    forbidden = data.ops.aswide(np.tile([0.0, -1e30, 2.0], (N, 1)))
    biased = Bias(classes, data.ops.asarray(np.zeros(N, np.int64)), forbidden)

    def call(ops: MlxOps, *fields: str, bias: Bias | None = None) -> Any:
        said = ops.vocabulary(h, table, config.softcap, mx.array(0.6), uniforms, bias=bias)
        return tuple(getattr(said, field) for field in fields)

    # An argmax or a sample may rightly differ where bfloat16 makes a tie.
    fields = "entropy", "soft"
    yield Case("vocabulary", "entropy, soft embedding", lambda ops: call(ops, *fields))
    yield Case("vocabulary", "with a bias", lambda ops: call(ops, *fields, bias=biased))


# ---- running them -------------------------------------------------------------------------------


def check(case: Case, dtype: mx.Dtype, timed: bool) -> Check:
    """One kernel against its twin; an exception of MLX's is reported as the kernel's fault."""
    on, off = MlxOps(dtype, case.needs | {case.kernel}), MlxOps(dtype, case.needs)
    made = partial(Check, case.kernel, case.what, on.dtype_name, bound=BOUNDS[dtype], switchable=True)
    try:
        error = difference(_on_host(case.call(on)), _on_host(case.call(off)))
    except (RuntimeError, ValueError) as broken:
        return made(error=None, broken=str(broken).strip().splitlines()[0][:200])
    if not timed:
        return made(error=error)
    return made(error=error, ms=clock(lambda: case.call(on)), plain_ms=clock(lambda: case.call(off)))


def _on_host(result: Any) -> list[np.ndarray]:
    """An array, or each of several, as float32."""
    arrays = (result,) if isinstance(result, mx.array) else result
    return [np.array(x.astype(mx.float32)) for x in arrays]


def clock(call: Callable[[], Any]) -> float:
    """Median milliseconds of one call; several are evaluated together, so that no launch is waited for."""
    mx.eval(call())
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        mx.eval([call() for _ in range(CALLS)])
        times.append(1000 * (time.perf_counter() - began) / CALLS)
    return statistics.median(times)


Progress = Callable[[str], None]


def check_all(device: str | None = None, progress: Progress = lambda what: None) -> dict[str, Any]:
    """The whole report, ready for JSON (`dgemma.reports.selftest`); a Mac keeps the verdict.

    MLX has one device: `device` is not read.
    """
    machine = verdict.machine()
    where = "{chip}, {system}, MLX {mlx}".format(**machine)
    if not hasattr(mx.fast, "metal_kernel"):
        return nothing(where, f"MLX {machine['mlx']} has no custom kernels", machine=machine, off={})
    if not on_metal():
        return nothing(where, "there is no Metal device here", machine=machine, off={})
    done = _checks(RELEASED_DIR, 1024, True, progress)
    off = {name: _fault([c for c in done if c.kernel == name]) for name in verdict.KERNELS}
    return found(where, done, machine=machine, off=off, kept=str(verdict.write(off)))


def on_metal() -> bool:
    """Whether MLX runs on an Apple GPU here."""
    return bool(mx.default_device().type == mx.gpu)


def _checks(folder: Path, context: int, timed: bool, progress: Progress) -> list[Check]:
    config = read_config(load_json(folder / "config.json"))
    done = []
    for dtype in (mx.bfloat16, mx.float32):
        for case in cases(Data(config, dtype, context)):
            progress(f"checking {case.kernel}, {case.what}")
            # Only bfloat16 is timed: a GPU runs it by default.
            done.append(check(case, dtype, timed and dtype == mx.bfloat16))
    return done


def _fault(done: list[Check]) -> str | None:
    """Why a kernel is off, by all checks of it."""
    faults = [check.fault for check in done if check.fault]
    if not done:
        return "not checked"
    return faults[0] if faults else None
