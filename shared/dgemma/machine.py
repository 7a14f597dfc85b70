"""The memory of this machine, as far as the system tells without a package of its own.

Linux tells in /proc and, for a container or a service, in the control groups above the process; macOS by
sysconf; Windows not at all. Everything is in bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 1 << 60  # control groups of version 1 write a number near 2^63 for "none"

ROOT = Path("/")


def total_memory() -> int | None:
    """Bytes that this process could ever hold, swap included; None if unknown."""
    facts = _meminfo()
    if "MemTotal" in facts:
        # Swap counts: what fits with it can be loaded, if slowly.
        own = facts["MemTotal"] + facts.get("SwapTotal", 0)
        groups = [limit + facts.get("SwapTotal", 0) for limit, _ in _groups()]
        return min([own, *groups, *_address_space()])
    pages = _pages()
    return None if pages is None else min([pages, *_address_space()])


def free_memory() -> int | None:
    """Bytes that this process can take now without swapping; None if unknown.

    Where the system does not tell it is three quarters of the memory: the rest is the system's.
    """
    facts = _meminfo()
    if "MemAvailable" in facts:
        groups = [max(0, limit - used) for limit, used in _groups()]
        return min([facts["MemAvailable"], *groups, *_address_space()])
    pages = _pages()
    return None if pages is None else pages * 3 // 4


def peak_memory() -> int | None:
    """Most bytes that this process has held, mapped files included; None where /proc does not tell."""
    peak = _facts("proc/self/status").get("VmHWM")
    return None if peak is None else 1024 * peak


def _meminfo() -> dict[str, int]:
    """The lines of /proc/meminfo in bytes; empty elsewhere."""
    return {name: 1024 * value for name, value in _facts("proc/meminfo").items()}


def _facts(file: str) -> dict[str, int]:
    """Names and numbers of a file of the kernel's, line by line; empty if it cannot be read."""
    try:
        lines = (ROOT / file).read_text().splitlines()
    except (OSError, ValueError):
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {name: int(value) for name, value, *_ in (w for w in words if len(w) > 1) if value.isdigit()}


def _number(file: Path) -> int | None:
    """The number in a file of the kernel's; None for "max" and for no file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _groups() -> Iterator[tuple[int, int]]:
    """The limit of every control group around this process that has one, and what it uses."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = (line + "::").split(":")[:3]
        if not controllers:  # version 2
            home, names, cached = "sys/fs/cgroup", ("memory.max", "memory.current"), "file"
        elif "memory" in controllers.split(","):
            home = "sys/fs/cgroup/memory"
            names, cached = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_cache"
        else:
            continue
        # A container sees its own group as the root, whatever path the host gave it.
        inner = Path(path.lstrip("/"))
        for folder in dict.fromkeys([inner, *inner.parents, Path()]):
            limit, used = (_number(ROOT / home / folder / name) for name in names)
            if limit is not None and limit < _NO_LIMIT:
                # Files that the kernel keeps in memory give way.
                kept = _facts(f"{home}/{folder}/memory.stat").get(cached, 0)
                yield limit, max(0, (used or 0) - kept)


def _address_space() -> Iterator[int]:
    """The limit of `ulimit -v`, if there is one."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit not in (resource.RLIM_INFINITY, -1):
        yield limit


def _pages() -> int | None:
    """Physical memory by sysconf, which macOS has."""
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # AttributeError: Windows
        return None
    return size if size > 0 else None
