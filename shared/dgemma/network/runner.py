"""A network ready to run: it encodes contexts and looks at canvases. The engine decides what follows.

A batch is a list of rows, each with a context of its own. The backend compiles the passes if it can:
everything that varies goes in as an array.

    B rows  L canvas positions  V vocabulary  D hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dgemma.errors import PromptError
from dgemma.files import Progress
from dgemma.network import graph
from dgemma.network.bias import Biases, RowBias
from dgemma.network.config import Config
from dgemma.network.context import Context, cut
from dgemma.network.ops import KV, Array, Bias, Ops, Prediction
from dgemma.network.ops.few import Few, draw_few
from dgemma.network.ops.vocabulary import judged, logits
from dgemma.network.weights import Weights

# Canvas ids [B, L], positions [B·L], past, soft [B, L, D].
Inputs = tuple[Array, Array, Any, Array]

# Most prompt tokens of one prefill pass: its scores are [heads, chunk, context], so memory is bounded.
PREFILL_CHUNK = 512

# Functions that are called many times with the same shapes.
_REPEATED = ("refine", "refine biased", "denoise")


@dataclass(frozen=True)
class Seen:
    """What the network says of a canvas. `soft` [B, L, D] stays on the device, the rest is on the host.

    `argmax` and `sample` are [B, L] int64, `entropy` [B, L] in nats, float32 (float64 on NumPy). `soft`
    leaves out at most the probability `missing` [B, L]; None if all of it is dense. `best` [B, L] is the
    probability of the argmax; None if nobody said it.
    """

    argmax: np.ndarray
    sample: np.ndarray
    entropy: np.ndarray
    soft: Array
    missing: np.ndarray | None = None
    best: np.ndarray | None = None


class Runner:
    """The graph over one backend and one set of weights; not thread-safe."""

    def __init__(self, ops: Ops, config: Config, weights: Weights):
        self.ops, self.config, self.weights = ops, config, weights
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._biases = Biases(ops)

    # ---- contexts -------------------------------------------------------------------------------

    def encode(
        self,
        tokens: Sequence[Sequence[int]],
        contexts: Sequence[Context] | None = None,
        progress: Progress | None = None,
        chunk: int = PREFILL_CHUNK,
    ) -> list[Context]:
        """Encode rows of token ids, each behind its context if any are given; returns a context a row.

        Rows may differ in length, and the given contexts stay as they are. `progress(done, total)` counts
        tokens of all rows, of which a pass has at most `chunk`. PromptError for an empty row, an id outside
        the vocabulary, or more positions than the model has.
        """
        rows = [self.check_tokens(row) for row in tokens]
        if not rows:
            raise PromptError("no rows of tokens to encode")
        if contexts is not None and len(rows) != len(contexts):
            raise PromptError(f"{len(rows)} rows of tokens for {len(contexts)} contexts")
        grown = (
            [Context(self.ops, self.config) for _ in rows]
            if contexts is None
            else [context.fork() for context in contexts]
        )
        for context, row in zip(grown, rows, strict=True):
            self.check_length(context.length + len(row))
        total = sum(len(row) for row in rows)
        while left := sum(len(row) for row in rows):
            taken = shares([len(row) for row in rows], chunk)
            some = [b for b, count in enumerate(taken) if count]
            self.extend([grown[b] for b in some], [rows[b][: taken[b]] for b in some])
            rows = [row[count:] for row, count in zip(rows, taken, strict=True)]
            if progress:
                progress(total - left + sum(taken), total)
        return grown

    def extend(self, contexts: Sequence[Context], rows: Sequence[np.ndarray]) -> None:
        """Encode rows of ids [n] in one pass, each behind its context, which grows."""
        ops, lengths = self.ops, [len(row) for row in rows]
        positions = np.concatenate([c.length + np.arange(n) for c, n in zip(contexts, lengths, strict=True)])

        def run(rows: list[Array], positions: Array, past: Any) -> list[KV]:
            return graph.encode(ops, self.config, self.weights, rows, positions, past)

        ids = [ops.asarray(row) for row in rows]
        new = self._variant(run, "encode")(ids, ops.asarray(positions), self._pasts(contexts, lengths))
        ops.settle(new)
        stop = 0
        for context, n in zip(contexts, lengths, strict=True):
            stop += n
            context.append([cut(kv, stop - n, stop) for kv in new])

    def _pasts(self, contexts: Sequence[Context], lengths: Sequence[int]) -> Any:
        """What `Ops.attend` reads of contexts, by layer, for rows of so many new tokens."""
        by_row = [context.read() for context in contexts]
        return self.ops.pasts([list(layer) for layer in zip(*by_row, strict=True)], lengths)

    def check_tokens(self, row: Sequence[int]) -> np.ndarray:
        """A row of token ids as an integer array [n]; PromptError if it is empty or holds anything else."""
        ids = _integers(row)
        if ids is None or ids.ndim != 1 or not len(ids):
            raise PromptError("a row of tokens must be a non-empty list of integers")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = ids[(ids < 0) | (ids >= self.config.vocab_size)][0]
            raise PromptError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
        return ids

    def check_length(self, length: int) -> None:
        """PromptError if a row of so many tokens has more positions than the model."""
        if length > self.config.max_positions:
            raise PromptError(f"{length} tokens exceed the model's {self.config.max_positions} positions")

    def _variant(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        # The first function of a name stays: all of them must close over the same facts.
        if name not in self._compiled:
            self._compiled[name] = self.ops.compile(function, repeats=name in _REPEATED)
        return self._compiled[name]

    # ---- canvases -------------------------------------------------------------------------------

    def logits(self, contexts: Sequence[Context], canvas: Any, soft: Any = None) -> np.ndarray:
        """Softcapped logits before temperature, float32 [B, L, V], of canvas [B, L] token ids.

        `contexts` and `soft` are as in `see`. This makes the whole [B, L, V] plane: use it for looking, not
        for generating.
        """

        def run(*inputs: Any) -> Array:
            return logits(self.ops, self._denoise(*inputs), self.weights.embed, self.config.softcap)

        z = self._variant(run, "logits")(*self._inputs(contexts, canvas, soft))
        return self.ops.to_numpy(z).astype(np.float32).reshape(*np.shape(canvas), -1)

    def judge(
        self, contexts: Sequence[Context], canvas: Any, tokens: Any = None, soft: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The log-probability [B, L] in nats of tokens [B, L] where canvas [B, L] stands, and the likeliest
        tokens.

        `tokens` are by default the canvas's own. All is before temperature. `contexts` and `soft` are as in
        `see`.
        """

        def run(*given: Any) -> tuple[Array]:
            return (self._denoise(*given),)

        ops, inputs = self.ops, self._inputs(contexts, canvas, soft)
        ids = inputs[0] if tokens is None else ops.asarray(np.asarray(tokens))
        (h,) = self._variant(run, "denoise")(*inputs)
        logs, best = judged(ops, h, self.weights.embed, self.config.softcap, ids.reshape(-1))
        # Ids below 2^24 are exact in float32, and one array is one host read.
        both = ops.to_numpy(ops.concat([logs[None], ops.to_wide(best)[None]], 0))
        return both[0].reshape(np.shape(canvas)), both[1].astype(np.int64).reshape(np.shape(canvas))

    def _denoise(self, canvas: Array, positions: Array, past: Any, soft: Array) -> Array:
        """A denoising pass of arrays only -> normed hidden states [B·L, D]."""
        return graph.denoise(self.ops, self.config, self.weights, canvas, soft, positions, past)

    def soft_embedding(self, probs: Any) -> Array:
        """The mean embedding [B, L, D] of probabilities [B, L, V], on the device, before the √D factor."""
        probs = self.ops.aswide(np.asarray(probs)) if isinstance(probs, np.ndarray | list) else probs
        return self.ops.soft_embedding(probs, self.weights.embed)

    def see(
        self,
        contexts: Sequence[Context],
        canvas: Any,
        soft: Any,
        temperature: float | np.ndarray,
        uniforms: np.ndarray,
        soft_bound: float = 0.0,
        bias: Sequence[RowBias | None] = (),
        few: Sequence[Few | None] = (),
    ) -> Seen:
        """One look at canvas [B, L] token ids, each row behind its context, at its temperature [B] or at one.

        `uniforms` [B, L] in [0, 1) pick each position's sample. `soft` is the previous step's soft embedding
        [B, L, D], or one [L, D] a row; None, for all or for a row, on a canvas's first step. The new one may
        leave out the probability `soft_bound`. A row's `bias` is added to its processed logits. Its samples
        come from its `few` tokens, at the price of `draw_few`; all else is as without. There is one host
        read; a `soft_bound` adds those of `Ops.vocabulary`.
        """
        ops, uniforms = self.ops, np.asarray(uniforms)
        inputs = self._inputs(contexts, canvas, soft)
        # One temperature for each position, so that backends need not know its row.
        heat = np.zeros(uniforms.shape) + np.reshape(temperature, (-1, 1))
        draw = ops.aswide(heat.reshape(-1)), ops.aswide(uniforms.reshape(-1))
        added = self._biases.of(bias, np.shape(canvas)[1])
        if soft_bound or any(few):
            host, new = self._in_parts(inputs, draw, soft_bound, added, few)
        else:
            host, new = self._whole(inputs, draw, added)
        argmax, sample, entropy, best, *missing = ops.to_numpy(host).reshape(-1, *np.shape(canvas))
        ids = argmax.astype(np.int64), sample.astype(np.int64)
        return Seen(*ids, entropy, new, missing[0] if missing else None, best)

    def _whole(self, inputs: Inputs, draw: tuple[Array, Array], bias: Bias | None) -> tuple[Array, Array]:
        """The host's part of a step [4, B·L] and its soft embedding [B, L, D]; compiled as a whole."""

        def run(
            canvas: Array,
            positions: Array,
            past: Any,
            soft: Array,
            heat: Array,
            uniforms: Array,
            *bias: Array,
        ) -> tuple[Array, Array]:
            given = self.ops, self.config, self.weights, canvas, soft, positions, past, heat, uniforms
            said = graph.step(*given, Bias(*bias) if bias else None)
            return self._for_host(said), said.soft.reshape(*canvas.shape, -1)

        if bias is None:
            return self._variant(run, "refine")(*inputs, *draw)
        added = bias.classes, bias.which, bias.values
        return self._variant(run, "refine biased")(*inputs, *draw, *added)

    def _in_parts(
        self,
        inputs: Inputs,
        draw: tuple[Array, Array],
        bound: float,
        bias: Bias | None,
        few: Sequence[Few | None],
    ) -> tuple[Array, Array]:
        """Like `_whole`, with `missing` [5, B·L] if there is a bound.

        Only what comes before the vocabulary is compiled: that may read the host, and a recording would keep
        the plane of `draw_few`.
        """

        def run(*given: Any) -> tuple[Array]:
            return (self._denoise(*given),)

        (h,) = self._variant(run, "denoise")(*inputs)
        head = self.weights.embed, self.config.softcap
        said = self.ops.vocabulary(h, *head, *draw, bound, bias)
        if any(few):
            said = replace(said, sample=draw_few(self.ops, h, *head, *draw, few, said.sample, bias))
        return self._for_host(said), said.soft.reshape(*inputs[0].shape, -1)

    def _for_host(self, said: Prediction) -> Array:
        """All that the host needs in one wide array [4 or 5, B·L]. Ids below 2^24 are exact in float32."""
        wide = self.ops.to_wide
        parts = [wide(said.argmax), wide(said.sample), said.entropy, said.best]
        parts += [] if said.missing is None else [said.missing]
        return self.ops.concat([part[None] for part in parts], 0)

    def _inputs(self, contexts: Sequence[Context], canvas: Any, soft: Any) -> Inputs:
        """The arrays of a pass over a canvas [B, L]; PromptError for one that does not fit."""
        ids = _integers(canvas)
        if ids is None or ids.ndim != 2 or len(ids) != len(contexts):
            raise PromptError(f"a canvas must be [{len(contexts)}, L] token ids")
        if ids.size == 0 or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise PromptError(f"a canvas token is outside the vocabulary of {self.config.vocab_size}")
        B, L = ids.shape
        positions = np.concatenate([context.length + np.arange(L) for context in contexts])
        past = self._pasts(contexts, (L,) * B)
        return self.ops.asarray(ids), self.ops.asarray(positions), past, self._signal(soft, B, L)

    def _signal(self, soft: Any, B: int, L: int) -> Array:
        """Soft embeddings [B, L, D] on the device from any form that `see` takes."""
        if not isinstance(soft, list | tuple):
            soft = [None] * B if soft is None else [soft]
        shape = L, self.config.hidden_size
        rows = [self._silence(shape) if row is None else self._on_device(row) for row in soft]
        if len(rows) == 1:
            return rows[0].reshape(-1, *shape)
        return self.ops.concat([row[None] for row in rows], 0)

    def _on_device(self, x: Any) -> Array:
        return self.ops.asarray(x) if isinstance(x, np.ndarray) else x

    def _silence(self, shape: tuple[int, int]) -> Array:
        return self.ops.asarray(np.zeros(shape, np.float32))


def shares(lengths: Sequence[int], most: int) -> list[int]:
    """How many of each row's tokens a pass of at most `most` takes: first come, first served."""
    taken = []
    for length in lengths:
        taken.append(min(length, most))
        most -= taken[-1]
    return taken


def _integers(x: Any) -> np.ndarray | None:
    """`x` as an integer array, None if it is anything else."""
    try:
        array = np.asarray(x)
    except (ValueError, TypeError):  # lists of unequal length
        return None
    return array if array.dtype.kind in "iu" else None
