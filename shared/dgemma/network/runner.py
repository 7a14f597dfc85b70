"""A network ready to run: it encodes contexts and looks at canvases. The engine decides what follows.

The backend compiles the passes if it can. Everything that varies goes in as an array; everything else
(padding or not, first step or not) picks the compiled variant.

    B rows  L canvas positions  V vocabulary  D hidden
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dgemma.errors import PromptError
from dgemma.files import Progress
from dgemma.network import cache, graph
from dgemma.network.cache import Cache
from dgemma.network.config import Config
from dgemma.network.ops import KV, Array, Ops, Prediction
from dgemma.network.ops.vocabulary import logits
from dgemma.network.weights import Weights

Inputs = tuple[Array, Array, list[KV]]  # canvas, offset, past

# Most prompt tokens of one prefill pass: its scores are [heads, chunk, context], so memory is bounded.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Context:
    """Encoded rows: a cache that canvases read, and each row's length in tokens, [B] int64."""

    cache: Cache
    lengths: np.ndarray

    @property
    def ragged(self) -> bool:
        """Whether some row has padding at its front."""
        return bool((self.lengths < self.cache.slots).any())

    def fork(self, rows: Sequence[int] | np.ndarray) -> Context:
        """These rows, in this order, each as often as named; independent of this context."""
        rows = [int(row) for row in rows]
        return Context(self.cache.fork(rows), self.lengths[rows])

    def trim(self, count: int) -> Context:
        """This context without every row's last `count` tokens.

        ValueError if that is more than a canvas or a whole row.
        """
        if count > self.lengths.min():
            raise ValueError(f"cannot take back {count} tokens from a row of {self.lengths.min()}")
        return Context(self.cache.trim(count), self.lengths - count)


@dataclass(frozen=True)
class Seen:
    """What the network says of a canvas. `soft` [B, L, D] stays on the device, the rest is on the host.

    `argmax` and `sample` are [B, L] int64, `entropy` [B, L] in nats, float32 (float64 on NumPy). `soft`
    leaves out at most the probability `missing` [B, L]; None if all of it is dense.
    """

    argmax: np.ndarray
    sample: np.ndarray
    entropy: np.ndarray
    soft: Array
    missing: np.ndarray | None = None


class Runner:
    """The graph over one backend and one set of weights; not thread-safe."""

    def __init__(self, ops: Ops, config: Config, weights: Weights):
        self.ops, self.config, self.weights = ops, config, weights
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    # ---- contexts -------------------------------------------------------------------------------

    def encode(
        self,
        tokens: Sequence[Sequence[int]],
        context: Context | None = None,
        progress: Progress | None = None,
        chunk: int = PREFILL_CHUNK,
    ) -> Context:
        """Encode rows of token ids, or append them to a context's rows. The given context stays usable.

        Rows may differ in length. `progress(done, total)` counts slots. PromptError for an empty row,
        an id outside the vocabulary, or a context beyond max_position_embeddings.
        """
        prefill = self.prefill(tokens, context, chunk)
        while True:
            try:
                done, total = next(prefill)
            except StopIteration as end:
                return end.value
            if progress:
                progress(done, total)

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        context: Context | None = None,
        chunk: int = PREFILL_CHUNK,
        consume: bool = False,
    ) -> Generator[tuple[int, int], None, Context]:
        """`encode` as a generator: yields (done, total) slots after every chunk, returns the context.

        `consume`: it may use up the given context, so that keys and values are not held twice.
        """
        rows = [self.check_tokens(row) for row in tokens]
        if not rows:
            raise PromptError("no rows of tokens to encode")
        if context is None:
            return (yield from self._prefill_rows(rows, None, cache.empty(self.ops, self.config), chunk))
        if len(rows) != len(context.lengths):
            raise PromptError(f"{len(rows)} rows of tokens for a context of {len(context.lengths)} rows")
        if len({len(row) for row in rows}) == 1:
            own = context.cache if consume else context.cache.fork()
            return (yield from self._prefill_rows(rows, context.lengths, own, chunk))
        # Rows end together, so rows that grow by different amounts are encoded apart and joined again.
        parts = []
        for b, row in enumerate(rows):
            one = context.fork([b])
            parts.append((yield from self._prefill_rows([row], one.lengths, one.cache, chunk)))
        joined = parts[0].cache.merge([part.cache for part in parts[1:]])
        return Context(joined, np.concatenate([part.lengths for part in parts]))

    def check_tokens(self, row: Sequence[int]) -> np.ndarray:
        """A row of token ids as an integer array [n]; PromptError if it is empty or holds anything else."""
        ids = _integers(row)
        if ids is None or ids.ndim != 1 or not len(ids):
            raise PromptError("a row of tokens must be a non-empty list of integers")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = ids[(ids < 0) | (ids >= self.config.vocab_size)][0]
            raise PromptError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
        return ids

    def _prefill_rows(
        self, rows: list[np.ndarray], before: np.ndarray | None, cache: Cache, chunk: int
    ) -> Generator[tuple[int, int], None, Context]:
        """Append rows of ids [n] each to a cache that holds `before` [B] tokens of them."""
        slots = max(len(row) for row in rows)
        lengths = np.array([len(row) for row in rows]) + (0 if before is None else before)
        if lengths.max() > self.config.max_positions:
            raise PromptError(
                f"{lengths.max()} tokens exceed the model's {self.config.max_positions} positions"
            )
        tokens = np.full((len(rows), slots), self.config.pad_id)
        for b, row in enumerate(rows):
            tokens[b, slots - len(row) :] = row
        # Chunked equals unchunked: a chunk's offset is absolute, and negative in a row still to begin.
        for start in range(0, slots, chunk):
            part = tokens[:, start : start + chunk]
            cache.append(self._encode(part, lengths - slots + start, cache))
            yield start + part.shape[1], slots
        return Context(cache, lengths)

    def _encode(self, tokens: np.ndarray, offset: np.ndarray, cache: Cache) -> list[KV]:
        """Keys and values by layer, already computed, of tokens [B, n] from positions offset [B] on."""
        ragged = bool((offset < cache.slots).any())
        past = cache.read()

        def run(tokens: Array, offset: Array, past: list[KV]) -> list[KV]:
            return graph.encode(
                self.ops, self.config, self.weights, tokens, offset, past or None, ragged=ragged
            )

        ops = self.ops
        new = self._variant(run, "encode", ragged, bool(past))(ops.asarray(tokens), ops.asarray(offset), past)
        ops.settle(new)
        return new

    def _variant(self, function: Callable[..., Any], *key: Any) -> Callable[..., Any]:
        # The first function of a key stays: all of them must close over the same facts.
        if key not in self._compiled:
            self._compiled[key] = self.ops.compile(function, repeats=key[0] in ("refine", "denoise"))
        return self._compiled[key]

    # ---- canvases -------------------------------------------------------------------------------

    def logits(self, context: Context, canvas: Any, soft: Any = None) -> np.ndarray:
        """Softcapped logits before temperature, float32 [B, L, V], of canvas [B, L] token ids.

        `soft` [B, L, D] is the previous step's soft embedding (`Seen.soft`, `Step.soft` or NumPy), None on a
        first step. This makes the whole [B, L, V] plane: use it for looking, not for generating.
        """
        denoise = self._denoise(context.ragged)

        def run(*inputs: Any) -> Array:
            return logits(self.ops, denoise(*inputs), self.weights.embed, self.config.softcap)

        run = self._variant(run, "logits", context.ragged, soft is not None)
        z = run(*self._inputs(context, canvas), context.cache.read(), *self._signal(soft))
        return self.ops.to_numpy(z).astype(np.float32)

    def _denoise(self, ragged: bool) -> Callable[..., Array]:
        """A denoising pass of arrays only: canvas [B, L], offset [B], past, soft [B, L, D] from step 2 on."""

        def run(canvas: Array, offset: Array, past: list[KV], *soft: Array) -> Array:
            signal = soft[0] if soft else None
            return graph.denoise(
                self.ops, self.config, self.weights, canvas, signal, offset, past, ragged=ragged
            )

        return run

    def soft_embedding(self, probs: Any) -> Array:
        """The mean embedding [B, L, D] of probabilities [B, L, V], on the device, before the √D factor."""
        probs = self.ops.aswide(np.asarray(probs)) if isinstance(probs, np.ndarray | list) else probs
        return self.ops.soft_embedding(probs, self.weights.embed)

    def see(
        self,
        context: Context,
        canvas: Any,
        soft: Any,
        temperature: float | np.ndarray,
        uniforms: np.ndarray,
        soft_bound: float = 0.0,
    ) -> Seen:
        """One look at canvas [B, L] token ids, each row at its temperature [B], or all at one.

        `uniforms` [B, L] in [0, 1) pick each position's sample. `soft` [B, L, D] is the previous step's soft
        embedding, None on a canvas's first step. The new one may leave out the probability `soft_bound`.
        There is one host read; a `soft_bound` adds those of `Ops.vocabulary`.
        """
        ops, uniforms = self.ops, np.asarray(uniforms)
        inputs = *self._inputs(context, canvas), context.cache.read()
        # One temperature for each position, so that backends need not know its row.
        heat = np.zeros(uniforms.shape) + np.reshape(temperature, (-1, 1))
        draw = ops.aswide(heat), ops.aswide(uniforms)
        predict = self._sparse if soft_bound else self._dense
        host, new = predict(context.ragged, inputs, draw, self._signal(soft), soft_bound)
        argmax, sample, entropy, *missing = ops.to_numpy(host).reshape(-1, *np.shape(canvas))
        ids = argmax.astype(np.int64), sample.astype(np.int64)
        return Seen(*ids, entropy, new, missing[0] if missing else None)

    def _dense(
        self,
        ragged: bool,
        inputs: Inputs,
        draw: tuple[Array, Array],
        signal: tuple[Array, ...],
        _: float,
    ) -> tuple[Array, Array]:
        """The host's part of a step [3, B·L] and its soft embedding [B, L, D]; compiled as a whole."""

        def run(
            canvas: Array, offset: Array, past: list[KV], heat: Array, uniforms: Array, *soft: Array
        ) -> tuple[Array, Array]:
            signal = soft[0] if soft else None
            given = self.ops, self.config, self.weights, canvas, signal, offset, past, heat, uniforms
            said = graph.step(*given, ragged=ragged)
            return self._for_host(said), said.soft.reshape(*canvas.shape, -1)

        return self._variant(run, "refine", ragged, bool(signal))(*inputs, *draw, *signal)

    def _sparse(
        self,
        ragged: bool,
        inputs: Inputs,
        draw: tuple[Array, Array],
        signal: tuple[Array, ...],
        bound: float,
    ) -> tuple[Array, Array]:
        """Like `_dense`, with `missing` [4, B·L]. The vocabulary may read the host, so it is not compiled."""
        denoise = self._denoise(ragged)

        def run(*given: Any) -> tuple[Array]:
            return (denoise(*given),)

        (h,) = self._variant(run, "denoise", ragged, bool(signal))(*inputs, *signal)
        said = graph.vocabulary(self.ops, self.config, self.weights, h, *draw, bound)
        return self._for_host(said), said.soft.reshape(*h.shape[:2], -1)

    def _for_host(self, said: Prediction) -> Array:
        """All that the host needs in one wide array [3 or 4, B·L]. Ids below 2^24 are exact in float32."""
        wide = self.ops.to_wide
        parts = [wide(said.argmax), wide(said.sample), said.entropy]
        parts += [] if said.missing is None else [said.missing]
        return self.ops.concat([part[None] for part in parts], 0)

    def _inputs(self, context: Context, canvas: Any) -> tuple[Array, Array]:
        """Canvas [B, L] and offset [B] on the device; PromptError for a canvas that does not fit."""
        canvas = _integers(canvas)
        if canvas is None or canvas.ndim != 2 or len(canvas) != len(context.lengths):
            raise PromptError(f"a canvas must be [{len(context.lengths)}, L] token ids")
        if canvas.size == 0 or canvas.min() < 0 or canvas.max() >= self.config.vocab_size:
            raise PromptError(f"a canvas token is outside the vocabulary of {self.config.vocab_size}")
        # Positions continue after a row's own tokens, not after its slots, which include padding.
        return self.ops.asarray(canvas), self.ops.asarray(context.lengths)

    def _signal(self, soft: Any) -> tuple[Array, ...]:
        """The soft embedding [B, L, D] on the device as a tuple of one, empty for None."""
        if soft is None:
            return ()
        return (self.ops.asarray(soft) if isinstance(soft, np.ndarray) else soft,)


def _integers(x: Any) -> np.ndarray | None:
    """`x` as an integer array, None if it is anything else."""
    try:
        array = np.asarray(x)
    except (ValueError, TypeError):  # lists of unequal length
        return None
    return array if array.dtype.kind in "iu" else None
