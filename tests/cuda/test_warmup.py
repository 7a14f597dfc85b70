"""What a user sees while kernels are compiled and steps recorded, with a recorder that is only slow."""

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.cli import main
from dgemma.commands import generate, opened, progress
from dgemma.model import Model
from dgemma.network.ops import Notices
from dgemma.text.tokenizer import Tokenizer
from dgemma.tiny import MODEL_DIR

torch = pytest.importorskip("torch")

from dgemma_cuda.kernels import compiling  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402
from tests.cuda.recording import RecordingOps, record_here  # noqa: E402


def test_slow_first_calls_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass over a prompt and every recording, and not what is replayed."""
    said: list[str] = []

    class Heard(Notices):
        @contextmanager
        def working(self, what: str, progress: Callable[[], str]) -> Iterator[None]:
            said.append(what.split()[0])
            yield
            said.append("done")

    monkeypatch.setattr("dgemma_cuda.ops.record_cuda", record_here)
    ops = CudaOps(kernels=True, notices=Heard())
    ops.device = torch.device("cuda")
    encode, step = ops.compile(lambda x: x), ops.compile(lambda x: (x + 1,), repeats=True)
    for _ in range(2):
        encode(torch.ones(3))
    assert said == ["compiling", "done"]
    for n in (3, 3, 4):
        step(torch.ones(n))
    assert said[2:] == ["recording", "done"] * 2


def test_kernels_are_counted_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's hook, and whatever had hooked in before is still told."""
    knobs = pytest.importorskip("triton.knobs")
    told: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: told.append(event["key"]))
    monkeypatch.setattr(compiling, "made", 0)
    compiling.watch.cache_clear()
    for _ in range(2):
        compiling.watch()
    for key in "ab":
        knobs.runtime.jit_post_compile_hook(key=key)
    assert (compiling.made, told) == (2, ["a", "b"])
    assert compiling.progress() == ", 2 kernels compiled"
    compiling.watch.cache_clear()


class SlowOps(RecordingOps):
    """Recordings on a CPU that are announced as a GPU's are."""

    _record = CudaOps._record


@pytest.mark.parametrize("live", ["--live", "--no-live"])
@pytest.mark.parametrize(("seconds", "terminal"), [(0.2, True), (0.0, True), (0.2, False)])
def test_a_slow_recording_is_shown_on_a_terminal(
    seconds: float,
    terminal: bool,
    live: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def slow(run: Callable[[], Any]) -> Any:
        time.sleep(seconds)
        return record_here(run)

    def load(*args: Any, notices: Notices, **options: Any) -> Model:
        checkpoint, ops = Checkpoint.open(MODEL_DIR), SlowOps(notices=notices)
        weights, tokenizer = checkpoint.load(ops), Tokenizer.open(MODEL_DIR)
        return Model(ops, checkpoint.config, checkpoint.generation, weights, tokenizer)

    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    monkeypatch.setattr("dgemma_cuda.ops.record_cuda", slow)
    monkeypatch.setattr(progress, "PATIENCE", 0.1 if seconds else 60)
    monkeypatch.setattr(progress, "AGAIN", 0.02)
    monkeypatch.setattr(compiling, "made", 7)
    monkeypatch.setattr(generate, "stderr_console", lambda: console)
    monkeypatch.setattr(opened, "load", load)
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", 'Reverse "canvas".', "--seed", "1", "--steps", "3", live])
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("dgemma: recording a denoising step") == (1 if seconds and terminal else 0)
    assert (re.search(r"dgemma: … \d+ s, 7 kernels compiled", shown) is not None) == bool(
        seconds and terminal
    )
    assert "dgemma:" not in capsys.readouterr().out
