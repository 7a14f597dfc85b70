"""Contexts: however one came about (in pieces, forked, trimmed, in company), it must read like a fresh one.

Contexts are compared through the logits of a canvas over them. Windows are 12 and 5, canvases 16, so
sliding layers forget early, and what `trim` may take back is soon all that they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dgemma.errors import PromptError
from dgemma.model import Model
from dgemma.network import context as contexts
from dgemma.network import graph
from dgemma.network.context import Context
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops.vocabulary import embed
from tests.compare import backends, close, make
from tests.oracle import oracle, our_model, tokens

LIMIT = {"numpy": 1e-12, "cuda": 1e-5, "mlx": 5e-5}
SLACK = 16  # a canvas


@pytest.fixture(scope="module", params=backends("float32", reference=True))
def shared_model(request: pytest.FixtureRequest) -> Model:
    return our_model(make(request.param), oracle("window"))


@pytest.fixture
def model(shared_model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """With full layers in many pieces; `alike` compares with one."""
    monkeypatch.setattr(shared_model.ops, "piece_slots", 7)
    return shared_model


@pytest.fixture(scope="module")
def exact() -> Model:
    return our_model(NumpyOps(), oracle("window"))


def look(model: Model, rows: Sequence[Context], seed: int = 0) -> np.ndarray:
    """Logits of a canvas, the same one for every row, with a self-conditioning signal."""
    canvas = np.repeat(tokens(seed, 1, 16), len(rows), 0)
    soft = np.random.default_rng(seed).normal(0, 0.3, (1, 16, model.config.hidden_size))
    return model.logits(rows, canvas, np.repeat(soft, len(rows), 0))


def alike(model: Model, found: Sequence[Context], rows: Sequence[Any], what: str) -> None:
    """Every context, seen in company, reads like a fresh one of its row, seen alone and in one piece."""
    assert [context.length for context in found] == [len(row) for row in rows]
    logits = look(model, found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.ops, "piece_slots", 1 << 30)
        for index, row in enumerate(rows):
            fresh = look(model, model.encode([row], chunk=1 << 20))
            close(logits[index : index + 1], fresh, LIMIT[model.ops.name], f"{what}, row {index}")


def joined(*parts: Any) -> np.ndarray:
    return np.concatenate(parts)


def held(model: Model, context: Context) -> list[list[int]]:
    """Tokens of each piece of the first full layer and the first sliding one."""
    windows = [layer.window for layer in model.config.layers]
    layers = [context._layers[windows.index(None)], context._layers[windows.index(12)]]
    return [[k.shape[1] for k, _ in pieces] for pieces in layers]


# ---- encoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(1, 47), (20, 20, 8), (11, 1, 12, 24), (5,) * 9 + (3,)])
def test_in_several_calls(model: Model, pieces: tuple[int, ...]) -> None:
    ids, found, start = tokens(1, 2, 48), None, 0
    for length in pieces:
        found = model.encode(ids[:, start : start + length], found)
        start += length
    assert found is not None
    alike(model, found, list(ids), f"calls of {pieces}")


def test_rows_of_any_lengths(model: Model) -> None:
    """In one pass, at every size of chunk, and with a chunk's end within a row, at one, or at several."""
    rows = [tokens(seed, length) for seed, length in enumerate((40, 12, 1, 29, 11))]
    for chunk in (512, 93, 40, 13, 6, 1) if model.ops.name == "numpy" else (512, 40, 6):
        alike(model, model.encode(rows, chunk=chunk), rows, f"chunks of {chunk}")


@pytest.mark.parametrize("slots", [7, 1 << 30])
def test_rows_grow_by_any_lengths(model: Model, slots: int) -> None:
    """Again and again, by calls that fork and by passes in place, as an engine commits canvases."""
    model.ops.piece_slots = slots
    rows: list[Any] = [tokens(row, n) for row, n in enumerate((7, 1, 20))]
    found = model.encode(rows)
    for step, lengths in enumerate([(1, 9, 3), (30, 2, 1), (16, 16, 16), (2, 40, 2)]):
        new = [tokens(10 * step + row, n) for row, n in enumerate(lengths)]
        rows = [joined(*both) for both in zip(rows, new, strict=True)]
        if step % 2:
            found = model.encode(new, found)
        else:
            model.extend(found, new)
        alike(model, found, rows, f"after {step + 1} times")


def test_contexts_need_not_have_come_together(model: Model) -> None:
    """Rows enter and leave a pass as they like; their contexts have different numbers of pieces."""
    rows = [tokens(40 + n, n) for n in (3, 50, 21)]
    found = [model.encode([row])[0] for row in rows]
    rest = [tokens(44, 2), tokens(45, 9)]
    found[1:] = model.encode(rest, found[1:])
    rows[1:] = [joined(*both) for both in zip(rows[1:], rest, strict=True)]
    alike(model, [found[2], found[0], found[1]], [rows[2], rows[0], rows[1]], "in another order")


def test_encoding_leaves_the_given_contexts_as_they_are(model: Model) -> None:
    ids = tokens(2, 2, 30)
    found = model.encode(ids)
    before = look(model, found)
    for piece in (ids[:, :3], [ids[0, :5], ids[1, :1]]):
        model.encode(piece, found)
    np.testing.assert_array_equal(look(model, found), before)


def test_far_past_the_window(shared_model: Model, exact: Model) -> None:
    """Forty windows of context against NumPy."""
    ids = tokens(3, 1, 480)
    close(look(shared_model, shared_model.encode(ids)), look(exact, exact.encode(ids)), 1e-4, "480 tokens")


def test_progress(shared_model: Model) -> None:
    seen: list[tuple[int, int]] = []
    shared_model.encode([tokens(0, 20), tokens(1, 3)], progress=lambda *at: seen.append(at), chunk=8)
    assert seen == [(8, 23), (16, 23), (23, 23)]


def test_rows_in_place_of_tokens(shared_model: Model) -> None:
    """The encoder reads what stands for a token as it reads the token: that is where images will enter."""
    ops, w, config = shared_model.ops, shared_model.weights, shared_model.config
    ids = [ops.asarray(np.asarray(tokens(seed, n))) for seed, n in ((4, 20), (5, 3))]
    vectors = [embed(ops, w.embed, row) * w.embed_scale for row in ids]
    positions = ops.asarray(joined(np.arange(20), np.arange(3)))
    past = ops.pasts([[[], []] for _ in config.layers], [20, 3])
    plain, mixed = (
        graph.encode(ops, config, w, rows, positions, past) for rows in (ids, [ids[0], vectors[1]])
    )
    for kv, other in zip(plain, mixed, strict=True):
        for x, y in zip(kv, other, strict=True):
            np.testing.assert_array_equal(ops.to_numpy(x), ops.to_numpy(y))


# ---- what a context holds -----------------------------------------------------------------------


def test_sliding_layers_hold_what_they_need(model: Model) -> None:
    """At every length, however it came about; and a read has one token less than the window."""
    (context,) = model.encode(tokens(4, 1, 10), chunk=3)
    for length in (10, 14, 27, 28, 60, 100):
        if length > context.length:
            model.extend([context], [np.asarray(tokens(length, length - context.length))])
        layers = zip(model.config.layers, context.read(), context._layers, strict=True)
        for layer, past, pieces in layers:
            kept = length if layer.window is None else min(length, layer.window - 1)
            for k, v in past:
                assert tuple(k.shape) == tuple(v.shape) == (layer.kv_heads, k.shape[1], layer.head_dim)
            assert sum(k.shape[1] for k, _ in past) == kept
            if layer.window is not None:
                assert [k.shape[1] for k, _ in pieces] == [min(length, layer.window - 1 + SLACK)]


def test_pieces_are_full(model: Model) -> None:
    """A piece that nobody shares grows to `piece_slots`, whatever a pass brings, and no further."""
    (context,) = model.encode(tokens(5, 1, 17), chunk=5)
    assert held(model, context)[0] == [7, 7, 3]
    for n, pieces in ((1, [7, 7, 4]), (3, [7, 7, 7]), (1, [7, 7, 7, 1]), (20, [7] * 6)):
        model.extend([context], [np.asarray(tokens(6, n))])
        assert held(model, context)[0] == pieces


def small() -> Model:
    """One narrow head, many positions; three sliding layers and a full one."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "global_head_dim": 4}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 2, "moe_intermediate_size": 8}
    return our_model(NumpyOps(), oracle("window", max_position_embeddings=1 << 16, **heads, **sizes))


def own(array: np.ndarray) -> np.ndarray:
    """The array that has the memory of this one, which may be a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_rows_hold_the_sum_of_their_contexts() -> None:
    """Eight rows from 1k to 32k tokens, encoded in one call: no token is held for another row's sake."""
    model, lengths = small(), [1024, 2048, 4096, 1500, 8192, 1024, 32_768, 3000]
    rng, found = np.random.default_rng(0), [Context(model.ops, model.config) for _ in range(8)]
    for start in range(0, max(lengths), 512):  # what passes leave, in place of 40 seconds of NumPy
        for context, length in zip(found, lengths, strict=True):
            if n := min(512, length - start) if length > start else 0:
                context.append([(rng.random((1, n, 4)), rng.random((1, n, 4))) for _ in model.config.layers])
    arrays: dict[int, int] = {}
    for context, length in zip(found, lengths, strict=True):
        assert context.length == length and not arrays.keys() & context.arrays().keys()
        arrays |= context.arrays()
    numbers = sum(length + 3 * (12 - 1 + SLACK) for length in lengths) * 2 * 4  # keys and values of a head
    assert sum(arrays.values()) == 8 * numbers
    # Nor does the memory behind views hold more.
    everything = [x for context in found for pieces in context._layers for kv in pieces for x in kv]
    assert sum({id(own(x)): own(x).nbytes for x in everything}.values()) == 8 * numbers


def test_a_pass_leaves_each_row_memory_of_its_own() -> None:
    """A short row does not hold what was encoded beside it, nor a long prompt's slot in a sliding layer."""
    model = small()
    short, long = model.encode([tokens(0, 3), tokens(1, 400)])
    for context, length in ((short, 3), (long, 400)):
        for layer, pieces in zip(model.config.layers, context._layers, strict=True):
            kept = min(length, 12 - 1 + SLACK) if layer.window else length
            assert [own(x).shape[1] for kv in pieces for x in kv] == [kept, kept]


# ---- canvases -----------------------------------------------------------------------------------


def test_canvases_leave_the_context_alone(model: Model) -> None:
    """Several canvases off one context, in any order, of any length."""
    found = model.encode(tokens(5, 1, 25))
    before = [look(model, found, seed) for seed in range(3)]
    model.logits(found, tokens(6, 1, 3))
    uniforms, noise = np.full((1, 16), 0.5), tokens(7, 1, 16)
    model.refine(found, tokens(8, 1, 16), None, 0.7, uniforms, noise)
    for seed in (2, 0, 1):
        np.testing.assert_array_equal(look(model, found, seed), before[seed])


def test_canvas_of_one_position(model: Model, exact: Model) -> None:
    ids, canvas = tokens(9, 2, 14), tokens(10, 2, 1)
    expected = exact.logits(exact.encode(ids), canvas)
    close(model.logits(model.encode(ids), canvas), expected, 1e-4, "one position")


def test_one_context_under_several_canvases(model: Model) -> None:
    """As for several candidates of one reply: the rows of a pass may be the same context."""
    (context,) = model.encode(tokens(11, 1, 26))
    alike(model, [context] * 3, [tokens(11, 26)] * 3, "thrice")


# ---- fork ---------------------------------------------------------------------------------------


def test_fork_is_independent(model: Model) -> None:
    """Neither the fork nor its origin nor another fork notices what the others do."""
    ids = tokens(11, 26)
    (origin,) = model.encode([ids])
    fork, twin = origin.fork(), origin.fork()
    more = [tokens(12, 20), tokens(13, 4), tokens(14, 9)]
    model.extend([fork], [more[0]])
    model.extend([origin, twin], more[1:])
    rows = [joined(ids, new) for new in more]
    alike(model, [fork, origin, twin], rows, "grown")
    again = [context.fork() for context in (fork, origin, twin)]
    model.extend([again[1]], [more[0]])
    alike(model, [*again, origin], [rows[0], joined(rows[1], more[0]), rows[2], rows[1]], "grown again")


def test_forks_share_arrays(model: Model) -> None:
    """A fork shares all; one that grew shares full pieces, and its origin keeps what it had."""
    (origin,) = model.encode(tokens(15, 1, 16))
    before = origin.arrays()
    fork = origin.fork()
    assert fork.arrays() == before
    model.extend([fork], [tokens(16, 9)])
    assert held(model, fork)[0] == [7, 7, 7, 4]
    full = [layer.window is None for layer in model.config.layers]
    kept = {
        id(x)
        for pieces, is_full in zip(origin._layers, full, strict=True)
        for kv in pieces[:2]
        for x in kv
        if is_full
    }
    assert kept == before.keys() & fork.arrays().keys()
    assert origin.arrays() == before


@pytest.mark.parametrize("length", [5, 6, 9])
def test_growing_behind_a_shared_piece(model: Model, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short one is copied, as attention pays for pieces; behind another a new one begins."""
    monkeypatch.setattr(contexts, "LEAST", 6)
    monkeypatch.setattr(model.ops, "piece_slots", 10)
    ids, more = tokens(17, length), tokens(18, 3)
    (origin,) = model.encode([ids])
    fork = origin.fork()
    for grown in (fork, origin):  # each believes that the other still has the piece
        shared = origin.arrays()
        model.extend([grown], [more])
        assert held(model, grown)[0] == ([length + 3] if length < 6 else [length, 3])
        model.extend([grown], [more[:2]])  # nobody shares the new piece
        assert held(model, grown)[0] == ([length + 5] if length < 6 else [length, 5])
        if grown is fork:
            assert origin.arrays() == shared and held(model, origin)[0] == [length]
    alike(model, [origin, fork], [joined(ids, more, more[:2])] * 2, "grown")


# ---- trim ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 14, SLACK])
def test_trim(model: Model, count: int) -> None:
    """A trimmed context is the shorter one, also after it grew again; its origin stays as it is."""
    ids, more = tokens(18, 2, 50), tokens(19, 2, 17)
    origin = model.encode(ids)
    trimmed = [context.trim(count) for context in origin]
    rows = list(ids[:, : 50 - count])
    alike(model, trimmed, rows, f"without {count}")
    grown = model.encode(more, trimmed)
    alike(model, grown, [joined(*both) for both in zip(rows, more, strict=True)], f"without {count}, grown")
    alike(model, [*trimmed, *origin], [*rows, *ids], f"origins, {count}")


def test_spare(model: Model) -> None:
    """All of a row that no layer has forgotten any of; else what is held beyond the longest window."""
    for length, spare in ((5, 5), (20, 20), (27, 27), (28, SLACK), (60, SLACK)):
        (context,) = model.encode(tokens(20, 1, length))
        assert context.spare == spare
        for count in (-1, spare + 1):
            with pytest.raises(ValueError, match=f"take back {count} of {length} tokens; at most {spare}"):
                context.trim(count)
        assert context.trim(spare).length == length - spare
        assert context.length == length


@pytest.mark.parametrize("counts", [(SLACK, SLACK), (10, 10), (1, SLACK), (9, 7), (0, SLACK)])
def test_trim_twice(model: Model, counts: tuple[int, int]) -> None:
    """There is one canvas of slack, not one each time; what was taken back is there again after growth."""
    ids, first, second = tokens(28, 60), *counts
    once = model.encode([ids])[0].trim(first)
    assert once.spare == SLACK - first
    if second <= once.spare:
        alike(model, [once.trim(second)], [ids[: 60 - first - second]], f"without {counts}")
    else:
        with pytest.raises(ValueError, match="take back"):
            once.trim(second)
    more = tokens(29, first)
    if first:
        model.extend([once], [more])
        assert once.spare == SLACK
        alike(model, [once.trim(second)], [joined(ids[: 60 - first], more)[: 60 - second]], "grown")


def test_trim_to_nothing_and_again(model: Model) -> None:
    """All of a short context goes; what is encoded next stands alone."""
    ids, more = tokens(30, 6), tokens(31, 20)
    empty = model.encode([ids])[0].trim(6)
    assert empty.length == 0 and not any(empty.read()) and not empty.arrays()
    alike(model, model.encode([more], [empty]), [more], "from nothing")


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [[], [[]], [[1, 2], []], [[-1]], [[1, 200]], [[0.5]], [["a"]], [[[1]]], [[True]], [[1, [2]]], [3]],
    ids=str,
)
def test_unusable_tokens(exact: Model, rows: Any) -> None:
    with pytest.raises(PromptError):
        exact.encode(rows)


def test_other_number_of_rows(exact: Model) -> None:
    with pytest.raises(PromptError, match="1 rows of tokens for 2 contexts"):
        exact.encode([[1]], exact.encode(tokens(32, 2, 4)))


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
def test_unusable_canvas(exact: Model, canvas: Any) -> None:
    found = exact.encode(tokens(33, 2, 4))
    with pytest.raises(PromptError):
        exact.logits(found, canvas)
    with pytest.raises(PromptError):
        exact.refine(found, canvas, None, 0.5, np.zeros((2, 2)), np.zeros((2, 2), np.int64))


def test_more_tokens_than_positions() -> None:
    model = our_model(NumpyOps(), oracle("window", max_position_embeddings=40))
    (context,) = model.encode(tokens(34, 1, 40))
    for refused in (lambda: model.encode(tokens(34, 1, 41)), lambda: model.encode([[1]], [context])):
        with pytest.raises(PromptError, match="40"):
            refused()
    model.encode([[1]], [context.trim(1)])
