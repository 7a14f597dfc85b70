"""The embedded model on every backend: the same seed says the same, alone and in a batch."""

from importlib.util import find_spec

import pytest

import dgemma
from benchmarks.tiny import evaluate, tasks
from dgemma.engine.events import Done
from dgemma.tiny import MODEL_DIR
from tests.compare import AS_ON_GPU, backends, load

pytestmark = pytest.mark.skipif(not MODEL_DIR.exists(), reason="the embedded checkpoint is not there")

FRAMEWORKS = {"cuda": "torch", "mlx": "mlx"}
PER_TASK = 10  # of ten tasks: 100 prompts
AGREE = 0.95  # float32 and float64 may part where a uniform falls on an edge


def model(backend: str) -> dgemma.Model:
    if backend in FRAMEWORKS and find_spec(FRAMEWORKS[backend]) is None:
        pytest.skip(f"{FRAMEWORKS[backend]} is not installed")
    return dgemma.load(backend=backend, dtype=None if backend == "numpy" else "float32")


def questions(count: int) -> list[tasks.Example]:
    return [e for task in tasks.TASKS for e in evaluate.held_out(task, count, seed=7)]


def replies(model: dgemma.Model, examples: list[tasks.Example], batch: int) -> list[Done]:
    return evaluate.replies(model, examples, seed=11, batch=batch)


@pytest.fixture(scope="module")
def reference() -> list[Done]:
    return replies(model("numpy"), questions(PER_TASK), batch=20)


@pytest.mark.parametrize("backend", backends("float32"))
def test_same_seed_same_text_on_every_backend(backend: tuple[str, str], reference: list[Done]) -> None:
    some = slice(None, None, 5 if backend[0] == AS_ON_GPU else 1)
    ours = replies(load(backend), questions(PER_TASK)[some], batch=20)
    same = [a.text == b.text and a.thinking == b.thinking for a, b in zip(ours, reference[some], strict=True)]
    assert sum(same) >= AGREE * len(same), f"{len(same) - sum(same)} of {len(same)} differ"


@pytest.mark.parametrize("backend", ["numpy", *FRAMEWORKS])
def test_a_row_says_the_same_alone_and_in_a_batch_of_four(backend: str) -> None:
    count = 10 if backend == "cuda" else 2
    loaded, examples = model(backend), questions(count)
    # Neighbours in a batch come from different tasks, so that prompts are ragged.
    examples = [e for start in range(count) for e in examples[start::count]]
    alone, batched = replies(loaded, examples, batch=1), replies(loaded, examples, batch=4)
    same = [a.tokens == b.tokens for a, b in zip(alone, batched, strict=True)]
    assert sum(same) >= AGREE * len(same), f"{len(same) - sum(same)} of {len(same)} differ"


def test_it_answers_and_stops_early() -> None:
    loaded = model("numpy")
    scores = [evaluate.score(loaded, task, 16, seed=3, batch=16) for task in ("reverse", "json")]
    for score in scores:
        assert score.accuracy >= 0.8, score
        assert score.steps_per_canvas < 24, score
