"""A run killed before each of its steps, and two runs at once: no byte is lost, and no shard is redone.

The run that is killed is a fork, so that a kill costs milliseconds and there is one at every step.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma.errors import ConfigError
from dgemma_convert import lock, stream
from tests.checkpoints import make_checkpoint, minute
from tests.convert.conversions import call, digest, refused, run

KILLED = """
import hashlib, os, shutil, signal, sys
from pathlib import Path

import dgemma_convert.plan
from dgemma_convert import stream

dgemma_convert.plan.SHARD_BYTES = 600
source, root, exists = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "empty"
dest, steps = root / "out", 0
STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "fsync")


def step(event, args):
    global steps
    if event in STEPS and str(args[0]).startswith(str(root)):
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def synced(path, sync=stream._sync):
    step("fsync", [path])
    sync(path)


def run(kill, dest):
    # Exit 0 if it was written, 1 if there was nothing to do.
    global steps
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    steps = kill
    if kill:
        sys.addaudithook(step)
        stream._sync = synced
    plan, checkpoint = dgemma_convert.plan.make_plan(source, "bf16")
    os._exit(not stream.convert(plan, checkpoint, dest))


def look(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def shards(folder):
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


assert run(0, root / "alone") == 0
alone = look(root / "alone")
shutil.rmtree(root / "alone")
kill, kept, published = 0, 0, 0
while True:
    kill += 1
    if exists:
        dest.mkdir()
    ended = run(kill, dest)
    if ended == 0:
        break
    assert ended == -signal.SIGKILL, ended
    whole = dest.is_dir() and any(dest.iterdir())
    assert not whole or look(dest) == alone, kill
    left = shards(dest if whole else root / ".out.partial")
    assert run(0, dest) == int(whole), kill
    assert look(dest) == alone, kill
    assert all(shards(dest)[name] == inode for name, inode in left.items()), kill
    others = set(os.listdir(root)) - {"out"}
    assert others <= ({".out.partial.lock"} if whole else set()), (kill, others)
    kept, published = max(kept, len(left)), published + whole
    shutil.rmtree(dest)
print(kill - 1, kept, len(shards(dest)), published)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("dest", ["missing", "empty"])
def test_killed_before_every_step(tmp_path: Path, dest: str) -> None:
    source = make_checkpoint(tmp_path / "in", minute())
    (source / "README.md").write_text("a card")
    (tmp_path / "root").mkdir()
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "root"), dest]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kills, kept, shards, published = map(int, result.stdout.split())
    assert kills > 30
    assert kept == shards > 2, "no kill came when all shards were written"
    assert published > 0, "no kill came after the last rename"


# ---- two at once --------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "in", minute())


def test_a_second_run_while_the_first_publishes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are written, and the folder has not yet its name."""
    wanted, seen = digest(run(source, tmp_path / "wanted", "bf16")), []
    for step in ("_sync", "_publish"):
        dest, real = tmp_path / step, getattr(stream, step)

        def second(arg: object, dest: Path = dest, real: Callable[[object], None] = real) -> None:
            if arg == tmp_path / f".{dest.name}.partial" or not isinstance(arg, Path):
                refused(call(source, dest, "--to", "bf16"), "another run is writing this conversion")
                seen.append(dest)
            real(arg)

        with monkeypatch.context() as patch:
            patch.setattr(stream, step, second)
            assert digest(run(source, dest, "bf16")) == wanted
    assert len(seen) == 2
    assert not list(tmp_path.glob(".*"))


def test_a_second_run_that_saw_no_destination(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the lock when the first run is done, and must not write again."""
    check, stamps = stream._check_room, []

    def first(*args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(stream, "_check_room", check)
            run(source, tmp_path / "out", "bf16")
        stamps.append((tmp_path / "out").stat().st_ino)

    monkeypatch.setattr(stream, "_check_room", first)
    assert "nothing to do" in call(source, tmp_path / "out", "--to", "bf16").stderr
    assert stamps == [(tmp_path / "out").stat().st_ino]


def test_a_lock_whose_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last run removed the file after this one opened it: a third could make and lock another."""
    real, path = lock._lock, tmp_path / ".out.partial.lock"

    def late(handle: int) -> None:
        real(handle)
        path.unlink()
        monkeypatch.setattr(lock, "_lock", real)

    monkeypatch.setattr(lock, "_lock", late)
    with lock.locked(tmp_path / ".out.partial"):
        assert path.exists()
        with pytest.raises(ConfigError, match="another run"), lock.locked(tmp_path / ".out.partial"):
            pass
    assert os.listdir(tmp_path) == []
