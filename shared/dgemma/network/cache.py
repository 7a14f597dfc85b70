"""Keys and values of an encoded context: one small interface, one plain implementation.

Rows of a batch end together. A shorter row has padding at its front, so all rows append, drop and
window at the same slots. Sliding layers keep their last window − 1 slots and `slack` more; `trim` can take
back the `slack`. A backend with fixed-capacity buffers overrides `append` and `read`. A fork is independent
of its origin, whatever either does next.

    B rows  G KV heads  n new slots  C head size
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
        """Slots that `read` returns for a full layer."""
        return self.length

    def append(self, new: Sequence[KV]) -> None:
        """Add each layer's keys and values [B, G, n, C] behind the old ones.

        Layers go one by one, so memory holds at most one layer twice, unless a fork shares it.
        """
        self.length += new[0][0].shape[2]
        self._layers = self._layers or [None] * len(new)
        assert len(new) == len(self._layers), (len(new), len(self._layers))
        for index, kv in enumerate(new):  # no other name for an old layer here: it would live on
            self._layers[index] = self._joined(self._layers[index], kv, index)
            self.ops.settle(self._layers[index])  # lazy arrays would wait for each other

    def _joined(self, old: KV | None, new: KV, index: int) -> KV:
        """Old and new keys and values [B, G, slots, C] of a layer, cut to what the layer keeps."""
        if old is not None:
            new = self.ops.concat([old[0], new[0]], 2), self.ops.concat([old[1], new[1]], 2)
        return self._last(new, self._kept(index))

    def read(self) -> list[KV]:
        """Keys and values [B, G, slots, C] by layer: all on full layers, the last window − 1 on sliding ones.

        window − 1, as the query itself takes one place of the window.
        """
        return [
            self._last(kv, layer.past)
            for kv, layer in zip(self._layers, self.config.layers, strict=bool(self._layers))
        ]

    def fork(self, rows: Sequence[int] | None = None) -> Cache:
        """A cache of these rows, in this order, each as often as named; None means all rows.

        No array is ever written in place, so a fork of all rows shares them.
        """
        if rows is None:
            return self._with(list(self._layers), self.length)
        ids = self.ops.asarray(np.asarray(rows, np.int64))
        return self._with(
            [(self.ops.take(k, ids), self.ops.take(v, ids)) for k, v in self._layers], self.length
        )

    def trim(self, count: int) -> Cache:
        """A cache without the last `count` slots; ValueError if a sliding layer no longer holds enough."""
        most = min([self.length, *self._spare()])
        if not 0 <= count <= most:
            raise ValueError(f"cannot take back {count} of {self.length} slots; at most {most}")
        layers = [(k[:, :, : k.shape[2] - count], v[:, :, : v.shape[2] - count]) for k, v in self._layers]
        return self._with(layers, self.length - count)

    def _spare(self) -> list[int]:
        """Slots beyond the window, for each sliding layer that has dropped some."""
        return [
            k.shape[2] - layer.past
            for (k, _), layer in zip(self._layers, self.config.layers, strict=bool(self._layers))
            if layer.past is not None and k.shape[2] < self.length
        ]

    def merge(self, others: Sequence[Cache]) -> Cache:
        """The rows of this cache, then the others'. Shorter ones are padded at the front."""
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
        """Slots that a layer keeps, None for all."""
        past = self.config.layers[index].past
        return None if past is None else past + self.slack

    def _last(self, kv: KV, count: int | None) -> KV:
        """The last `count` slots of keys and values [B, G, slots, C], all for None."""
        k, v = kv
        if count is None or k.shape[2] <= count:
            return kv
        first = k.shape[2] - count
        return k[:, :, first:], v[:, :, first:]

    def _fit(self, kv: KV, slots: int) -> KV:
        """Keys and values [B, G, slots, C]: the last ones, or all with zeros in front."""
        k, v = self._last(kv, slots)
        if (missing := slots - k.shape[2]) == 0:
            return k, v
        B, G, _, C = k.shape
        zeros = self.ops.asarray(np.zeros((B, G, missing, C), np.float32))
        return self.ops.concat([zeros, k], 2), self.ops.concat([zeros, v], 2)


def empty(ops: Ops, config: Config) -> Cache:
    """A cache of no slots, of the backend's own kind if it has one."""
    cache: Cache = (ops.cache_type or Cache)(ops, config)
    return cache
