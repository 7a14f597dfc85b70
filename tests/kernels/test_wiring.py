"""The backend with its kernels, interpreted on a CPU: a checkpoint in NVFP4, from its file to logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.model import Model
from dgemma.network.config import read_config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Ops
from dgemma_convert import stream
from dgemma_convert.plan import make_plan
from tests.checkpoints import make_checkpoint, small
from tests.compare import Heard

torch = pytest.importorskip("torch")

# The interpreter's NumPy says so of log2(0), where a split of the keys has none.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

from dgemma_cuda import bench  # noqa: E402
from dgemma_cuda.kernels.layout import Tiled  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402

TWO_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.fixture(scope="module", params=["balanced", "small"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ModelOpt NVFP4, experts of a size that fills neither a tile nor a block; in "small" linears, too."""
    folder = tmp_path_factory.mktemp("packed")
    config = small(**TWO_LAYERS)
    plan, source = make_plan(make_checkpoint(folder / "in", config), "nvfp4", request.param)
    assert source
    stream.convert(plan, source, folder / "out")
    return folder / "out"


def with_kernels(place: Any, kernels: bool = True) -> CudaOps:
    """The backend as on a GPU that has the kernels; the interpreter takes float32."""
    return CudaOps(place, torch.bfloat16 if place.type == "cuda" else torch.float32, kernels=kernels)


def logits(folder: Path, ops: Ops) -> tuple[Model, np.ndarray]:
    checkpoint = Checkpoint.open(folder)
    model = Model(ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), None)
    rng = np.random.default_rng(0)
    return model, model.logits(model.encode([rng.integers(0, 200, 7).tolist()]), rng.integers(0, 200, (1, 4)))


def test_a_checkpoint_runs_on_the_kernels(packed: Path, place: Any) -> None:
    ops = with_kernels(place)
    model, got = logits(packed, ops)
    layer, tiled = model.weights.layers[0], Checkpoint.open(packed).sources
    assert isinstance(layer.experts.gate_up, Tiled)
    for name, w in (("self_attn.q_proj", layer.attention.q), ("mlp.down_proj", layer.mlp.down)):
        stored = tiled[f"model.decoder.layers.0.{name}.weight"].form
        assert isinstance(w, Tiled) == (stored is not None)
    _, wanted = logits(packed, NumpyOps())
    bound = 2e-5 if ops.dtype == torch.float32 else 0.05
    assert np.abs(got - wanted).max() <= bound * np.abs(wanted).max()


def test_a_step_on_the_kernels(packed: Path, place: Any) -> None:
    """Twice, the second conditioned on the first, over rows of unequal lengths: all families of kernels."""
    rng = np.random.default_rng(1)
    prompts, canvas = [rng.integers(0, 200, n).tolist() for n in (9, 4)], rng.integers(0, 200, (2, 4))
    uniforms, steps = rng.random(canvas.shape), []
    for ops in (with_kernels(place), NumpyOps()):
        checkpoint = Checkpoint.open(packed)
        model = Model(ops, checkpoint.config, checkpoint.generation, checkpoint.load(ops), None)
        contexts = model.encode(prompts)
        first = model.refine(contexts, canvas, None, 0.7, uniforms, canvas)
        steps.append(model.refine(contexts, canvas, ops.to_numpy(first.soft), 0.7, uniforms, canvas))
    got, wanted = steps
    bound = 0.05 if place.type == "cuda" else 1e-3
    assert np.abs(got.entropy - wanted.entropy).max() <= bound * wanted.entropy.max()
    if place.type == "cpu":  # in bfloat16 a tie may fall otherwise
        assert (got.argmax == wanted.argmax).all() and (got.canvas == wanted.canvas).all()


def test_every_record_of_fp8_runs_on_the_kernels(place: Any) -> None:
    """Experts, attention and MLP, as the published checkpoints have it; the twin decodes the same records."""
    config, found = read_config(small(**TWO_LAYERS)), []
    for kernels in (True, False):
        ops = with_kernels(place, kernels)
        made = bench.prepare(ops, config, "fp8", context=7, rows=1, skew=0.0)
        layer = made.model.weights.layers[0]
        weights = layer.experts.gate_up, layer.experts.down, layer.attention.o, layer.mlp.gate
        assert all(isinstance(w, Tiled) == kernels for w in weights)
        found.append(made.model.logits(made.contexts, made.canvas))
        assert ops.reads_host != kernels  # so that such a step can be recorded
    bound = 0.1 if place.type == "cuda" else 2e-5
    assert np.abs(found[0] - found[1]).max() <= bound * np.abs(found[1]).max()


def test_one_stack_in_another_form(packed: Path, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = with_kernels(place)
    arrange = ops.arrange
    monkeypatch.setattr(ops, "arrange", lambda r, name: r if name == "gate_up" else arrange(r, name))
    model, got = logits(packed, ops)
    kinds = [type(w).__name__ for w in vars(model.weights.layers[0].experts).values()]
    assert kinds == ["Quantized", "Tiled"]
    _, wanted = logits(packed, NumpyOps())
    assert np.abs(got - wanted).max() <= (0.05 if place.type == "cuda" else 2e-5) * np.abs(wanted).max()


def test_kernels_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU keeps records, whatever the interpreter could do; a GPU without the kernels says so once."""
    assert not CudaOps(dtype=torch.bfloat16).kernels
    said: list[str] = []
    ops = CudaOps(dtype=torch.bfloat16, notices=Heard(said))
    ops.device = torch.device("cuda")
    monkeypatch.setattr("dgemma_cuda.kernels.launch.find_spec", lambda name: None)
    assert (ops.kernels, ops.kernels) == (False, False)
    assert len(said) == 1 and "need Triton, which is not installed" in said[0]
