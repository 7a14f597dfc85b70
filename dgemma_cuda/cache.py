"""Keys and values in a few sizes, so that a step meets few shapes and a captured one can be replayed.

Slots are added at the front, where shorter rows of a batch have theirs: attention masks them already, so a
context that is rounded up to a bucket needs no mask of its own. The price is attention over at most half
as many slots again, and one copy of the context a canvas.
"""

from __future__ import annotations

from collections.abc import Sequence

from dgemma.cache import Cache
from dgemma.config import Config
from dgemma.graph import KV
from dgemma.ops import Ops


def bucket(slots: int) -> int:
    """The least of 0, 256, 384, 512, 768, 1024, … that holds `slots`: powers of two, and halfway between."""
    if slots == 0:
        return 0
    size = 256
    while size < slots:
        size *= 2
    return size * 3 // 4 if size > 256 and slots <= size * 3 // 4 else size


class BucketCache(Cache):
    """A cache that reads in buckets; what it stores is the plain cache's."""

    def __init__(self, ops: Ops, config: Config):
        super().__init__(ops, config)
        self._padded: list[KV] | None = None

    @property
    def slots(self) -> int:
        return bucket(self.length)

    def append(self, new: Sequence[KV]) -> None:
        super().append(new)
        self._padded = None

    def read(self) -> list[KV]:
        """As `Cache.read`, rounded up; the same arrays until something is appended."""
        if self._padded is None:
            self._padded = [
                self._fit(kv, min(self.slots, layer.window - 1) if layer.window else self.slots)
                for kv, layer in zip(super().read(), self.config.layers, strict=bool(self._layers))
            ]
        return self._padded
