"""Contexts: however one came about (in pieces, forked, trimmed, in a batch), it must read like a fresh one.

Contexts are compared through the logits of a canvas over them. Windows are 12 and 5, canvases 16, so
sliding layers forget early, and what `trim` may take back is soon all that they hold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dgemma.errors import PromptError
from dgemma.model import Model
from dgemma.network import graph
from dgemma.network.cache import Cache
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops.vocabulary import embed
from dgemma.network.runner import Context
from tests.compare import backends, close, make
from tests.oracle import oracle, our_model, tokens

LIMIT = {"numpy": 1e-6, "cuda": 1e-5, "mlx": 5e-5}
SLACK = 16  # a canvas


@pytest.fixture(scope="module", params=backends("float32", reference=True))
def model(request: pytest.FixtureRequest) -> Model:
    return our_model(make(request.param), oracle("window"))


@pytest.fixture(scope="module")
def exact() -> Model:
    return our_model(NumpyOps(), oracle("window"))


def look(model: Model, context: Context, seed: int = 0) -> np.ndarray:
    """Logits of a canvas, the same one for every row, with a self-conditioning signal."""
    rows = len(context.lengths)
    canvas = np.repeat(tokens(seed, 1, 16), rows, 0)
    soft = np.random.default_rng(seed).normal(0, 0.3, (1, 16, model.config.hidden_size))
    return model.logits(context, canvas, np.repeat(soft, rows, 0))


def same(model: Model, ours: Context, expected: Context, what: str) -> None:
    assert ours.lengths.tolist() == expected.lengths.tolist()
    close(look(model, ours), look(model, expected), LIMIT[model.ops.name], what)


def alone(model: Model, context: Context, rows: list[Any], what: str) -> None:
    """Every row of a context reads like a context of that row only."""
    assert context.lengths.tolist() == [len(row) for row in rows]
    logits = look(model, context)
    for index, row in enumerate(rows):
        fresh = look(model, model.encode([row]))
        close(logits[index : index + 1], fresh, LIMIT[model.ops.name], f"{what}, row {index}")


# ---- encoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(1, 47), (20, 20, 8), (11, 1, 12, 24), (5,) * 9 + (3,)])
def test_in_pieces(model: Model, pieces: tuple[int, ...]) -> None:
    ids, context, start = tokens(1, 2, 48), None, 0
    for length in pieces:
        context = model.encode(ids[:, start : start + length], context)
        start += length
    assert context is not None
    same(model, context, model.encode(ids), f"pieces {pieces}")


def test_ragged_rows_read_like_single_rows(model: Model) -> None:
    rows = [tokens(seed, length) for seed, length in enumerate((40, 12, 1, 29, 11))]
    alone(model, model.encode(rows), rows, "ragged")
    alone(model, model.encode(rows, chunk=6), rows, "ragged in chunks")


def test_ragged_continuation(model: Model) -> None:
    """Rows of different lengths grow by different lengths, again and again."""
    lengths = [(7, 1, 20), (1, 9, 3), (30, 2, 1), (4, 4, 4), (2, 40, 2)]
    rows: list[Any] = [np.empty(0, np.int64)] * 3
    context = None
    for step, growth in enumerate(lengths):
        new = [tokens(10 * step + row, length) for row, length in enumerate(growth)]
        rows = [np.concatenate(pair) for pair in zip(rows, new, strict=True)]
        context = model.encode(new, context)
        alone(model, context, rows, f"after {step + 1} pieces")


def test_encoding_leaves_the_context_usable(model: Model) -> None:
    ids = tokens(2, 2, 30)
    context = model.encode(ids)
    before = look(model, context)
    for piece in (ids[:, :3], [ids[0, :5], ids[1, :1]]):
        model.encode(piece, context)
    np.testing.assert_array_equal(look(model, context), before)
    same(model, context, model.encode(ids), "old context")


def test_a_context_that_may_be_consumed(model: Model) -> None:
    """Its successor is the same, in its own cache; a fork of it is not touched."""
    ids, more = tokens(2, 2, 30), tokens(3, 2, 9)
    context, found = model.encode(ids), []
    fork, expected = context.fork([0, 1]), model.encode(more, context)

    def run() -> Any:
        found.append((yield from model.prefill(more, context, chunk=4, consume=True)))

    list(run())
    assert found[0].cache is context.cache
    same(model, found[0], expected, "consumed")
    same(model, fork, model.encode(ids), "fork of it")


def test_far_past_the_window(model: Model, exact: Model) -> None:
    """Forty windows of context against NumPy."""
    ids = tokens(3, 1, 480)
    close(look(model, model.encode(ids)), look(exact, exact.encode(ids)), 1e-4, "480 tokens")


def test_progress(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    model.encode([tokens(0, 20), tokens(1, 3)], progress=lambda *at: seen.append(at), chunk=8)
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_sliding_layers_hold_what_they_need(model: Model) -> None:
    context = model.encode(tokens(4, 2, 100))
    cache = context.cache
    for layer, (k, v) in zip(model.config.layers, cache.read(), strict=True):
        slots = layer.window - 1 if layer.window else 100
        assert tuple(k.shape) == tuple(v.shape) == (2, layer.kv_heads, slots, layer.head_dim)
    if type(cache) is Cache:
        held = [k.shape[2] for k, _ in cache._layers]
        assert held == [layer.window - 1 + SLACK if layer.window else 100 for layer in model.config.layers]


# ---- canvases -----------------------------------------------------------------------------------


def test_canvases_leave_the_context_alone(model: Model) -> None:
    """Several canvases off one context, in any order, of any length."""
    context = model.encode(tokens(5, 1, 25))
    before = [look(model, context, seed) for seed in range(3)]
    model.logits(context, tokens(6, 1, 3))
    uniforms, noise = np.full((1, 16), 0.5), tokens(7, 1, 16)
    model.refine(context, tokens(8, 1, 16), None, 0.7, uniforms, noise)
    for seed in (2, 0, 1):
        np.testing.assert_array_equal(look(model, context, seed), before[seed])


def test_canvas_of_one_position(model: Model, exact: Model) -> None:
    ids, canvas = tokens(9, 2, 14), tokens(10, 2, 1)
    expected = exact.logits(exact.encode(ids), canvas)
    close(model.logits(model.encode(ids), canvas), expected, 1e-4, "one position")


# ---- fork ---------------------------------------------------------------------------------------


def test_fork(model: Model) -> None:
    """Any rows in any order, repeated rows included."""
    rows = [tokens(seed, length) for seed, length in enumerate((33, 6, 18))]
    context = model.encode(rows)
    for picks in ([2, 0], [1], [0, 0, 1, 0], [0, 1, 2]):
        alone(model, context.fork(picks), [rows[pick] for pick in picks], f"rows {picks}")


def test_fork_is_independent(model: Model) -> None:
    """Neither the fork nor the origin notices what the other does."""
    ids = tokens(11, 2, 26)
    context = model.encode(ids)
    fork, twin = context.fork([0, 1]), context.fork([1, 1])
    grown, other = model.encode(tokens(12, 2, 20), fork), model.encode(tokens(13, 2, 4), twin)
    again = model.encode(tokens(14, 2, 9), context)
    alone(model, context, list(ids), "origin")
    alone(model, fork, list(ids), "fork")
    alone(model, twin, [ids[1], ids[1]], "twin")
    for ours, first, more in ((grown, ids, (12, 20)), (other, ids[[1, 1]], (13, 4)), (again, ids, (14, 9))):
        alone(model, ours, list(np.concatenate([first, tokens(more[0], 2, more[1])], 1)), "grown")


def test_fork_of_a_row_that_was_padded_can_grow(model: Model) -> None:
    rows = [tokens(15, 40), tokens(16, 2)]
    short = model.encode(rows).fork([1])
    more = tokens(17, 1, 23)
    alone(model, model.encode(more, short), [np.concatenate([rows[1], more[0]])], "short row")


# ---- trim ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, SLACK])
def test_trim(model: Model, count: int) -> None:
    """A trimmed context is the shorter one, also after it grew again."""
    ids = tokens(18, 2, 50)
    trimmed = model.encode(ids).trim(count)
    same(model, trimmed, model.encode(ids[:, : 50 - count]), f"without {count}")
    more = tokens(19, 2, 17)
    whole: Any = np.concatenate([ids[:, : 50 - count], more], 1)
    same(model, model.encode(more, trimmed), model.encode(whole), f"without {count}, grown")


def test_trim_of_ragged_rows(model: Model) -> None:
    rows = [tokens(20, 30), tokens(21, 9)]
    context = model.encode(rows).trim(4)
    alone(model, context, [row[:-4] for row in rows], "trimmed")
    more = [tokens(22, 2), tokens(23, 21)]
    grown = [np.concatenate([row[:-4], new]) for row, new in zip(rows, more, strict=True)]
    alone(model, model.encode(more, context), grown, "trimmed and grown")


def test_trim_leaves_the_origin_alone(model: Model) -> None:
    ids = tokens(24, 1, 30)
    context = model.encode(ids)
    model.encode(tokens(25, 1, 6), context.trim(8))
    alone(model, context, list(ids), "origin")


def test_trim_beyond_what_is_held(model: Model) -> None:
    context = model.encode([tokens(26, 40), tokens(27, 5)])
    for count in (-1, 6, SLACK + 1):
        with pytest.raises(ValueError, match="take back"):
            context.trim(count)
    with pytest.raises(ValueError, match="take back"):
        context.fork([0]).trim(SLACK + 1)
    context.trim(5)


@pytest.mark.parametrize("counts", [(SLACK, SLACK), (10, 10), (1, SLACK)])
def test_trim_twice(model: Model, counts: tuple[int, int]) -> None:
    """The second time either raises or is right: there is one canvas of slack, not one each time."""
    ids = tokens(28, 1, 60)
    once = model.encode(ids).trim(counts[0])
    try:
        twice = once.trim(counts[1])
    except ValueError:
        return
    same(model, twice, model.encode(ids[:, : 60 - sum(counts)]), f"without {counts}")


def test_trim_twice_within_the_slack(model: Model) -> None:
    ids = tokens(29, 1, 60)
    same(model, model.encode(ids).trim(9).trim(7), model.encode(ids[:, :44]), "without 9 and 7")


def test_trim_of_rows_that_grew_apart(model: Model) -> None:
    """After a trim, rows grow by 1 and by 3: what the first one lacks in its window is no padding."""
    ids = tokens(35, 2, 60)
    context = model.encode(ids).trim(SLACK)
    more = [tokens(36, 1), tokens(37, 3)]
    grown = model.encode(more, context)
    whole = [np.concatenate([row[: 60 - SLACK], new]) for row, new in zip(ids, more, strict=True)]
    alone(model, grown, whole, "grown apart")
    for count in (1, 2, 3):
        try:
            trimmed = grown.trim(count)
        except ValueError:
            continue
        alone(model, trimmed, [row[:-count] for row in whole], f"grown apart, without {count}")


def test_trim_to_nothing_and_again(model: Model) -> None:
    """All of a short context goes; what is encoded next stands alone."""
    ids, more = tokens(30, 1, 6), tokens(31, 1, 20)
    empty = model.encode(ids).trim(6)
    assert empty.lengths.tolist() == [0]
    same(model, model.encode(more, empty), model.encode(more), "from nothing")


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [[[]], [[1, 2], []], [[-1]], [[1, 200]], [[0.5]], [["a"]], [[[1]]], [[True]], [[1, [2]]], [3]],
    ids=str,
)
def test_unusable_tokens(model: Model, rows: Any) -> None:
    with pytest.raises(PromptError):
        model.encode(rows)


def test_no_rows(model: Model) -> None:
    with pytest.raises(PromptError):
        model.encode([])


def test_other_number_of_rows(model: Model) -> None:
    context = model.encode(tokens(32, 2, 4))
    with pytest.raises(PromptError, match="2 rows"):
        model.encode([[1]], context)


@pytest.mark.parametrize(
    "canvas",
    [
        [1, 2],
        [[1, 2]],
        [[1], [2], [3]],
        [[], []],
        [[1.0], [2.0]],
        [[1, 2], [3, 200]],
        [[1, 2], [3, -1]],
        [[[1]], [[2]]],
        [[1, 2], [3]],
        [["a"], ["b"]],
        None,
    ],
    ids=str,
)
def test_unusable_canvas(model: Model, canvas: Any) -> None:
    context = model.encode(tokens(33, 2, 4))
    with pytest.raises(PromptError):
        model.logits(context, canvas)
    with pytest.raises(PromptError):
        model.refine(context, canvas, None, 0.5, np.zeros((2, 2)), np.zeros((2, 2), np.int64))


def test_more_tokens_than_positions() -> None:
    model = our_model(NumpyOps(), oracle("window", max_position_embeddings=40))
    context = model.encode(tokens(34, 1, 40))
    for refused in (lambda: model.encode(tokens(34, 1, 41)), lambda: model.encode([[1]], context)):
        with pytest.raises(PromptError, match="40"):
            refused()
    model.encode([[1]], context.trim(1))


def test_rows_in_place_of_tokens(model: Model) -> None:
    """The encoder reads what stands for a token as it reads the token: that is where images will enter."""
    ops, w = model.ops, model.weights
    ids, offset = ops.asarray(np.asarray(tokens(4, 1, 20))), ops.asarray(np.zeros(1, np.int64))
    rows = embed(ops, w.embed, ids) * w.embed_scale
    found = [graph.encode(ops, model.config, w, x, offset, None, ragged=False) for x in (ids, rows)]
    for kv, other in zip(*found, strict=True):
        for x, y in zip(kv, other, strict=True):
            np.testing.assert_array_equal(ops.to_numpy(x), ops.to_numpy(y))
