"""The experts of a layer by grouped products: replaces `Ops.experts`, in two ways that share plan and sum.

The fused way is four launches: the plan, gate and up with GELU, down, and the weighted sum over picks. Rows
of x are read through the plan, weights are decoded on their way to threadgroup memory, and nothing of 2M
columns is ever stored. Row tiles begin at each expert's first row, and eights of rows that a tile lacks are
skipped. The other way is MLX's products of sorted rows. They take any format, and use the matrix units that
some GPUs have (M5), which no kernel here does.

The sum goes over a token's picks in their order and in float32, so that results repeat. Arrays between
launches are of the type of x, as between the composite's products.

Which way is faster depends on the GPU; what follows is counted, not measured. A simdgroup needs about 200
instructions a tile to decode and load the fragments of 32 columns and 32 inputs of an expert. Every eight
rows need 264, of which 256 multiply. A canvas of the released model brings an expert 16 rows on average, in
2.43 eights and one tile of 32: 843. Tiles of 16 are 1.43, hence 930. MLX's multiply all their 16 rows, 16
columns at a time, and come to 1,067.

    N tokens  K picks a token  P = N·K rows  E experts  D hidden  M expert size
    O outputs  I inputs of a stack
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from dgemma.formats.quantized import Quantized
from dgemma.network.ops import Ops
from dgemma.network.ops.layers import geglu

from .launch import Kernel
from .plan import Plan, plan

Array = mx.array

ROWS = 32  # of a tile: 16 or 32
SIMDS = 4  # simdgroups of a threadgroup, which share rows of x; each has 32 rows of weights for itself
# How the kernel calls a format, by mode and bits.
FORMATS = {
    ("affine", 4): "AFFINE",
    ("affine", 8): "AFFINE",
    ("nvfp4", 4): "NVFP4",
    ("mxfp4", 4): "MXFP4",
    ("mxfp8", 8): "MXFP8",
}
NAMES = ("PLAIN", "AFFINE", "NVFP4", "MXFP4", "MXFP8")

HEADER = (
    f"enum {{ {', '.join(NAMES)} }};"
    + """
// E4M3 and E2M1 are halves of fewer bits: moved into place they are off by a power of two, subnormals, too.
// Two codes at once, in the bytes 0 and 2. Of E4M3 the code that is all ones is NaN, as it then is here.
inline half2 e4m3_pair(uint two) {
    const uint magnitude = two & 0x007F007Fu, none = (magnitude + 0x00010001u) & 0x00800080u;
    const uint bits = magnitude << 7 | none << 7 | (two & 0x00800080u) << 8;
    return as_type<half2>(bits) * half2(static_cast<half>(256.0f));
}
inline half2 e2m1_pair(uint two) {
    const uint bits = (two & 0x00070007u) << 9 | (two & 0x00080008u) << 12;
    return as_type<half2>(bits) * half2(static_cast<half>(16384.0f));
}
inline float e8m0(uint code) {
    return as_type<float>(code == 0u ? 0x00400000u : code == 255u ? 0x7FC00000u : code << 23);
}
template <int FORMAT, typename S>
inline float scale_of(S stored) {
    if (FORMAT == NVFP4) return static_cast<float>(e4m3_pair(static_cast<uint>(stored)).x);
    if (FORMAT == MXFP4 || FORMAT == MXFP8) return e8m0(static_cast<uint>(stored));
    return static_cast<float>(stored);
}
// Two codes of a word, half a word apart, as numbers: `i` counts from the lower one.
template <int FORMAT, int BITS>
inline half2 code_pair(uint word, int i) {
    const uint two = word >> (i * BITS);
    if (FORMAT == AFFINE) {  // 1024 + code has the code in its last bits
        const uint codes = two & (BITS == 4 ? 0x000F000Fu : 0x00FF00FFu);
        return as_type<half2>(codes | 0x64006400u) - half2(static_cast<half>(1024.0f));
    }
    return BITS == 4 ? e2m1_pair(two) : e4m3_pair(two);
}
// The codes of a word as weights.
template <typename T, int FORMAT, int BITS>
inline void decode(threadgroup T* to, uint word, float scale, float bias) {
    constexpr int HALF = 16 / BITS;
    T values[2 * HALF];
    for (int i = 0; i < HALF; i++) {
        const half2 codes = code_pair<FORMAT, BITS>(word, i);
        const float low = static_cast<float>(codes.x), high = static_cast<float>(codes.y);
        values[i] = static_cast<T>(FORMAT == AFFINE ? metal::fma(low, scale, bias) : low * scale);
        values[i + HALF] = static_cast<T>(FORMAT == AFFINE ? metal::fma(high, scale, bias) : high * scale);
    }
    for (int i = 0; i < 2 * HALF; i += 4) {
        vec<T, 4> four;
        for (int c = 0; c < 4; c++) four[c] = values[i + c];
        *(threadgroup vec<T, 4>*)(to + i) = four;
    }
}
inline float gelu(float x) {
    return 0.5f * x * (1.0f + metal::precise::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
"""
)

# Weights are the left operand, as they lie in memory: only the few rows of x are read transposed. A
# simdgroup multiplies the 32 rows of weights that its own lanes have decoded, one each: 32 columns, or the
# gate's and the up's of 16. Whatever is beyond a tile's rows, the columns or the inputs is zero on both
# sides, as 0 · NaN is NaN.
PRODUCT = Kernel(
    name="expert_product",
    inputs=("x", "words", "scales", "biases", "factor", "offsets", "tokens"),
    outputs=("out",),
    header=HEADER,
    source="""
    constexpr int BK = 32, LD = BK + 16 / sizeof(T);  // 16 bytes more: rows of a fragment in different banks
    constexpr int SPAN = GATED ? 16 : 32;             // columns of a simdgroup
    constexpr int QUADS = BM * BK / 4 / (SIMDS * 32);  // of x, that a thread loads
    constexpr int SCALES = GROUP < BK ? BK / GROUP : 1;
    threadgroup float4 x_memory[BM * LD * sizeof(T) / 16];
    threadgroup float4 w_memory[SIMDS * 32 * LD * sizeof(T) / 16];
    threadgroup T* xs = (threadgroup T*)x_memory;
    const int thread_id = int(thread_position_in_threadgroup.x), lane = int(thread_index_in_simdgroup);
    const int sg = int(simdgroup_index_in_threadgroup);
    threadgroup T* ws = (threadgroup T*)w_memory + sg * 32 * LD;
    const int E = offsets_shape[0] - 1, inputs = x_shape[1], outputs = words_shape[1];

    // The tile: every lane counts an expert's, and the one that has ours says so by a maximum.
    const int tile = int(threadgroup_position_in_grid.y);
    int expert = -1, first = 0, rows = 0, counted = 0;
    for (int from = 0; from < E; from += 32) {
        const int e = from + lane;
        const int begin = e < E ? offsets[e] : 0, count = e < E ? offsets[e + 1] - begin : 0;
        const int tiles = (count + BM - 1) / BM;
        const int at = tile - counted - simd_prefix_exclusive_sum(tiles);
        if (at >= 0 && at < tiles) {
            expert = e;
            first = begin + at * BM;
            rows = metal::min(count - at * BM, BM);
        }
        counted += simd_sum(tiles);
    }
    expert = simd_max(expert);
    first = simd_max(first);
    rows = simd_max(rows);
    if (expert < 0) return;

    size_t from[QUADS];
    bool there[QUADS];
    for (int i = 0; i < QUADS; i++) {
        const int r = thread_id / 8 + i * SIMDS * 4;
        there[i] = r < rows;
        const int place = first + (there[i] ? r : 0);
        from[i] = static_cast<size_t>(GATED ? static_cast<int>(tokens[place]) : place) * inputs;
    }
    const int columns = GATED ? outputs / 2 : outputs;
    const int leftmost = (int(threadgroup_position_in_grid.x) * SIMDS + sg) * SPAN;
    const int column = leftmost + lane % SPAN;  // of this lane's row of weights, and of its sums
    const bool inside = column < columns;
    const size_t stack = static_cast<size_t>(expert) * outputs;
    const size_t start = (stack + (inside ? column + lane / SPAN * columns : 0)) * inputs;

    simdgroup_matrix<float, 8, 8> sums[4][BM / 8];
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < BM / 8; i++) sums[j][i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    float scale[SCALES], bias[SCALES];  // kept as long as they hold
    for (int k0 = 0; k0 < inputs; k0 += BK) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const int c = thread_id % 8 * 4;
        for (int i = 0; i < QUADS; i++) {
            vec<T, 4> four = vec<T, 4>(static_cast<T>(0.0f));
            if (WHOLE && there[i]) four = *(const device vec<T, 4>*)(x + from[i] + k0 + c);
            if (!WHOLE && there[i]) {
                for (int b = 0; b < 4; b++) {
                    if (k0 + c + b < inputs) four[b] = x[from[i] + k0 + c + b];
                }
            }
            *(threadgroup vec<T, 4>*)(xs + (thread_id / 8 + i * SIMDS * 4) * LD + c) = four;
        }
        if (FORMAT == PLAIN) {
            for (int i = 0; i < 32; i += 4) {  // eight lanes a row: neighbours read what is adjacent
                const int r = i + lane / 8, own = leftmost + r % SPAN;
                const size_t at = (stack + own + r / SPAN * columns) * inputs + k0 + c;
                vec<T, 4> four = vec<T, 4>(static_cast<T>(0.0f));
                if (WHOLE && own < columns) {
                    const vec<W, 4> stored = *(const device vec<W, 4>*)(words + at);
                    for (int b = 0; b < 4; b++) four[b] = static_cast<T>(static_cast<float>(stored[b]));
                }
                if (!WHOLE && own < columns) {
                    for (int b = 0; b < 4; b++) {
                        if (k0 + c + b < inputs) four[b] = static_cast<T>(static_cast<float>(words[at + b]));
                    }
                }
                *(threadgroup vec<T, 4>*)(ws + r * LD + c) = four;
            }
        } else {  // 32 codes are as many words as a code has bits
            uint codes[BITS];
            for (int i = 0; i < BITS; i += 4) {
                const size_t at = start * BITS / 32 + k0 * BITS / 32 + i;
                uint4 four = uint4(0u);
                if (WHOLE && inside) four = *(const device uint4*)(words + at);
                for (int b = 0; b < 4; b++) {
                    const bool real = !WHOLE && inside && k0 + (i + b) * 32 / BITS < inputs;
                    codes[i + b] = real ? static_cast<uint>(words[at + b]) : four[b];
                }
            }
            for (int g = 0; g < SCALES && k0 % GROUP == 0; g++) {
                const bool real = inside && (WHOLE || k0 + g * GROUP < inputs);
                const size_t at = start / GROUP + k0 / GROUP + g;
                scale[g] = real ? scale_of<FORMAT>(scales[at]) : 0.0f;
                bias[g] = real && FORMAT == AFFINE ? static_cast<float>(biases[at]) : 0.0f;
            }
            for (int i = 0; i < BITS; i++) {
                const int n = i * 32 / BITS, g = n / GROUP;
                decode<T, FORMAT, BITS>(ws + lane * LD + n, codes[i], scale[g], bias[g]);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int k = 0; k < BK; k += 8) {
            simdgroup_matrix<T, 8, 8> a[4], b;
            for (int j = 0; j < 4; j++) simdgroup_load(a[j], ws + j * 8 * LD + k, LD);
            for (int i = 0; i < BM / 8; i++) {
                if (i * 8 < rows) {
                    simdgroup_load(b, xs + i * 8 * LD + k, LD, ulong2(0), true);
                    for (int j = 0; j < 4; j++) {
                        simdgroup_multiply_accumulate(sums[j][i], a[j], b, sums[j][i]);
                    }
                }
            }
        }
    }

    // Sums pass through the memory of this simdgroup's weights, where lanes know what they read.
    constexpr int LS = 9;
    threadgroup float* through = (threadgroup float*)ws;
    float times[2] = {1.0f, 1.0f};
    for (int part = 0; part < (GATED ? 2 : 1) && FACTOR != 0; part++) {
        const int each = factor_shape[1];
        const int own = each == 1 ? 0 : (inside ? column + part * columns : 0);
        times[part] = static_cast<float>(factor[expert * each + own]);
    }
    for (int i = 0; i < BM / 8; i++) {
        if (i * 8 >= rows) break;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int j = 0; j < 4; j++) simdgroup_store(sums[j][i], through + j * 8 * LS, LS);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int r = lane / SPAN; r < 8; r += 32 / SPAN) {
            if (!inside || i * 8 + r >= rows) continue;
            float value = through[lane % SPAN * LS + r];
            value = FACTOR == 2 ? value / times[0] : value * times[0];
            if (GATED) {
                const float up = through[(16 + lane % SPAN) * LS + r];
                value = gelu(value) * (FACTOR == 2 ? up / times[1] : up * times[1]);
            }
            out[static_cast<size_t>(first + i * 8 + r) * columns + column] = static_cast<T>(value);
        }
    }
""",
)

COMBINE = Kernel(
    name="combine",
    inputs=("y", "inverse", "weights"),
    outputs=("out",),
    source="""
    const int K = weights_shape[1], D = y_shape[1];
    const size_t token = thread_position_in_grid.y;
    const int column = int(thread_position_in_grid.x) * WIDTH;
    float sums[WIDTH];
    for (int c = 0; c < WIDTH; c++) sums[c] = 0.0f;
    for (int k = 0; k < K; k++) {
        const size_t at = static_cast<size_t>(inverse[token * K + k]) * D + column;
        const float weight = weights[token * K + k];
        if (WIDTH == 4) {
            const vec<T, 4> four = *(const device vec<T, 4>*)(y + at);
            for (int c = 0; c < WIDTH; c++) sums[c] += weight * static_cast<float>(four[c]);
        } else {
            for (int c = 0; c < WIDTH; c++) sums[c] += weight * static_cast<float>(y[at + c]);
        }
    }
    for (int c = 0; c < WIDTH; c++) out[token * D + column + c] = static_cast<T>(sums[c]);
""",
)


def experts(ops: Ops, x: Array, weights: Array, ids: Array, gate_up: Any, down: Any, fused: bool) -> Array:
    """`Ops.experts` of x [N, D] with weights [N, K] float32 and ids [N, K], as `Ops.router` gives them.

    Stacks gate_up [E, 2M, D] and down [E, D, M] are arrays or records. `fused` asks for the kernels here,
    where both stacks are `supported`; MLX's products take the others.
    """
    chosen = plan(ids, gate_up.shape[0])
    if fused and supported(gate_up) and supported(down):
        y = projected(gated(x, chosen, gate_up), chosen, down)
    else:
        y = _library(ops, x, chosen, gate_up, down)
    return combined(y, chosen, weights)


def supported(weight: Any) -> bool:
    """Whether the fused products can read a stack: any floats, and the formats in FORMATS."""
    if not isinstance(weight, Quantized):
        return True
    return (weight.form.mode, weight.form.bits) in FORMATS


def gated(x: Array, plan: Plan, gate_up: Any, rows: int = ROWS) -> Array:
    """gelu(gate) · up of the planned rows of x [N, D], in the order of the plan: [P, M]."""
    return _product(x, plan, gate_up, True, rows)


def projected(h: Array, plan: Plan, down: Any, rows: int = ROWS) -> Array:
    """Rows of `gated` [P, M] through the down projection, in their order: [P, D]."""
    return _product(h, plan, down, False, rows)


def combined(y: Array, plan: Plan, weights: Array) -> Array:
    """The weighted sum of each token's rows of y [P, D], float32 in the order of its picks: [N, D]."""
    (N, _), D = weights.shape, y.shape[1]
    assert y.size >= 8 and weights.dtype == mx.float32, (y.shape, weights.dtype)
    width = 4 if D % 4 == 0 else 1
    (out,) = COMBINE(
        y,
        plan.inverse,
        weights,
        grid=(D // width, N, 1),
        group=(256, 1, 1),
        shapes=[(N, D)],
        dtypes=[y.dtype],
        T=y.dtype,
        WIDTH=width,
    )
    return out


def _library(ops: Ops, x: Array, plan: Plan, gate_up: Any, down: Any) -> Array:
    """x [N, D] through the experts by MLX's products, in the order of the plan: [P, D]."""
    h = ops.expert_linear(mx.take(x, plan.tokens, 0), gate_up, plan.rows)
    half = h.shape[-1] // 2
    return ops.expert_linear(geglu(ops, h[:, :half], h[:, half:]), down, plan.rows)


def _product(x: Array, plan: Plan, weight: Any, gated: bool, rows: int) -> Array:
    """Planned rows of x [N or P, I] times a stack [E, O, I]: [P, O], or if `gated` gelu(gate) · up [P, O/2].

    The grid is for the worst routing: tiles that it leaves over find no expert and return.
    """
    E, outputs, inputs = weight.shape
    assert x.shape[1] == inputs and x.size >= 8
    P, columns = len(plan.rows), outputs // 2 if gated else outputs
    span = SIMDS * (16 if gated else 32)
    arrays, constants = _operands(weight)
    (out,) = PRODUCT(
        x,
        *arrays,
        plan.offsets,
        plan.tokens,
        grid=(-(-columns // span) * SIMDS * 32, -(-P // rows) + E, 1),
        group=(SIMDS * 32, 1, 1),
        shapes=[(P, columns)],
        dtypes=[x.dtype],
        T=x.dtype,
        GATED=gated,
        BM=rows,
        SIMDS=SIMDS,
        WHOLE=inputs % 32 == 0,
        **constants,
    )
    return out


def _operands(weight: Any) -> tuple[list[Array], dict[str, Any]]:
    """Words, scales, biases and factor of a stack, and its constants; an absent field is the words again."""
    if not isinstance(weight, Quantized):
        constants = {"FORMAT": 0, "BITS": 4, "GROUP": 32, "FACTOR": 0, "W": weight.dtype}
        return [weight] * 4, constants
    form = weight.form
    words = weight.codes.view(mx.uint32)
    fields = [words if field is None else field for field in (weight.scales, weight.biases, weight.factor)]
    factor = 0 if weight.factor is None else 2 if weight.divides else 1
    which = NAMES.index(FORMATS[form.mode, form.bits])
    constants = {"FORMAT": which, "BITS": form.bits, "GROUP": form.group, "FACTOR": factor, "W": mx.uint32}
    return [words, *fields], constants
