"""What this machine has: an OpenBLAS, installed engines, a GPU; and how a process is started on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from benchmarks.peers.engines import MLX, NEEDS, PAIRS

ROOT = Path(__file__).resolve().parents[2]


def find_openblas() -> Path | None:
    """An OpenBLAS with plain symbol names, those with POSIX threads first; None where there is none."""
    try:
        known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:  # not on every user's path
        known = ""
    found = [Path(path) for path in re.findall(r"libopenblas[a-z]?\.so\S* .*=> (\S+)", known)]
    for folder in ("lib/*/openblas-*", "lib64"):
        found += sorted(Path("/usr").glob(f"{folder}/libopenblas*.so.0"))
    found.sort(key=lambda path: re.search("pthread|blasp", str(path.resolve())) is None)
    return found[0] if found else None


def choose_blas(wish: str) -> Path | None:
    """The BLAS to preload for MLX: "auto", "none" or a file."""
    if sys.platform != "linux" or wish == "none":
        return None
    if wish != "auto" and not Path(wish).is_file():  # the loader would only warn
        raise click.BadParameter(f"{wish} is not a file", param_hint="--blas")
    return find_openblas() if wish == "auto" else Path(wish)


def installed(distribution: str) -> str | None:
    """Its version."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def version_of(engine: str) -> str:
    """Versions of what an engine runs on."""
    if engine in PAIRS:
        return f"{NEEDS[engine]} {installed(NEEDS[engine])}"
    under = "mlx" if engine in MLX else "torch"
    return f"{installed(NEEDS[engine])}, {under} {installed(under)}"


def default_device() -> str:
    """PyTorch's default device, found without importing it: the parent stays small."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def environment() -> dict[str, str]:
    """The environment of a process that finds this package from any folder."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}
