"""Recorded steps and bucketed contexts, on a CPU: a recorder that runs the function in place of a GPU's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.checkpoint import Checkpoint
from dgemma.engine import Done
from dgemma.model import Model
from dgemma.numpy_ops import NumpyOps
from dgemma.quantized import FP8, quantize
from dgemma.tiny import MODEL_DIR

torch = pytest.importorskip("torch")

from dgemma_cuda.cache import BucketCache, bucket  # noqa: E402
from dgemma_cuda.graphs import Graphed, Places  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402


def record_here(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A recording without a GPU: each replay runs the function on the same inputs, into the same outputs."""
    outputs = run()

    def replay() -> None:
        for place, new in zip(outputs, run(), strict=True):
            place.copy_(new)

    return replay, outputs


class RecordingOps(CudaOps):
    """The CUDA backend's cache and recordings, on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.graphed: list[Graphed] = []

    def cache(self, config: Any) -> BucketCache:
        return BucketCache(self, config)

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        if not repeats:
            return fn
        self.graphed.append(Graphed(fn, record_here, places=self._places))
        return self.graphed[-1]


# ---- buckets ------------------------------------------------------------------------------------


def test_buckets_hold_and_are_not_much_larger() -> None:
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size < 1.5 * n for n, size in enumerate(sizes, 1) if n > 256)
    assert sorted(set(sizes)) == [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert bucket(0) == 0


@pytest.fixture(scope="module")
def plain() -> Model:
    return dgemma.load(backend="cuda", device="cpu", dtype="float32")


@pytest.fixture()
def recorded() -> Model:
    checkpoint, ops = Checkpoint.open(MODEL_DIR), RecordingOps()
    return Model(ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), None)


def inputs(rows: int, seed: int = 0) -> tuple[list[list[int]], np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 400, n).tolist() for n in (70, 9, 300)[:rows]], rng.integers(3, 400, (rows, 32))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_bucketed_context_gives_the_same_logits(plain: Model, recorded: Model, rows: int) -> None:
    prompts, canvas = inputs(rows)
    contexts = [model.encode(prompts, chunk=50) for model in (plain, recorded)]
    assert contexts[1].cache.read()[-1][0].shape[2] == (256 if rows == 1 else 384)
    wanted, got = (m.logits(c, canvas) for m, c in zip((plain, recorded), contexts, strict=True))
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_a_bucketed_context_grows_and_shrinks(plain: Model, recorded: Model) -> None:
    prompts, canvas = inputs(3)
    wanted, got = (
        m.logits(m.encode([[5, 6, 7], [8], [9, 10]], m.encode(prompts).fork([2, 0, 1])).fork([1]), canvas[:1])
        for m in (plain, recorded)
    )
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()


# ---- recordings ---------------------------------------------------------------------------------


def ids_of(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    events = model.generate(prompts, seed=3, max_new_tokens=70, steps=6)
    return [e.tokens for e in sorted((e for e in events if isinstance(e, Done)), key=lambda e: e.row)]


def test_replies_are_those_of_the_plain_path(plain: Model, recorded: Model) -> None:
    prompts, _ = inputs(2)
    assert ids_of(recorded, prompts) == ids_of(plain, prompts)
    assert all(len(g.recordings) <= g.kept for g in recorded.ops.graphed)  # type: ignore[attr-defined]


def test_a_shape_is_recorded_once() -> None:
    calls: list[int] = []

    def function(x: Any, pair: Any) -> Any:
        calls.append(1)
        return (x + pair[0] * pair[1],)

    graphed = Graphed(function, lambda run: (lambda: None, run()))
    for n in (3, 3, 4, 3):
        graphed(torch.ones(n), [torch.ones(n), torch.ones(n)])
    assert len(calls) == len(graphed.recordings) == 2


def test_recordings_are_bounded() -> None:
    graphed = Graphed(lambda x: (x + 1,), record_here, kept=2)
    for n in (1, 2, 1, 3):
        graphed(torch.ones(n))
    assert [shapes[0][0] for _, shapes in graphed.recordings] == [torch.Size([1]), torch.Size([3])]


def test_results_outlive_the_next_replay() -> None:
    graphed = Graphed(lambda x: (2 * x,), record_here)
    first, second = graphed(torch.tensor([1.0]))[0], graphed(torch.tensor([5.0]))[0]
    assert (float(first), float(second)) == (2.0, 10.0)


def spied(graphed: Graphed) -> list[Any]:
    """What will be copied to the places of the only recording."""
    copied: list[Any] = []

    class Spy:
        def __init__(self, memory: Any):
            self.memory = memory

        def copy_(self, new: Any) -> None:
            copied.append(new)
            self.memory.copy_(new)

    (recording,) = graphed.recordings.values()
    for place in recording.places:
        place.memory = Spy(place.memory)  # type: ignore[assignment]
    return copied


def test_only_what_changed_is_copied() -> None:
    """A context is an argument of every step of a canvas, and hundreds of megabytes."""
    context = torch.ones(4)
    graphed = Graphed(lambda x, past: (x + past,), record_here)
    graphed(torch.zeros(4), context)
    copied = spied(graphed)
    new = torch.full((4,), 2.0)
    assert torch.equal(graphed(new, context)[0], torch.full((4,), 3.0))
    assert copied == [new]
    assert torch.equal(graphed(new, torch.zeros(4))[0], torch.full((4,), 2.0))
    assert len(copied) == 2


def test_a_context_is_held_once() -> None:
    """By the recordings of a canvas's first step and of its later ones, which differ in their arguments."""
    places, context = Places(), torch.ones(4, 4)
    first = Graphed(lambda x, past: (x + past,), record_here, places=places)
    later = Graphed(lambda x, past, soft: (x + past + soft,), record_here, places=places)
    x, soft = torch.zeros(4), torch.full((4, 4), 3.0)
    assert torch.equal(first(x, context)[0], torch.ones(4, 4))
    assert torch.equal(later(x, context, soft)[0], torch.full((4, 4), 4.0))
    (one,), (two,) = first.recordings.values(), later.recordings.values()
    assert [place in one.places for place in two.places] == [True, True, False]
    # What one recording's call left there is not taken for the other's argument.
    assert torch.equal(later(x, context + 1, soft)[0], torch.full((4, 4), 5.0))
    assert torch.equal(first(x, context)[0], torch.ones(4, 4))
    copied = spied(first)
    first(x, context)
    assert copied == []
    del first, later, one, two
    assert not list(places._known)  # nothing is held for recordings that are gone


def test_equal_arguments_have_places_of_their_own() -> None:
    graphed = Graphed(lambda x, y: (x - y,), record_here)
    same = torch.ones(3)
    assert torch.equal(graphed(same, same)[0], torch.zeros(3))
    assert torch.equal(graphed(torch.full((3,), 5.0), same)[0], torch.full((3,), 4.0))


def test_steps_that_read_the_host_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records without a kernel are widened expert by expert, which a recording cannot hold."""
    recorded: list[Any] = []
    monkeypatch.setattr(
        "dgemma_cuda.ops.Graphed", lambda fn, record, places: lambda *args: recorded.append(args)
    )
    ops = CudaOps()
    ops.device = torch.device("cuda")
    step = ops.compile(lambda x: x + 1, repeats=True)
    step(1)
    assert recorded == [(1,)]
    ops.device = torch.device("cpu")
    weight = quantize(np.ones((2, 4, 32), np.float32), FP8).map(torch.from_numpy)
    ops.expert_linear(torch.ones(3, 32), weight, torch.tensor([0, 0, 1]))
    assert step(1) == 2
    assert len(recorded) == 1
    assert ops.compile(len, repeats=True) is len


# ---- what a recording must not do ---------------------------------------------------------------


def step_of(ops: CudaOps, soft: bool, ragged: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step that `Model.refine` records, and arguments for it."""
    from dgemma import graph

    checkpoint = Checkpoint.open(MODEL_DIR)
    config, weights = checkpoint.config, checkpoint.load(ops)
    prompts, canvas = inputs(2 if ragged else 1)
    model = Model(ops, config, checkpoint.generation, weights, None)
    context = model.encode(prompts)
    signal = (torch.zeros(*canvas.shape, config.hidden_size, dtype=ops.dtype, device=ops.device),) * soft

    def run(canvas: Any, offset: Any, past: Any, temperature: Any, uniforms: Any, *signal: Any) -> Any:
        guess = graph.step(
            ops, config, weights, canvas, signal[0] if signal else None, offset, past, temperature, uniforms,
            ragged=ragged,
        )  # fmt: skip
        return guess.argmax, guess.sample, guess.entropy, guess.soft

    args = (
        ops.asarray(canvas),
        ops.asarray(context.lengths),
        context.cache.read(),
        ops.aswide(np.asarray(0.7)),
        ops.aswide(np.random.default_rng(0).random(canvas.shape)),
        *signal,
    )
    return run, args


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_the_step_compiles_without_a_break(soft: bool, ragged: bool) -> None:
    run, args = step_of(CudaOps(dtype=torch.bfloat16), soft, ragged)
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=False)
    for got, wanted in zip(compiled(*args), run(*args), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("soft", [False, True])
def test_the_step_reads_nothing_on_the_host(soft: bool) -> None:
    """Under fake tensors there are no values to read: a step that asked for one would fail."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    run, args = step_of(CudaOps(dtype=torch.bfloat16), soft, ragged=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        leaves[2] = [(mode.from_tensor(k), mode.from_tensor(v)) for k, v in args[2]]
        outputs = run(*leaves)
        assert [tuple(x.shape) for x in outputs[:3]] == [(64,)] * 3
        with pytest.raises(DataDependentOutputException):  # the check can fail
            outputs[0][0].item()


def test_reference_and_buckets_agree_on_numpy() -> None:
    """Rounding up at the front is masked by the graph itself, so that any backend could do it."""
    checkpoint = Checkpoint.open(MODEL_DIR)

    class BucketNumpy(NumpyOps):
        def cache(self, config: Any) -> BucketCache:
            return BucketCache(self, config)

    prompts, canvas = inputs(3)
    results = []
    for ops in (NumpyOps(), BucketNumpy()):
        model = Model(ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), None)
        results.append(model.logits(model.encode(prompts), canvas))
    assert np.abs(results[0] - results[1]).max() < 1e-5
