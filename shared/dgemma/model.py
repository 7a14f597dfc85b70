"""A loaded model: the graph, its weights, its tokenizer, and the few calls everything else is made of.

    model = dgemma.load()                               # the embedded model
    context = model.encode([[2, 105, ...]])             # ragged lists of token ids
    logits = model.logits(context, canvas)              # [B, L, V] float32 NumPy

Passes are compiled by the backend where it can; everything that varies goes in as an array, everything
else (padding or not, first step or not) picks the compiled variant.

    B rows  L canvas positions  V vocabulary  D hidden
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dgemma.engine import sampler
from dgemma.errors import PromptError
from dgemma.files import Progress
from dgemma.network import graph
from dgemma.network.cache import Cache
from dgemma.network.config import Config
from dgemma.network.ops import Array, Guess, Ops
from dgemma.network.weights import Weights
from dgemma.settings import GenerationConfig

if TYPE_CHECKING:
    from dgemma.engine.events import Event
    from dgemma.text.tokenizer import Tokenizer

Inputs = tuple[Array, Array, list[graph.KV]]  # canvas, offset, past

# Prompt tokens a prefill pass takes at most; scores of one pass are [heads, chunk, context].
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
        """Without every row's last `count` tokens; ValueError beyond a canvas's length or a row's own."""
        if count > self.lengths.min():
            raise ValueError(f"cannot take back {count} tokens from a row of {self.lengths.min()}")
        return Context(self.cache.trim(count), self.lengths - count)


@dataclass(frozen=True)
class Step:
    """One refinement of a canvas. NumPy on the host, but for `soft`, which stays on the device.

    `canvas` [B, L]: accepted samples, fresh noise elsewhere: the next step's input. `argmax` [B, L]:
    what would be committed. `entropy` [B, L] float32 nats; `accepted` [B, L] bool; `soft` [B, L, D].
    `missing` [B, L] is the probability that `soft` leaves out at most, None where all of it is dense.
    """

    canvas: np.ndarray
    argmax: np.ndarray
    entropy: np.ndarray
    accepted: np.ndarray
    soft: Array
    missing: np.ndarray | None = None

    @property
    def dense(self) -> np.ndarray:
        """Positions [B, L] whose soft embedding left nothing out."""
        return np.ones(self.argmax.shape, bool) if self.missing is None else self.missing == 0


class Model:
    """See the module. Made by `dgemma.load`; not thread-safe."""

    def __init__(
        self,
        ops: Ops,
        config: Config,
        generation: GenerationConfig,
        weights: Weights,
        tokenizer: Tokenizer | None,
    ):
        self.ops, self.config, self.generation = ops, config, generation
        self.weights, self._tokenizer = weights, tokenizer
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise PromptError("this checkpoint has no tokenizer.json: only token ids can be given")
        return self._tokenizer

    # ---- contexts -------------------------------------------------------------------------------

    def encode(
        self,
        tokens: Sequence[Sequence[int]],
        context: Context | None = None,
        progress: Progress | None = None,
        chunk: int = PREFILL_CHUNK,
    ) -> Context:
        """Encode rows of token ids, or append them to a context's rows (which stays usable).

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

        Where it may `consume` the context, which then is of no more use, keys and values are not held twice.
        """
        rows = [self.check_tokens(row) for row in tokens]
        if not rows:
            raise PromptError("no rows of tokens to encode")
        if context is None:
            return (yield from self._prefill_rows(rows, None, self.ops.cache(self.config), chunk))
        if len(rows) != len(context.lengths):
            raise PromptError(f"{len(rows)} rows of tokens for a context of {len(context.lengths)} rows")
        if len({len(row) for row in rows}) == 1:
            cache = context.cache if consume else context.cache.fork()
            return (yield from self._prefill_rows(rows, context.lengths, cache, chunk))
        # Rows end together, so rows that grow by different amounts are encoded apart and joined again.
        parts = []
        for b, row in enumerate(rows):
            one = context.fork([b])
            parts.append((yield from self._prefill_rows([row], one.lengths, one.cache, chunk)))
        cache = parts[0].cache.merge([part.cache for part in parts[1:]])
        return Context(cache, np.concatenate([part.lengths for part in parts]))

    def check_tokens(self, row: Sequence[int]) -> np.ndarray:
        """A row of token ids as an array; PromptError if it is empty or holds anything else."""
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
        """Append rows to a cache that holds `before` tokens of each."""
        slots = max(len(row) for row in rows)
        lengths = np.array([len(row) for row in rows]) + (0 if before is None else before)
        if lengths.max() > self.config.max_positions:
            raise PromptError(
                f"{lengths.max()} tokens exceed the model's {self.config.max_positions} positions"
            )
        tokens = np.full((len(rows), slots), self.config.pad_id)
        for b, row in enumerate(rows):
            tokens[b, slots - len(row) :] = row
        for start in range(0, slots, chunk):
            part = tokens[:, start : start + chunk]
            cache.append(self._encode(part, lengths - slots + start, cache))
            yield start + part.shape[1], slots
        return Context(cache, lengths)

    def _encode(self, tokens: np.ndarray, offset: np.ndarray, cache: Cache) -> list[graph.KV]:
        ragged = bool((offset < cache.slots).any())
        past = cache.read()

        def run(tokens: Array, offset: Array, past: list[graph.KV]) -> list[graph.KV]:
            return graph.encode(
                self.ops, self.config, self.weights, tokens, offset, past or None, ragged=ragged
            )

        ops = self.ops
        new = self._variant(run, "encode", ragged, bool(past))(ops.asarray(tokens), ops.asarray(offset), past)
        ops.settle(new)
        return new

    def _variant(self, function: Callable[..., Any], *key: Any) -> Callable[..., Any]:
        if key not in self._compiled:
            self._compiled[key] = self.ops.compile(function, repeats=key[0] in ("refine", "denoise"))
        return self._compiled[key]

    # ---- canvases -------------------------------------------------------------------------------

    def logits(self, context: Context, canvas: Any, soft: Any = None) -> np.ndarray:
        """Softcapped logits before temperature, float32 [B, L, V], of canvas [B, L] token ids.

        `soft` [B, L, D] is the previous step's soft embedding (`Step.soft` or NumPy), None on a first
        step. The whole [B, L, V] plane is made: for looking, not for generating.
        """
        ops, w = self.ops, self.weights
        ragged = context.ragged

        def run(canvas: Array, offset: Array, past: list[graph.KV], *soft: Array) -> Array:
            signal = soft[0] if soft else None
            h = graph.denoise(ops, self.config, w, canvas, signal, offset, past, ragged=ragged)
            return ops.logits(h, w.embed, self.config.softcap)

        run = self._variant(run, "logits", ragged, soft is not None)
        z = run(*self._inputs(context, canvas), context.cache.read(), *self._signal(soft))
        return ops.to_numpy(z).astype(np.float32)

    def soft_embedding(self, probs: Any) -> Array:
        """Probabilities [B, L, V] -> their mean embedding [B, L, D] on the device, before the √D factor."""
        probs = self.ops.aswide(np.asarray(probs)) if isinstance(probs, np.ndarray | list) else probs
        return self.ops.soft_embedding(probs, self.weights.embed)

    def refine(
        self,
        context: Context,
        canvas: Any,
        soft: Any,
        temperature: float,
        uniforms: np.ndarray,
        noise: np.ndarray,
        entropy_bound: float | None = None,
        soft_bound: float = 0.0,
    ) -> Step:
        """One denoising step of canvas [B, L] at a temperature.

        `uniforms` [B, L] in [0, 1) pick each position's sample; `noise` [B, L] are the tokens that
        positions outside the entropy bound (default: the checkpoint's) are refilled with. Of the new soft
        embedding, `soft_bound` of the probability may be missing. One host read, with a `soft_bound`
        those that `Ops.vocabulary` makes besides.
        """
        ops = self.ops
        inputs = *self._inputs(context, canvas), context.cache.read()
        draw = ops.aswide(np.asarray(temperature)), ops.aswide(np.asarray(uniforms))
        if soft_bound:
            host, new = self._sparse(context.ragged, inputs, draw, self._signal(soft), soft_bound)
        else:
            host, new = self._dense(context.ragged, inputs, draw, self._signal(soft))
        argmax, sample, entropy, *missing = ops.to_numpy(host).reshape(-1, *np.shape(canvas))
        bound = self.generation.entropy_bound if entropy_bound is None else entropy_bound
        accepted = sampler.accept(entropy, bound)
        refilled = np.where(accepted, sample, noise).astype(np.int64)
        step = Step(refilled, argmax.astype(np.int64), entropy.astype(np.float32), accepted, new)
        return replace(step, missing=missing[0]) if missing else step

    def _dense(
        self, ragged: bool, inputs: Inputs, draw: tuple[Array, Array], signal: tuple[Array, ...]
    ) -> tuple[Array, Array]:
        """What the host needs of a step, and its soft embedding [B, L, D]; compiled as a whole."""

        def run(  # type: ignore[no-untyped-def]
            canvas: Array,
            offset: Array,
            past: list[graph.KV],
            temperature: Array,
            uniforms: Array,
            *soft: Array,
        ):
            guess = graph.step(
                self.ops,
                self.config,
                self.weights,
                canvas,
                soft[0] if soft else None,
                offset,
                past,
                temperature,
                uniforms,
                ragged=ragged,
            )
            return self._for_host(guess), guess.soft.reshape(*canvas.shape, -1)

        return self._variant(run, "refine", ragged, bool(signal))(*inputs, *draw, *signal)

    def _sparse(
        self,
        ragged: bool,
        inputs: Inputs,
        draw: tuple[Array, Array],
        signal: tuple[Array, ...],
        bound: float,
    ) -> tuple[Array, Array]:
        """As `_dense`, compiled but for the vocabulary, which may read the host."""
        ops, config, w = self.ops, self.config, self.weights

        def run(canvas: Array, offset: Array, past: list[graph.KV], *soft: Array) -> tuple[Array]:
            signal = soft[0] if soft else None
            return (graph.denoise(ops, config, w, canvas, signal, offset, past, ragged=ragged),)

        (h,) = self._variant(run, "denoise", ragged, bool(signal))(*inputs, *signal)
        guess = graph.vocabulary(ops, config, w, h, *draw, bound)
        return self._for_host(guess), guess.soft.reshape(*h.shape[:2], -1)

    def _for_host(self, guess: Guess) -> Array:
        """All that the host needs in one array: ids are exact in float32, being below 2^24."""
        wide = self.ops.wide
        parts = [wide(guess.argmax), wide(guess.sample), guess.entropy]
        parts += [] if guess.missing is None else [guess.missing]
        return self.ops.concat([part[None] for part in parts], 0)

    def _inputs(self, context: Context, canvas: Any) -> tuple[Array, Array]:
        canvas = _integers(canvas)
        if canvas is None or canvas.ndim != 2 or len(canvas) != len(context.lengths):
            raise PromptError(f"a canvas must be [{len(context.lengths)}, L] token ids")
        if canvas.size == 0 or canvas.min() < 0 or canvas.max() >= self.config.vocab_size:
            raise PromptError(f"a canvas token is outside the vocabulary of {self.config.vocab_size}")
        return self.ops.asarray(canvas), self.ops.asarray(context.lengths)

    def _signal(self, soft: Any) -> tuple[Array, ...]:
        if soft is None:
            return ()
        return (self.ops.asarray(soft) if isinstance(soft, np.ndarray) else soft,)

    # ---- replies --------------------------------------------------------------------------------

    def generate(self, prompt: Sequence[Any], **options: Any) -> Iterator[Event]:
        """Generate replies; see `dgemma.engine.run.generate` for the options and the events."""
        from dgemma.engine.run import generate

        return generate(self, prompt, **options)


def _integers(x: Any) -> np.ndarray | None:
    """`x` as an integer array, None if it is anything else."""
    try:
        array = np.asarray(x)
    except (ValueError, TypeError):  # lists of unequal length
        return None
    return array if array.dtype.kind in "iu" else None
