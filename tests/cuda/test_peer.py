"""transformers as the bench's peer, on a CPU and the embedded model's geometry."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dgemma.errors import BackendError
from dgemma.files import load_json
from dgemma.network.config import read_config
from dgemma.released import RELEASED_DIR
from dgemma.tiny import MODEL_DIR

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks import bench_transformers as peer  # noqa: E402
from benchmarks.bench_transformers import COMPILED, DEFAULT, Transformers  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402

TINY = read_config(load_json(MODEL_DIR / "config.json"))
CPU = torch.device("cpu")


def prompts(rows: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, TINY.vocab_size, (rows, 20))


@pytest.fixture(scope="module")
def model() -> Transformers:
    return Transformers.random(MODEL_DIR, torch.bfloat16, CPU)


def test_random_weights_are_tied_and_finite(model: Transformers) -> None:
    tensors = dict(model.model.named_parameters(remove_duplicate=False))
    shared = [name for name in tensors if name.startswith("model.decoder.layers.0.experts")]
    assert len(shared) == 2
    for name in shared:
        twin = tensors[name.replace("decoder", "encoder.language_model")]
        assert twin is tensors[name] and twin.dtype == torch.bfloat16
    assert all(torch.isfinite(x).all() for x in [*tensors.values(), *model.model.buffers()])
    assert all(x.device == CPU for x in model.model.buffers())
    scalars = {name: x for name, x in model.model.named_buffers() if "layer_scalar" in name}
    assert len(scalars) == 2 * len(TINY.layers) and all((x == 1).all() for x in scalars.values())
    # No matrix has been left at what it was made with.
    matrices = {name: x for name, x in tensors.items() if x.ndim > 1 and "vision" not in name}
    assert [name for name, x in matrices.items() if x.float().std() == 0] == []


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_a_clock_reads_every_draft(model: Transformers, options: dict[str, Any]) -> None:
    """One canvas in all its steps, also where the first ones are sure."""
    times = model.clock(prompts(2), 4, **options)
    assert len(times) == 2 + 4 and times == sorted(times)
    assert len(model.steps(prompts(), 3, **options)) == 3


def test_a_folder_gives_the_model_of_its_tensors(tmp_path: Path) -> None:
    loaded = Transformers.load(MODEL_DIR, "float32", "cpu").model
    assert loaded.dtype == torch.float32
    assert loaded.config.vision_config.num_hidden_layers == 1
    assert loaded.model.decoder.embed_tokens.weight.std() > 0


def test_what_is_compared_and_what_is_not() -> None:
    facts = peer.compare(CudaOps(), MODEL_DIR, TINY, prompts(), 2, ours=1.0)
    assert facts["why"] is None and facts["modes"][DEFAULT]["why"] is None, facts
    assert facts["modes"][DEFAULT]["ratio"] == 1 / facts["modes"][DEFAULT]["step_ms"]["median"]
    assert facts["modes"][COMPILED]["why"]  # the device is no GPU
    said = peer.text(facts, "nvfp4")
    assert f"{COMPILED}: not timed, because" in said and "it reads no NVFP4" in said
    assert "NVFP4" not in peer.text(facts, "bf16")


def test_a_mode_that_fails_says_why(model: Transformers, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB\nmore")

    monkeypatch.setattr(model, "clock", fail)
    reason = peer._mode(model, prompts(), 2, 1.0, {})["why"]
    assert reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GB"


def test_too_little_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaOps, "free_memory", lambda self: 24 * 10**9)
    released = read_config(load_json(RELEASED_DIR / "config.json"))
    facts = peer.compare(CudaOps(dtype=torch.bfloat16), RELEASED_DIR, released, prompts(), 2, ours=1.0)
    assert facts["modes"] == {}
    assert "not timed, because bf16 weights of this geometry need 5" in peer.text(facts, "nvfp4")


def test_transformers_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, in a line that says how to get it."""
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(
        BackendError, match=r"needs transformers 5.11 or newer.*pip install 'dgemma\[bench\]'"
    ):
        peer.library()


def test_the_command() -> None:
    args = ["--geometry", "tiny", "--random-weights", "--context", "20", "--steps", "2", "--device", "cpu"]
    shown = CliRunner().invoke(peer.main, args)
    assert shown.exit_code == 0, shown.stderr
    assert "tokens/s by tokens a forward" in shown.stdout and "ours ÷ its" in shown.stdout
    assert f"{COMPILED}: not timed" in shown.stdout
    report = json.loads(CliRunner().invoke(peer.main, [*args, "--no-compiled", "--json"]).stdout)
    assert report["format"] == "nvfp4" and list(report["against"]["modes"]) == [DEFAULT]
    ours, its = report["step_ms"]["median"], report["against"]["modes"][DEFAULT]
    assert its["ratio"] == ours / its["step_ms"]["median"]


def test_the_commands_errors_are_one_line() -> None:
    wrong = CliRunner().invoke(peer.main, ["--random-weights", "--geometry", "/nowhere", "--device", "cpu"])
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
    assert CliRunner().invoke(peer.main, ["--geometry", "tiny"]).exit_code == 2  # no --random-weights
