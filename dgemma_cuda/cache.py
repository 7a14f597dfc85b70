"""Keys and values in a few sizes, so that a step meets few shapes and a captured one can be replayed.

Slots are added at the front, where shorter rows of a batch have theirs: attention masks them already, so a
context that is rounded up to a bucket needs no mask of its own. It is stored as it is read, once. The price
is attention over, and memory for, at most half as many slots again.
"""

from __future__ import annotations

from dgemma.network.cache import Cache
from dgemma.network.ops import KV


def bucket(slots: int) -> int:
    """The least of 0, 256, 384, 512, 768, 1024, … that holds `slots`: powers of two, and halfway between."""
    if slots == 0:
        return 0
    size = 256
    while size < slots:
        size *= 2
    return size * 3 // 4 if size > 256 and slots <= size * 3 // 4 else size


class BucketCache(Cache):
    """A cache that stores buckets; sliding layers store no more than in the plain cache."""

    @property
    def slots(self) -> int:
        return bucket(self.length)

    def _with(self, layers: list[KV], length: int) -> BucketCache:
        other = type(self)(self.ops, self.config)
        other.length = length
        other._layers = [other._stored(kv, index) for index, kv in enumerate(layers)]
        return other

    def _stored(self, kv: KV, index: int) -> KV:
        """Keys and values [B, G, ·, C] of a layer in as many slots as it stores."""
        slots = kv[0].shape[2]
        return kv if slots == self._size(slots, index) else self._joined(None, kv, index)

    def _size(self, slots: int, index: int) -> int:
        """Slots that a layer stores of so many: no padding once some are dropped, as `trim` counts."""
        size = min(self.slots, self._kept(index) or self.slots)
        return size if slots >= self.length else min(size, slots)

    def _joined(self, old: KV | None, new: KV, index: int) -> KV:
        """The last slots of both [B, G, ·, C] as new arrays: views would hold all they were cut from."""
        k, v = new
        old = (k[:, :, :0], v[:, :, :0]) if old is None else old
        size = self._size(old[0].shape[2] + new[0].shape[2], index)
        new = self._last(new, size)
        old = self._fit(old, size - new[0].shape[2])
        return self.ops.concat([old[0], new[0]], 2), self.ops.concat([old[1], new[1]], 2)
