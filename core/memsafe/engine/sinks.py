"""Rows to their own place: results carry their address, so no order is ever restored.

Rows on the host are one of four things: a dense array, float32 of shape (rows, ...); a ``scipy.sparse.csr_array``; a
:class:`memsafe.ragged.RaggedArray`; or :class:`Outputs`, several of these by name. All have a length, and
``rows[places]`` takes some of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe.ragged import RaggedArray

__all__ = ["HostCopy", "Outputs", "RowWriter", "Rows", "finite", "replaced", "to_host"]

Rows = Any
"""Rows on the host, of one of the four kinds."""
_Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Outputs:
    """Several outputs of the same inputs, by name."""

    named: Mapping[str, Rows]

    def __getitem__(self, places: Any) -> Outputs:
        return Outputs({name: rows[places] for name, rows in self.named.items()})

    def __len__(self) -> int:
        return _count(next(iter(self.named.values())))


class RowWriter:
    """Collects rows of one call, whatever their kind. Thread-safe: writers of different rows never wait for each other's copy.

    keep: what is to be kept of the rows of each micro-batch, None for all as it is.
    """

    def __init__(self, num_rows: int, keep: Callable[[Rows], Rows] | None = None) -> None:
        self.num_rows = num_rows
        self._keep = keep
        self._sink: _Dense | _Segments | _Several | None = None
        self._lock = threading.Lock()

    @property
    def array(self) -> Rows | None:
        """All rows; None before the first is written. Dense rows not written are NaN, others empty."""
        return None if self._sink is None else self._sink.rows()

    def write(self, indices: Sequence[int], rows: Rows) -> None:
        """Write `rows`, as many as `indices`, to the positions `indices`."""
        if self._keep is not None:
            rows = self._keep(rows)
        with self._lock:
            if self._sink is None:  # now that the first row tells its kind and shape
                self._sink = _sink(self.num_rows, rows)
        self._sink.write(np.asarray(indices, dtype=np.int64), rows)


class _Dense:
    def __init__(self, num_rows: int, like: Rows) -> None:
        self._array = np.full((num_rows, *like.shape[1:]), np.nan, dtype=np.float32)

    def write(self, indices: _Ints, rows: Rows) -> None:
        self._array[indices] = rows

    def rows(self) -> Rows:
        return self._array


class _Segments:
    """Rows of different numbers of values: kept in pieces until all are there, and joined once."""

    def __init__(self, num_rows: int, like: Rows) -> None:
        self._sparse = not isinstance(like, RaggedArray)
        self._counts = np.zeros(num_rows, np.int64)
        self._pieces: list[tuple[_Ints, Rows]] = []
        self._like = like[np.zeros(0, np.int64)]  # what they are, without a row
        self._joined: Rows | None = None

    def write(self, indices: _Ints, rows: Rows) -> None:
        self._counts[indices] = np.diff(rows.indptr) if self._sparse else rows.counts
        self._pieces.append((indices, rows))

    def rows(self) -> Rows:
        if self._joined is None:
            self._joined = self._join()
        return self._joined

    def _join(self) -> Rows:
        """Each piece is dropped as soon as it is copied, so that not all of them are there twice."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._counts)])
        like = self._like
        total = int(offsets[-1])
        empty = like.data if self._sparse else like.values
        values = np.empty((total, *empty.shape[1:]), empty.dtype)
        columns = np.empty(total, np.int32) if self._sparse else None
        while self._pieces:
            indices, rows = self._pieces.pop()
            starts = rows.indptr if self._sparse else rows.offsets
            found = rows.data if self._sparse else rows.values
            for place, start, stop in zip(indices, starts[:-1], starts[1:], strict=True):
                into = slice(offsets[place], offsets[place + 1])
                values[into] = found[start:stop]
                if columns is not None:
                    columns[into] = rows.indices[start:stop]
        if columns is None:
            return RaggedArray(values, offsets)
        starts = offsets.astype(np.int32) if total < 1 << 31 else offsets
        return type(like)((values, columns, starts), shape=(len(self._counts), like.shape[1]))


class _Several:
    def __init__(self, num_rows: int, like: Outputs) -> None:
        self._writers = {name: _sink(num_rows, rows) for name, rows in like.named.items()}

    def write(self, indices: _Ints, rows: Outputs) -> None:
        for name, writer in self._writers.items():
            writer.write(indices, rows.named[name])

    def rows(self) -> Rows:
        return Outputs({name: writer.rows() for name, writer in self._writers.items()})


def _sink(num_rows: int, like: Rows) -> _Dense | _Segments | _Several:
    if isinstance(like, Outputs):
        return _Several(num_rows, like)
    return _Dense(num_rows, like) if isinstance(like, np.ndarray) else _Segments(num_rows, like)


def _count(rows: Rows) -> int:
    return int(rows.shape[0]) if hasattr(rows, "shape") else len(rows)


def finite(rows: Rows) -> NDArray[np.bool_]:
    """Which rows are numbers throughout: bool, shape (rows,)."""
    if isinstance(rows, Outputs):
        return np.asarray(np.logical_and.reduce([finite(each) for each in rows.named.values()]))
    if isinstance(rows, np.ndarray):
        return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
    starts, values = (rows.offsets, rows.values) if isinstance(rows, RaggedArray) else (rows.indptr, rows.data)
    bad = np.asarray(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(bad)])
    return np.asarray(before[starts[1:]] == before[starts[:-1]])


def replaced(rows: Rows, places: Any, new: Rows) -> Rows:
    """A copy of `rows` in which those at `places` are `new`."""
    writer = RowWriter(_count(rows))
    others = np.setdiff1d(np.arange(writer.num_rows), places)
    writer.write(others.tolist(), rows[others])
    writer.write(places, new)
    return writer.array


def to_host(rows: Any) -> Rows:
    """Rows on the host, from what a forward gives: a tensor of any floating dtype or an array, whose shape is kept, or what
    has a ``to_host`` of its own."""
    if isinstance(rows, np.ndarray):
        return rows.astype(np.float32, copy=False)
    if hasattr(rows, "outputs"):
        return Outputs({name: to_host(each) for name, each in rows.outputs.items()})
    if hasattr(rows, "to_host"):
        return rows.to_host()
    return np.asarray(rows.detach().float().cpu().numpy(), dtype=np.float32)


class HostCopy:
    """Rows on their way from an accelerator to pinned host memory; the host goes on meanwhile."""

    def __init__(self, rows: Any) -> None:
        self._rows, self._event = rows, None
        dense = not isinstance(rows, np.ndarray) and hasattr(
            rows, "is_contiguous"
        )  # others say only here how large they are
        if dense and rows.device.type == "cuda":
            import torch

            # The device is named, since a default device (torch.set_default_device) cannot be pinned.
            host = torch.empty(rows.shape, dtype=torch.float32, device="cpu", pin_memory=True)
            host.copy_(rows, non_blocking=True)
            self._rows, self._event = host, torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(rows.device))

    def wait(self) -> Rows:
        """Rows on the host."""
        if self._event is not None:
            self._event.synchronize()
        return to_host(self._rows)
