"""What each row of a step adds to its logits, on the device.

L canvas positions  V vocabulary  C classes of tokens  K tables of classes
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dgemma.network.ops import Array, Bias, Ops

# Of one row: a class [V] for each token, and what tokens of each class get at each position, [L, C].
RowBias = tuple[np.ndarray, np.ndarray]

# Tables of classes that stay on the device, half a megabyte each, besides those of the last step.
KEPT = 16


class Biases:
    """Makes the bias of a step, and keeps tables of classes on the device."""

    def __init__(self, ops: Ops):
        self._ops = ops
        self._tables: dict[int, tuple[np.ndarray, Array]] = {}  # by id of the host's array, which thus stays

    def of(self, rows: Sequence[RowBias | None], length: int) -> Bias | None:
        """The bias of all positions, from that of each row over `length` positions; None if no row has one.

        Tables and classes are padded to powers of two: a recording exists once for each number of them.
        """
        given = [row for row in rows if row is not None]
        if not given:
            return None
        tables = list({id(table): table for table, _ in given}.values())
        index = {id(table): k for k, table in enumerate(tables)}
        classes = self._classes([*tables, *tables[:1] * (power_of_two(len(tables)) - len(tables))])
        # A row without a bias may have any table, as its values are zeros.
        which = np.repeat([0 if row is None else index[id(row[0])] for row in rows], length)
        width = power_of_two(max(values.shape[1] for _, values in given))
        values = np.zeros((len(rows), length, width), np.float32)
        for own, row in zip(values, rows, strict=True):
            if row is not None:
                own[:, : row[1].shape[1]] = row[1]
        ops = self._ops
        return Bias(classes, ops.asarray(which), ops.aswide(values.reshape(-1, width)))

    def _classes(self, tables: Sequence[np.ndarray]) -> Array:
        """The tables [V] as one array [K, V] on the device."""
        for table in tables:
            kept = self._tables.pop(id(table), None) or self._uploaded(table)
            self._tables[id(table)] = kept  # the latest stand last
        for old in list(self._tables)[: -KEPT - len(tables)]:
            del self._tables[old]
        parts = [self._tables[id(table)][1] for table in tables]
        return parts[0] if len(parts) == 1 else self._ops.concat(parts, 0)

    def _uploaded(self, table: np.ndarray) -> tuple[np.ndarray, Array]:
        assert table.min() >= 0 and table.max() < 2**15, "kernels read classes of two bytes"
        return table, self._ops.asclasses(table[None])


def power_of_two(n: int) -> int:
    """The next power of two, at least `n`."""
    return 1 << (n - 1).bit_length()
