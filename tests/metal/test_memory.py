"""Memory on a Mac: limits that are put back, and peaks against what `dgemma info` predicts (CPU build)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import dgemma
from dgemma.backends import make_ops
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.network.config import read_config
from dgemma.network.context import Context
from dgemma.network.memory import format_of, weight_bytes
from dgemma.network.spec import text_parameters
from dgemma_convert import stream
from dgemma_convert.plan import make_plan
from dgemma_mlx import memory
from tests.checkpoints import make_checkpoint, small

PROMPT = [{"role": "user", "content": 'Reverse "memory".'}]


@pytest.fixture
def cache_limit() -> Iterator[int]:
    """A limit of the process that nothing else sets."""
    before = mx.set_cache_limit(12_345_678)
    yield 12_345_678
    mx.set_cache_limit(before)


def limit_now() -> int:
    """The cache's limit, which MLX only tells whoever sets it."""
    now = mx.set_cache_limit(0)
    mx.set_cache_limit(now)
    return now


# ---- limits -------------------------------------------------------------------------------------


def test_a_reply_sets_the_limit_and_puts_it_back(cache_limit: int) -> None:
    events = dgemma.load(backend="mlx").generate(PROMPT, seed=0)
    assert limit_now() == cache_limit
    next(events)
    assert limit_now() == memory.CACHE_LIMIT
    for _ in events:
        assert limit_now() == memory.CACHE_LIMIT
    assert limit_now() == cache_limit


def test_a_run_that_is_closed_or_fails_puts_it_back(cache_limit: int) -> None:
    events: Any = dgemma.load(backend="mlx").generate(PROMPT, seed=0)
    next(events)
    events.close()
    assert limit_now() == cache_limit
    with pytest.raises(KeyboardInterrupt), memory.limits(False, print):
        raise KeyboardInterrupt
    assert limit_now() == cache_limit


def test_overlapping_runs_share_the_limit(cache_limit: int) -> None:
    model = dgemma.load(backend="mlx")
    first: Any = model.generate(PROMPT, seed=0)
    second: Any = model.generate(PROMPT, seed=1)
    next(first), next(second)
    first.close()
    assert limit_now() == memory.CACHE_LIMIT
    second.close()
    assert limit_now() == cache_limit


def test_wired_memory_on_a_gpu(cache_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only macOS has, recorded: all of the working set while it runs, the old limit afterwards."""
    calls: list[int] = []
    said: list[str] = []

    def set_wired_limit(limit: int) -> int:
        calls.append(limit)
        return 77

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1000})
    monkeypatch.setattr(mx, "get_active_memory", lambda: 2_000_000_000)
    with memory.limits(True, said.append), memory.limits(True, said.append):
        assert calls == [1000]
    assert calls == [1000, 77]
    assert len(said) == 1 and "iogpu.wired_limit_mb=" in said[0]


def test_only_a_crowded_memory_is_worth_a_word() -> None:
    assert memory.crowded(89, 100) is None
    assert "16.5 GB of the 17.2 GB" in str(memory.crowded(16_500_000_000, 17_200_000_000))


# ---- peaks against predictions ------------------------------------------------------------------


def wide_checkpoint(folder: Path) -> Path:
    """8.6 M parameters in odd proportions: a table that dwarfs the layers, so that a plane would show."""
    return make_checkpoint(
        folder,
        small(hidden_size=128, moe_intermediate_size=64, vocab_size=65_536) | {"canvas_length": 64},
        tokenizer=True,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_checkpoint(tmp_path_factory.mktemp("memory") / "source")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan, checkpoint = make_plan(source, "mlx", "balanced", [])
    assert checkpoint
    dest = tmp_path_factory.mktemp("memory") / "packed"
    stream.convert(plan, checkpoint, dest)
    return dest


def loaded(folder: Path) -> tuple[Any, int, int]:
    """The checkpoint's weights on MLX, the bytes they keep, and the peak while they were loaded."""
    ops, checkpoint = make_ops("mlx"), Checkpoint.open(folder)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    weights = checkpoint.load(ops)
    return weights, mx.get_active_memory() - before, mx.get_peak_memory() - before


@pytest.mark.parametrize("which", ["source", "packed"])
def test_loading_makes_no_second_copy(which: str, request: pytest.FixtureRequest) -> None:
    """At the peak there are the weights and one tensor more, as it is stored and as it becomes."""
    folder: Path = request.getfixturevalue(which)
    checkpoint = Checkpoint.open(folder)
    kept, active, peak = loaded(folder)
    forms = {name: source.form for name, source in checkpoint.sources.items()}
    float32 = format_of("float32")
    predicted = weight_bytes(checkpoint.config, float32, forms)
    largest = max(p.size for p in text_parameters(checkpoint.config)) * 6  # bfloat16 and float32
    assert 0.99 * predicted <= active <= 1.02 * predicted, (active, predicted)
    assert peak <= active + largest, (peak, active, largest)
    assert kept is not None


@pytest.mark.parametrize("which", ["source", "packed"])
def test_a_step_stays_within_what_info_says(which: str, request: pytest.FixtureRequest) -> None:
    """Activations, and less than the vocabulary plane that it predicts: here there are tiles only."""
    folder: Path = request.getfixturevalue(which)
    model = dgemma.load(folder, "mlx")
    config, L = model.config, model.config.canvas_length
    context = model.encode([np.arange(3, 67).tolist()])
    canvas, rng = np.full((1, L), 5), np.random.default_rng(0)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model.refine(context, canvas, None, 0.7, rng.random((1, L)), canvas)
    plane = L * config.vocab_size * 4
    activations = (
        40 * L * max(config.hidden_size, *(2 * config.heads * x.head_dim for x in config.layers)) * 4
    )
    taken = mx.get_peak_memory() - before
    assert taken <= 0.6 * plane + activations, (taken, plane, activations)
    assert model.ops.peak_memory() == mx.get_peak_memory()


def test_a_commit_has_one_layer_twice() -> None:
    """Of twelve: each is joined and let go before the next. Behind a shared piece a new one begins."""
    config = read_config(small(num_hidden_layers=12, layer_types=["full_attention"] * 12))

    def new(slots: int) -> list[Any]:
        shapes = [(layer.kv_heads, slots, layer.head_dim) for layer in config.layers]
        return [(mx.random.normal(shape), mx.random.normal(shape)) for shape in shapes]

    peaks = []
    for shared in (False, True):
        context, more = Context(make_ops("mlx"), config), new(16)
        context.append(new(8192))
        mx.eval(more)
        kept = context.fork() if shared else None
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        context.append(more)
        peaks.append((mx.get_peak_memory() - held) / sum(context.arrays().values()))
        del kept
    assert peaks[1] < 0.01 < 1 / 12 < peaks[0] < 2 / 12, peaks
