"""The MLX backend with simulated kernels: the same logits and the same text, and off unless proven here."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import dgemma
from benchmarks.tiny import evaluate, tasks
from dgemma.model import Model
from dgemma.network.runner import Runner
from dgemma_mlx import arrays, verdict
from dgemma_mlx.ops import MlxOps
from tests.compare import Heard, close
from tests.graph.test_backends_agree import config, place
from tests.metal import simulator

ALL = frozenset(verdict.KERNELS)
BOUNDS = {mx.float32: 1e-5, mx.bfloat16: 0.05}


@pytest.fixture(autouse=True)
def no_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own for every test, and nothing remembered."""
    monkeypatch.setattr(verdict, "folder", lambda: tmp_path)


# ---- the same results -----------------------------------------------------------------------------


def logits(kernels: frozenset[str], dtype: mx.Dtype, rows: int = 2, bias: bool = True) -> np.ndarray:
    """Canvases behind 30 and 25 tokens, which is past the window, with self-conditioning."""
    geometry, ops, rng = config(bias), MlxOps(dtype, kernels), np.random.default_rng(1)
    runner = Runner(ops, geometry, place(ops, geometry))
    long, short = rng.integers(1, 96, (2, 30)).tolist()
    contexts = runner.encode([long, short[5:]][:rows])
    canvas, soft = rng.integers(0, 96, (2, 12)), rng.standard_normal((2, 12, 32)) / 6
    return runner.logits(contexts, canvas[:rows], soft[:rows])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kernels", [ALL, ALL - {"gather"}], ids=["fused", "library"])
def test_logits_are_those_without_kernels(kernels: frozenset[str], dtype: mx.Dtype) -> None:
    plain = logits(frozenset(), dtype)
    with simulator.installed(order="shuffled"):
        simulated = logits(kernels, dtype)
    worst = BOUNDS[dtype]
    close(simulated, plain, 10 * worst if dtype == mx.bfloat16 else worst, "logits", rms=worst)


@pytest.mark.parametrize("name", verdict.KERNELS)
def test_each_kernel_alone_changes_no_logit(name: str) -> None:
    """Without biases: q, k and v are one matrix."""
    kernels = frozenset({name, "experts"} if name == "gather" else {name})
    plain = logits(frozenset(), mx.float32, 1, bias=False)
    with simulator.installed():
        close(logits(kernels, mx.float32, 1, bias=False), plain, 1e-5, name)


def with_all_kernels(model: Model) -> Model:
    """The same weights, run with every kernel whatever this machine has proven."""
    return Model(MlxOps(mx.float32, ALL), model.config, model.generation, model.weights, model.tokenizer)


# Prompts of each task. With 10, all of a hundred are the same text, which takes three minutes.
PER_TASK = 2


def test_same_text() -> None:
    """Prompts of all tasks, each with its own noise: the simulated backend says the same."""
    examples = [e for task in tasks.TASKS for e in evaluate.held_out(task, PER_TASK, seed=7)]
    model = dgemma.load(backend="mlx", dtype="float32")
    plain = evaluate.replies(model, examples, seed=11, batch=20)
    with simulator.installed():
        simulated = evaluate.replies(with_all_kernels(model), examples, seed=11, batch=20)
    same = [a.text == b.text for a, b in zip(plain, simulated, strict=True)]
    assert sum(same) >= 0.95 * len(same), f"{len(same) - sum(same)} of {len(same)} differ"


def test_every_kernel_takes_part() -> None:
    """What a reply launches, so that no test above compares plain MLX with itself."""
    model = with_all_kernels(dgemma.load(backend="mlx", dtype="float32"))
    with simulator.installed(), simulator.recording() as calls:
        model.refine(
            model.encode([[2, 5, 6]]), np.full((1, 8), 4), None, 0.7, np.full((1, 8), 0.5), np.zeros((1, 8))
        )
    launched = {call.kernel.name.removeprefix("dgemma_") for call in calls}
    assert launched >= {
        "rms_norm",
        "heads",
        "open_branches",
        "join_branches",
        "route",
        "plan",
        "expert_product",
        "combine",
        "vocabulary_tile",
    }
    assert any("softmax" in name for name in launched)


# ---- when they run --------------------------------------------------------------------------------


def test_no_kernel_is_made_at_import() -> None:
    script = """
import mlx.core as mx
def refuse(*args, **kwargs): raise AssertionError("a kernel was made")
mx.fast.metal_kernel = refuse
import dgemma, dgemma_mlx.ops, dgemma_mlx.selftest
from dgemma_mlx.kernels import attention, moe, norms, plan, vocabulary
model = dgemma.load(backend="mlx")
assert [event for event in model.generate([{"role": "user", "content": "Hi!"}], seed=0)]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_on_a_cpu_no_kernel_runs_but_those_asked_for() -> None:
    """Not those of a verdict either, nor where the simulator could run them."""
    verdict.write(dict.fromkeys(verdict.KERNELS))
    ops = MlxOps()
    assert ops.kernels == frozenset()
    with simulator.installed():
        assert ops.kernels == frozenset()
        assert MlxOps(kernels=ALL).kernels == ALL
    assert ops.kernels == frozenset()


def test_a_gpu_runs_what_its_verdict_allows() -> None:
    """And its user hears once what does not run, unless something else is faster."""

    def made() -> tuple[frozenset[str], list[str]]:
        said: list[str] = []
        ops = MlxOps(notices=Heard(said))
        ops.on_gpu = True
        assert ops.kernels == ops.kernels
        return ops.kernels, said

    on, (sentence,) = made()
    assert on == frozenset() and "dgemma selftest" in sentence
    off = dict.fromkeys(verdict.KERNELS) | {"gather": "slower: 2 ms for 1 ms", "attend": "wrong by 3"}
    verdict.write(off)
    on, (sentence,) = made()
    assert on == ALL - {"gather", "attend"} and "attend" in sentence and "gather" not in sentence
    verdict.write(dict.fromkeys(verdict.KERNELS))
    assert made() == (ALL, [])


def test_only_a_pass_of_one_row_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX keeps every trace: their number has a bound, and rows at different canvases would need many."""
    monkeypatch.setattr(arrays, "TRACES", 2)
    ops, ran = MlxOps(kernels=frozenset(), on_gpu=True), Counter[int]()

    def run(rows: mx.array, past: mx.array) -> mx.array:
        ran[len(rows)] += 1
        return rows + past

    compiled = ops.compile(run)
    for length in (1, 2, 3, 3, 1):  # the third begins anew
        for rows in (1, 2):
            compiled(mx.ones((rows, length)), mx.ones(length))
    assert ran == {1: 4, 2: 5}


@pytest.mark.parametrize("change", ["chip", "mlx", "kernels", "system"])
def test_a_verdict_holds_for_one_machine(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict.write(dict.fromkeys(verdict.KERNELS))
    assert verdict.read() is not None
    other = verdict.machine() | {change: "another"}
    monkeypatch.setattr(verdict, "machine", lambda: other)
    assert verdict.read() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"off": 3}', '{"off": {"heads": null}}'])
def test_a_damaged_verdict_is_none(text: str) -> None:
    place = verdict.write(dict.fromkeys(verdict.KERNELS))
    place.write_text(text)
    assert verdict.read() is None


def test_an_mlx_without_kernels_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mx.fast, "metal_kernel")
    assert "has no custom kernels" in str(verdict.notice(None))
