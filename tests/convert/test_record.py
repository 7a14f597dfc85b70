"""A second run says "nothing to do" only of what is the same source and the same output, file by file."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma_convert import record, stream
from tests.checkpoints import make_checkpoint, small, write_json
from tests.convert.conversions import call, refused, run, tree

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source `in` in two files and its conversion `out` in several."""
    folder = tmp_path_factory.mktemp("made")
    source = make_checkpoint(folder / "in", small(), shards=2)
    (source / "README.md").write_text("a card")
    if sys.platform == "linux":
        (source / "\udcff.txt").write_text("a name that is no UTF-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dgemma_convert.plan.SHARD_BYTES", 300_000)
        assert call(source, folder / "out", "--to", "bf16").exit_code == 0
    return folder


@pytest.fixture
def pair(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of both, with new times, and shards of the size that they were made with."""
    monkeypatch.setattr("dgemma_convert.plan.SHARD_BYTES", 300_000)
    for name in ("in", "out"):
        shutil.copytree(made / name, tmp_path / name, copy_function=shutil.copyfile)
    return tmp_path


def again(pair: Path, source: str = "in") -> Any:
    return call(pair / source, pair / "out", "--to", "bf16")


def edit(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(pair: Path) -> None:
        data = json.loads((pair / name).read_text())
        change(data)
        write_json(pair / name, data)

    return apply


def flip(name: str, where: int) -> Callable[[Path], None]:
    """One bit of a file, its size and its times as they were."""

    def apply(pair: Path) -> None:
        times = (pair / name).stat()
        with (pair / name).open("r+b") as file:
            file.seek(where, os.SEEK_END if where < 0 else os.SEEK_SET)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        os.utime(pair / name, ns=(times.st_atime_ns, times.st_mtime_ns))

    return apply


def append(name: str) -> Callable[[Path], None]:
    return lambda pair: (pair / name).write_bytes((pair / name).read_bytes() + b" ") and None


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda pair: (pair / name).write_text(text) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda pair: (pair / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda pair: os.truncate(pair / name, size)


def replace_by(make: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    return lambda pair: ((pair / name).unlink(), make(pair / name), None)[2]


def swap(one: str, other: str) -> Callable[[Path], None]:
    def apply(pair: Path) -> None:
        (pair / one).rename(pair / "spare")
        (pair / other).rename(pair / one)
        (pair / "spare").rename(pair / other)

    return apply


def other_model(pair: Path) -> None:
    """Another model under the same name, of the same sizes."""
    make_checkpoint(pair / "in", small(), seed=1, shards=2)


def without_record(data: Any) -> None:
    del data["metadata"]["dgemma"]


FIRST, LAST = "out/model-00001-of-00003.safetensors", "out/model-00003-of-00003.safetensors"
SOURCE = "in/model-00002-of-00002.safetensors"
CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (remove(FIRST), "model-00001-of-00003.safetensors is missing"),
    (remove("out/config.json"), "exists and is not this conversion"),
    (remove("out/generation_config.json"), "generation_config.json is missing"),
    (remove(f"out/{INDEX}"), f"{INDEX} has no record"),
    (truncate(FIRST, 5000), "model-00001-of-00003.safetensors has 5,000 bytes and not"),
    (truncate(LAST, 0), "has 0 bytes and not"),
    (append(LAST), "bytes and not"),
    (flip(FIRST, 30), "model-00001-of-00003.safetensors is not what was written"),
    (flip(FIRST, -1), "model-00001-of-00003.safetensors is not what was written"),
    (flip(LAST, -1000), "model-00003-of-00003.safetensors is not what was written"),
    (flip("out/README.md", 1), "README.md is not what was written"),
    (flip("out/generation_config.json", 9), "generation_config.json is not what was written"),
    (replace_by(Path.mkdir, FIRST), "is not a file"),
    (replace_by(os.mkfifo, "out/README.md"), "README.md is not a file"),
    (replace_by(os.mkfifo, "out/config.json"), "exists and is not this conversion"),
    (replace_by(os.mkfifo, f"out/{INDEX}"), "no record"),
    (write("out/config.json", "{}"), "exists and is not this conversion"),
    (write("out/config.json", "{half"), "exists and is not this conversion"),
    (write(f"out/{INDEX}", '{"metadata": {"dgemma": {"files": []}}}'), "no record"),
    (edit("out/config.json", lambda data: data.update(eos_token_id=[1])), "config.json"),
    (edit(f"out/{INDEX}", without_record), "no record"),
    (edit(f"out/{INDEX}", lambda data: data["weight_map"].popitem()), f"{INDEX} is not what was written"),
    (
        edit(f"out/{INDEX}", lambda data: data["metadata"]["dgemma"]["files"].popitem()),
        "and not in the other",
    ),
    (
        edit(f"out/{INDEX}", lambda data: data["metadata"]["dgemma"].update(files={"/etc/passwd": 1})),
        "the other",
    ),
    (swap(FIRST, LAST), "bytes and not"),
    (flip(SOURCE, -1), "was made from other weights"),
    (flip(SOURCE, -50_000), "was made from other weights"),
    (other_model, "was made from other weights"),
    (append("in/README.md"), "README.md in the source is not what it was"),
    (remove("in/README.md"), "README.md is in the source or in the conversion"),
    (write("in/LICENSE", "new"), "LICENSE is in the source or in the conversion"),
    (append("in/generation_config.json"), "generation_config.json in the source"),
    (edit("in/config.json", lambda data: data.update(eos_token_id=[1])), "another plan"),
]


@pytest.mark.parametrize(("change", "fault"), CHANGES)
def test_a_change_is_noticed(pair: Path, change: Callable[[Path], object], fault: str) -> None:
    change(pair)
    before = tree(pair)
    refused(again(pair), fault)
    assert tree(pair) == before


def touch(pair: Path) -> None:
    for path in (pair / "in").iterdir():
        path.touch()


def move(pair: Path) -> None:
    (pair / "in").rename(pair / "elsewhere")
    (pair / "in").symlink_to("elsewhere")


def notes(pair: Path) -> None:
    (pair / "out" / "notes").mkdir()
    (pair / "out" / ".DS_Store").touch()


def moved_shard(pair: Path) -> None:
    """A shard of the output was moved to another drive, with a link in its place."""
    (pair / FIRST).rename(pair / "shard")
    (pair / FIRST).symlink_to(pair / "shard")


@pytest.mark.parametrize("change", [lambda pair: None, touch, move, notes, moved_shard])
def test_what_changes_nothing(pair: Path, change: Callable[[Path], object]) -> None:
    """Copies with new times and under other names, and files that no conversion wrote."""
    change(pair)
    result = again(pair)
    assert (result.exit_code, "nothing to do" in result.stderr) == (0, True), result.stderr


def test_a_copy_of_the_source_is_the_source(pair: Path) -> None:
    (pair / "in").rename(pair / "copy")
    assert "nothing to do" in again(pair, "copy").stderr


@pytest.mark.parametrize("settings", [["--to", "mlx"], ["--to", "bf16", "--preset", "small"]])
def test_another_conversion_of_the_same_source(pair: Path, settings: list[str]) -> None:
    refused(call(pair / "in", pair / "out", *settings), "exists and is not this conversion")


def test_an_output_without_write_rights_is_still_done(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only share: nothing is written where nothing is to do."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(stream, "_locked", lambda _: pytest.fail("a lock was taken"))
    assert "nothing to do" in again(pair).stderr


def test_the_record_names_no_folder_and_no_time(made: Path, tmp_path: Path, pair: Path) -> None:
    """Conversions of two copies are the same, byte for byte, but for the source's name."""
    run(pair / "in", tmp_path / "second", "bf16")
    names = [path.name for path in (made / "out").iterdir() if path.name not in ("config.json", INDEX)]
    assert len(names) > 5
    assert all((made / "out" / n).read_bytes() == (tmp_path / "second" / n).read_bytes() for n in names)
    first, second = (
        json.loads((folder / INDEX).read_text()) for folder in (made / "out", tmp_path / "second")
    )
    for index in (first, second):
        del index["metadata"]["dgemma"]["files"]["config.json"]
    assert first == second


def test_large_files_are_sampled(tmp_path: Path) -> None:
    """Blocks of both ends and in between; the rest is not read, and a changed size is seen without."""
    file = tmp_path / "x.txt"
    size = 3 * record.FILE_BLOCKS * record.BLOCK
    with file.open("wb") as stream:
        stream.truncate(size)
    blocks = list(record._blocks((7, size), 5))
    assert (blocks[0], blocks[-1]) == ((7, record.BLOCK), (7 + size - record.BLOCK, record.BLOCK))
    assert len(blocks) == 5
    assert list(record._blocks((7, 5 * record.BLOCK), 5)) == [(7, 5 * record.BLOCK)]
    before = record.facts(file)
    flip("x.txt", -1)(tmp_path)
    assert record.facts(file) != before
    assert record.facts(file)["bytes"] == size


def test_every_tensor_of_a_source_is_sampled(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: a change at the start of any of them is seen."""
    monkeypatch.setattr(record, "SOURCE_BLOCKS", 1)
    monkeypatch.setattr(record, "BLOCK", 8)
    checkpoint = Checkpoint.open(pair / "in")
    seen = {record.source_digest(checkpoint)}
    for entry in checkpoint.entries.values():
        flip(f"in/{entry.file.name}", entry.offset)(pair)
        seen.add(record.source_digest(checkpoint))
    assert len(seen) == 1 + len(checkpoint.entries)
