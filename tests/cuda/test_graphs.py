"""Recorded steps over tables of contexts, on a CPU: the recorder of `tests.cuda.recording`."""

from collections.abc import Callable, Sequence
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
from dgemma.network.ops import Ops
from dgemma.network.runner import Context
from dgemma.tiny import MODEL_DIR
from tests.checkpoints import small

torch = pytest.importorskip("torch")

from dgemma_cuda import bench  # noqa: E402
from dgemma_cuda.graphs import Graphed  # noqa: E402
from dgemma_cuda.kernels import attention  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402
from tests.cuda.recording import RecordingOps, found, record_here  # noqa: E402


@pytest.fixture(scope="module")
def plain() -> Model:
    return dgemma.load(backend="cuda", device="cpu", dtype="float32")


def model_of(ops: CudaOps) -> Model:
    checkpoint = Checkpoint.open(MODEL_DIR)
    return Model(ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), None)


@pytest.fixture()
def recorded() -> Model:
    return model_of(RecordingOps())


def ids(rows: int = 3, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 400, n).tolist() for n in (70, 9, 200)[:rows]]


def canvas_of(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(3, 400, (rows, 32))


def refined(model: Model, contexts: Sequence[Context], canvas: np.ndarray) -> list[Step]:
    """A first step and one with self-conditioning."""
    draw = np.full(canvas.shape, 0.5), canvas
    first = model.refine(contexts, canvas, None, 0.7, *draw)
    return [first, model.refine(contexts, first.canvas, first.soft, 0.6, *draw)]


# ---- a model's recordings -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_replies_are_those_of_the_plain_path(plain: Model, recorded: Model, rows: int) -> None:
    """Of several canvases, with rows that end apart."""

    def reply(model: Model) -> list[list[int]]:
        events = model.generate(ids(rows), seed=3, max_new_tokens=70, steps=4)
        return [e.tokens for e in sorted((e for e in events if isinstance(e, Done)), key=lambda e: e.row)]

    assert reply(recorded) == reply(plain)
    assert 0 < recorded.ops.recordings <= rows  # type: ignore[attr-defined]


def branches(model: Model) -> list[list[Context]]:
    """Pairs of contexts with a past in common that was forked, trimmed and appended to, and without one."""
    rows = ids()
    root = model.encode([rows[0], rows[2]])
    left = model.encode([[5] * 9, [6]], root)
    return [root, left, model.encode([[7] * 20, [8] * 3], root), [left[0].trim(30), root[0]], root[::-1],
            model.encode([[9] * 100] * 2, left), [root[1]] * 2, model.encode([[4], [5, 6]])]  # fmt: skip


def take_turns(recorded: Model, eager: Model) -> None:
    """Each step is that of its contexts, whichever came before, and to the bit what no recording gives."""
    canvas = canvas_of(2)
    pairs = list(zip(branches(recorded), branches(eager), strict=True))
    for ours, theirs in pairs + pairs[::-1]:
        for got, wanted in zip(refined(recorded, ours, canvas), refined(eager, theirs, canvas), strict=True):
            assert torch.equal(got.soft, wanted.soft)
            assert np.array_equal(got.entropy, wanted.entropy) and np.array_equal(got.canvas, wanted.canvas)


@pytest.mark.parametrize("slots", [64, 4096])
def test_branches_of_a_context_take_turns(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in many pieces: one recording is replayed over other contexts, lengths and pieces."""
    monkeypatch.setattr(CudaOps, "piece_slots", slots)
    recorded = model_of(RecordingOps())
    take_turns(recorded, model_of(CudaOps()))
    # The longest row has five pieces of 64, and the table is of eight then.
    assert recorded.ops.recordings == (2 if slots == 64 else 1)  # type: ignore[attr-defined]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_branches_of_a_context_take_turns_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs, and the kernel that follows the table."""
    monkeypatch.setattr(CudaOps, "piece_slots", 64)
    place = torch.device("cuda"), torch.bfloat16
    eager = model_of(CudaOps(*place))
    assert eager.ops.kernels  # type: ignore[attr-defined]
    monkeypatch.setattr(eager.ops, "compile", lambda fn, repeats=False: fn)
    take_turns(model_of(CudaOps(*place)), eager)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_the_kernel_follows_the_table_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """From contexts to a step's results, two pairs in turn, with Triton's interpreter."""

    class Eager(CudaOps):
        kernels = True  # type: ignore[assignment]
        vocabulary = Ops.vocabulary  # its kernels take long here

    class Recording(RecordingOps):
        kernels = True  # type: ignore[assignment]
        pasts, attend, vocabulary = CudaOps.pasts, CudaOps.attend, Ops.vocabulary

    monkeypatch.setattr(CudaOps, "piece_slots", 6)
    layers = ["sliding_attention", "full_attention"]
    config = read_config(small(vocab_size=300, num_hidden_layers=2, layer_types=layers))
    results = []
    for ops in (Recording(), Eager(), CudaOps()):
        made = bench.prepare(ops, config, "bf16", context=5, rows=2, skew=0.0)
        canvas, draw = made.canvas[:, :8], (np.full((2, 8), 0.5), made.canvas[:, :8])
        pairs = made.contexts, made.model.encode([[5] * 9, [6] * 2], made.contexts)
        results.append([made.model.refine(pair, canvas, None, 0.7, *draw).soft for pair in pairs])
    recorded, eager, plain = results
    assert all(torch.equal(*pair) for pair in zip(recorded, eager, strict=True))
    assert all((a - b).abs().max() < 1e-4 * b.abs().max() for a, b in zip(eager, plain, strict=True))
    assert not torch.equal(*recorded)


def test_a_step_is_recorded_once_for_a_number_of_rows(
    recorded: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its contexts grow, on their own, canvas by canvas; each doubling of pieces is one more."""
    monkeypatch.setattr(CudaOps, "piece_slots", 40)
    counts = []
    contexts = recorded.encode([[5] * 3, [6] * 11])
    for turn in range(10):
        refined(recorded, contexts, canvas_of(2))
        contexts = recorded.encode([[7] * 32, [8] * (turn + 1)], contexts)
        counts.append(recorded.ops.recordings)  # type: ignore[attr-defined]
    assert contexts[0].length > 8 * 40 and counts == [1] * 5 + [2] * 5
    refined(recorded, contexts[:1], canvas_of(1))
    assert recorded.ops.recordings == 3  # type: ignore[attr-defined]


# ---- recordings by themselves -------------------------------------------------------------------


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


def test_a_context_is_read_where_it_is() -> None:
    """What its arrays hold at the time of the replay, and nothing of a context that is gone."""

    def over(past: Any) -> tuple[Any]:
        return (torch.stack([k.sum() + 2 * v.sum() for row in past[0] for k, v in found(row, *kind)]),)

    def piece(x: float, n: int) -> tuple[Any, Any]:
        return x * torch.ones(2, n, 4), -x * torch.ones(2, n, 4)

    kind = 2, 4, torch.float32
    graphed, one, two = Graphed(over, record_here), piece(1, 3), piece(2, 5)

    def now(*pieces: Any) -> Any:
        return graphed(attention.table([[list(pieces)]], (1,), torch.device("cpu")))[0].tolist()

    assert now(one, two) == [-24, -80]
    del two
    one[0].zero_()
    other = piece(3, 3)
    assert now(other, one) == [-72, -48] and len(graphed.recordings) == 1


def test_equal_arguments_have_places_of_their_own() -> None:
    graphed = Graphed(lambda x, y: (x - y,), record_here)
    same = torch.ones(3)
    assert torch.equal(graphed(same, same)[0], torch.zeros(3))
    assert torch.equal(graphed(torch.full((3,), 5.0), same)[0], torch.full((3,), 4.0))


def test_steps_that_cannot_be_recorded_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records without a kernel are widened expert by expert, and only our attention reads a table."""
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


def step_of(ops: CudaOps) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step that `Model.refine` records, and arguments for it: two rows of unequal lengths."""
    caught: list[Any] = []

    class Caught(Exception):
        pass

    def compile(fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            caught.append((fn, args))
            raise Caught

        return run if repeats else fn

    model, tokens = model_of(ops), canvas_of(2)
    ops.compile = compile  # type: ignore[method-assign]
    with pytest.raises(Caught):
        refined(model, model.encode(ids(2)), tokens)
    run, (canvas, positions, past, *rest) = caught[0]
    # Plain lists: PyTorch's trees know no others.
    return run, (canvas, positions, [[list(pieces) for pieces in rows] for rows in past], *rest)


def test_the_step_compiles_without_a_break() -> None:
    run, args = step_of(CudaOps(dtype=torch.bfloat16))
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=False)
    for got, wanted in zip(compiled(*args), run(*args), strict=True):
        assert torch.equal(got, wanted)


def test_the_step_reads_nothing_on_the_host() -> None:
    """Under fake tensors there are no values to read: a step that asked for one would fail."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    from torch.utils._pytree import tree_map

    run, args = step_of(CudaOps(dtype=torch.bfloat16))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        host, soft = run(*tree_map(mode.from_tensor, args))
        assert tuple(host.shape) == (4, 64) and soft.shape[:2] == (2, 32)
        with pytest.raises(DataDependentOutputException):  # the check can fail
            host[0][0].item()
