"""Which kernels run on this machine: what `dgemma selftest` found here, and nothing before it has run.

A Metal kernel that is right on one chip may fail to compile on another, or be slower than MLX's own. So
kernels are off until the selftest has compared and timed them, and its verdict holds for that chip, macOS,
MLX and text of the kernels only. It is a small file in the user's cache; deleting it turns the kernels off.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

# The composites that have kernels, and `gather`: whether the fused expert products beat MLX's own.
KERNELS = (
    "rms_norm",
    "heads",
    "open_branches",
    "join_branches",
    "attend",
    "router",
    "experts",
    "gather",
    "vocabulary",
)


def machine() -> dict[str, str]:
    """The chip, system, MLX and kernels that a verdict holds for."""
    text = b"".join(path.read_bytes() for path in sorted((Path(__file__).parent / "kernels").glob("*.py")))
    return {
        "chip": str(mx.device_info().get("device_name", "unknown")),
        "system": f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(),
        "mlx": version("mlx"),
        "kernels": hashlib.sha256(text).hexdigest()[:16],
    }


def folder() -> Path:
    """The folder of verdicts."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgemma"


def path() -> Path:
    """This machine's verdict."""
    key = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return folder() / f"metal-{key}.json"


def write(verdict: Mapping[str, str | None]) -> Path:
    """Keep why each kernel is off, None where it runs; one rename replaces what was there."""
    place = path()
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"machine": machine(), "off": dict(verdict)}, indent=2) + "\n")
    part.replace(place)
    return place


def read() -> dict[str, str | None] | None:
    """This machine's verdict, None where there is none or it cannot be read."""
    try:
        found: Any = json.loads(path().read_text())["off"]
        return {name: found[name] for name in KERNELS}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def enabled(verdict: Mapping[str, str | None] | None) -> frozenset[str]:
    """The kernels that a verdict lets run."""
    return frozenset(name for name, why in (verdict or {}).items() if why is None)


def notice(verdict: Mapping[str, str | None] | None) -> str | None:
    """A sentence on what a user should know of a verdict; None if all is well."""
    if not hasattr(mx.fast, "metal_kernel"):
        return f"MLX {version('mlx')} has no custom kernels, so its own operations run; a newer one is faster"
    if verdict is None:
        return "Metal kernels are off until `dgemma selftest` has checked them here; plain MLX runs, slower"
    # Slower than MLX's own is no defect: the better one runs.
    broken = [name for name, why in verdict.items() if why is not None and not why.startswith("slower")]
    if broken:
        return f"kernels that failed the selftest are off: {', '.join(broken)}; plain MLX runs in their place"
    return None
