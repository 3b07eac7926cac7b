"""Rows to their own place: results carry their address, so no order is ever restored."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["RowWriter"]

Rows = NDArray[np.float32]


class RowWriter:
    """Collects rows of one call. Thread-safe: writers of different rows never wait for each other's copy.

    array: float32, shape (num_rows, *row shape); allocated when the first row tells its shape. Rows not written are NaN.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.array: Rows | None = None
        self._lock = threading.Lock()

    def write(self, indices: Sequence[int], rows: Rows) -> None:
        """Write `rows`, float32 of shape (len(indices), ...), to the positions `indices`."""
        with self._lock:
            if self.array is None:
                self.array = np.full((self.num_rows, *rows.shape[1:]), np.nan, dtype=np.float32)
        self.array[np.asarray(indices)] = rows
