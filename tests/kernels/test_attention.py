"""Attention by kernel against the composite in float64: rows, pasts in pieces, groups of heads, splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dgemma.network.ops import Mask
from tests.compare import EPS, REFERENCE, close

torch = pytest.importorskip("torch")

# What the interpreter's NumPy says of an empty row's log2(0) and of NaN that belongs where it is.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

from dgemma_cuda.kernels import attention as module  # noqa: E402
from dgemma_cuda.kernels.attention import Tile, attend, attend_plain, table  # noqa: E402
from dgemma_cuda.ops import CudaOps  # noqa: E402

# Own tokens of rows, and the sizes of their pieces: none, one, several, and some of a single token.
LENGTHS = 5, 1, 11
PIECES: list[list[int]] = [[], [33], [7, 16, 1, 12]]
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["canvas", "causal"])


@pytest.fixture(autouse=True)
def device(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Blocks of 16 rows and 16 keys: many of each at test sizes."""
    monkeypatch.setattr(module, "tile_for", lambda C, device: Tile(16, 16, 4, 2, resident=2))
    return place


class Rows:
    """Unit normals on a device; q scaled so that scores have some spread. Pieces lie within NaN."""

    def __init__(
        self,
        device: torch.device,
        lengths: Sequence[int] = LENGTHS,
        pieces: Sequence[Sequence[int]] = PIECES,
        H: int = 2,
        G: int = 1,
        C: int = 16,
        dtype: torch.dtype = torch.float32,
    ):
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.as_tensor(rng.standard_normal(shape), dtype=torch.float32).to(device, dtype)

        def within(x: torch.Tensor) -> torch.Tensor:
            around = torch.full((G, x.shape[1] + 5, C), torch.nan, dtype=dtype, device=device)
            around[:, 3:-2] = x
            return around[:, 3:-2]

        self.device, self.lengths, N = device, tuple(lengths), sum(lengths)
        self.q, self.own = normal(H, N, C) * (2 * C**-0.5), (normal(G, N, C), normal(G, N, C))
        self.past = [[(within(normal(G, n, C)), within(normal(G, n, C))) for n in row] for row in pieces]

    def composite(self, mask: Mask) -> np.ndarray:
        """The definition, of the very same numbers."""

        def wide(x: Any) -> Any:
            return x.double().cpu().numpy() if isinstance(x, torch.Tensor) else [wide(part) for part in x]

        return REFERENCE.attend(wide(self.q), wide(self.own), wide(self.past), self.lengths, mask)

    def table(self) -> torch.Tensor:
        return table([self.past], self.lengths, self.device)[0]

    def kernel(self, mask: Mask, splits: int | None = None) -> torch.Tensor:
        return attend(self.q, self.own, self.table(), self.lengths, mask, splits)

    def check(self, mask: Mask, splits: int | None = None) -> None:
        """The kernel and its twin against the composite."""
        expected, off = self.composite(mask), 2 * EPS[str(self.q.dtype)[6:]] + 1e-5
        ours, twin = self.kernel(mask, splits), attend_plain(self.q, self.own, self.past, self.lengths, mask)
        assert ours.dtype == self.q.dtype and ours.transpose(0, 1).is_contiguous()
        for name, got in (("kernel", ours), ("plain twin", twin)):
            close(got.double().cpu().numpy(), expected, off, name)


@CAUSAL
@pytest.mark.parametrize(("H", "G", "C"), [(2, 2, 32), (4, 2, 16), (8, 1, 64)])
def test_rows_of_unequal_lengths(device: torch.device, H: int, G: int, C: int, causal: bool) -> None:
    """In one launch, over pieces of odd sizes; the first has no past."""
    Rows(device, H=H, G=G, C=C).check(Mask(causal))


@pytest.mark.parametrize(
    ("lengths", "pieces"),
    [((16,), [[]]), ((1,), [[1]]), ((3, 3), [[16] * 6, [15, 17]]), ((37,), [[24]])],
    ids=["no past", "a token each", "blocks and not", "long"],
)
def test_odd_sizes(device: torch.device, lengths: tuple[int, ...], pieces: list[list[int]]) -> None:
    for causal in (False, True):
        Rows(device, lengths, pieces).check(Mask(causal))


@CAUSAL
def test_bfloat16(device: torch.device, causal: bool) -> None:
    Rows(device, C=32, dtype=torch.bfloat16).check(Mask(causal, 20), splits=2)


@pytest.mark.parametrize("window", [1, 2, 12, 16, 21, 36, 55, 56, 500])
def test_windows(device: torch.device, window: int) -> None:
    """Across borders of pieces and of blocks, from the own tokens alone to wider than all there is."""
    Rows(device).check(Mask(True, window))


@CAUSAL
@pytest.mark.parametrize(("C", "H", "G"), [(256, 2, 1), (512, 8, 1)])
def test_the_released_heads(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, C: int, H: int, G: int, causal: bool
) -> None:
    """In the tiles that ship, over two blocks of rows of which one is padding."""
    monkeypatch.setattr(module, "tile_for", lambda C, device: module.TILES[C, "mma"])
    Rows(device, (80 // H, 3), [[20], [9, 35]], H, G, C).check(Mask(causal, 30))
    assert set(module.TILES) == {(C, family) for C in (256, 512) for family in ("mma", "wgmma")}


@CAUSAL
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_splits(device: torch.device, splits: int, causal: bool) -> None:
    """No even division, splits without a key, and splits within a piece and across some."""
    Rows(device).check(Mask(causal, 12 if causal else None), splits)


@pytest.mark.parametrize("splits", [1, 2])
def test_nan_that_a_row_must_not_read(device: torch.device, splits: int) -> None:
    """In other rows, in their pieces, and in what a table holds beyond a row's pieces."""
    rows, mask = Rows(device), Mask(True, 40)
    before = rows.kernel(mask, splits)
    broken = rows.table()
    for row, pieces in zip(broken, PIECES, strict=True):
        nan = torch.full((1000,), torch.nan, device=device)
        row[8 + 4 * len(pieces) :] = torch.tensor(nan.data_ptr())
    assert torch.equal(attend(rows.q, rows.own, broken, rows.lengths, mask, splits), before)
    for x in (rows.q, *rows.own):
        x[:, 5:6] = torch.nan
    for x in rows.past[1][0]:
        x.fill_(torch.nan)
    after = rows.kernel(mask, splits)
    assert torch.isnan(after[:, 5]).all()
    after[:, 5] = before[:, 5]
    assert torch.equal(after, before)


def test_a_nan_query_stays_alone(device: torch.device) -> None:
    rows = Rows(device)
    before = rows.kernel(Mask())
    rows.q[1, 9] = torch.nan
    after = rows.kernel(Mask())
    assert torch.isnan(after[1, 9]).all()
    after[1, 9] = before[1, 9]
    assert torch.equal(after, before)


def test_large_scores(device: torch.device) -> None:
    """Scores are not scaled: at ±300 the softmax is a choice, and must not overflow."""
    rows = Rows(device)
    rows.q *= 100
    rows.check(Mask(), 2)


def test_strides_of_new_tokens_are_free(device: torch.device) -> None:
    """Heads behind tokens, as a projection leaves them; keys and values are copied then."""
    rows = Rows(device)
    expected = rows.kernel(Mask())
    rows.q = rows.q.transpose(0, 1).contiguous().transpose(0, 1)
    rows.own = (
        rows.own[0].transpose(0, 1).contiguous().transpose(0, 1),
        rows.own[1].transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert torch.equal(rows.kernel(Mask()), expected)


def test_rows_that_share_pieces(device: torch.device) -> None:
    """As forks do: whole pieces, and one cut shorter. How a past is cut changes roundings only."""
    rows = Rows(device, (4, 4, 4), [[20, 9], [], []])
    whole, end = rows.past[0]
    rows.past[1:] = [[whole], [(whole[0][:, :13], whole[1][:, :13])]]
    rows.check(Mask(), 1)
    rows.past[1:] = [[whole, end], [(torch.cat((whole[0], end[0]), 1), torch.cat((whole[1], end[1]), 1))]]
    rows.q = rows.q[:, :4].repeat(1, 3, 1)
    rows.own = rows.own[0][:, :4].repeat(1, 3, 1), rows.own[1][:, :4].repeat(1, 3, 1)
    first, second, third = rows.kernel(Mask(), 1).split(4, 1)
    assert torch.equal(first, second)
    close(third.cpu(), first.cpu(), 1e-5, "one piece")


def test_a_launch_says_nothing_of_pasts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a recorded one serves every length: only what the table holds differs."""
    launches: list[Any] = []

    class Heard:
        def __getitem__(self, grid: Any) -> Any:
            def run(*args: Any, **options: Any) -> None:
                numbers = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in args]
                launches.append((grid, numbers, options))

            return run

    module.load()
    monkeypatch.setattr(module, "_attend", Heard())
    monkeypatch.setattr(module, "_merge", Heard())
    monkeypatch.setattr(module, "processors", lambda device: 132)
    for pieces in (PIECES, [[5000], [1], [1] * module.ROOM]):
        Rows(device, pieces=pieces).kernel(Mask())
    assert len(launches) == 4 and launches[:2] == launches[2:]


def test_the_table(device: torch.device) -> None:
    """Entries as the docstring has them; its size follows from the rows and a power of two of pieces."""
    rows = Rows(device)
    made = table([rows.past, rows.past[::-1]], rows.lengths, device)
    assert made.shape == (2, 3, 4 * (module.ROOM + 2)) and made.dtype == torch.int64
    (k, v), size = rows.past[1][0], rows.q.element_size()
    assert made[0, 1, :12].tolist() == [1, 5, 0, 1, k.data_ptr(), v.data_ptr(), 33, 38 * 16, 0, 0, 34, 0]
    second, _ = rows.past[2][1]
    assert made[1, 0, 8] == second.data_ptr() - 7 * 16 * size
    assert made[1, 0, 4 * 5 :].tolist() == [0, 0, 36 + 5, 0]
    sizes = [table([[rows.past[1] * n]], (1,), device).shape[2] for n in (0, 1, 4, 5, 8, 9)]
    assert sizes == [24, 24, 24, 40, 40, 72]
    with pytest.raises(AssertionError):
        table([[[(k, v.transpose(1, 2).contiguous().transpose(1, 2))]]], (1,), device)


def test_the_backend_joins_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = CudaOps(device, torch.float32, kernels=True)
    monkeypatch.setattr(ops, "concat", None)
    rows = Rows(device)
    (past,) = ops.pasts([rows.past], rows.lengths)
    assert torch.equal(ops.attend(rows.q, rows.own, past, rows.lengths, Mask()), rows.kernel(Mask()))
    assert CudaOps(kernels=False).pasts([rows.past], rows.lengths) == [rows.past]


def test_splits_fill_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canvas of 256 on 132 processors: 64 blocks of the full layers, of which one fits a processor.

    On sliding layers the window bounds the keys, 1,279 with the canvas; nothing does on full ones.
    """
    monkeypatch.setattr(module, "processors", lambda device: 132)
    cpu, full, sliding = torch.device("cpu"), module.TILES[512, "wgmma"], module.TILES[256, "wgmma"]
    assert module._splits(64, None, full, cpu) == 2
    assert module._splits(64, 1279, sliding, cpu) == 4
    assert module._splits(64, 256, sliding, cpu) == 2
    assert module._splits(1, None, full, cpu) == module.MOST
    assert module._splits(1000, None, sliding, cpu) == 1


def test_idle_programs_are_not_counted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid is for the longest row; splits are chosen by the blocks that work."""
    seen: list[int] = []

    def splits(blocks: int, *_: Any) -> int:
        seen.append(blocks)
        return 1

    monkeypatch.setattr(module, "_splits", splits)
    Rows(device, (40, 3, 3), [[], [], []], H=4, G=2).kernel(Mask())
    assert seen == [2 * (5 + 1 + 1)]  # 8 queries fill a block of 16 rows
