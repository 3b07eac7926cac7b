"""Rows to their own place: results carry their address, so no order is ever restored."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["HostCopy", "RowWriter", "Rows", "to_host"]

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


def to_host(rows: Any) -> Rows:
    """float32 rows on the host, from a tensor of any floating dtype or an array; shape kept."""
    if isinstance(rows, np.ndarray):
        return rows.astype(np.float32, copy=False)
    return np.asarray(rows.detach().float().cpu().numpy(), dtype=np.float32)


class HostCopy:
    """Rows on their way from an accelerator to pinned host memory; the host goes on meanwhile."""

    def __init__(self, rows: Any) -> None:
        self._rows, self._event = rows, None
        if not isinstance(rows, np.ndarray) and rows.device.type == "cuda":
            import torch

            # The device is named, since a default device (torch.set_default_device) cannot be pinned.
            host = torch.empty(rows.shape, dtype=torch.float32, device="cpu", pin_memory=True)
            host.copy_(rows, non_blocking=True)
            self._rows, self._event = host, torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(rows.device))

    def wait(self) -> Rows:
        """float32 rows on the host."""
        if self._event is not None:
            self._event.synchronize()
        return to_host(self._rows)
