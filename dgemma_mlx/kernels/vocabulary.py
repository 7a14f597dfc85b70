"""What the vocabulary says of each position, in one pass over the table: replaces `Ops.vocabulary_rows`.

The definition keeps a float32 plane [N, V], since a probability needs the largest logit of all. Here z is
relative to the largest so far, as in flash attention. One reading of a tile of the table gives its logits
and its share of the soft embedding, and earlier sums fade where a tile holds a larger logit. A tile leaves
only the mass of each run of 32 tokens, V/32 numbers a row. They say in which run the sample lies, and the
logits of those 32 tokens are computed again.

The price: the float32 sums [N, D] are read and written once a tile, 32 rows of the table are gathered for
each row of h, and a logit computed again may be rounded the other way. So the first logits alone decide
which run it is, and the second only how its mass is divided.

`sparse_vocabulary` first reads the table for logits only. A row for which the runs of the most mass will do
gathers and sums their rows of the table. The rest of the rows read the table a second time, logits and all.
The price: the host learns which rows those are, so it cannot be compiled, and it costs more than it saves
where many rows are dense.

A bias is added to t, in units of it: see `Scale`. So every sum knows it, and kernels without one are as if
there were none.

`tile`, a kernel, or `tile_plain` works up a tile's logits; all else is the same code. A row that holds NaN
gets NaN as its entropy and soft embedding and some valid ids; no other row does.

    N tokens  D hidden  V vocabulary  W tokens of a tile  T tiles  R runs of a tile  C classes of tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from dgemma.formats.quantized import Quantized
from dgemma.network.ops import Array
from dgemma.network.ops.vocabulary import TRACE, Bias, Prediction, soft_cap
from dgemma_mlx.arrays import MlxArrays

from .launch import Kernel

RUN = 32  # tokens of a run
THREADS, READS = 256, 4  # threads of a row; adjacent tokens that each of them takes at a time
NOTHING = -2.0  # below every t without a bias
LEAST = -1e31  # below every z with one
GATHERED = 256 * RUN  # rows of the table gathered at once: as many as the samples of 256 rows of h need


@dataclass(frozen=True)
class Scale:
    """z = unit · t of a logit of the head, where t = tanh(logit / softcap) and unit = softcap / temperature.

    With a bias t = tanh(logit / softcap) + bias / unit.
    Comparisons are of t, and sums of unit · (t − top). That is 0 for the largest t, which z − top need not be
    where a compiler fuses product and difference. So no entropy is negative.
    """

    ops: MlxArrays
    softcap: float
    unit: Array  # float32 [N]
    bias: Bias | None = None

    def tile(self, raw: Array, first: int) -> Array:
        """t of logits [N, W] of tokens from `first` on, float32."""
        t = self._bend(raw)
        if self.bias is None:
            return t
        classes = self.bias.classes[:, first : first + raw.shape[1]]
        return t + self._lift(mx.take(classes, self.bias.which, 0))

    def some(self, raw: Array, ids: Array) -> Array:
        """t of logits [N, n] of tokens `ids` [N, n], float32."""
        t = self._bend(raw)
        if self.bias is None:
            return t
        return t + self._lift(self.bias.classes[self.bias.which[:, None], ids])

    def _bend(self, raw: Array) -> Array:
        """What the softcap leaves of logits [N, …], in units of it."""
        return soft_cap(self.ops, self.ops.to_wide(raw) / self.softcap, 1.0)

    def _lift(self, classes: Array) -> Array:
        """What a bias adds to t of tokens of `classes` [N, n]."""
        assert self.bias is not None
        return mx.take_along_axis(self.bias.values, classes.astype(mx.int32), -1) / self.unit[:, None]

    @property
    def least(self) -> Array:
        """What is below every t, [N, 1]; times `unit` it is finite."""
        if self.bias is None:
            return mx.full((len(self.unit), 1), NOTHING)
        return LEAST / self.unit[:, None]

    def below(self, t: Array, top: Array) -> Array:
        """How far z is below its largest, from t and `top` [N, …], float32: 0 or less."""
        return self.unit.reshape(-1, *[1] * (t.ndim - 1)) * (t - top)

    def rows(self, ids: Array | slice) -> Scale:
        """The scale of some rows."""
        return Scale(self.ops, self.softcap, self.unit[ids], self.bias and self.bias.rows(ids))


def scale_of(
    ops: MlxArrays, softcap: float, temperature: Array | float, rows: int, bias: Bias | None = None
) -> Scale:
    """The scale of so many rows, at a temperature [N] each or all at one."""
    unit = softcap / temperature
    units = mx.broadcast_to(unit if isinstance(unit, mx.array) else mx.array(unit), (rows,))
    return Scale(ops, softcap, units, bias)


@dataclass(frozen=True, eq=False)
class Running:
    """What is known of the tokens so far, each [N, 1]; d is what `Scale.below` gives, and e = exp(d)."""

    top: Array  # float32: the largest t
    mass: Array  # float32: Σ e
    weighted: Array  # float32: Σ e·d
    argmax: Array  # int32: the first place of `top`

    @classmethod
    def start(cls, scale: Scale) -> Running:
        """Before the first tile."""
        rows = len(scale.unit)
        zero = mx.zeros((rows, 1))
        return cls(scale.least, zero, zero, mx.zeros((rows, 1), mx.int32))


@dataclass(frozen=True, eq=False)
class Tile:
    """A tile's logits, worked up; `top` is the largest t up to and with this tile."""

    running: Running
    fade: Array  # [N, 1] float32: what earlier sums shrink by, as `top` rose
    p: Array  # [N, W]: e
    masses: Array  # [N, 1 + R] float32: `top`, then Σ e of each run


# (what was known, logits [N, W] as the head gives them, scale, first token, R, type of p)
Step = Callable[[Running, Array, Scale, int, int, mx.Dtype], Tile]


def vocabulary(
    ops: MlxArrays,
    h: Array,
    table: Array | Quantized,
    softcap: float,
    temperature: Array | float,
    uniforms: Array,
    step: Step,
    bias: Bias | None = None,
) -> Prediction:
    """`Ops.vocabulary_rows` of h [N, D] against the table [V, D], an array or a record.

    Tiles are `ops.vocab_tile` tokens wide, and one follows another; `step` works up the logits of one.
    """
    scale = scale_of(ops, softcap, temperature, len(h), bias)
    running, masses, soft = _read(ops, h, table, scale, step)
    said = _said(ops, h, table, scale, uniforms, running, masses)
    return Prediction(*said, soft, 1 / running.mass[:, 0])


def sparse_vocabulary(
    ops: MlxArrays,
    h: Array,
    table: Array | Quantized,
    softcap: float,
    temperature: Array | float,
    uniforms: Array,
    step: Step,
    bound: float,
    bias: Bias | None = None,
) -> Prediction:
    """As `vocabulary`, with rows of `soft` that leave out up to `bound` of the probability.

    Such a row is made of the `ops.soft_tokens` / 32 runs that have the most mass. The host reads which rows
    those are. Only the others make their logits again and are multiplied with the table.
    """
    scale = scale_of(ops, softcap, temperature, len(h), bias)
    running, masses, _ = _read(ops, h, table, scale, step, product=False)
    said = _said(ops, h, table, scale, uniforms, running, masses)
    runs, missing = _best(scale, running.top, masses, max(1, ops.soft_tokens // RUN))
    few = np.array(missing <= bound)  # NaN is not
    sparse, dense = np.flatnonzero(few), np.flatnonzero(~few)
    parts = []
    if len(sparse):
        some = mx.array(sparse)
        ids = _tokens(runs[some], min(ops.vocab_tile, table.shape[0]), table.shape[0])
        parts.append(
            _gathered(ops, h[some], table, scale.rows(some), running.top[some], ids, 1 - missing[some])
        )
    if len(dense):
        rest = mx.array(dense)
        parts.append(_read(ops, h[rest], table, scale.rows(rest), step)[2])
    soft = mx.concatenate(parts)[mx.array(np.argsort(np.r_[sparse, dense]))]
    missing = mx.where(mx.array(few), mx.maximum(missing, TRACE), 0.0)
    return Prediction(*said, soft, 1 / running.mass[:, 0], missing)


def _read(
    ops: MlxArrays, h: Array, table: Array | Quantized, scale: Scale, step: Step, product: bool = True
) -> tuple[Running, Array, Array]:
    """Read the table for h [N, D]: what is known in the end, masses [N, T, 1 + R], soft embedding [N, D].

    The last is zero without the `product`.
    """
    V, width = table.shape[0], min(ops.vocab_tile, table.shape[0])
    # Factors of the table's rows go into p before it is rounded.
    factored = isinstance(table, Quantized) and table.factor is not None
    kind = mx.float32 if factored else ops.dtype
    running, soft, masses, x = Running.start(scale), mx.array(0.0), [], h
    for a in range(0, V, width):
        rows = table[a : a + width]
        part = step(running, ops.linear(x, rows), scale, a, -(-width // RUN), kind)
        running = part.running
        if product:
            share = ops.to_wide(ops.soft_embedding(part.p, rows))
            soft = soft * part.fade + share if a else share
        masses.append(part.masses)
        x = ops.after(h, soft, part.masses, running.weighted, running.argmax)
    return running, mx.stack(masses, 1), ops.to_compute(soft / running.mass)


def _said(
    ops: MlxArrays,
    h: Array,
    table: Array | Quantized,
    scale: Scale,
    uniforms: Array,
    running: Running,
    masses: Array,
) -> tuple[Array, Array, Array]:
    """Argmax and sample [N] int32, entropy [N] float32."""
    V, width = table.shape[0], min(ops.vocab_tile, table.shape[0])
    run, rest = _run(scale, running.top, masses, uniforms)
    ids = _tokens(run, width, V)
    e = _masses(scale, _candidates(h, _rows(ops, table, ids)), running.top, ids, V)
    sample = _draw(ids, e, rest, running.argmax)
    entropy = mx.log(running.mass) - running.weighted / running.mass
    return running.argmax[:, 0], sample, entropy[:, 0]


def vocabulary_plain(
    ops: MlxArrays,
    h: Array,
    table: Array | Quantized,
    softcap: float,
    temperature: Array | float,
    uniforms: Array,
) -> Prediction:
    """`vocabulary` of the same arrays without a kernel."""
    return vocabulary(ops, h, table, softcap, temperature, uniforms, tile_plain)


# ---- the sample: the first token whose cumulative p exceeds its uniform --------------------------------


def _run(scale: Scale, top: Array, masses: Array, uniforms: Array) -> tuple[Array, Array]:
    """The run that holds the sample, [N, 1] int32, and the part [N, 1] of its mass that it is to exceed.

    `masses` [N, T, 1 + R] are those of each `Tile`, `top` [N, 1] is of all. The part is 1 or more, or NaN,
    where there is no such run.
    """
    share = _shares(scale, top, masses)
    below = mx.cumsum(share, -1, inclusive=False)
    reach = below + share
    goal = uniforms[:, None] * reach[:, -1:]
    run = _first((reach > goal) & (share > 0))  # a sum in parallel may rise where nothing is added
    below, share = (mx.take_along_axis(x, run, -1) for x in (below, share))
    return run, (goal - below) / share


def _shares(scale: Scale, top: Array, masses: Array) -> Array:
    """Mass [N, T·R] of each run, relative to `top` [N, 1], the largest of all."""
    share = masses[..., 1:] * scale.ops.exp(scale.below(masses[..., :1], top[..., None]))
    return share.reshape(len(share), -1)


def _tokens(runs: Array, width: int, V: int) -> Array:
    """The tokens [N, 32 n] of runs [N, n]; V where a tile of `width`, or the vocabulary, has ended."""
    per_tile = -(-width // RUN)
    start = (runs // per_tile * width)[..., None]
    ids = start + (runs % per_tile * RUN)[..., None] + mx.arange(RUN)
    return mx.where(ids < start + width, mx.minimum(ids, V), V).reshape(len(runs), -1)


def _draw(ids: Array, e: Array, rest: Array, argmax: Array) -> Array:
    """The first token [N] of `ids` [N, 32] whose mass e so far exceeds the part `rest` [N, 1] of theirs.

    The argmax [N, 1] stands in where there is none; a token without mass is never drawn.
    """
    reach = mx.cumsum(e, -1)
    beyond = (reach > rest * reach[:, -1:]) & (e > 0)
    token = mx.take_along_axis(ids, _first(beyond), -1)
    return mx.where(mx.any(beyond, -1, keepdims=True), token, argmax)[:, 0]


def _first(found: Array) -> Array:
    """The first place [N, 1] where `found` [N, n] is true, 0 where it never is."""
    return mx.argmax(found, -1, keepdims=True).astype(mx.int32)


def _rows(ops: MlxArrays, table: Array | Quantized, ids: Array) -> Array:
    """Rows [N, n, D] of the table for ids [N, n], in the compute type; a token V gets the last one."""
    ids = mx.minimum(ids, table.shape[0] - 1)
    return _dequantized(ops, table[ids]) if isinstance(table, Quantized) else ops.take(table, ids)


def _candidates(h: Array, rows: Array) -> Array:
    """Logits [N, n] of h [N, D] for the tokens of `rows` [N, n, D], uncapped, in the compute type."""
    return (rows @ h[..., None])[..., 0]


def _masses(scale: Scale, raw: Array, top: Array, ids: Array, V: int) -> Array:
    """e [N, n] float32 of uncapped logits of tokens `ids` [N, n]; 0 for tokens that do not exist."""
    t = scale.some(raw, mx.minimum(ids, V - 1))
    return mx.where(ids < V, scale.ops.exp(scale.below(t, top)), 0.0)


def _dequantized(ops: MlxArrays, record: Quantized) -> Array:
    """As `dense` of a record [..., D], whose int32 and float32 planes would be the largest arrays here."""
    y = ops.decoded(record, ops.dtype)
    if record.factor is None:
        return y
    factor = record.factor[..., None]
    return ops.to_compute(y / factor if record.divides else y * factor)


# ---- a sparse soft embedding: the runs that have the most mass -------------------------------------------


def _best(scale: Scale, top: Array, masses: Array, count: int) -> tuple[Array, Array]:
    """The `count` runs [N, count] int32 of the most mass, and the part [N] of all mass that others have."""
    share = _shares(scale, top, masses)
    count = min(count, share.shape[1])
    runs = mx.argpartition(-share, count - 1, axis=-1)[:, :count].astype(mx.int32)
    # Summed, as 1 less what is kept would be a rounding of 1.
    others = mx.sum(mx.put_along_axis(share, runs, mx.array(0.0), -1), -1)
    return runs, others / mx.sum(share, -1)


def _gathered(
    ops: MlxArrays, h: Array, table: Array | Quantized, scale: Scale, top: Array, ids: Array, kept: Array
) -> Array:
    """Soft embedding [N, D] of tokens `ids` [N, n], whose probabilities add up to `kept` [N]."""
    block = max(1, GATHERED // ids.shape[1])
    parts: list[Array] = []
    for a in range(0, len(h), block):
        at = slice(a, a + block)
        rows = _rows(ops, table, ops.after(ids[at], parts[-1]) if parts else ids[at])
        e = _masses(scale.rows(at), _candidates(h[at], rows), top[at], ids[at], table.shape[0])
        p = e * (kept[at, None] / mx.sum(e, -1, keepdims=True))
        parts.append((ops.to_compute(p)[:, None] @ rows)[:, 0])
    return mx.concatenate(parts)


# ---- a tile ------------------------------------------------------------------------------------------


def tile_plain(running: Running, raw: Array, scale: Scale, first: int, runs: int, dtype: mx.Dtype) -> Tile:
    """`tile` of the same arrays without a kernel."""
    t = scale.tile(raw, first)
    peak = mx.max(t, -1, keepdims=True)
    place = mx.argmax(t, -1, keepdims=True).astype(mx.int32) + first
    top = mx.maximum(running.top, peak)
    d = scale.below(t, top)
    e = scale.ops.exp(d)
    sums = _by_run(e, runs)
    rise = scale.below(running.top, top)
    fade = mx.exp(rise)
    known = Running(
        top,
        fade * running.mass + mx.sum(sums, -1, keepdims=True),
        fade * (running.weighted + running.mass * rise) + mx.sum(e * d, -1, keepdims=True),
        mx.where(peak > running.top, place, running.argmax),
    )
    return Tile(known, fade, e.astype(dtype), mx.concatenate([top, sums], -1))


def _by_run(e: Array, runs: int) -> Array:
    """Sums [N, R] over runs of e [N, W]."""
    short = runs * RUN - e.shape[1]
    e = mx.pad(e, [(0, 0), (0, short)]) if short else e  # it would copy even with nothing to add
    return mx.sum(e.reshape(len(e), runs, RUN), -1)


def tile(running: Running, raw: Array, scale: Scale, first: int, runs: int, dtype: mx.Dtype) -> Tile:
    """Logits raw [N, W] of tokens from `first` on, W <= 32 · runs, in any floating-point type -> `Tile`.

    Runs behind the last token have mass 0. One launch, a threadgroup a row.
    """
    N, W = raw.shape
    known, numbers = (running.top, running.mass, running.weighted, running.argmax), (N, 1)
    scalars = (_scalar(scale.softcap), scale.unit, mx.array(first), mx.array(runs))
    bias = scale.bias
    kernel, more = (TILE_BIASED, (bias.classes, bias.which, bias.values)) if bias else (TILE, ())
    *updated, fade, p, masses = kernel(
        raw,
        *known,
        *scalars,
        *more,
        grid=(N * THREADS, 1, 1),
        group=(THREADS, 1, 1),
        shapes=[*[numbers] * 5, (N, W), (N, 1 + runs)],
        dtypes=[*[mx.float32] * 3, mx.int32, mx.float32, dtype, mx.float32],
        P=dtype,
        THREADS=THREADS,
        READS=READS,
        RUN=RUN,
    )
    return Tile(Running(*updated), fade, p, masses)


def _scalar(x: float) -> Array:
    """A 0-d float32, which a kernel takes as a reference."""
    return mx.array(x, mx.float32)


# A row is read twice, for its largest t and for what is relative to that: p cannot be written before the
# largest is known, and a tile of 49,152 tokens fits neither registers nor threadgroup memory. The second
# reading finds the row, 98 KB of bfloat16, in a cache. tanh is computed twice, and raw logits never compared,
# so that no e exceeds 1 whatever tanh rounds to, and ties are those of the definition.
HEADER = """
inline float bend(float x, float softcap) { return metal::precise::tanh(x / softcap); }
"""
SOURCE = """
    constexpr uint SIMDS = THREADS / 32, LANES = RUN / READS, NOWHERE = 0xFFFFFFFFu;
    threadgroup float peaks[SIMDS];
    threadgroup uint places[SIMDS];
    threadgroup float sums[SIMDS];
    threadgroup float products[SIMDS];
    const uint at = thread_position_in_threadgroup.x;
    const uint lane = thread_index_in_simdgroup;
    const uint group = simdgroup_index_in_threadgroup;
    const uint row = threadgroup_position_in_grid.x;
    const uint width = uint(raw_shape[1]);
    const uint padded = uint(runs) * RUN;
    const size_t start = size_t(row) * width;
    const float unit = units[row];
    BEFORE
    // The largest t and its first place. NaN is never larger.
    float peak = LEAST;
    uint place = NOWHERE;
    for (uint a = READS * at; a < width; a += READS * THREADS) {
        for (uint i = a; i < a + READS; i++) {
            if (i < width) {
                const float t = BENT;
                place = t > peak ? i : place;
                peak = t > peak ? t : peak;
            }
        }
    }
    const float largest = simd_max(peak);
    place = simd_min(peak == largest ? place : NOWHERE);
    peak = largest;
    if (lane == 0) {
        peaks[group] = peak;
        places[group] = place;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint s = 0; s < SIMDS; s++) {
        if (peaks[s] > peak || (peaks[s] == peak && places[s] < place)) {
            peak = peaks[s];
            place = places[s];
        }
    }
    const float before = top_before[row];
    const float now = metal::max(before, peak);

    // All lanes go round equally often: they add up runs together.
    float sum = 0.0f, product = 0.0f;
    for (uint base = 0; base < padded; base += READS * THREADS) {
        const uint a = base + READS * at;
        float part = 0.0f;
        for (uint i = a; i < a + READS; i++) {
            if (i < width) {
                const float d = unit * (BENT - now);
                const float e = metal::precise::exp(d);
                p[start + i] = static_cast<P>(e);
                part += e;
                product += e * d;
            }
        }
        sum += part;
        for (ushort far = 1; far < LANES; far *= 2) {
            part += simd_shuffle_xor(part, far);
        }
        if (lane % LANES == 0 && a < padded) {
            masses[size_t(row) * (runs + 1) + 1 + a / RUN] = part;
        }
    }
    sum = simd_sum(sum);
    product = simd_sum(product);
    if (lane == 0) {
        sums[group] = sum;
        products[group] = product;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (at == 0) {
        const float rise = unit * (before - now);
        const float shrink = metal::precise::exp(rise);
        const float old = mass_before[row];
        float total = shrink * old;
        float spread = shrink * (weighted_before[row] + old * rise);
        for (uint s = 0; s < SIMDS; s++) {
            total += sums[s];
            spread += products[s];
        }
        top[row] = now;
        mass[row] = total;
        weighted[row] = spread;
        argmax[row] = peak > before ? first + int(place) : argmax_before[row];
        fade[row] = shrink;
        masses[size_t(row) * (runs + 1)] = now;
    }
"""


def _kernel(name: str, more: tuple[str, ...], before: str, bent: str, least: str) -> Kernel:
    """A kernel with `more` inputs: `bent` is t of token i of the tile, and `least` is below every t."""
    return Kernel(
        name=name,
        inputs=(
            "raw", "top_before", "mass_before", "weighted_before", "argmax_before",
            "softcap", "units", "first", "runs", *more,
        ),
        outputs=("top", "mass", "weighted", "argmax", "fade", "p", "masses"),
        header=HEADER,
        source=SOURCE.replace("BEFORE", before).replace("BENT", bent).replace("LEAST", least),
    )  # fmt: skip


_BENT = "bend(static_cast<float>(raw[start + i]), softcap)"
TILE = _kernel("vocabulary_tile", (), "", _BENT, "-2.0f")
# Classes are two bytes a token, and a row's values a few cache lines: both stay in caches.
TILE_BIASED = _kernel(
    "vocabulary_tile_biased",
    ("classes", "which", "values"),
    """
    const size_t own = size_t(row) * uint(values_shape[1]);
    const size_t table = size_t(which[row]) * uint(classes_shape[1]) + uint(first);
    """,
    f"({_BENT} + values[own + uint(classes[table + i])] / unit)",
    "-3.0e38f",
)
