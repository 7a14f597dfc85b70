"""Rows that come and go: what each gets is what it would get alone, whatever the others do."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma import Committed, ConfigError, DgemmaError, Done, Draft, Prefill, PromptError
from dgemma.engine.engine import Engine
from dgemma.engine.handle import Handle
from dgemma.engine.request import FREE, Request
from dgemma.errors import QueueFullError
from dgemma.model import Model
from dgemma.network.context import Context
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.runner import Seen
from tests.compare import backends, make
from tests.oracle import oracle, our_model, tokens

CANVAS = 16
# The second and third begin like the first: what is encoded of one serves the others.
LONG = tokens(1, 40).tolist()
PROMPTS = [LONG[:30], LONG, [*LONG[:17], 3, 4], tokens(2, 5).tolist(), [7]]


@cache
def exact() -> Model:
    return our_model(NumpyOps(), oracle("window"), steps=3)


def request(prompt: Sequence[int], seed: int = 1, **options: Any) -> Request:
    """A request for 40 tokens, which are two and a half canvases, unless `options` say otherwise."""
    own = {name: options.pop(name) for name in list(options) if hasattr(exact().generation, name)}
    return Request(prompt, exact().generation.override(**({"max_new_tokens": 40} | own)), seed, **options)


def reply(engine: Engine, wanted: Request) -> Done:
    return engine.submit(wanted).result()


@cache
def alone(prompt: tuple[int, ...], seed: int, limit: int) -> list[int]:
    return reply(Engine(exact(), None), request(prompt, seed, max_new_tokens=limit)).tokens


# ---- any schedule -------------------------------------------------------------------------------

ARRIVALS = st.tuples(
    st.sampled_from(range(len(PROMPTS))),
    st.integers(0, 2),  # seed
    st.sampled_from([1, 16, 17, 40]),  # tokens
    st.sampled_from([None, None, None, 1e-9, 1000.0]),  # deadline
)
ACTIONS = st.one_of(
    ARRIVALS.map(lambda x: ("submit", x)),
    st.integers(0, 9).map(lambda x: ("cancel", x)),
    st.integers(1, 6).map(lambda x: ("step", x)),
)


@given(
    actions=st.lists(ACTIONS, max_size=14),
    rows=st.integers(1, 4),
    prefill=st.sampled_from([3, 16, 100]),
    prefixes=st.sampled_from([0, 60_000, 1 << 30]),
    memory=st.sampled_from([None, 1, 3]),
)
@settings(max_examples=40, deadline=None)
def test_any_schedule(
    actions: list[tuple[str, Any]], rows: int, prefill: int, prefixes: int, memory: int | None
) -> None:
    """Every handle ends once, with its own reply or the beginning of it, and nothing is left."""
    model = exact()
    engine = Engine(model, None, max_rows=rows, prefill=prefill, prefixes=prefixes)
    most = engine.needs(request(LONG))
    engine.memory = memory and memory * most
    asked: list[tuple[Request, Handle]] = []
    for action, value in actions:
        if action == "submit":
            prompt, seed, limit, deadline = value
            wanted = request(PROMPTS[prompt], seed, max_new_tokens=limit, deadline=deadline)
            asked.append((wanted, engine.submit(wanted)))
        elif action == "cancel" and asked:
            asked[value % len(asked)][1].cancel()
        elif action == "step":
            for _ in range(value):
                engine.step()
                assert engine.running <= rows
                assert engine.memory is None or engine.reserved <= engine.memory
    for _ in range(1000):
        if not engine.step():
            break
    assert (engine.running, engine.waiting, engine.reserved) == (0, 0, 0)
    assert engine.prefixes.bytes <= prefixes
    for wanted, handle in asked:
        events = list(handle)
        ends = [event for event in events if isinstance(event, Done)]
        assert len(ends) == 1 and events[-1] is ends[0]
        expected = alone(tuple(wanted.prompt), wanted.seed, wanted.settings.max_new_tokens)
        got = ends[0].tokens
        assert got == [token for event in events if isinstance(event, Committed) for token in event.tokens]
        if ends[0].finish_reason == "length":
            assert got == expected
        else:
            assert ends[0].finish_reason in ("cancelled", "deadline")
            assert got == expected[: len(got)]
            assert ends[0].finish_reason == "cancelled" or wanted.deadline == 1e-9


@pytest.fixture(params=backends("float32"))
def model(request: pytest.FixtureRequest) -> Model:
    return our_model(make(request.param), oracle("window"), steps=3)


def test_a_changing_crowd(model: Model) -> None:
    """On every backend a row's reply is its own in float32, whoever comes and goes beside it."""
    wanted = request(LONG)
    engine = Engine(model, None, max_rows=3, prefill=16, prefixes=1 << 30)
    expected = reply(Engine(model, None), wanted).tokens
    handle, others = engine.submit(wanted), [engine.submit(request(p, 5)) for p in PROMPTS]
    engine.step()
    engine.step()
    others[0].cancel()
    others.append(engine.submit(request([9, 9], 2, max_new_tokens=3)))
    assert handle.result().tokens == expected
    assert all(other.result().finish_reason in ("length", "cancelled") for other in others)


# ---- who runs, and when -------------------------------------------------------------------------


def passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[int]]:
    """Tokens by row of every encoder pass, and rows of every look at canvases, as they come."""
    extend, see = model.extend, model.see
    encoded: list[list[int]] = []
    seen: list[int] = []

    def counted_extend(contexts: list[Context], rows: list[np.ndarray]) -> None:
        encoded.append([len(row) for row in rows])
        extend(contexts, rows)

    def counted_see(contexts: list[Context], *rest: Any) -> Seen:
        seen.append(len(contexts))
        return see(contexts, *rest)

    monkeypatch.setattr(model, "extend", counted_extend)
    monkeypatch.setattr(model, "see", counted_see)
    return encoded, seen


def test_a_long_prompt_delays_no_row_by_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact()
    encoded, seen = passes(model, monkeypatch)
    engine = Engine(model, None, prefill=4)
    first = engine.submit(request([7], max_new_tokens=16))
    engine.step()
    late = engine.submit(request(LONG, max_new_tokens=16))
    engine.step()
    engine.step()
    assert encoded == [[1], [4], [4]] and seen == [1, 1, 1] and first.ended
    while engine.step():
        pass
    assert encoded[1:] == [[4]] * 10
    assert [event.done for event in late if isinstance(event, Prefill)] == list(range(4, 41, 4))


def test_short_prompts_are_encoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, seen = passes(exact(), monkeypatch)
    engine = Engine(exact(), None, prefill=8)
    handles = [engine.submit(request(prompt, max_new_tokens=1)) for prompt in ([7], [8, 9], [1] * 7)]
    engine.step()
    assert encoded == [[1, 2, 5]] and seen == [2]
    engine.step()
    assert encoded == [[1, 2, 5], [2]] and seen == [2, 3]
    assert all(handle.result().tokens for handle in handles)


def test_first_come_first_served() -> None:
    """A request that does not fit yet is not overtaken, so that it never starves."""
    engine = Engine(exact(), None, max_rows=4)
    small, large = request([7], max_new_tokens=16), request(LONG, max_new_tokens=200)
    engine.memory = engine.needs(large) + engine.needs(small) // 2
    handles = [engine.submit(wanted) for wanted in (small, large, small)]
    engine.step()
    assert engine.running == 1 and engine.waiting == 2
    while not handles[0].ended:
        engine.step()
    engine.step()
    assert engine.running == 1 and engine.waiting == 1 and not handles[1].ended
    assert len(handles[1].result().tokens) == 200
    queued = handles[2].result().stats.queued_seconds
    assert queued > 0


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    engine = Engine(exact(), None, memory=1_000_000)
    with pytest.raises(PromptError, match=r"may need .* GB for 4\d+ positions, and the engine has 0.00 GB"):
        engine.submit(request(LONG, max_new_tokens=4000))
    assert reply(engine, request(LONG)).tokens


def test_a_full_queue() -> None:
    engine = Engine(exact(), None, queue=2)
    handles = [engine.submit(request([7], max_new_tokens=1)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        engine.submit(request([7]))
    assert [handle.result().finish_reason for handle in handles] == ["length"] * 2
    assert reply(engine, request([7], max_new_tokens=1)).tokens


def test_every_request_has_its_own_settings() -> None:
    """Temperatures, bounds, steps, seeds and lengths differ within one pass."""
    own = [
        request(LONG, 3, steps=2, t_max=3.0, t_min=2.0),
        request(LONG, 4, steps=5, entropy_bound=0.0),
        request([7], 3, stability=0, confidence=5.0),
        request(LONG, 3, row_id=77),
    ]
    engine = Engine(exact(), None)
    together = [engine.submit(wanted) for wanted in own]
    for wanted, handle in zip(own, together, strict=True):
        single = reply(Engine(exact(), None), wanted)
        done = handle.result()
        assert (done.tokens, done.stats.steps) == (single.tokens, single.stats.steps)
    assert len({tuple(reply(engine, wanted).tokens) for wanted in own}) == 4


# ---- a reply that was begun elsewhere, pins, drafts, stop texts, constraints --------------------


@pytest.mark.parametrize("canvases", [1, 2])
def test_a_reply_goes_on_where_it_was_cut_off(canvases: int) -> None:
    whole = alone(tuple(LONG), 1, 40)
    events = list(Engine(exact(), None).submit(request(LONG, committed=whole[: canvases * CANVAS])))
    done = events[-1]
    assert isinstance(done, Done) and done.tokens == whole
    assert [event.canvas for event in events if isinstance(event, Committed)] == list(range(canvases, 3))
    assert done.stats.canvases == 3 and done.stats.steps == 3 * (3 - canvases)


def test_pins_stand_and_the_rest_is_written() -> None:
    pins = np.full(24, FREE)
    pins[3:9], pins[20] = 50, 60
    events = list(Engine(exact(), None).submit(request(LONG, pins=pins.tolist(), max_new_tokens=32)))
    drafts = [event for event in events if isinstance(event, Draft)]
    for draft in drafts:
        part = pins[draft.canvas * CANVAS :][:CANVAS]
        fixed = np.flatnonzero(part != FREE)
        assert (draft.tokens[fixed] == part[fixed]).all() and not draft.accepted[fixed].any()
        assert draft.accepted.any()
    done = events[-1]
    assert isinstance(done, Done) and done.tokens[3:9] == [50] * 6 and done.tokens[20] == 60
    assert done.tokens != alone(tuple(LONG), 1, 40)[:32]


def test_a_canvas_of_pins_alone_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, seen = passes(exact(), monkeypatch)
    done = reply(Engine(exact(), None), request([7], pins=[5] * CANVAS, max_new_tokens=CANVAS + 2))
    assert done.tokens[:CANVAS] == [5] * CANVAS and len(done.tokens) == CANVAS + 2
    assert encoded == [[1], [CANVAS]] and seen == [1] * 3


def test_a_draft_is_where_the_first_canvas_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    model, begun = exact(), []
    see = model.see

    def looked(contexts: list[Context], canvas: np.ndarray, *rest: Any) -> Seen:
        begun.append(canvas[0].tolist())
        return see(contexts, canvas, *rest)

    monkeypatch.setattr(model, "see", looked)
    reply(Engine(model, None), request([7], draft=[9] * 10, max_new_tokens=CANVAS))
    assert begun[0][:10] == [9] * 10 and begun[0][10:] != [9] * 6
    assert begun[1] != begun[0]


class Only:
    """A constraint: even tokens on the first canvas; a commit that ends with 1."""

    def __init__(self, vocab: int):
        self.classes = np.arange(vocab) % 2
        self.asked: list[tuple[int, bool]] = []

    def bias(self, canvas: int, last: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
        self.asked.append((canvas, last is None))
        values = np.zeros((CANVAS, 2))
        values[:, 1] = -1e30
        return None if canvas else (self.classes, values)

    def commit(self, canvas: int, tokens: np.ndarray) -> np.ndarray:
        return np.where(np.arange(CANVAS) == CANVAS - 1, 1, tokens)


def test_a_constraint_reaches_samples_and_commits() -> None:
    rule = Only(exact().config.vocab_size)
    engine = Engine(exact(), None)
    free, bound = engine.submit(request(LONG)), engine.submit(request(LONG, constraint=rule))
    events = list(bound)
    first = [event for event in events if isinstance(event, Draft) and event.canvas == 0]
    assert all((draft.tokens[:-1] % 2 == 0).all() for draft in first)
    done = events[-1]
    assert isinstance(done, Done) and done.tokens[CANVAS - 1] == done.tokens[2 * CANVAS - 1] == 1
    assert any(token % 2 for token in done.tokens[CANVAS : 2 * CANVAS - 1])
    assert rule.asked == [(canvas, step == 0) for canvas in range(3) for step in range(3)]
    assert free.result().tokens == alone(tuple(LONG), 1, 40)


# ---- leaving early ------------------------------------------------------------------------------


def contexts_alive() -> int:
    gc.collect()
    return sum(type(thing) is Context for thing in gc.get_objects())


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 7])
def test_cancelling_in_every_phase(steps: int) -> None:
    """In the queue, in the prompt, on the first canvas, on the second: the row is gone after one step."""
    before = contexts_alive()
    engine = Engine(exact(), None, max_rows=2, prefill=20)
    other = engine.submit(request([7]))
    handle = engine.submit(request(LONG))
    for _ in range(steps):
        engine.step()
    handle.cancel()
    engine.step()
    assert handle.ended and engine.running == 1
    done = handle.result()
    assert done.finish_reason == "cancelled"
    assert done.tokens == alone(tuple(LONG), 1, 40)[: len(done.tokens)]
    assert other.result().tokens == alone((7,), 1, 40)
    assert engine.reserved == 0 and contexts_alive() == before


def test_two_hundred_cancels_leave_nothing_behind() -> None:
    rng = np.random.default_rng(0)
    engine = Engine(exact(), None, max_rows=3, prefill=16)
    before = contexts_alive()
    for turn in range(200):
        handle = engine.submit(request(PROMPTS[turn % 5], turn))
        for _ in range(rng.integers(0, 8)):
            engine.step()
        handle.cancel()
    while engine.step():
        pass
    assert engine.reserved == 0 and contexts_alive() == before
    assert reply(engine, request(LONG)).tokens == alone(tuple(LONG), 1, 40)


def test_a_deadline_ends_a_reply_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    engine = Engine(exact(), None)
    handle = engine.submit(request(LONG, deadline=5.0))
    for _ in range(4):
        engine.step()
    clock[0] = 105.0
    engine.step()
    done = handle.result()
    assert done.finish_reason == "deadline" and done.tokens == alone(tuple(LONG), 1, 40)[:CANVAS]


def test_an_error_ends_the_rows_that_ran_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact()
    engine = Engine(model, None, max_rows=1)
    first, second = engine.submit(request(LONG)), engine.submit(request([7]))
    with monkeypatch.context() as patch:
        patch.setattr(model, "see", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            engine.step()
    with pytest.raises(MemoryError, match="no room"):
        list(first)
    assert engine.reserved == 0
    assert second.result().tokens == alone((7,), 1, 40)


# ---- threads and event loops --------------------------------------------------------------------


@pytest.fixture
def threaded() -> Iterator[Engine]:
    with Engine(exact(), None, max_rows=3, prefill=16, prefixes=1 << 20).thread() as engine:
        yield engine


def test_a_thread_of_its_own(threaded: Engine) -> None:
    """Requests from many threads, one of them cancelled from another."""
    results: dict[int, Done] = {}

    def ask(seed: int) -> None:
        results[seed] = reply(threaded, request(PROMPTS[seed % 5], seed))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    handle = threaded.submit(request(LONG, max_new_tokens=3000))
    next(event for event in handle if isinstance(event, Committed))
    handle.cancel()
    assert handle.result().finish_reason == "cancelled"
    for thread in threads:
        thread.join(60)
    assert {seed: done.tokens for seed, done in results.items()} == {
        seed: alone(tuple(PROMPTS[seed % 5]), seed, 40) for seed in range(8)
    }


@pytest.mark.parametrize("own_thread", [True, False])
def test_event_loops(own_thread: bool) -> None:
    """Handles are awaited, and iterated with `async for`, side by side."""
    engine = Engine(exact(), None)

    async def main() -> None:
        handles = [engine.submit(request(prompt)) for prompt in PROMPTS[:3]]
        events = [event async for event in handles[0]]
        assert isinstance(events[0], Prefill) and isinstance(events[-1], Done)
        dones = await asyncio.gather(handles[1], handles[2])
        for prompt, done in zip(PROMPTS, [events[-1], *dones], strict=False):
            assert done.tokens == alone(tuple(prompt), 1, 40)

    if own_thread:
        engine.thread()
    with engine:
        asyncio.run(main())


def test_closing_ends_what_is_there(threaded: Engine) -> None:
    handles = [threaded.submit(request(LONG, max_new_tokens=3000)) for _ in range(5)]
    next(iter(handles[0]))
    threaded.close()
    assert [handle.result().finish_reason for handle in handles] == ["cancelled"] * 5
    with pytest.raises(DgemmaError, match="closed"):
        threaded.submit(request([7]))
    assert threaded.reserved == 0


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"deadline": 0.0}, ConfigError, "deadline must be above 0"),
        ({"deadline": -1.0}, ConfigError, "deadline must be above 0"),
        ({"stop": ("",)}, ConfigError, "stop has the unusable value"),
        ({"committed": [5] * 15}, PromptError, "whole canvases of 16 tokens"),
        ({"committed": [5] * 48}, PromptError, "before max_new_tokens; 48 of 40"),
        ({"pins": [FREE] * 41}, PromptError, "41 tokens are pinned or left open, and max_new_tokens is 40"),
        ({"pins": [200]}, PromptError, "token id 200 is outside"),
        ({"pins": [-2]}, PromptError, "token id -2 is outside"),
        ({"pins": [0.5]}, PromptError, "pins must be token ids"),
        ({"pins": [4, FREE], "stop_ids": (4,)}, PromptError, "pins contradict: the stop token 4 at 0"),
        ({"draft": [200]}, PromptError, "token id 200 is outside"),
        ({"seed": -1}, ConfigError, "seed must be at least 0"),
        ({"row_id": 2**64}, ConfigError, "row_ids must be at least 0"),
        ({"max_new_tokens": 5000}, PromptError, "the model has 4096"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_unusable_requests(options: dict[str, Any], error: type[Exception], words: str) -> None:
    engine = Engine(exact(), None)
    with pytest.raises(error, match=words):
        engine.submit(request(LONG, **options))
    assert not engine.step() and engine.waiting == 0


def test_a_request_is_what_it_says() -> None:
    wanted = request(LONG)
    assert wanted.positions == 80 and wanted.id == replace(wanted, seed=9).id
    assert replace(wanted, row_id=5).id == 5
