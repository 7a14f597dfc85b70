"""Attention by kernel against the composite in float64: heads in groups, masks, padding, splits."""

from __future__ import annotations

import numpy as np
import pytest

from dgemma.network.ops import Mask
from tests.compare import EPS, REFERENCE, close

torch = pytest.importorskip("torch")

# What the interpreter's NumPy says of an empty row's log2(0) and of NaN that belongs where it is.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

from dgemma_cuda.kernels import attention as module  # noqa: E402
from dgemma_cuda.kernels.attention import Remote, Tile, attend, attention, attention_plain  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402


@pytest.fixture(autouse=True)
def device(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Blocks of 16 rows and 16 keys: many of each at test sizes."""
    monkeypatch.setattr(module, "tile_for", lambda C, device: Tile(16, 16, 4, 2, resident=2))
    return place


def heads(
    B: int, H: int, G: int, L: int, S: int, C: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.Tensor]:
    """q, k, v of unit normals, q scaled so that scores have some spread."""
    rng = np.random.default_rng(seed)
    shapes = ((B, H, L, C), (B, G, S, C), (B, G, S, C))
    q, k, v = (torch.as_tensor(rng.standard_normal(shape), dtype=torch.float32) for shape in shapes)
    return [x.to(dtype) for x in (q * 2 * C**-0.5, k, v)]


def composite(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: list[int] | None, causal: bool, window: int | None
) -> np.ndarray:
    """The definition, of the very same numbers."""
    arrays = (x.double().numpy() for x in (q, k, v))
    return REFERENCE.attention(*arrays, Mask(None if pad is None else np.asarray(pad), causal, window))


def check(
    device: torch.device,
    qkv: list[torch.Tensor],
    pad: list[int] | None,
    causal: bool,
    window: int | None,
    splits: int | None = None,
) -> None:
    """The kernel and its twin against the composite."""
    expected = composite(*qkv, pad, causal, window)
    at = None if pad is None else torch.tensor(pad, device=device)
    there = [x.to(device) for x in qkv]
    off = 2 * EPS[str(qkv[0].dtype)[6:]] + 1e-5
    ours = attention(*there, Mask(at, causal, window), splits)
    assert ours.dtype == qkv[0].dtype and ours.transpose(1, 2).is_contiguous()
    close(ours.double().cpu().numpy(), expected, off, "kernel")
    close(
        attention_plain(*there, Mask(at, causal, window)).double().cpu().numpy(), expected, off, "plain twin"
    )


@pytest.mark.parametrize("causal", [False, True], ids=["canvas", "causal"])
@pytest.mark.parametrize(("H", "G"), [(2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize(("L", "S", "C"), [(16, 16, 16), (5, 37, 32), (19, 19, 64), (1, 33, 16)])
def test_groups_of_heads_and_odd_sizes(
    device: torch.device, L: int, S: int, C: int, H: int, G: int, causal: bool
) -> None:
    check(device, heads(2, H, G, L, S, C), None, causal, None)


@pytest.mark.parametrize("causal", [False, True], ids=["canvas", "causal"])
def test_bfloat16(device: torch.device, causal: bool) -> None:
    check(device, heads(1, 4, 2, 11, 45, 32, torch.bfloat16), [3], causal, 20, splits=2)


@pytest.mark.parametrize("window", [1, 2, 16, 21, 60, 61, 500])
def test_windows(device: torch.device, window: int) -> None:
    """Narrower than a block, as wide as one, as wide as all slots and wider."""
    check(device, heads(1, 2, 1, 37, 61, 16), None, True, window)


@pytest.mark.parametrize("causal", [False, True], ids=["canvas", "causal"])
@pytest.mark.parametrize(
    "pad", [[0, 3], [17, 16], [29, 30], [31, 48], [52, -7]], ids=lambda pad: ",".join(map(str, pad))
)
def test_padding(device: torch.device, pad: list[int], causal: bool) -> None:
    """In the cached slots only (below 30), to their end, into the queries, of all of them but one."""
    check(device, heads(2, 4, 2, 23, 53, 16), pad, causal, 20)


@pytest.mark.parametrize("causal", [False, True], ids=["canvas", "causal"])
@pytest.mark.parametrize(("C", "H", "G"), [(256, 2, 1), (512, 8, 1)])
def test_the_released_heads(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, C: int, H: int, G: int, causal: bool
) -> None:
    """In the tiles that ship, over two blocks of rows of which one is padding."""
    monkeypatch.setattr(module, "tile_for", lambda C, device: module.TILES[C, "mma"])
    check(device, heads(1, H, G, 80 // H, 100, C), [96], causal, 50)
    assert set(module.TILES) == {(C, family) for C in (256, 512) for family in ("mma", "wgmma")}


@pytest.mark.parametrize("causal", [False, True], ids=["canvas", "causal"])
@pytest.mark.parametrize("pad", [None, [7, 30]], ids=["", "padded"])
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_splits(device: torch.device, splits: int, pad: list[int] | None, causal: bool) -> None:
    """Of 45 keys: no even division, splits in which a row has no key, and padding queries counted once."""
    check(device, heads(2, 2, 1, 21, 45, 16), pad, causal, 12, splits)


def test_more_splits_than_blocks(device: torch.device) -> None:
    check(device, heads(1, 2, 1, 3, 20, 16), None, False, None, splits=8)


@pytest.mark.parametrize("causal", [False, True], ids=["canvas", "causal"])
@pytest.mark.parametrize("splits", [1, 3])
def test_nan_in_padding_reaches_no_real_row(device: torch.device, splits: int, causal: bool) -> None:
    """As keys, as values and as queries; infinities too."""
    q, k, v = heads(2, 2, 1, 21, 45, 16)
    pad, first = [19, 30], 45 - 21
    clean = composite(q, k, v, pad, causal, 12)
    for b, end in enumerate(pad):
        k[b, :, :end], v[b, :, :end] = float("nan"), float("nan")
        v[b, :, : end // 2] = float("inf")
        q[b, :, : max(0, end - first)] = float("nan")
    *there, at = (x.to(device) for x in (q, k, v, torch.tensor(pad)))
    ours = attention(*there, Mask(at, causal, 12), splits).double().cpu().numpy()
    for b, end in enumerate(pad):
        real = slice(max(0, end - first), None)
        close(ours[b, :, real], clean[b, :, real], 1e-5, f"row {b}")


def test_a_nan_query_stays_alone(device: torch.device) -> None:
    q, k, v = (x.to(device) for x in heads(1, 2, 1, 9, 20, 16))
    before = attention(q, k, v, Mask(), 2)
    q[0, 1, 4] = float("nan")
    after = attention(q, k, v, Mask(), 2)
    assert torch.isnan(after[0, 1, 4]).all()
    after[0, 1, 4] = before[0, 1, 4]
    assert torch.equal(after, before)


def test_large_scores(device: torch.device) -> None:
    """Scores are not scaled: at ±300 the softmax is a choice, and must not overflow."""
    q, k, v = heads(1, 2, 1, 9, 20, 16)
    check(device, [q * 100, k, v], None, False, None, 2)


def test_strides_are_free(device: torch.device) -> None:
    """As the graph has them: heads behind positions, and a window cut from a longer cache."""
    q, k, v = (x.to(device) for x in heads(2, 4, 2, 7, 40, 16))
    expected = attention(q, k[:, :, 9:], v[:, :, 9:], Mask())
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attention(q, k[:, :, 9:], v[:, :, 9:], Mask()), expected)


@pytest.mark.parametrize("causal", [False, True], ids=["canvas", "causal"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("pad", [None, [7, 25], [16, 31]], ids=lambda pad: str(pad))
@pytest.mark.parametrize("P", [0, 1, 16, 29])
def test_past_and_own_are_read_where_they_are(
    device: torch.device, P: int, pad: list[int] | None, splits: int, causal: bool
) -> None:
    """Apart from each other and in strides of their own, the past cut from a cache; padding in both."""
    q, k, v = heads(2, 4, 2, 21, P + 21, 16)
    pad = [min(n, P + 20) for n in pad] if pad else None
    expected = composite(q, k, v, pad, causal, 12)
    cached = [torch.cat([torch.full((2, 2, 5, 16), torch.nan), x[:, :, :P]], 2).to(device) for x in (k, v)]
    past = tuple(x[:, :, 5:] for x in cached) if P else None
    own = tuple(x[:, :, P:].transpose(1, 2).contiguous().to(device).transpose(1, 2) for x in (k, v))
    at = None if pad is None else torch.tensor(pad, device=device)
    ours = attend(q.to(device), own, past, Mask(at, causal, 12), splits)  # type: ignore[arg-type]
    close(ours.double().cpu().numpy(), expected, 1e-5, "past and own")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_remote_past(device: torch.device, splits: int, dtype: torch.dtype) -> None:
    """Whichever context is at the addresses, in the strides of a window cut from a cache: the same bits."""
    q, k, v = (x.to(device) for x in heads(2, 4, 2, 21, 50, 16, dtype))
    own = k[:, :, 29:], v[:, :, 29:]
    contexts = [(k[:, :, :29], v[:, :, :29]), (v[:, :, :29], k[:, :, :29])]
    at = torch.zeros((2, 2), dtype=torch.int64, device=device)
    remote = tuple(Remote(at[i], x.shape, x.stride()) for i, x in enumerate(contexts[0]))
    pad = torch.tensor([0, 7], device=device)
    for past in (*contexts, contexts[0]):
        at[:, 0] = torch.tensor([x.data_ptr() for x in past])
        expected = attend(q, own, past, Mask(pad), splits)
        assert torch.equal(attend(q, own, remote, Mask(pad), splits), expected)  # type: ignore[arg-type]


def test_a_pair_that_lies_apart_is_copied(device: torch.device) -> None:
    q, k, v = (x.to(device) for x in heads(2, 4, 2, 7, 30, 16))
    expected = attention(q, k, v, Mask(causal=True))
    cut = k[:, :, :23], v[:, :, :23].transpose(1, 2).contiguous().transpose(1, 2)
    own = k[:, :, 23:], v[:, :, 23:].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attend(q, own, cut, Mask(causal=True)), expected)


def test_the_backend_joins_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = CudaOps(device, torch.bfloat16 if device.type == "cuda" else torch.float32, kernels=True)
    monkeypatch.setattr(ops, "concat", None)
    q, k, v = (x.to(device) for x in heads(1, 2, 1, 7, 30, 16))
    past, own = (k[:, :, :23], v[:, :, :23]), (k[:, :, 23:], v[:, :, 23:])
    assert torch.equal(ops.attend(q, own, past, Mask()), attention(q, k, v, Mask()))


def test_splits_fill_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canvas of 256 on 132 processors: 64 blocks of the full layers, of which one fits a processor."""
    monkeypatch.setattr(module, "processors", lambda device: 132)
    cpu, full, sliding = torch.device("cpu"), module.TILES[512, "wgmma"], module.TILES[256, "wgmma"]
    assert module._splits(64, 1280, full, cpu) == 2
    assert module._splits(64, 1279, sliding, cpu) == 4
    assert module._splits(64, 256, sliding, cpu) == 2
    assert module._splits(1000, 4096, sliding, cpu) == 1
