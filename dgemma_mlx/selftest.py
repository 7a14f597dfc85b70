"""The Metal kernels on this machine, each against plain MLX: right, and how fast; the verdict is kept.

It runs on a Mac only, at the released sizes. A kernel is switched on if it is right in both number formats
and no slower than MLX's own operations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from dgemma.files import load_json
from dgemma.formats.quantized import Form, Quantized, affine
from dgemma.network.build import rope_frequencies
from dgemma.network.config import Config, LayerConfig, read_config
from dgemma.network.weights import AttentionWeights, BiasWeights
from dgemma.released import RELEASED_DIR

from . import verdict
from .kernels import attention
from .ops import MlxOps

# Largest difference over the largest value: a few roundings of the format.
BOUNDS = {mx.float32: 2e-5, mx.bfloat16: 2.0**-6}
CALLS, ROUNDS = 5, 5  # calls evaluated together, and how often that is timed
SLACK = 1.02  # a kernel may take this much of its twin's time: timings wobble


@dataclass(frozen=True)
class Case:
    """A composite's name, what it is called on here, and the call for an `MlxOps`."""

    kernel: str
    what: str
    call: Callable[[MlxOps], Any]
    needs: frozenset[str] = frozenset()  # kernels that are on also where `kernel` is off


@dataclass(frozen=True)
class Check:
    """A kernel beside its twin: the largest difference over the largest value, and milliseconds a call."""

    kernel: str
    what: str
    dtype: str
    error: float | None
    bound: float
    ms: float | None = None
    plain_ms: float | None = None
    broken: str | None = None  # what MLX said, where the kernel did not run

    @property
    def fault(self) -> str | None:
        """Why the kernel is off, as far as this check goes."""
        if self.broken:
            return f"does not run: {self.broken}"
        if self.error is None or not self.error <= self.bound:  # NaN is not
            return f"wrong by {self.error} in {self.dtype}, {self.what}"
        if self.ms and self.plain_ms and self.ms > SLACK * self.plain_ms:
            return f"slower: {self.ms:.3f} ms for {self.plain_ms:.3f} ms, {self.what}"
        return None


# ---- cases ----------------------------------------------------------------------------------------


class Data:
    """Random inputs in one number format, at one geometry."""

    def __init__(self, config: Config, dtype: mx.Dtype, context: int):
        self.config, self.dtype, self.context = config, dtype, context
        self.rng = np.random.default_rng(0)
        self.ops = MlxOps(dtype, frozenset())

    def normal(self, *shape: int, scale: float = 1.0) -> mx.array:
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
    h, a, m = (data.normal(1, L, D, scale=3) for _ in range(3))
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
    """Of a narrow stream, or their products would take most of the time."""
    config, C, H, G, D = data.config, layer.head_dim, data.config.heads, layer.kv_heads, 32
    q, k, v = (data.normal(heads * C, D, scale=D**-0.5) for heads in (H, G, G))
    w = AttentionWeights(q, k, None, data.normal(C), data.normal(C), None if layer.shares_kv else v)
    w = data.ops.attention_weights(w, biased=False)
    offset = data.ops.asarray(np.array([data.context]))
    rotary = data.ops.rotary(offset, config.canvas_length, data.ops.aswide(rope_frequencies(layer)))
    x = data.normal(1, config.canvas_length, D)
    return Case("heads", f"heads of {C}", lambda ops: ops.heads(x, w, BiasWeights(), config.rms_eps, rotary))


def _attention(data: Data, layer: LayerConfig) -> Iterator[Case]:
    """Over the context; without a window also over two pieces and a slot, which are merged."""
    if layer.window:
        yield _canvas(data, layer, min(data.context, layer.window - 1))
    else:
        yield _canvas(data, layer, data.context)
        scores = data.config.heads * data.config.canvas_length
        yield _canvas(data, layer, 2 * attention.slots(scores, data.ops.score_bytes) + 1)


def _canvas(data: Data, layer: LayerConfig, S: int) -> Case:
    C, G, L = layer.head_dim, layer.kv_heads, data.config.canvas_length
    q = data.normal(1, data.config.heads, L, C, scale=C**-0.5)
    own, past = [(data.normal(1, G, n, C), data.normal(1, G, n, C)) for n in (L, S)]
    pad = data.ops.asarray(np.array([3]))
    what = f"heads of {C}, {S:,} slots"
    return Case("attend", what, lambda ops: ops.attend(q, own, past, pad, False, layer.window))


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

    def call(ops: MlxOps, *fields: str) -> Any:
        said = ops.vocabulary(h, table, config.softcap, mx.array(0.6), uniforms)
        return tuple(getattr(said, field) for field in fields)

    # An argmax or a sample may rightly differ where bfloat16 makes a tie.
    yield Case("vocabulary", "entropy, soft embedding", lambda ops: call(ops, "entropy", "soft"))


# ---- running them -------------------------------------------------------------------------------


def check(case: Case, dtype: mx.Dtype, timed: bool) -> Check:
    """One kernel against its twin; an exception of MLX's is the kernel's fault, and said."""
    on, off = MlxOps(dtype, case.needs | {case.kernel}), MlxOps(dtype, case.needs)
    name = str(dtype).removeprefix("mlx.core.")
    fixed = (case.kernel, case.what, name)
    try:
        error = difference(case.call(on), case.call(off))
    except (RuntimeError, ValueError) as broken:
        return Check(*fixed, None, BOUNDS[dtype], broken=str(broken).strip().splitlines()[0][:200])
    if not timed:
        return Check(*fixed, error, BOUNDS[dtype])
    times = clock(lambda: case.call(on)), clock(lambda: case.call(off))
    return Check(*fixed, error, BOUNDS[dtype], *times)


def difference(got: Any, wanted: Any) -> float:
    """Largest difference over the largest value, over all arrays of a result."""
    if isinstance(got, mx.array):
        got, wanted = (got,), (wanted,)
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
        worst = np.maximum(worst, np.abs(a - b).max() / np.abs(b).max())  # NaN stays
    return float(worst)


def clock(call: Callable[[], Any]) -> float:
    """Median milliseconds of one call, several evaluated together so that launches are not waited for."""
    mx.eval(call())
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        mx.eval([call() for _ in range(CALLS)])
        times.append(1000 * (time.perf_counter() - began) / CALLS)
    return statistics.median(times)


Progress = Callable[[str], None]


def run(progress: Progress = lambda what: None) -> dict[str, Any]:
    """The whole report, ready for JSON, and kept; `ok` is None where nothing could be checked."""
    if not hasattr(mx.fast, "metal_kernel"):
        return _nothing("MLX {mlx} has no custom kernels".format(**verdict.machine()))
    if not on_metal():
        return _nothing("there is no Metal device here")
    report = _report(_checks(RELEASED_DIR, 1024, True, progress))
    report["kept"] = str(verdict.write(report["off"]))
    return report


def on_metal() -> bool:
    """Whether MLX runs on an Apple GPU here."""
    return bool(mx.default_device().type == mx.gpu)


def _checks(folder: Any, context: int, timed: bool, progress: Progress) -> list[Check]:
    config = read_config(load_json(folder / "config.json"))
    done = []
    for dtype in (mx.bfloat16, mx.float32):
        for case in cases(Data(config, dtype, context)):
            progress(f"checking {case.kernel}, {case.what}")
            # What is timed is what runs by default on a GPU.
            done.append(check(case, dtype, timed and dtype == mx.bfloat16))
    return done


def _report(done: list[Check]) -> dict[str, Any]:
    off = {name: _fault([c for c in done if c.kernel == name]) for name in verdict.KERNELS}
    wrong = [c for c in done if c.fault and not c.fault.startswith("slower")]
    return {
        "device": verdict.machine(),
        "ok": not wrong,
        "why": None,
        "checks": [asdict(item) | {"fault": item.fault} for item in done],
        "off": off,
    }


def _fault(done: list[Check]) -> str | None:
    """Why a kernel is off, by all checks of it."""
    faults = [check.fault for check in done if check.fault]
    if not done:
        return "not checked"
    return faults[0] if faults else None


def _nothing(reason: str) -> dict[str, Any]:
    return {"device": verdict.machine(), "ok": None, "why": reason, "checks": [], "off": {}}


def text(report: Mapping[str, Any]) -> str:
    """The report of `run` to read."""
    from dgemma.reports.tables import table

    where = "{chip}, {system}, MLX {mlx}".format(**report["device"])
    if report["ok"] is None:
        return f"{where}: no kernel was checked, because {report['why']}. Plain MLX runs without them."
    rows = [["kernel", "", "format", "error", "bound", "ms", "plain ms", ""]]
    for c in report["checks"]:
        times = ["" if c[key] is None else f"{c[key]:.3f}" for key in ("ms", "plain_ms")]
        error = "" if c["error"] is None else f"{c['error']:.1e}"
        verdict_ = "ok" if c["fault"] is None else c["fault"].partition(":")[0]
        rows.append([c["kernel"], c["what"], c["dtype"], error, f"{c['bound']:.1e}", *times, verdict_])
    return "\n".join([where, "", *table(rows), "", *_conclusion(report)])


def _conclusion(report: Mapping[str, Any]) -> list[str]:
    on = [name for name, why in report["off"].items() if why is None]
    lines = [f"On from now on: {', '.join(on) or 'none'}."]
    return lines + [f"Off: {name}, {why}." for name, why in report["off"].items() if why is not None]
