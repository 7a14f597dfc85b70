"""What the released geometry needs of a device, from the program's own allocations on fake tensors.

Weights are built and a step is run as on a GPU with the kernels, whose launches do nothing, on tensors
without memory; every storage that lives is counted. What no tensor shows comes on top: the driver's context
with the kernels' code, about half a gigabyte, and what PyTorch's allocator keeps for later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import finalize

import pytest

from dgemma.files import load_json
from dgemma.formats.quantized import NVFP4, Form
from dgemma.network import graph
from dgemma.network.config import LayerConfig, read_config
from dgemma.network.context import Context
from dgemma.network.memory import kv_bytes, predict
from dgemma.network.passes import find
from dgemma.network.runner import PREFILL_CHUNK
from dgemma.network.spec import text_parameters
from dgemma.released import RELEASED_DIR
from dgemma.reports.tables import amount

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from dgemma_cuda import bench  # noqa: E402
from dgemma_cuda.graphs import Recording  # noqa: E402
from dgemma_cuda.kernels import attention, device, layout, vocabulary  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402
from dgemma_cuda.synthetic import random_weights  # noqa: E402

CONFIG = read_config(load_json(RELEASED_DIR / "config.json"))


class Live(TorchDispatchMode):
    """Bytes of the storages that are made here: now, and at most so far. Arguments' own do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._users: Counter[int] = Counter()
        self._others: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and not self._users[key(x)] and key(x) not in self._others:
                self._others.add(key(x))
                finalize(x, self._others.discard, key(x))  # another storage may have this key then
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and key(x) not in self._others:
                self._count(x)
        return out

    def _count(self, x: Any) -> None:
        storage, size = key(x), x.untyped_storage().nbytes()
        if not self._users[storage]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[storage] += 1
        finalize(x, self._leave, storage, size)

    def _leave(self, storage: int, size: int) -> None:
        self._users[storage] -= 1
        if not self._users[storage]:
            self.now -= size


def key(x: Any) -> int:
    """Of a tensor's storage."""
    return x.untyped_storage()._cdata


class Nothing:
    """A kernel whose launches do nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaOps]:
    """The backend as on a GPU of 132 processors with the kernels, under fake tensors."""
    for module in (attention, vocabulary):
        monkeypatch.setattr(module, "load", lambda: None)
        monkeypatch.setattr(module, "processors", lambda device: 132)
    for module, names in (
        (device, ("plan", "gate_up", "down", "combine", "linear")),
        (attention, ("_attend", "_merge")),
        (vocabulary, tuple(vocabulary.OPTIONS)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Nothing())
    monkeypatch.setattr(layout, "CHUNK", 1 << 40)  # temporaries cost nothing here, and loops do
    layout._tables()  # kept by the module: not as fake ones
    monkeypatch.setattr(attention, "_entry", lambda k, v, start: [0] * 4)  # there are no addresses
    ops = CudaOps(dtype=torch.bfloat16, kernels=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        yield ops


def keys_and_values(slots: Callable[[LayerConfig], int]) -> list[tuple[Any, Any]]:
    """Of one row, with so many slots in a layer."""
    shapes = [(layer.kv_heads, slots(layer), layer.head_dim) for layer in CONFIG.layers]
    return [
        (torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16))
        for shape in shapes
    ]


def grown(ops: CudaOps, tokens: int) -> Context:
    """A context that has grown canvas by canvas."""
    context = Context(ops, CONFIG)
    for _ in range(tokens // CONFIG.canvas_length):
        context.append(keys_and_values(lambda layer: CONFIG.canvas_length))
    return context


def pasts(ops: CudaOps, contexts: Sequence[Context], length: int) -> Any:
    """What passes over rows of so many tokens read of contexts."""
    by_row = [context.read() for context in contexts]
    return ops.pasts([list(layer) for layer in zip(*by_row, strict=True)], [length] * len(contexts))


def step_inputs(ops: CudaOps, contexts: Sequence[Context]) -> tuple[Any, ...]:
    """A step's arguments: canvas, soft embedding, positions, contexts, temperature, uniforms."""
    L, D, B = CONFIG.canvas_length, CONFIG.hidden_size, len(contexts)
    canvas, soft = torch.zeros((B, L), dtype=torch.int64), torch.empty((B, L, D), dtype=torch.bfloat16)
    positions, draw = torch.zeros(B * L, dtype=torch.int64), (torch.ones(B * L), torch.empty(B * L))
    return canvas, soft, positions, pasts(ops, contexts, L), *draw


def step_bytes(ops: CudaOps, weights: Any, contexts: Sequence[Context]) -> int:
    """What a step of a canvas a row holds at most, beside its arguments."""
    inputs = step_inputs(ops, contexts)
    with Live() as live:
        graph.step(ops, CONFIG, weights, *inputs)
    return live.peak


def prefill_bytes(ops: CudaOps, weights: Any, context: Context) -> int:
    """The same of a pass over a prompt's next tokens, with their keys and values."""
    tokens, positions = (torch.zeros(PREFILL_CHUNK, dtype=torch.int64) for _ in range(2))
    past = pasts(ops, [context], PREFILL_CHUNK)
    with Live() as live:
        graph.encode(ops, CONFIG, weights, [tokens], positions, past)
    return live.peak


def context_bytes(ops: CudaOps, tokens: int) -> tuple[int, int]:
    """Of a context: what it holds, and how much more while a canvas is added to it."""
    with Live() as live:
        context = grown(ops, tokens)
        held, live.peak = live.now, 0
        context.append(keys_and_values(lambda layer: CONFIG.canvas_length))
    return held, live.peak - held


def recording_bytes(ops: CudaOps, contexts: Sequence[Context]) -> int:
    """What a recording of a step reads, beside its contexts."""
    inputs = step_inputs(ops, contexts)
    with Live() as live:
        kept = Recording(lambda *args: (), inputs, lambda run: (lambda: None, run()))
        assert len(kept.inputs) == 6
        return live.now


def stored(forms: Mapping[str, Form]) -> dict[str, Form | None]:
    """The forms of parameters by name, from those of classes."""
    return {p.name: forms.get(p.group) if len(p.shape) > 1 else None for p in text_parameters(CONFIG)}


def needed(ops: CudaOps, forms: Mapping[str, Form], tokens: int) -> dict[str, int]:
    """Bytes by part, of one row with so many tokens of context."""
    weights, context = random_weights(ops, CONFIG, forms, 0.0, 0), grown(ops, tokens)
    held, more = context_bytes(ops, tokens)
    parts = {
        "weights": sum(bench.stored_bytes(w) for w in bench._leaves(weights)),
        "context": held,
        "what a recording reads": recording_bytes(ops, [context]),
        "a recording of a step": step_bytes(ops, weights, [context]),
        # Both are there besides: what recordings write in is theirs for good.
        "a pass, or a canvas's commit": max(
            prefill_bytes(ops, weights, grown(ops, tokens - PREFILL_CHUNK)), more
        ),
    }
    predicted = predict(CONFIG, find("cuda", "GPU", "bfloat16"), 1, tokens, stored(forms))
    assert 0.97 < predicted.total / sum(parts.values()) < 1.03, predicted
    passes = parts["a recording of a step"] + parts["a pass, or a canvas's commit"]
    assert 0.9 < predicted.temporaries / passes < 1.1, predicted
    lines = {**parts, "in all": sum(parts.values())}
    print("\n".join(f"{name:36}{amount(n):>10}" for name, n in lines.items()))
    return parts


def test_nvfp4_with_dense_linears_runs_in_18_gb(ops: CudaOps) -> None:
    parts = needed(ops, {"experts": NVFP4, "attention": NVFP4, "mlp": NVFP4}, 4096)
    assert sum(parts.values()) < 16.1e9
    assert parts["weights"] < 15.5e9


def test_nvfp4_experts_alone_run_in_18_gib(ops: CudaOps) -> None:
    """Of 10^9 bytes, by 0.43: weights and context are above it by themselves. Of 2^30 it takes 17.2.

    Attention in NVFP4, too, is 1.6 GB less.
    """
    parts = needed(ops, {"experts": NVFP4}, 4096)
    assert parts["weights"] + parts["context"] > 18.0e9
    assert sum(parts.values()) < 18.5e9 < 17.25 * 2**30
    assert sum(needed(ops, {"experts": NVFP4, "attention": NVFP4}, 4096).values()) < 16.9e9


def test_the_plane_of_logits_in_blocks(ops: CudaOps) -> None:
    """Half the rows at a time are 67 MB less, for 3 GB that are read more a step: not worth it."""
    weights, contexts = random_weights(ops, CONFIG, {"experts": NVFP4}, 0.0, 0), [grown(ops, 4096)]
    whole = step_bytes(ops, weights, contexts)
    plane = 2 * CONFIG.canvas_length * CONFIG.vocab_size
    assert plane < whole < plane + 50e6
    ops.kernel_rows = CONFIG.canvas_length // 2
    halves = step_bytes(ops, weights, contexts)
    assert 0.9 * plane / 2 < whole - halves <= plane / 2
    assert 2 * weights.embed.nbytes > 2.9e9  # head and soft embedding read the table once more each


def test_a_context_holds_what_its_tokens_need(ops: CudaOps) -> None:
    """And once: no recording has a copy, and a commit copies one layer's last piece."""
    canvas = CONFIG.canvas_length
    for tokens in (1024, 4096, 8448):
        held, more = context_bytes(ops, tokens)
        assert held == kv_bytes(CONFIG, 2, tokens)
        new = kv_bytes(CONFIG, 2, canvas) * 2  # the arguments, and where they go
        pieces = [layer.past + canvas if layer.past else ops.piece_slots for layer in CONFIG.layers]
        sizes = [4 * x.kv_heads * x.head_dim * n for x, n in zip(CONFIG.layers, pieces, strict=True)]
        assert more <= new + max(sizes)
    assert recording_bytes(ops, [grown(ops, 4096)]) < 2e6
    # Turns that follow one prompt hold their own tokens, and the window on sliding layers.
    with Live() as live:
        prompt = grown(ops, 4096)
        before, turns = live.now, [prompt.fork() for _ in range(4)]
        for turn in turns:
            turn.append(keys_and_values(lambda layer: canvas))
        window = sum(n for n, layer in zip(sizes, CONFIG.layers, strict=True) if layer.past)
        assert live.now - before <= 4 * (window + kv_bytes(CONFIG, 2, canvas))


def test_what_is_counted() -> None:
    """Storages, whatever views there are of them, until the last one is gone."""
    with Live() as live:
        x = torch.empty(100, dtype=torch.uint8)
        y = x[:10]
        del x
        assert live.now == 100
        z = y + 1
        del y
        assert (live.now, live.peak) == (10, 110)
        del z
    assert (live.now, live.peak) == (0, 110)
