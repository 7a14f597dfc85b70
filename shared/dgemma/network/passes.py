"""The arrays that a pass holds at its widest moment, by backend: what its operations keep at once.

Each number is counted in the code that it describes, none is fitted to a machine.

    N tokens of all rows  L queries of one row  S keys  D hidden  H heads  G KV heads  C head size
    F dense MLP  K picks a token  M expert size  V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from dgemma.formats.quantized import Form
from dgemma.network.config import Config, LayerConfig
from dgemma.network.ops import Ops
from dgemma.network.spec import Param, text_parameters

# Bytes of float32 that MLX decodes of a stack of experts at a time, on a CPU.
DECODED = 8 << 20


@dataclass(frozen=True)
class Backend:
    """How a backend holds numbers, and how many arrays it has at once.

    `compute` and `wide` are bytes of a number. Counts are of arrays [N, H·C] where heads are made; [H, L, S]
    of scores, in the encoder and for a canvas, and those of a canvas with itself; [N, F] or [N·K, M] in a
    gated product, gate and up included; [rows, tile] of logits, beside the plane [rows, V] if one is kept.
    """

    name: str
    place: str  # "CPU" or "GPU"
    dtype: str
    compute: int
    wide: int
    heads: int
    causal_scores: int
    scores: int
    own_scores: int
    gated: int
    tiles: int
    tile: int = 32768  # tokens
    rows: int = 256  # of the vocabulary at once
    plane: int = 0  # bytes of a logit in a plane
    gathers: int = 0  # rows of the table that each position's sample gathers
    joins: str = "always"  # whether keys are copied behind those of the past: "always", "causal", "never"
    score_bytes: int = 1 << 62  # of an array of scores at most, counted as float32
    piece_slots: int = 1 << 30  # tokens of a piece of a context
    decodes: int = 0  # bytes of the integers by which records are decoded; 0: products read them as they are
    widens: bool = False  # whether products make float32 of whole matrices
    kernels: bool = False  # whether experts leave two arrays, and a step is recorded with its memory
    lazy: bool = False  # whether dense MLP and experts, which are independent, exist together
    whole_process: bool = False  # whether `Ops.peak_memory` is the process's, and not that of its arrays
    staging: int = 0  # bytes of each of two buffers for uploads


# In NumPy a softmax has scores, differences and exponentials; a GELU three arrays beside gate and up; a tile
# of logits its differences, exponentials and sums. PyTorch fuses the first two, on a CPU without any scores.
# MLX runs up to ten operations ahead on a CPU. A gated product is dozens of one size there. Of a block of a
# prompt's attention one in five is an array of scores, and a canvas's of the past take turns with its own.
BACKENDS = (
    Backend("mlx", "GPU", "bfloat16", 2, 4, 3, 3, 3, 3, 4, 4, tile=49152, gathers=32, joins="causal",
            score_bytes=128 << 20, piece_slots=24576, lazy=True),
    Backend("mlx", "GPU", "float32", 4, 4, 3, 3, 3, 3, 4, 4, tile=49152, gathers=32, joins="causal",
            score_bytes=128 << 20, piece_slots=24576, lazy=True),
    Backend("mlx", "CPU", "float32", 4, 4, 6, 3, 7, 5, 12, 12, tile=2048, gathers=32, joins="causal",
            score_bytes=2 << 20, piece_slots=24576, decodes=4, lazy=True),
    Backend("mlx", "CPU", "bfloat16", 2, 4, 6, 3, 7, 5, 12, 12, tile=2048, gathers=32, joins="causal",
            score_bytes=2 << 20, piece_slots=24576, decodes=4, lazy=True, widens=True),
    Backend("cuda", "GPU", "bfloat16", 2, 4, 4, 0, 0, 0, 4, 0, rows=512, plane=2, joins="never",
            piece_slots=4096, kernels=True),
    Backend("cuda", "GPU", "float32", 4, 4, 4, 3, 3, 3, 4, 4, plane=4, piece_slots=4096, decodes=4),
    Backend("cuda", "CPU", "float32", 4, 4, 4, 0, 0, 0, 4, 4, plane=4, piece_slots=4096, decodes=4,
            whole_process=True, staging=64 << 20),
    Backend("cuda", "CPU", "bfloat16", 2, 4, 6, 0, 0, 0, 4, 4, plane=4, piece_slots=4096, decodes=4,
            whole_process=True, staging=64 << 20),
    Backend("numpy", "CPU", "float64", 8, 8, 4, 3, 3, 3, 5, 3, plane=8, decodes=8, whole_process=True),
)  # fmt: skip


def backend_of(ops: Ops) -> Backend:
    """The description of a backend that runs."""
    return find(ops.name, "GPU" if ops.on_gpu else "CPU", ops.dtype_name)


def find(name: str, place: str, dtype: str) -> Backend:
    """The backend of this name on a "CPU" or "GPU" in this type."""
    return next(b for b in BACKENDS if (b.name, b.place, b.dtype) == (name, place, dtype))


@dataclass(frozen=True)
class Work:
    """One pass: its tokens, how many are of its longest row, and what that row has encoded before."""

    tokens: int
    queries: int
    past: int
    causal: bool


def moments(backend: Backend, config: Config, work: Work, forms: Mapping[str, Form | None]) -> dict[str, int]:
    """Bytes of temporaries in each part of a pass, the stream and a prompt's new keys and values included."""
    # The residual stream with what has just been added to it, its three norms, and one for the router.
    new = _new_keys(backend, config, work)
    stream = new + work.tokens * config.hidden_size * (5 * backend.compute + backend.wide)
    picks = work.tokens * config.top_k * (config.hidden_size + 2 * config.expert_size)
    mlp = backend.gated * work.tokens * config.mlp_size + picks * backend.lazy
    decoded = _decoded(backend, config, forms)
    parts = {
        "attention": max(_attention(backend, config, layer, work) for layer in set(config.layers)),
        "dense MLP": stream + mlp * backend.compute + decoded * backend.lazy,
        "experts": stream + _experts(backend, config, work.tokens),
        "decoded weights": stream + decoded,
    }
    return parts if work.causal else parts | {"vocabulary": vocabulary_bytes(backend, config, work.tokens)}


def slot_bytes(layer: LayerConfig, compute: int) -> int:
    """Key and value of one token in one layer. Full layers store both: V is K's projection before k_norm."""
    return 2 * layer.kv_heads * layer.head_dim * compute


def _new_keys(backend: Backend, config: Config, work: Work) -> int:
    """Keys and values that a pass over a prompt leaves for its contexts."""
    slots = sum(slot_bytes(layer, backend.compute) for layer in config.layers)
    return work.tokens * slots * work.causal


def attention_bytes(backend: Backend, config: Config, work: Work) -> int:
    """Scores and joined keys of the widest layer for one row."""
    return max(sum(_row(backend, config, layer, work)) for layer in set(config.layers))


def _attention(backend: Backend, config: Config, layer: LayerConfig, work: Work) -> int:
    queries, keys = config.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    token = work.tokens * backend.compute
    made = token * (backend.heads * queries + 4 * keys)
    before = _new_keys(backend, config, work) + 2 * token * config.hidden_size  # the stream, and its norm
    # Queries, keys and values of all rows, what is done of the result, and a row's own queries and result.
    weighed = token * (2 * queries + 2 * keys) + sum(_row(backend, config, layer, work))
    return before + max(made, weighed)


def _row(backend: Backend, config: Config, layer: LayerConfig, work: Work) -> tuple[int, int]:
    """One row's attention in a layer: scores, and keys and values behind their past."""
    past = work.past if layer.past is None else min(work.past, layer.past)
    queries, keys = work.queries, past + work.queries
    joins = backend.joins == "always" or (backend.joins == "causal" and work.causal)
    joined = keys * slot_bytes(layer, backend.compute) if joins and past else 0
    most = backend.score_bytes // 4
    if not work.causal:
        seen = backend.scores * min(most, config.heads * queries * past)
        own = backend.own_scores * config.heads * queries * queries
        return (seen + own) * backend.compute, joined
    if most < config.heads * queries * keys:  # blocks of queries, which skip keys
        queries = max(1, min(queries, most // (config.heads * keys), layer.window or queries))
        keys = min(keys, (layer.window or keys) + queries)
    return backend.causal_scores * config.heads * queries * keys * backend.compute, joined


def _experts(backend: Backend, config: Config, tokens: int) -> int:
    """Rows of picks: sorted inputs with gate and up, the gated product, and the weighted sum of results."""
    D, M, rows = config.hidden_size, config.expert_size, tokens * config.top_k
    if backend.kernels:  # gated products in tiles, of which half may be empty, and results
        return (rows * (2 * M + D) + 2 * tokens * D) * backend.compute
    equal = backend.compute == backend.wide
    total = D * (2 * backend.compute if equal else backend.compute + 2 * backend.wide)
    # What is lazy holds the sorted inputs still, and halves of their product twice.
    gated = backend.gated * M + backend.lazy * (D + 3 * M)
    widest = max((D + 2 * M) * backend.compute, gated * backend.compute, total)
    return rows * widest + tokens * D * backend.wide


def _decoded(backend: Backend, config: Config, forms: Mapping[str, Form | None]) -> int:
    """What a pass makes of stored matrices: the largest; or what is lazy, all of a layer's."""
    sizes: dict[tuple[str | int, ...], int] = {}
    for param in text_parameters(config):
        own = _decoded_bytes(backend, param, forms.get(param.name))
        where = param.path[:2]
        sizes[where] = sizes.get(where, 0) + own if backend.lazy else max(sizes.get(where, 0), own)
    return max(sizes.values())


def _decoded_bytes(backend: Backend, param: Param, form: Form | None) -> int:
    """A matrix while its record is decoded: octets, codes apart and joined; or while it is widened."""
    size = param.size
    if form is None or not backend.decodes:
        return size * backend.wide if backend.widens and len(param.shape) > 1 and not param.wide else 0
    if param.group == "experts":  # one at a time; MLX so many outputs of all
        size = min(size, DECODED // 4) if backend.lazy else prod(param.shape[1:])
    elif param.group == "embed":
        size = min(backend.tile, param.shape[0]) * param.shape[1]
    whole = 1 if backend.lazy else 2 + form.bits / 8  # MLX decodes in one operation
    return int(size * backend.decodes * whole)


def vocabulary_bytes(backend: Backend, config: Config, tokens: int) -> int:
    """The plane of logits of as many positions as a block has, or its tiles, and the sums [rows, D]."""
    rows, D, V = min(backend.rows, tokens), config.hidden_size, config.vocab_size
    tiles = backend.tiles * min(backend.tile, V) * backend.wide
    logits = V * backend.plane + tiles
    if backend.gathers:  # beside the masses of all runs, twice, and what is left of the last tile
        masses, left = 2 * (V // 32) * backend.wide, 4 * min(backend.tile, V) * backend.wide
        logits = max(logits, backend.gathers * D * backend.compute + masses + left)
    return rows * (logits + 3 * D * backend.wide) + 2 * tokens * D * backend.compute
