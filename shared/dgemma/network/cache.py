"""Keys and values of an encoded context: one small interface, one plain implementation.

Rows of a batch end together: a shorter row has padding at its front, so all rows append, drop and
window at the same slots. Sliding layers keep their last window − 1 slots and `slack` more, which is
what `trim` can take back. A backend with fixed-capacity buffers overrides `append` and `read`; a fork
is independent of its origin whatever either does next.

    B rows  T slots  G KV heads  C head size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dgemma.network.config import Config
from dgemma.network.ops import KV, Ops


class Cache:
    """Per-layer keys and values [B, G, slots, C] of one context."""

    def __init__(self, ops: Ops, config: Config):
        self.ops, self.config = ops, config
        self.length = 0  # slots, padding included
        self.slack = config.canvas_length
        self._layers: list[Any] = []  # pairs of keys and values

    @property
    def slots(self) -> int:
        """Slots that a full layer's `read` has."""
        return self.length

    def append(self, new: Sequence[KV]) -> None:
        """Add each layer's keys and values [B, G, n, C] behind those that are there.

        Layer by layer: no more than one of them is there twice, unless another cache has it.
        """
        self.length += new[0][0].shape[2]
        self._layers = self._layers or [None] * len(new)
        assert len(new) == len(self._layers), (len(new), len(self._layers))
        for index, kv in enumerate(new):  # nothing else may name an old layer: it would live on
            self._layers[index] = self._joined(self._layers[index], kv, index)
            self.ops.settle(self._layers[index])  # lazy arrays would wait for each other

    def _joined(self, old: KV | None, new: KV, index: int) -> KV:
        if old is not None:
            new = self.ops.concat([old[0], new[0]], 2), self.ops.concat([old[1], new[1]], 2)
        return self._last(new, self._kept(index))

    def read(self) -> list[KV]:
        """What a pass may see: everything on full layers, the last window − 1 slots on sliding ones."""
        return [
            self._last(kv, layer.past)
            for kv, layer in zip(self._layers, self.config.layers, strict=bool(self._layers))
        ]

    def fork(self, rows: Sequence[int] | None = None) -> Cache:
        """A cache of these rows, in this order, each as often as named; of all when None.

        Nothing here is ever written in place, so arrays are shared where rows stay as they are.
        """
        if rows is None:
            return self._with(list(self._layers), self.length)
        ids = self.ops.asarray(np.asarray(rows, np.int64))
        return self._with(
            [(self.ops.take(k, ids), self.ops.take(v, ids)) for k, v in self._layers], self.length
        )

    def trim(self, count: int) -> Cache:
        """A cache without the last `count` slots; ValueError if sliding layers no longer hold enough."""
        most = min([self.length, *self._spare()])
        if not 0 <= count <= most:
            raise ValueError(f"cannot take back {count} of {self.length} slots; at most {most}")
        layers = [(k[:, :, : k.shape[2] - count], v[:, :, : v.shape[2] - count]) for k, v in self._layers]
        return self._with(layers, self.length - count)

    def _spare(self) -> list[int]:
        """Slots beyond the window that each sliding layer which dropped some still holds."""
        return [
            k.shape[2] - layer.past
            for (k, _), layer in zip(self._layers, self.config.layers, strict=bool(self._layers))
            if layer.past is not None and k.shape[2] < self.length
        ]

    def merge(self, others: Sequence[Cache]) -> Cache:
        """This cache's rows and then the others', shorter ones padded at the front."""
        caches = [self, *others]
        layers = []
        for parts in zip(*(cache._layers for cache in caches), strict=True):
            # A row that has dropped slots of this layer limits what can be taken back for all.
            dropped = [
                k.shape[2] for cache, (k, _) in zip(caches, parts, strict=True) if k.shape[2] < cache.length
            ]
            slots = min(dropped) if dropped else max(k.shape[2] for k, _ in parts)
            k, v = zip(*(self._fit(kv, slots) for kv in parts), strict=True)
            layers.append((self.ops.concat(k, 0), self.ops.concat(v, 0)))
        return self._with(layers, max(cache.length for cache in caches))

    def _with(self, layers: list[KV], length: int) -> Cache:
        other = type(self)(self.ops, self.config)
        other._layers, other.length = layers, length
        return other

    def _kept(self, index: int) -> int | None:
        past = self.config.layers[index].past
        return None if past is None else past + self.slack

    def _last(self, kv: KV, count: int | None) -> KV:
        k, v = kv
        if count is None or k.shape[2] <= count:
            return kv
        first = k.shape[2] - count
        return k[:, :, first:], v[:, :, first:]

    def _fit(self, kv: KV, slots: int) -> KV:
        """The last `slots` slots, padded at the front where there are fewer."""
        k, v = self._last(kv, slots)
        if (missing := slots - k.shape[2]) == 0:
            return k, v
        B, G, _, C = k.shape
        zeros = self.ops.asarray(np.zeros((B, G, missing, C), np.float32))
        return self.ops.concat([zeros, k], 2), self.ops.concat([zeros, v], 2)


def empty(ops: Ops, config: Config) -> Cache:
    """A cache of no slots, of the backend's own kind where it has one."""
    cache: Cache = (ops.cache_type or Cache)(ops, config)
    return cache
