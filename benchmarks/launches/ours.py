"""Our step: `Model.refine` on the MLX backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from benchmarks.launches.graph import Shape
from benchmarks.launches.metal import Region
from benchmarks.launches.step import Step, arrays_of, mapped, released
from dgemma.checkpoint.presets import PRESETS
from dgemma.formats.quantized import Form, Quantized
from dgemma.model import Model
from dgemma.network.build import build, constants
from dgemma.network.config import Config, read_config
from dgemma.network.context import Context
from dgemma.network.ops import Array, Past
from dgemma.network.spec import Param, text_parameters
from dgemma.network.weights import Weights
from dgemma.settings import read_generation_config
from dgemma_convert.recipe import recipe
from dgemma_mlx import verdict
from dgemma_mlx.ops import MlxOps

EVERY = frozenset(verdict.KERNELS)


class TracedOps(MlxOps):
    """The backend as on an Apple GPU, in bfloat16; it only keeps what the host would read."""

    def __init__(self, kernels: frozenset[str]):
        with mock.patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)):
            super().__init__(mx.bfloat16, kernels)
        self.read: list[mx.array] = []

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        return fn  # `Step.compiled` says it

    def fused(self, chain: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return Region(chain)

    def settle(self, arrays: Any) -> None:
        """There are no values."""

    def to_numpy(self, x: mx.array) -> np.ndarray:
        self.read.append(x)
        return np.zeros(x.shape, np.float32)


def ours(
    context: int,
    form: str,
    kernels: frozenset[str] = frozenset(),
    raw: dict[str, Any] | None = None,
    rows: int = 1,
) -> Step:
    """A step of `Model.refine` on `rows` rows, each over `context` tokens and the last step's soft embedding.

    `raw` is the dictionary of config.json, by default the released one.
    """
    given_config, settings = released()
    config = read_config(raw or given_config)
    generation = read_generation_config(settings, config.vocab_size)
    ops = TracedOps(kernels)
    weights = blank_weights(ops, config, form)
    ids = np.zeros((rows, config.canvas_length), np.int64)
    pasts = [blank_past(ops, config, context) for _ in range(rows)]
    soft = mx.zeros((*ids.shape, config.hidden_size), ops.dtype)
    given = (weights, pasts, soft)

    def function(*arrays: mx.array) -> list[mx.array]:
        source = iter(arrays)
        weights, pasts, soft = mapped(given, lambda _: next(source))
        model = Model(ops, config, generation, weights, None)
        contexts = [Holder(ops, config, past, context) for past in pasts]
        step = model.refine(contexts, ids, soft, 0.5, np.zeros(ids.shape), ids)
        return [ops.read.pop(), step.soft]

    arrays, table = arrays_of(given), {id(x) for x in arrays_of(weights.embed)}
    return Step(function, arrays, {i for i, x in enumerate(arrays) if id(x) in table}, compiled=rows == 1)


class Holder(Context):
    """A context of `length` tokens that holds the pieces which it is given, by layer."""

    def __init__(self, ops: MlxOps, config: Config, layers: Sequence[Past], length: int):
        super().__init__(ops, config)
        self._layers, self.length = [list(pieces) for pieces in layers], length


def blank_past(ops: MlxOps, config: Config, tokens: int) -> list[Past]:
    """What a canvas reads behind a prefill of so many tokens, by layer."""
    context, shapes = Context(ops, config), [(x.kv_heads, tokens, x.head_dim) for x in config.layers]
    context.append([(mx.zeros(shape, ops.dtype), mx.zeros(shape, ops.dtype)) for shape in shapes])
    return context.read()


def blank_weights(ops: MlxOps, config: Config, form: str) -> Weights:
    """Weights of the released shapes, as loading would leave them."""
    table = text_parameters(config)
    forms = recipe(PRESETS["mlx"]["balanced"] if form == "4bit" else {}, [], table, ["affine"])

    def leaf(param: Param) -> Any:
        own = None if param.wide else forms.form(param)  # the router is decoded when it is loaded
        if own is None:
            return mx.zeros(param.shape, mx.float32 if param.wide else ops.dtype)
        record = blank_record(param.shape, own, ops.dtype)
        return ops.arrange(record, str(param.path[-1])) if param.group == "experts" else record

    with mock.patch.object(mx, "eval"):
        return build(config, table, leaf, constants(config, ops), ops)


def blank_record(shape: Shape, form: Form, dtype: mx.Dtype) -> Quantized:
    """A record of `shape` [..., O, I] in an affine form; nothing is allocated until it is read."""
    codes = mx.zeros((*shape[:-1], shape[-1] * form.bits // 8), mx.uint8)
    scales, biases = (mx.zeros((*shape[:-1], shape[-1] // form.group), dtype) for _ in range(2))
    return Quantized(form, codes, scales, biases)
