"""A tensor as a file holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as a file holds it, or one put together from several of them.

    `data` may be a read-only map of the file: copy it before the file goes. bfloat16 is uint16 in it, 8-bit
    floats are uint8 (`dgemma.checkpoint.safetensors.DTYPES`).
    """

    name: str
    dtype: str  # as safetensors names it: "BF16", "F16", "F32", ...
    shape: tuple[int, ...]
    data: np.ndarray
    file: Path

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __getitem__(self, rows: slice) -> Stored:
        """Rows along the first axis, a view."""
        data = self.data[rows]
        return replace(self, shape=data.shape, data=data)

    def to_float32(self) -> np.ndarray:
        """The values as float32 in memory of their own, for floating-point types of 16 bits and more."""
        if self.dtype == "BF16":  # the upper half of a float32
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        assert self.data.dtype.kind == "f", self.dtype
        return self.data.astype(np.float32)
