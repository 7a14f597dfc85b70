"""Norms and what stands next to them, each in one launch: replaces the composites of `Ops` of the same names.

`heads` is what follows the products of `Ops.heads`. A row is read once and stays in registers: a threadgroup
has a row of D, a simdgroup a head. Everything inside is float32 and each output is rounded once. MLX's own
operations on bfloat16 make up to four launches a norm and round between them. The price: D, C and the numbers
of heads are compiled in, so every size is a kernel of its own. The plain twins are the composites.

    N tokens  D hidden  H heads  G KV heads  C head size
"""

from __future__ import annotations

import mlx.core as mx

from .launch import Kernel, Template, simd_groups

THREADS = 256  # of a group, at most: with two rows of 2816 that is 22 values a thread, which every chip has

HEADER = """
// Sum over the N simdgroups of a threadgroup, the same on every lane. Each call needs `room` of its own.
template <int N>
inline float group_sum(float x, threadgroup float* room, uint lane, uint sg) {
    x = simd_sum(x);
    if (lane == 0) {
        room[sg] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_sum(lane < uint(N) ? room[lane] : 0.0f);
}
"""


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """`Ops.rms_norm` of x [..., D] and weight [D], of any two floating types -> x's type."""
    assert weight is None or weight.shape == x.shape[-1:], (x.shape, weight)
    inputs = (x, _absent() if weight is None else weight)
    (y,) = _launch(NORM, inputs, eps, (x.dtype,), WEIGHTED=weight is not None)
    return y


def open_branches(
    h: mx.array,
    a: mx.array,
    post: mx.array,
    mlp: mx.array,
    experts: mx.array,
    router: mx.array,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """`Ops.open_branches` of h and a [..., D], weights [D]: three in h's type, the router's in float32.

    The stream is rounded before it is normed again: all three norms are of what the next layer reads.
    """
    assert h.shape == a.shape, (h.shape, a.shape)
    types = (h.dtype, h.dtype, h.dtype, mx.float32)
    stream, x, y, routed = _launch(OPEN, (h, a, post, mlp, experts, router), eps, types)
    return stream, x, y, routed


def join_branches(
    h: mx.array,
    m: mx.array,
    e: mx.array,
    post_mlp: mx.array,
    post_experts: mx.array,
    post: mx.array,
    scalar: mx.array,
    eps: float,
) -> mx.array:
    """`Ops.join_branches` of h, m and e [..., D], scalar [1] -> h's type; rounded once, at the end."""
    assert h.shape == m.shape == e.shape, (h.shape, m.shape, e.shape)
    (y,) = _launch(JOIN, (h, m, e, post_mlp, post_experts, post, scalar), eps, (h.dtype,))
    return y


def heads(
    y: mx.array,
    columns: tuple[int, ...],
    q_norm: mx.array,
    k_norm: mx.array,
    eps: float,
    rotary: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """`Ops.heads` of its products y [N, ·] -> q [H, N, C], k and v [G, N, C] in y's type.

    y has q, k and v side by side in so many `columns`: H·C, G·C and G·C, or only two where V is made of
    K's. Norms are [C], C even; `rotary` is cos and sin [N, C/2], as `layers.rotary` makes them.
    """
    N, width = y.shape
    C = q_norm.shape[0]
    H, G = columns[0] // C, columns[1] // C
    assert C % 2 == 0 and columns in ((H * C, G * C), (H * C, G * C, G * C)), (columns, C)
    assert width == sum(columns) and k_norm.shape == (C,), (y.shape, columns, k_norm.shape)
    cosines, sines = rotary
    assert cosines.shape == sines.shape == (N, C // 2), (y.shape, cosines.shape)
    threads = 32 * N * (H + 2 * G)
    q, k, v = HEADS(
        y,
        q_norm,
        k_norm,
        cosines,
        sines,
        mx.array(eps),
        grid=(threads, 1, 1),
        group=(min(threads, THREADS), 1, 1),
        shapes=((H, N, C), (G, N, C), (G, N, C)),
        dtypes=(y.dtype,) * 3,
        T=y.dtype,
        C=C,
        H=H,
        G=G,
    )
    return q, k, v


def _launch(
    kernel: Kernel,
    inputs: tuple[mx.array, ...],
    eps: float,
    dtypes: tuple[mx.Dtype, ...],
    **template: Template,
) -> list[mx.array]:
    """A threadgroup for each row of the first input [..., D]; outputs have its shape."""
    x = inputs[0]
    D = x.shape[-1]
    threads = simd_groups(D, THREADS)
    return kernel(
        *inputs,
        mx.array(eps),
        grid=(threads, x.size // D, 1),
        group=(threads, 1, 1),
        shapes=[x.shape] * len(dtypes),
        dtypes=dtypes,
        T=x.dtype,
        D=D,
        TG=threads,
        **template,
    )


def _absent() -> mx.array:
    """An array [1] for an input that a kernel does not read this time."""
    return mx.array([0.0])


# ---- kernels -----------------------------------------------------------------------------------------

# A thread has the values t, t + TG, ... of its row; those behind the end are zeros and are not stored.
ROW = """
    constexpr int R = (D + TG - 1) / TG, SG = TG / 32;
    const int t = int(thread_position_in_threadgroup.x);
    const uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    const size_t row = size_t(threadgroup_position_in_grid.y) * D;
"""

NORM = Kernel(
    "rms_norm",
    inputs=("x", "weight", "eps"),
    outputs=("out",),
    header=HEADER,
    source=ROW
    + """
    threadgroup float room[SG];
    float v[R];
    float squares = 0.0f;
    for (int i = 0; i < R; i++) {
        const int d = t + i * TG;
        v[i] = d < D ? static_cast<float>(x[row + d]) : 0.0f;
        squares += v[i] * v[i];
    }
    const float r = metal::precise::rsqrt(group_sum<SG>(squares, room, lane, sg) / D + eps);
    for (int i = 0; i < R; i++) {
        const int d = t + i * TG;
        if (d < D) {
            const float scale = WEIGHTED ? static_cast<float>(weight[d]) : 1.0f;
            out[row + d] = static_cast<T>(v[i] * r * scale);
        }
    }
""",
)

OPEN = Kernel(
    "open_branches",
    inputs=("h", "a", "post", "mlp", "experts", "router", "eps"),
    outputs=("stream", "for_mlp", "for_experts", "routed"),
    header=HEADER,
    source=ROW
    + """
    threadgroup float room[2 * SG];
    float v[R];
    float squares = 0.0f;
    for (int i = 0; i < R; i++) {
        const int d = t + i * TG;
        v[i] = d < D ? static_cast<float>(a[row + d]) : 0.0f;
        squares += v[i] * v[i];
    }
    float r = metal::precise::rsqrt(group_sum<SG>(squares, room, lane, sg) / D + eps);
    squares = 0.0f;
    for (int i = 0; i < R; i++) {
        const int d = t + i * TG;
        if (d < D) {
            const float sum = static_cast<float>(h[row + d]) + v[i] * r * static_cast<float>(post[d]);
            const T rounded = static_cast<T>(sum);
            stream[row + d] = rounded;
            v[i] = static_cast<float>(rounded);
            squares += v[i] * v[i];
        }
    }
    r = metal::precise::rsqrt(group_sum<SG>(squares, room + SG, lane, sg) / D + eps);
    const float root = metal::precise::rsqrt(static_cast<float>(D));
    for (int i = 0; i < R; i++) {
        const int d = t + i * TG;
        if (d < D) {
            const float normed = v[i] * r;
            for_mlp[row + d] = static_cast<T>(normed * static_cast<float>(mlp[d]));
            for_experts[row + d] = static_cast<T>(normed * static_cast<float>(experts[d]));
            routed[row + d] = normed * static_cast<float>(router[d]) * root;
        }
    }
""",
)

JOIN = Kernel(
    "join_branches",
    inputs=("h", "m", "e", "post_mlp", "post_experts", "post", "scalar", "eps"),
    outputs=("out",),
    header=HEADER,
    source=ROW
    + """
    threadgroup float room[3 * SG];
    float v[R], w[R];
    float of_m = 0.0f, of_e = 0.0f;
    for (int i = 0; i < R; i++) {
        const int d = t + i * TG;
        v[i] = d < D ? static_cast<float>(m[row + d]) : 0.0f;
        w[i] = d < D ? static_cast<float>(e[row + d]) : 0.0f;
        of_m += v[i] * v[i];
        of_e += w[i] * w[i];
    }
    const float r_m = metal::precise::rsqrt(group_sum<SG>(of_m, room, lane, sg) / D + eps);
    const float r_e = metal::precise::rsqrt(group_sum<SG>(of_e, room + SG, lane, sg) / D + eps);
    float of_both = 0.0f;
    for (int i = 0; i < R; i++) {
        const int d = t + i * TG;
        if (d < D) {
            v[i] *= r_m * static_cast<float>(post_mlp[d]);
            v[i] += w[i] * r_e * static_cast<float>(post_experts[d]);
            of_both += v[i] * v[i];
        }
    }
    const float r = metal::precise::rsqrt(group_sum<SG>(of_both, room + 2 * SG, lane, sg) / D + eps);
    for (int i = 0; i < R; i++) {
        const int d = t + i * TG;
        if (d < D) {
            const float sum = static_cast<float>(h[row + d]) + v[i] * r * static_cast<float>(post[d]);
            out[row + d] = static_cast<T>(sum * static_cast<float>(scalar[0]));
        }
    }
""",
)

# A simdgroup has a head of one position, of q, k or v: all its lanes go the same way. A lane has pairs
# (i, i + C/2) of it: rotation needs no other lane.
HEADS = Kernel(
    "heads",
    inputs=("y", "q_norm", "k_norm", "cosines", "sines", "eps"),
    outputs=("queries", "keys", "values"),
    source="""
    constexpr int HALF = C / 2, R = (HALF + 31) / 32;
    constexpr uint ALL = H + 2 * G;
    const int lane = int(thread_index_in_simdgroup);
    const uint N = uint(y_shape[0]), width = uint(y_shape[1]) / C;
    const uint place = thread_position_in_grid.x / 32 / ALL, slot = thread_position_in_grid.x / 32 % ALL;
    const bool query = slot < H, value = slot >= H + G;
    const uint head = query ? slot : (slot - H) % G;
    // Where V has no columns of its own, the last ones are K's.
    const size_t from = (size_t(place) * width + (value ? width - G + head : slot)) * C;
    const size_t to = (size_t(head) * N + place) * C;
    const size_t turn = size_t(place) * HALF;
    device T* out = query ? queries : value ? values : keys;
    float v[R], w[R];
    float squares = 0.0f;
    for (int i = 0; i < R; i++) {
        const int c = lane + 32 * i;
        v[i] = c < HALF ? static_cast<float>(y[from + c]) : 0.0f;
        w[i] = c < HALF ? static_cast<float>(y[from + c + HALF]) : 0.0f;
        squares += v[i] * v[i] + w[i] * w[i];
    }
    const float r = metal::precise::rsqrt(simd_sum(squares) / C + eps);
    for (int i = 0; i < R; i++) {
        const int c = lane + 32 * i;
        if (c < HALF) {
            float p = v[i] * r, q = w[i] * r;
            if (!value) {
                p *= query ? static_cast<float>(q_norm[c]) : static_cast<float>(k_norm[c]);
                q *= query ? static_cast<float>(q_norm[c + HALF]) : static_cast<float>(k_norm[c + HALF]);
                const float cosine = cosines[turn + c], sine = sines[turn + c];
                const float turned = p * cosine - q * sine;
                q = q * cosine + p * sine;
                p = turned;
            }
            out[to + c] = static_cast<T>(p);
            out[to + c + HALF] = static_cast<T>(q);
        }
    }
""",
)
