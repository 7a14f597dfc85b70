"""The Mac's memory while something runs: what stays resident, and what MLX keeps of what it freed.

macOS pages out what the GPU does not hold "wired", which makes a model that fits crawl; MLX by default keeps
every freed buffer for reuse, up to as much memory as there is. Both are limits of the process: they are set
when the first run begins and put back when the last one ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

# Freed buffers kept for reuse. A step's temporaries are below this; a 24 GB Mac can spare it.
CACHE_LIMIT = 1 << 30
# Share of the GPU's working set that arrays may take before things get slow.
CROWDED = 0.9

_runs = 0  # generations that are under way: they may overlap, as iterators
_before = (0, 0)  # limits to go back to: wired, cache


@contextmanager
def limits(on_gpu: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Limits for one run, shared by runs that overlap; a CPU has only the cache's.

    `say` is told where the model hardly fits.
    """
    global _runs, _before
    if _runs == 0:
        _before = _enter(on_gpu, say)
    _runs += 1
    try:
        yield
    finally:
        _runs -= 1
        if _runs == 0:
            mx.synchronize()  # nothing may be in flight when memory stops being resident
            if on_gpu:
                mx.set_wired_limit(_before[0])
            mx.set_cache_limit(_before[1])


def _enter(on_gpu: bool, say: Callable[[str], None]) -> tuple[int, int]:
    """Set the limits; returns those that there were."""
    wired = 0
    if on_gpu:
        room = int(mx.device_info()["max_recommended_working_set_size"])
        wired = mx.set_wired_limit(room)
        if message := crowded(mx.get_active_memory(), room):
            say(message)
    return wired, mx.set_cache_limit(CACHE_LIMIT)


def crowded(active: int, room: int) -> str | None:
    """A sentence if `active` bytes of arrays leave little of the `room` that the GPU may keep resident."""
    if active <= CROWDED * room:
        return None
    return (
        f"the model takes {active / 1e9:.1f} GB of the {room / 1e9:.1f} GB that macOS lets the GPU keep "
        "resident, so it may be slow: take a smaller format (dgemma convert), or raise the limit with "
        f"sudo sysctl iogpu.wired_limit_mb={int(1.3 * active) >> 20}"
    )
