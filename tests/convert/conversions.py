"""What the tests of conversions share: the command, a run without it, and looks at what they leave."""

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.cli import main
from dgemma_convert import stream
from dgemma_convert.encode import values
from dgemma_convert.plan import make_plan


def call(*args: str | Path) -> Result:
    result = CliRunner().invoke(main, ["convert", *(str(arg) for arg in args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result: Result, fault: str) -> None:
    assert result.exit_code == 1
    assert result.stderr.startswith("dgemma: error: ")
    assert result.stderr.count("\n") == 1
    assert fault in result.stderr


def run(source: Path, dest: Path, to: str, *settings: str) -> Path:
    plan, checkpoint = make_plan(source, to, "balanced", settings)
    assert checkpoint is not None
    assert stream.convert(plan, checkpoint, dest)
    return dest


def decoded(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint.open(folder)
    return {name: values(checkpoint.read(name)) for name in checkpoint.sources}


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tree(folder: Path) -> dict[str, object]:
    """What lies in a folder and its folders: type and contents of each path, no link followed."""
    found: dict[str, object] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            mode = path.lstat().st_mode
            contents = os.readlink(path) if stat.S_ISLNK(mode) else None
            if stat.S_ISREG(mode):
                contents = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = (stat.S_IFMT(mode), contents)
    return found
