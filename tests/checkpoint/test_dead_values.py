"""Zeros and NaN in the place of weights: found by `dgemma verify`, and refused or said by a load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.checkpoint import samples, values
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.safetensors import Entry, read_header
from dgemma.errors import CheckpointError
from dgemma.network.config import read_config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Notices
from dgemma.network.spec import text_parameters
from dgemma.reports import verify
from tests.checkpoints import SMALL_VISION, Edit, Tensor, make_checkpoint, small
from tests.cli.test_verify import EXPERT, FORMATS, GATE_UP, make_quantized, put

LAYER = "model.decoder.layers.1"
DOWN = f"{LAYER}.mlp.down_proj.weight"
GATE = f"{LAYER}.mlp.gate_proj.weight"
EMBED = "model.decoder.embed_tokens.weight"
NORM = f"{LAYER}.input_layernorm.weight"
CLOSING = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


class Said(Notices):
    """Keeps what a load says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


def loaded(folder: Path) -> list[str]:
    """What a load says; CheckpointError if it refuses."""
    said = Said()
    Checkpoint.open(folder).load(NumpyOps(said))
    return said.texts


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        loaded(folder)
    message = str(caught.value)
    assert "\n" not in message and "dgemma verify" in message
    assert all(part in message for part in parts), message


def dead(folder: Path) -> set[str]:
    """The tensors that verify calls dead."""
    report = verify.inspect(folder)
    assert report["ok"] == (not report["findings"])
    return {finding["tensor"] for finding in report["findings"] if finding["kind"] == "dead"}


def zeros(name: str, start: float = 0.0, end: float = 1.0) -> Edit:
    """Zeros from one share of a tensor to another."""

    def edit(tensors: dict[str, Tensor]) -> None:
        raw = bytearray(tensors[name].raw)
        a, b = int(start * len(raw)), int(end * len(raw))
        raw[a:b] = bytes(b - a)
        tensors[name].raw = bytes(raw)

    return edit


def blank(file: Path, start: int) -> None:
    """Zeros from a byte on, as in a file that was made at its full size and never filled."""
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(start)
        stream.truncate(size)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_file_that_was_never_filled(share: float, shards: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=shards)
    file = sorted(folder.glob("*.safetensors"))[-1]
    entries = read_header(file)
    data = entries[0].offset
    blank(file, data + int(share * (file.stat().st_size - data)))
    refused(folder, str(file))
    last = [entry.name for entry in entries if entry.offset > data + share * (file.stat().st_size - data)]
    assert set(last) <= dead(folder)


def test_the_end_of_each_file_is_looked_at_first(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shards=2)
    file = sorted(folder.glob("*.safetensors"))[-1]
    blank(file, read_header(file)[-1].offset)
    done: list[int] = []
    with pytest.raises(CheckpointError, match=file.name):
        Checkpoint.open(folder).load(NumpyOps(), lambda n, total: done.append(n))
    assert not done


@pytest.mark.parametrize("name", FORMATS)
def test_half_of_a_quantized_file(name: str, tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, name)
    file = folder / "model.safetensors"
    blank(file, file.stat().st_size // 2)
    refused(folder, str(file))
    assert dead(folder)


def test_zeros_are_found_where_the_checkpoint_does_not_open(tmp_path: Path) -> None:
    """By the names alone: biases and tied copies stay out."""
    folder = make_checkpoint(tmp_path, small(attention_bias=True))
    file = folder / "model.safetensors"
    entries = read_header(file)
    blank(file, entries[len(entries) // 2].offset)
    (folder / "config.json").write_text("{")
    found = dead(folder)
    assert found and not any(name.endswith(".bias") for name in found)
    assert {e.name for e in entries[len(entries) // 2 + 1 :] if len(e.shape) > 1} <= found


# ---- tensors ------------------------------------------------------------------------------------

NAMES = [param.name for param in text_parameters(read_config(small())) if param.name.count(".0.") == 0]


@pytest.mark.parametrize("name", [name for name in NAMES if ".layers." not in name or LAYER in name])
def test_a_tensor_of_zeros(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, edit=zeros(name))
    assert dead(folder) == {name}
    if name.endswith(CLOSING):
        (text,) = loaded(folder)
        assert repr(name) in text and "verify" in text
    else:
        refused(folder, repr(name), "nothing but zeros", "model.safetensors")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_zeros_of_either_sign(dtype: str, tmp_path: Path) -> None:
    width = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    minus = bytes(width - 1) + b"\x80"

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[GATE].raw = minus * (len(tensors[GATE].raw) // width)

    folder = make_checkpoint(tmp_path, dtype=dtype, edit=edit)
    assert dead(folder) == {GATE}
    refused(folder, repr(GATE))


@pytest.mark.parametrize("name", [GATE, EMBED, GATE_UP, NORM])
@pytest.mark.parametrize(("start", "end"), [(0.5, 1), (0.74, 1), (0, 0.4), (0.3, 0.6)])
def test_a_part_of_a_tensor(name: str, start: float, end: float, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, edit=zeros(name, start, end))
    assert dead(folder) == {name}
    refused(folder, repr(name), "in a row zero, first at [")


def test_a_hole_in_a_large_tensor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far below an eighth, anywhere, and over the ends of chunks; a load may only meet it by chance."""
    monkeypatch.setattr(values, "CHUNK", 5000)
    monkeypatch.setattr(values, "HOLE", 3000)  # bytes
    rng = np.random.default_rng(3)
    for attempt in range(6):
        at = float(rng.random() * 0.9)
        folder = make_checkpoint(tmp_path / str(attempt), edit=zeros(GATE_UP, at, at + 0.06))
        report = verify.inspect(folder)
        (finding,) = report["findings"]
        size = 8 * 64 * 64
        place = int(np.ravel_multi_index(finding["first"], (8, 64, 64)))
        assert (finding["kind"], finding["tensor"]) == ("dead", GATE_UP)
        assert abs(place - at * size) <= 2 and abs(finding["count"] - 0.06 * size) <= 4
    folder = make_checkpoint(tmp_path / "last", edit=zeros(GATE_UP, 0.94))
    (text,) = loaded(folder)
    assert repr(GATE_UP) in text


def test_runs_are_counted_as_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest run beside a search in plain Python, with the sieve and without."""
    rng = np.random.default_rng(5)
    file = tmp_path / "x"
    for size in (1, 17, 300, 9000, 40_000):
        for _ in range(20):
            x = rng.integers(1, 99, size).astype("<u2")
            for _ in range(rng.integers(4)):
                at = rng.integers(size)
                x[at : at + rng.integers(1, size // 2 + 2)] = 0
            x.tofile(file)
            monkeypatch.setattr(values, "CHUNK", int(rng.choice([1 << 22, 1500, 4096])))
            subject = values.subject(Entry("m.w", "BF16", (size,), file, 0))
            subject = values.Subject(subject.entry, subject.bits, ("dead",))
            flaws = values.examine(subject)
            edges = np.flatnonzero(np.concatenate(([1], x, [1])))
            longest = int(np.diff(edges).max()) - 1
            limit = size if size <= 16 else max(16, min(size // 8, 1 << 15))
            assert [flaw.count for flaw in flaws] == ([longest] if longest >= limit else [])


# ---- what may be zero ---------------------------------------------------------------------------


def test_biases_may_begin_with_zero(tmp_path: Path) -> None:
    config = small(attention_bias=True)

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".bias")]:
            zeros(name)(tensors)

    folder = make_checkpoint(tmp_path, config, edit=edit)
    assert loaded(folder) == [] and verify.inspect(folder)["ok"]


def test_what_the_vision_tower_may_have_as_zeros(tmp_path: Path) -> None:
    config = small() | {"vision_config": SMALL_VISION}
    tower = "model.encoder.vision_tower"
    folder = make_checkpoint(tmp_path / "bias", config, edit=zeros(f"{tower}.std_bias"))
    assert verify.inspect(folder)["ok"]
    table = f"{tower}.patch_embedder.position_embedding_table"
    folder = make_checkpoint(tmp_path / "table", config, edit=zeros(table, 0.5))
    assert verify.inspect(folder)["ok"]
    scale = f"{tower}.std_scale"
    folder = make_checkpoint(tmp_path / "scale", config, edit=zeros(scale))
    assert dead(folder) == {scale}
    assert loaded(folder) == []  # it reads no tower


def test_rows_that_no_token_uses(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, edit=zeros(EMBED, 0.9))
    assert loaded(folder) == [] and verify.inspect(folder)["ok"]


def test_single_zeros_among_weights(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        data = np.frombuffer(tensors[GATE].raw, "<u2").copy()
        data[::2] = 0
        tensors[GATE].raw = data.tobytes()

    folder = make_checkpoint(tmp_path, edit=edit)
    assert loaded(folder) == [] and verify.inspect(folder)["ok"]


# ---- quantized ----------------------------------------------------------------------------------

DAMAGE = [
    ("modelopt", f"{LAYER}.experts.3.gate_proj.weight"),
    ("modelopt", f"{LAYER}.experts.3.up_proj.weight_scale"),
    ("modelopt", f"{LAYER}.experts.3.up_proj.weight_scale_2"),
    ("affine", f"{GATE_UP}.weight"),
    ("affine", f"{GATE_UP}.scales"),
    ("affine", f"{GATE_UP}.biases"),
    ("mxfp4", f"{GATE_UP}.weight"),
    ("mxfp4", f"{GATE_UP}.scales"),
    ("mxfp8", f"{GATE_UP}.weight"),
    ("mlx-nvfp4", f"{GATE_UP}.weight"),
    ("compressed", f"{LAYER}.experts.3.gate_proj.weight_packed"),
    ("fp8", f"{LAYER}.experts.3.up_proj.weight"),
    ("fp8", f"{LAYER}.experts.3.up_proj.weight_scale"),
]


@pytest.mark.parametrize(("form", "name"), DAMAGE)
def test_codes_and_scales_of_zeros(form: str, name: str, tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, form, zeros(name))
    found = verify.inspect(folder)["findings"]
    assert [f["tensor"] for f in found] == [name] and found[0]["kind"] in ("dead", "zero")
    refused(folder, repr(name))


def test_codes_of_minus_zero(tmp_path: Path) -> None:
    name = f"{LAYER}.experts.3.gate_proj.weight"

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].raw = b"\x88\x08" * (len(tensors[name].raw) // 2)

    folder = make_quantized(tmp_path, "modelopt", edit)
    assert dead(folder) == {name}
    refused(folder, repr(name))


def test_an_expert_whose_last_matrix_is_zero_is_said(tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, "modelopt", zeros(f"{EXPERT}.weight"))
    assert dead(folder) == {f"{EXPERT}.weight"}
    (text,) = loaded(folder)
    assert repr(f"{EXPERT}.weight") in text


# ---- not finite ---------------------------------------------------------------------------------

NOT_FINITE: list[tuple[str | None, str, int]] = [
    (None, GATE, 0x7FC0),
    (None, NORM, 0x7F80),
    (None, EMBED, 0xFF80),
    (None, f"{LAYER}.layer_scalar", 0x7FC0),
    ("modelopt", f"{EXPERT}.weight_scale", 0x7F),
    ("modelopt", f"{EXPERT}.weight_scale_2", 0x7FC0_0000),
    ("compressed", f"{EXPERT}.weight_global_scale", 0x7F80_0000),
    ("fp8", f"{EXPERT}.weight", 0xFF),
    ("affine", f"{GATE_UP}.scales", 0x7FC0),
    ("affine", f"{GATE_UP}.biases", 0xFF80),
    ("mxfp8", f"{GATE_UP}.scales", 0xFF),
]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "last"])
@pytest.mark.parametrize(("form", "name", "bits"), NOT_FINITE)
def test_values_that_are_not_finite(
    form: str | None, name: str, bits: int, whole: bool, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        word = "<u4" if bits > 0xFFFF else "<u2" if bits > 0xFF else "u1"
        if whole:
            tensors[name].raw = np.full(
                len(tensors[name].raw) // np.dtype(word).itemsize, bits, word
            ).tobytes()
        else:
            put(tensors[name], -1, bits, word)

    folder = make_quantized(tmp_path, form, edit) if form else make_checkpoint(tmp_path, edit=edit)
    refused(folder, repr(name), "not finite", "model.safetensors")
    found = verify.inspect(folder)["findings"]
    assert {(f["kind"], f["tensor"]) for f in found} == {("non-finite", name)}


# ---- cost ---------------------------------------------------------------------------------------


def test_a_load_reads_a_few_kilobytes_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound tensors are not read in full a second time."""
    full: list[str] = []

    def examine(subject: Any, inner: Callable[[Any], Any] = samples.examine) -> Any:
        full.append(subject.entry.name)
        return inner(subject)

    sampled: list[int] = []

    def sample(*args: Any, inner: Callable[..., np.ndarray] = samples._sample) -> np.ndarray:
        found = inner(*args)
        sampled.append(found.nbytes)
        return found

    monkeypatch.setattr(samples, "examine", examine)
    monkeypatch.setattr(samples, "_sample", sample)
    assert loaded(make_checkpoint(tmp_path)) == []
    assert not full and max(sampled) <= 17 * 16 * 2
    name = f"{LAYER}.experts.3.gate_proj.weight"
    make_quantized(tmp_path / "packed", "modelopt", zeros(name))
    refused(tmp_path / "packed", repr(name))
    assert full == [name]
