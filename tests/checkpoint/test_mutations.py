"""Whatever a load refuses, `dgemma verify` calls unsound: the embedded checkpoint, damaged file by file."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import dgemma
from dgemma.errors import DgemmaError
from dgemma.reports import verify
from dgemma.tiny import MODEL_DIR
from tests.checkpoints import make_checkpoint, minute

SEEDS, ROUNDS = 3, 12  # of each file


def damaged(data: bytes, end: int, rng: np.random.Generator) -> bytes:
    """A copy with one fault; small ones stand before `end`, holes anywhere."""
    made = bytearray(data)
    at = int(rng.integers(end))
    length = int(rng.integers(1, 100))
    kind = rng.integers(9)
    if kind == 0:
        made[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        made[at : at + 3] = rng.bytes(3)
    elif kind == 2:
        del made[rng.integers(len(made)) :]
    elif kind == 3:
        del made[at : at + length]
    elif kind == 4:
        made[at:at] = made[at : at + length]
    elif kind == 5:
        digits = [place for place in range(end) if chr(made[place]).isdigit()]
        made[rng.choice(digits or [at])] = rng.choice(list(b"0123456789-.e]"))
    elif kind == 6:
        words = [b"null", b"true", b"[]", b"{}", b'""', b"-1", b"1e999", b"NaN"]
        colons = [place for place in range(end) if made[place] == ord(":")]
        place = int(rng.choice(colons or [at])) + 1
        made[place : place + int(rng.integers(9))] = words[rng.integers(len(words))]
    else:  # a hole, or a file that was never filled
        start = int(rng.integers(len(made)))
        stop = len(made) if kind == 7 else min(len(made), start + int(rng.integers(1, 1 << 18)))
        made[start:stop] = bytes([rng.choice([0, 0xFF])]) * (stop - start)
    return bytes(made)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutations") / "model"
    if (MODEL_DIR / "config.json").exists():
        shutil.copytree(MODEL_DIR, folder)
    else:
        make_checkpoint(folder, minute(), tokenizer=True)
    return folder


FILES = sorted(
    file.name for file in MODEL_DIR.iterdir() if file.suffix in (".json", ".jinja", ".safetensors")
)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that damage made
def test_what_a_load_refuses_is_unsound(name: str, seed: int, checkpoint: Path) -> None:
    file = checkpoint / name
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little") if file.suffix == ".safetensors" else len(whole)
    rng = np.random.default_rng([seed, *name.encode()])
    refusals = 0
    try:
        for _ in range(ROUNDS):
            file.write_bytes(damaged(whole, end, rng))
            try:
                dgemma.load(checkpoint, "numpy")
            except DgemmaError as error:
                refusals += 1
                assert "\n" not in str(error)
                assert not verify.inspect(checkpoint)["ok"], error
    finally:
        file.write_bytes(whole)
    assert refusals > (2 if file.suffix == ".safetensors" else 0), "the damage misses what is checked"
