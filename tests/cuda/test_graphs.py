"""Recorded steps over bucketed contexts, on a CPU: the recorder of `tests.cuda.recording`."""

import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.engine.events import Done
from dgemma.engine.sampler import Step
from dgemma.formats.encode import quantize
from dgemma.formats.quantized import FP8
from dgemma.model import Model
from dgemma.network.config import read_config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Ops
from dgemma.network.runner import Context
from dgemma.tiny import MODEL_DIR
from tests.checkpoints import small

torch = pytest.importorskip("torch")

from dgemma_cuda import bench  # noqa: E402
from dgemma_cuda.cache import BucketCache, bucket  # noqa: E402
from dgemma_cuda.graphs import Graphed  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402
from tests.cuda.recording import BucketOps, RecordingOps, found, record_here  # noqa: E402

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


def model_of(ops: CudaOps) -> Model:
    checkpoint = Checkpoint.open(MODEL_DIR)
    return Model(ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), None)


@pytest.fixture()
def recorded() -> Model:
    return model_of(RecordingOps())


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


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_replies_are_those_of_the_plain_path(plain: Model, recorded: Model, rows: int) -> None:
    """Of several canvases; three rows are ragged and grow from one bucket into the next."""
    prompts, _ = inputs(rows)
    if rows == 3:
        prompts[2] = prompts[2][:230]
    assert ids_of(recorded, prompts) == ids_of(plain, prompts)
    assert all(len(g.recordings) <= g.kept for g in recorded.ops.graphed)  # type: ignore[attr-defined]


def refined(model: Model, context: Context, canvas: np.ndarray) -> list[Step]:
    """A first step and one with self-conditioning."""
    draw = np.full(canvas.shape, 0.5), canvas
    first = model.refine(context, canvas, None, 0.7, *draw)
    return [first, model.refine(context, first.canvas, first.soft, 0.6, *draw)]


def branches(model: Model) -> list[Context]:
    """Contexts with a common past that was forked, trimmed and appended to; two rows each."""
    rows = inputs(3)[0][::2]
    root = model.encode([rows[0], rows[1][:150]])
    left = model.encode([[5] * 9, [6] * 9], root)
    return [root, left, model.encode([[7] * 20, [8] * 3], root), left.trim(30), root.fork([1, 0]),
            model.encode([[9] * 200] * 2, left)]  # fmt: skip


def take_turns(recorded: Model, eager: Model) -> None:
    """Each step is that of its context, whichever came before, and to the bit what no recording gives."""
    canvas = inputs(2)[1]
    pairs = list(zip(branches(recorded), branches(eager), strict=True))
    for ours, theirs in pairs + pairs[::-1]:
        for got, wanted in zip(refined(recorded, ours, canvas), refined(eager, theirs, canvas), strict=True):
            assert torch.equal(got.soft, wanted.soft)
            assert np.array_equal(got.entropy, wanted.entropy) and np.array_equal(got.canvas, wanted.canvas)


def test_branches_of_a_context_take_turns(recorded: Model) -> None:
    take_turns(recorded, model_of(BucketOps()))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_branches_of_a_context_take_turns_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs, and the kernel that follows addresses."""
    place = torch.device("cuda"), torch.bfloat16
    eager = model_of(CudaOps(*place))
    assert eager.ops.kernels  # type: ignore[attr-defined]
    monkeypatch.setattr(eager.ops, "compile", lambda fn, repeats=False: fn)
    take_turns(model_of(CudaOps(*place)), eager)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_the_kernel_follows_addresses_through_the_model() -> None:
    """From the cache to a step's results, two contexts in turn, with Triton's interpreter."""

    class Eager(BucketOps):
        kernels = True  # type: ignore[assignment]
        vocabulary = Ops.vocabulary  # its kernels take long here

    class Recording(RecordingOps):
        kernels = True  # type: ignore[assignment]
        attend, vocabulary = CudaOps.attend, Ops.vocabulary

    layers = ["sliding_attention", "full_attention"]
    config = read_config(small(vocab_size=300, num_hidden_layers=2, layer_types=layers))
    results = []
    for ops in (Recording(), Eager()):
        made = bench.prepare(ops, config, "bf16", context=5, rows=2, skew=0.0)
        canvas, draw = made.canvas[:, :8], (np.full((2, 8), 0.5), made.canvas[:, :8])
        contexts = made.context, made.model.encode([[5] * 9, [6] * 9], made.context)
        results.append([made.model.refine(context, canvas, None, 0.7, *draw).soft for context in contexts])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not torch.equal(*results[0])


def test_contexts_of_a_bucket_share_a_recording(recorded: Model) -> None:
    """However they were cut into chunks and appends: arrays lie the same way."""
    canvas = inputs(1)[1]
    rows = np.random.default_rng(1).integers(3, 400, 250).tolist()
    for context in (
        recorded.encode([rows]),
        recorded.encode([rows[:200]], chunk=33),
        recorded.encode([rows[:31]], recorded.encode([rows[:180]])),
    ):
        refined(recorded, context, canvas)
    (first,), (later,) = (graphed.recordings for graphed in recorded.ops.graphed)  # type: ignore[attr-defined]
    assert len(later) == len(first) + 1


def test_a_shape_is_recorded_once() -> None:
    calls: list[int] = []

    def function(x: Any) -> Any:
        calls.append(1)
        return (x + 1,)

    graphed = Graphed(function, lambda run: (lambda: None, run()))
    for n in (3, 3, 4, 3):
        graphed(torch.ones(n))
    assert len(calls) == len(graphed.recordings) == 2


def test_recordings_are_bounded() -> None:
    graphed = Graphed(lambda x: (x + 1,), record_here, kept=2)
    for n in (1, 2, 1, 3):
        graphed(torch.ones(n))
    assert [shape for ((shape, _, _),) in graphed.recordings] == [torch.Size([1]), torch.Size([3])]


def test_results_outlive_the_next_replay() -> None:
    graphed = Graphed(lambda x: (2 * x,), record_here)
    first, second = graphed(torch.tensor([1.0]))[0], graphed(torch.tensor([5.0]))[0]
    assert (float(first), float(second)) == (2.0, 10.0)


def over(x: Any, context: Any) -> tuple[Any]:
    """Of every layer the keys' and values' sums, and x."""
    return (x + torch.stack([found(k).sum() + 2 * found(v).sum() for k, v in context]),)


def pairs(*values: float) -> list[Any]:
    """A context of that many layers."""
    return [(torch.full((1, 1, 3, 2), float(x)), torch.full((1, 1, 3, 2), -float(x))) for x in values]


def test_a_context_is_read_where_it_is() -> None:
    """Any context of the same shape, and what its arrays hold at the time of the replay."""
    graphed, x = Graphed(over, record_here), torch.zeros(2)
    one, two = pairs(1, 2), pairs(3, 5)
    for context, wanted in ((one, [-6, -12]), (two, [-18, -30]), (one, [-6, -12])):
        assert graphed(x, context)[0].tolist() == wanted
    one[0][0].zero_()
    assert graphed(x, one)[0].tolist() == [-12, -12]
    assert len(graphed.recordings) == 1


def test_addresses_are_copied_when_they_change() -> None:
    """A canvas's steps have the same context, and a copy from the host waits for the GPU."""
    graphed, context = Graphed(over, record_here), pairs(1, 2)
    graphed(torch.zeros(2), context)
    ((_, followed),) = [recording.inputs for recording in graphed.recordings.values()]
    copied: list[Any] = []

    class Spy:
        def copy_(self, new: Any) -> None:
            copied.append(new)
            memory.copy_(new)

    memory, followed.addresses = followed.addresses, Spy()  # type: ignore[union-attr, assignment]
    graphed(torch.ones(2), [tuple(pair) for pair in context])
    assert not copied
    assert graphed(torch.zeros(2), pairs(3, 5))[0].tolist() == [-18, -30]
    assert len(copied) == 1


def test_a_context_that_lies_otherwise_is_recorded_anew() -> None:
    """Strides are numbers of a recorded launch."""
    graphed, x = Graphed(over, record_here), torch.zeros(1)
    graphed(x, pairs(1))
    wide = torch.arange(10.0).reshape(1, 1, 5, 2)
    assert graphed(x, [(wide[:, :, 2:], wide[:, :, 2:])])[0].tolist() == [3 * sum(range(4, 10))]
    crossed = wide.transpose(2, 3).contiguous().transpose(2, 3)
    assert graphed(x, [(crossed[:, :, 2:], crossed[:, :, 2:])])[0].tolist() == [3 * sum(range(4, 10))]
    assert len(graphed.recordings) == 3


def test_a_context_is_not_kept() -> None:
    """By recordings, which would else hold those of earlier buckets until they are used again."""
    graphed, context = Graphed(over, record_here), pairs(1, 2)
    graphed(torch.zeros(2), context)
    gone = [weakref.ref(x) for pair in context for x in pair]
    del context
    assert not any(ref() is not None for ref in gone)


def test_equal_arguments_have_places_of_their_own() -> None:
    graphed = Graphed(lambda x, y: (x - y,), record_here)
    same = torch.ones(3)
    assert torch.equal(graphed(same, same)[0], torch.zeros(3))
    assert torch.equal(graphed(torch.full((3,), 5.0), same)[0], torch.full((3,), 4.0))


def test_steps_that_cannot_be_recorded_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records without a kernel are widened expert by expert, and only our attention follows addresses."""
    recorded: list[Any] = []
    monkeypatch.setattr("dgemma_cuda.ops.Graphed", lambda fn, record: lambda *args: recorded.append(args))
    ops = CudaOps()
    ops.device = torch.device("cuda")
    assert not ops.kernels and ops.compile(len, repeats=True) is len
    ops = CudaOps(kernels=True)
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
    from dgemma.network import graph

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
