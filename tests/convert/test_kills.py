"""A run killed before each of its steps on the disk: the next ends with the same bytes, and loses no shard.

The child process is a fork, so that a kill costs milliseconds and there is one at every step.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint, minute

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
