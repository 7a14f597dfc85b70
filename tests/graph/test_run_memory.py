"""The memory of a run as it is predicted, beside arrays that are counted and what backends allocate."""

import gc
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.errors import PromptError
from dgemma.files import load_json
from dgemma.formats.quantized import Form
from dgemma.network import memory
from dgemma.network.config import read_config
from dgemma.network.context import Context
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Ops
from dgemma.network.passes import BACKENDS, Backend, backend_of, find
from dgemma.released import RELEASED_DIR

NUMPY = find("numpy", "CPU", "float64")
RELEASED = read_config(load_json(RELEASED_DIR / "config.json"))


def run(model: Any, rows: int, tokens: int) -> list[Context]:
    """Prompts and two steps."""
    rng, L, V = np.random.default_rng(0), model.config.canvas_length, model.config.vocab_size
    contexts = model.encode([rng.integers(3, V, tokens).tolist() for _ in range(rows)])
    canvas, soft = rng.integers(3, V, (rows, L)), None
    for _ in range(2):
        seen = model.see(contexts, canvas, soft, 0.7, rng.random((rows, L)))
        soft = [seen.soft[row] for row in range(rows)]
    return list(contexts)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 128), (3, 256), (2, 544)])
def test_numpy_takes_what_is_predicted(rows: int, tokens: int) -> None:
    """All that Python allocates, which knows no interpreter and no maps of files."""
    model = dgemma.load(None, "numpy")
    predicted = memory.predict(model.config, NUMPY, rows, tokens)
    tracemalloc.start()
    try:
        contexts = run(model, rows, tokens)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sum(context.arrays().values()) for context in contexts) == predicted.contexts
    assert 0.9 < predicted.total / (predicted.weights + peak) < 1.1, (predicted, peak)
    assert 0.8 < (predicted.total - predicted.weights) / peak < 1.25, (predicted, peak)


@pytest.mark.parametrize(("rows", "tokens"), [(2, 512), (1, 200)])
def test_mlx_takes_what_is_predicted(rows: int, tokens: int) -> None:
    mx = pytest.importorskip("mlx.core")
    from dgemma.network.passes import DECODED
    from dgemma_mlx import arrays
    from dgemma_mlx.ops import MlxOps

    assert DECODED == arrays.DECODED
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = dgemma.load(None, "mlx", "float32")
    run(model, rows, tokens)
    backend = backend_of(model.ops)
    predicted = memory.predict(model.config, backend, rows, tokens).total
    assert 0.9 < predicted / (mx.get_peak_memory() - before) < 1.1
    for place in ("CPU", "GPU"):
        told, ops = find("mlx", place, "float32"), MlxOps(on_gpu=place == "GPU")
        assert (told.tile, told.score_bytes, told.piece_slots) == (
            ops.vocab_tile, ops.score_bytes, ops.piece_slots,
        )  # fmt: skip


def test_descriptions_are_those_of_the_backends() -> None:
    pytest.importorskip("torch")
    from dgemma_cuda.kernels import vocabulary
    from dgemma_cuda.ops import CudaOps
    from dgemma_cuda.staging import BUFFER

    kernels, plain = find("cuda", "GPU", "bfloat16"), find("cuda", "CPU", "float32")
    assert backend_of(CudaOps()) == plain and backend_of(NumpyOps()) == NUMPY
    assert {b.piece_slots for b in (kernels, plain)} == {CudaOps.piece_slots}
    assert (kernels.rows, plain.staging) == (vocabulary.ROWS, BUFFER)
    for backend in (NUMPY, plain):
        assert (backend.tile, backend.rows) == (Ops.vocab_tile, Ops.vocab_rows)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: f"{b.name}-{b.place}-{b.dtype}")
def test_more_rows_and_tokens_never_take_less(backend: Backend) -> None:
    def total(rows: int, tokens: int, forms: Mapping[str, Form | None] = memory.NOTHING_QUANTIZED) -> int:
        return memory.predict(RELEASED, backend, rows, tokens, forms).total

    sizes = [total(rows, tokens) for rows in (1, 2, 8) for tokens in (256, 1024, 4096, 131072)]
    assert total(1, 131072) < total(8, 131072) and min(sizes) == sizes[0] < sizes[-1]
    rows = [memory.row_bytes(RELEASED, backend, tokens) for tokens in (256, 1024, 131072)]
    assert rows == sorted(rows) and rows[0] > memory.kv_bytes(RELEASED, backend.compute, 256)


def test_an_engine_has_what_is_free_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dgemma.load(None, "numpy")
    monkeypatch.setattr(NumpyOps, "free_memory", lambda self: None)
    assert model.engine().memory is None
    free = 10**9
    monkeypatch.setattr(NumpyOps, "free_memory", lambda self: free)
    few, many = (model.engine(max_rows=rows).memory or 0 for rows in (1, 64))
    assert 0 < many < few < 0.9 * free
    assert many == int(0.9 * free) - memory.pass_bytes(model.config, NUMPY, 64)
    free = 1000
    assert model.engine().memory == 0 and model.engine(memory=None).memory is None
    settings = replace(model.generation, max_new_tokens=32)
    from dgemma.engine.request import Request

    with pytest.raises(PromptError, match=r"the engine has 0\.00 GB"):
        model.engine().check(Request([3, 4], settings, 0))
