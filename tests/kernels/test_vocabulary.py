"""Vocabulary statistics by kernel against the composite in float64: rows peaked, flat, tied and NaN."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from dgemma.network.ops import Bias, Prediction
from dgemma.network.ops.vocabulary import logits
from tests.compare import EPS, REFERENCE, close, some_bias

torch = pytest.importorskip("torch")

from dgemma_cuda.kernels import vocabulary  # noqa: E402

# The interpreter's NumPy says that 2^(2x/softcap) overflows where tanh is 1.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

NAMES = ("argmax", "sample", "entropy", "soft", "best")
SOFTCAP, TEMPERATURE = 30.0, 0.7
BELOW_ONE = np.float32(1 - 2.0**-24)


@pytest.fixture(autouse=True)
def device(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Tiles of 32, splits of three tiles (96), the product in blocks of 16: many of each at test sizes."""
    monkeypatch.setattr(vocabulary, "TILE", 32)
    monkeypatch.setattr(vocabulary, "WIDTH", 96)
    monkeypatch.setattr(vocabulary, "PRODUCT", {"BM": 16, "BN": 16, "BK": 64})
    monkeypatch.setattr(vocabulary, "COLUMNS", 16)
    monkeypatch.setattr(vocabulary, "GATHERED", 4)
    return place


@dataclass
class Case:
    """h [N, D] and table [V, D] on the device, and uniforms [N]."""

    h: torch.Tensor
    table: torch.Tensor
    uniforms: torch.Tensor
    bias: tuple[np.ndarray, ...] | None = None

    @classmethod
    def exact(
        cls, device: torch.device, logits: np.ndarray, uniforms: Any, dtype: torch.dtype = torch.bfloat16
    ) -> Case:
        """A head product that is `logits` [N, V], rounded to `dtype` and no further."""
        table = torch.as_tensor(logits.T.copy(), dtype=torch.float32).to(dtype)
        u = torch.as_tensor(np.asarray(uniforms), dtype=torch.float32)
        return cls(*(x.to(device) for x in (torch.eye(len(logits)).to(dtype), table, u)))

    def kernel(self, temperature: float = TEMPERATURE) -> Prediction:
        t = torch.tensor(temperature, device=self.h.device)
        return on_host(vocabulary.vocabulary(self.h, self.table, SOFTCAP, t, self.uniforms, self.added))

    @property
    def added(self) -> Bias | None:
        """The bias as the backend has it."""
        from dgemma_cuda.ops import CudaOps

        ops = CudaOps(self.h.device)
        given = self.bias
        return given and Bias(ops.asclasses(given[0]), ops.asarray(given[1]), ops.aswide(given[2]))

    def definition(self, temperature: float = TEMPERATURE) -> tuple[Prediction, np.ndarray]:
        """What the composite says of the very same numbers, and the probabilities."""
        args = (float64(self.h), float64(self.table), SOFTCAP, float(np.float32(temperature)))
        z, bias = logits(REFERENCE, *args[:3]) / args[3], None
        if self.bias:
            kinds, which, values = self.bias
            z, bias = z + np.take_along_axis(values, kinds[which], -1), Bias(*self.bias)
        e = np.exp(z - z.max(-1, keepdims=True))
        said = REFERENCE.vocabulary(*args, float64(self.uniforms), bias=bias)
        return said, e / e.sum(-1, keepdims=True)


def float64(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def on_host(guess: Prediction) -> Prediction:
    return Prediction(*(float64(getattr(guess, name)) for name in NAMES))


def drawn(ours: Prediction, p: np.ndarray, uniforms: np.ndarray) -> None:
    """Assert that each sample is the first token whose cumulative p exceeds its uniform, up to rounding."""
    here, ids = np.arange(len(p)), ours.sample.astype(int)
    reach = np.cumsum(p, -1)[here, ids]
    none = (uniforms > 1 - 1e-6) & (ours.sample == ours.argmax)
    assert (none | (reach > uniforms - 1e-6)).all()
    assert (none | (reach - p[here, ids] <= uniforms + 1e-6)).all()
    assert (p[here, ids] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [5, 96, 97, 230])
@pytest.mark.parametrize("scale", [0.05, 3.0, 20.0], ids=["flat", "mixed", "peaked"])
def test_statistics(device: torch.device, scale: float, V: int, dtype: torch.dtype) -> None:
    check_statistics(device, scale, V, dtype, biased=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [5, 97, 230])
def test_statistics_with_a_bias(device: torch.device, V: int, dtype: torch.dtype) -> None:
    check_statistics(device, 3.0, V, dtype, biased=True)


def check_statistics(device: torch.device, scale: float, V: int, dtype: torch.dtype, biased: bool) -> None:
    rng = np.random.default_rng(V)
    uniforms = np.r_[np.float32(0), BELOW_ONE, rng.random(2, dtype=np.float32)]
    case = Case.exact(device, scale * rng.standard_normal((4, V)), uniforms, dtype)
    case.bias = some_bias(4, V, classes=300 if V == 230 else 5) if biased else None
    ours, (theirs, p) = case.kernel(), case.definition()
    np.testing.assert_array_equal(ours.argmax, theirs.argmax)
    drawn(ours, p, uniforms)
    np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-4)
    np.testing.assert_allclose(ours.best, p.max(-1), rtol=1e-4)
    close(ours.soft, theirs.soft, 2 * EPS[str(dtype)[6:]] + 1e-5, "soft embedding")


@pytest.mark.parametrize("biased", [False, True])
def test_the_plain_twin_says_the_same(device: torch.device, biased: bool) -> None:
    rng = np.random.default_rng(2)
    case = Case.exact(device, 3 * rng.standard_normal((9, 131)), rng.random(9))
    case.bias = some_bias(9, 131) if biased else None
    ours, args = case.kernel(), (case.h, case.table, SOFTCAP, TEMPERATURE, case.uniforms, case.added)
    twin = on_host(vocabulary.vocabulary_plain(*args))
    np.testing.assert_array_equal(ours.argmax, twin.argmax)
    np.testing.assert_array_equal(ours.sample, twin.sample)
    np.testing.assert_allclose(ours.entropy, twin.entropy, atol=1e-4)
    close(ours.soft, twin.soft, 2 * EPS["bfloat16"], "soft embedding")


@pytest.mark.parametrize(("width", "tile"), [(32, 16), (256, 128), (1024, 1024)])
def test_splits_and_tiles_change_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, width: int, tile: int
) -> None:
    rng = np.random.default_rng(3)
    uniforms = rng.random(4)
    case = Case.exact(device, 4 * rng.standard_normal((4, 257)), uniforms, torch.float32)
    before = case.kernel()
    monkeypatch.setattr(vocabulary, "WIDTH", width)
    monkeypatch.setattr(vocabulary, "TILE", tile)
    after = case.kernel()
    np.testing.assert_array_equal(after.argmax, before.argmax)
    drawn(after, case.definition()[1], uniforms)
    np.testing.assert_allclose(after.entropy, before.entropy, atol=1e-5)
    close(after.soft, before.soft, 1e-5, "soft embedding")


def test_rows_in_blocks(device: torch.device) -> None:
    """The backend's blocks of rows, each with a plane of logits; every row has a temperature of its own."""
    from dgemma_cuda.ops import CudaOps

    rng = np.random.default_rng(4)
    case = Case.exact(device, 4 * rng.standard_normal((7, 60)), rng.random(7))
    heat = rng.uniform(0.3, 0.9, 7)
    alone = [
        Case(case.h[row : row + 1], case.table, case.uniforms[row : row + 1]).kernel(t)
        for row, t in enumerate(heat)
    ]
    ops = CudaOps(device, torch.bfloat16, kernels=True)
    for rows in (3, 7, 512):
        ops.kernel_rows = rows
        at = torch.tensor(heat, dtype=torch.float32, device=device)
        parts = on_host(ops.vocabulary(case.h, case.table, SOFTCAP, at, case.uniforms))
        for name in NAMES:
            whole = np.concatenate([getattr(one, name) for one in alone])
            np.testing.assert_array_equal(getattr(parts, name), whole)


@pytest.mark.parametrize(
    ("places", "first"), [((3, 4), 3), ((31, 32), 31), ((20, 90), 20), ((95, 96), 95), ((139, 140), 139)]
)
def test_argmax_takes_the_first_of_equals(device: torch.device, places: tuple[int, ...], first: int) -> None:
    """Ties in a tile, in two tiles of a split, in two splits."""
    logits = np.zeros((2, 141))
    logits[:, places] = 2.5
    ours = Case.exact(device, logits, np.zeros(2)).kernel()
    np.testing.assert_array_equal(ours.argmax, [first, first])


def test_a_flat_row_is_drawn_evenly_and_a_peaked_row_surely(device: torch.device) -> None:
    logits = np.full((6, 128), -60.0)
    logits[:5] = 7.0
    logits[5, 77] = 60.0
    case = Case.exact(device, logits, [0.0, 0.25, 1 - 2.0**-7, 0.5, 0.75, 0.5])
    ours, (theirs, _) = case.kernel(0.4), case.definition(0.4)
    np.testing.assert_array_equal(ours.sample, [0, 32, 127, 64, 96, 77])
    np.testing.assert_array_equal(ours.sample, theirs.sample)
    np.testing.assert_allclose(ours.entropy, [np.log(128)] * 5 + [0.0], atol=1e-5)


@pytest.mark.parametrize("place_of_mass", [0, 50, 99])
def test_a_token_without_mass_is_never_drawn(device: torch.device, place_of_mass: int) -> None:
    """At 0 and just below 1 the only token with any mass is drawn, wherever it is."""
    logits = np.full((2, 100), -90.0)
    logits[:, place_of_mass] = 90.0
    ours = Case.exact(device, logits, [0.0, BELOW_ONE]).kernel(0.2)
    np.testing.assert_array_equal(ours.sample, [place_of_mass] * 2)


def test_a_split_without_mass_is_passed_over(device: torch.device) -> None:
    """At 0 the first token with any mass is drawn: the second split's first, not the argmax behind it."""
    logits = np.full((1, 110), -90.0)
    logits[:, [97, 99]] = 5.0, 6.0
    assert Case.exact(device, logits, [0.0]).kernel(0.2).sample == 97


def test_lanes_behind_the_vocabulary_have_no_mass(device: torch.device) -> None:
    """Where all logits are at the negative cap, so are those that are not there."""
    ours = Case.exact(device, np.full((2, 70), -3e4), [0.5, BELOW_ONE]).kernel()
    np.testing.assert_allclose(ours.entropy, [np.log(70)] * 2, atol=1e-5)
    assert ours.sample[0] == 35 and ours.sample[1] < 70


def test_logits_far_beyond_the_softcap_stay_finite(device: torch.device) -> None:
    rng = np.random.default_rng(5)
    logits = np.array([[-3e4], [3e4], [1e-30]]) * rng.random((3, 70))
    case = Case.exact(device, logits, np.full(3, 0.5))
    ours, (theirs, _) = case.kernel(0.01), case.definition(0.01)
    assert np.isfinite(ours.entropy).all()
    np.testing.assert_allclose(ours.entropy[1:], theirs.entropy[1:], atol=1e-3)


def test_temperature_is_a_tensor_or_a_number(device: torch.device) -> None:
    rng = np.random.default_rng(6)
    case = Case.exact(device, 4 * rng.standard_normal((3, 60)), rng.random(3))
    first, *others = (
        vocabulary.vocabulary(case.h, case.table, SOFTCAP, t, case.uniforms.double())
        for t in (torch.tensor(0.5, device=device), torch.tensor(0.5, device=device).double(), 0.5)
    )
    for other in others:
        assert all(torch.equal(getattr(other, name), getattr(first, name)) for name in NAMES)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_nan_row_stays_alone(device: torch.device, sparse: bool) -> None:
    rng = np.random.default_rng(7)
    h = torch.as_tensor(rng.standard_normal((5, 8)), dtype=torch.bfloat16, device=device)
    table = torch.as_tensor(6 * rng.standard_normal((130, 8)), dtype=torch.bfloat16, device=device)
    uniforms = torch.as_tensor(rng.random(5), dtype=torch.float32, device=device)

    def run(x: torch.Tensor) -> Prediction:
        if sparse:
            return on_host(vocabulary.sparse_vocabulary(x, table, SOFTCAP, 0.7, uniforms))
        return on_host(vocabulary.vocabulary(x, table, SOFTCAP, 0.7, uniforms))

    before = run(h)
    h[2] = float("nan")
    after = run(h)
    others = [0, 1, 3, 4]
    for name in NAMES:
        np.testing.assert_array_equal(getattr(after, name)[others], getattr(before, name)[others])
    assert np.isnan(after.entropy[2]) and np.isnan(after.soft[2]).all()
    assert 0 <= after.argmax[2] < 130 and 0 <= after.sample[2] < 130


def alternate(device: torch.device, V: int) -> Case:
    """34 rows, flat and dominated by three tokens in turn: more of each than a block of the product."""
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((34, V))
    for row in range(0, 34, 2):
        logits[row, rng.integers(0, V, 3)] = 20 + rng.random(3)
    return Case.exact(device, logits, rng.random(34))


@pytest.mark.parametrize(
    ("most", "left_out", "V", "biased"),
    [(0.0, 0, 128, False), (1e-3, 17, 110, False), (2.0, 34, 128, False), (1e-3, None, 110, True)],
    ids=["all dense", "mixed", "all sparse", "biased"],  # 128: whole blocks of the product
)
def test_sparse_soft_embedding_is_within_what_it_reports(
    device: torch.device, most: float, left_out: int | None, V: int, biased: bool
) -> None:
    case = alternate(device, V)
    case.bias = some_bias(34, V) if biased else None
    args = (case.h, case.table, SOFTCAP, TEMPERATURE, case.uniforms)
    sparse = vocabulary.Sparse(ratio=1e-5, keep=6, missing=most)
    said = vocabulary.sparse_vocabulary(*args, sparse, case.added)
    ours, missing, full = on_host(said), float64(said.missing), case.kernel()
    for name in ("argmax", "sample", "entropy", "best"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(full, name))
    theirs, _ = case.definition()
    largest = np.abs(float64(case.table)).max()
    error = np.abs(ours.soft - theirs.soft).max(-1)
    assert (error <= (missing + 2 * EPS["bfloat16"]) * largest).all()
    assert (missing <= most).all()
    assert (missing > 0).sum() == left_out if left_out is not None else 0 < (missing > 0).sum() < 34
    twin = vocabulary.sparse_vocabulary_plain(*args, sparse, case.added)
    np.testing.assert_allclose(missing, float64(twin.missing), atol=1e-6)
    close(ours.soft, on_host(twin).soft, 2 * EPS["bfloat16"], "soft embedding")


def test_sparse_rows_beyond_the_cap_keep_the_first_tokens(device: torch.device) -> None:
    """Ten equal tokens in three splits, of which a cap of seven keeps the first seven."""
    logits = np.full((1, 230), -60.0)
    logits[0, [1, 2, 30, 31, 60, 61, 100, 150, 151, 229]] = 5.0
    case = Case.exact(device, logits, [0.5])
    sparse = vocabulary.Sparse(ratio=1e-3, keep=7, missing=0.5)
    guess = vocabulary.sparse_vocabulary(case.h, case.table, SOFTCAP, 0.7, case.uniforms, sparse)
    np.testing.assert_allclose(float64(guess.missing), [0.3], atol=1e-6)
    np.testing.assert_allclose(float64(guess.soft), [[3.5]], rtol=2.0**-8)


def test_a_sure_row_is_sparse_and_says_so(device: torch.device) -> None:
    """What it leaves out is less than float32 has: not 0, which would mean that it left nothing out."""
    logits = np.full((1, 120), -90.0)
    logits[0, 7] = 90.0
    args = Case.exact(device, logits, [0.5])
    for run in (vocabulary.sparse_vocabulary, vocabulary.sparse_vocabulary_plain):
        missing = run(args.h, args.table, SOFTCAP, 0.2, args.uniforms).missing
        assert 0 < float(missing[0]) < 1e-20


def test_the_backend_leaves_out_what_it_may(device: torch.device) -> None:
    from dgemma_cuda.ops import CudaOps

    case, ops = alternate(device, 128), CudaOps(device, torch.bfloat16, kernels=True)
    args = (case.h, case.table, SOFTCAP, TEMPERATURE, case.uniforms)
    said = ops.vocabulary(*args, soft_bound=1e-3)
    wanted = vocabulary.sparse_vocabulary(*args, vocabulary.Sparse(missing=1e-3))
    assert torch.equal(said.soft, wanted.soft) and torch.equal(said.missing, wanted.missing)
    assert 0 < said.missing.max() <= 1e-3
    whole = ops.vocabulary(*args)
    assert whole.missing is None and torch.equal(whole.soft, vocabulary.vocabulary(*args).soft)


def test_importing_the_kernels_imports_no_triton() -> None:
    code = "import sys, dgemma_cuda.kernels.attention; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
