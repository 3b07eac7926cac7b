"""All rows and ids of a store, as arrays and sequences that stay on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from memsafe.stores.manifest import Header
from memsafe.stores.segments import Segments, as_given, parts_of
from memsafe.stores.shards import Array, Id, Shard

__all__ = ["StoredIds", "StoredRows", "StoredSegments"]


class StoredSegments:
    """All rows of a store of sparse rows, or of vectors of tokens: ``rows[5]`` is row 5, (1, vocabulary) or (vectors, dim);
    ``rows[10:20]``, ``rows[[3, 1, 2]]`` and ``rows[mask]`` are a ``scipy.sparse.csr_array`` or a :class:`RaggedArray`.

    A slice within one shard is a view of the files (but for the offsets); whatever else is asked for is copied, and only that.
    """

    def __init__(self, shards: Sequence[Shard], header: Header) -> None:
        self._segments: list[Any] = [shard.rows_view for shard in shards]
        self._starts = np.cumsum([0, *map(len, self._segments)])
        self._header = header
        self.dtype = np.dtype(header.dtype)
        *values, _ = parts_of(header.kind, header.dtype, header.dimension)
        empty = [np.empty((0,) if each.width is None else (0, each.width), each.dtype) for each in values]
        self._nothing = Segments(empty, np.zeros(1, np.int64))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_values(self) -> int:
        """Numbers of all sparse rows, or vectors of all rows."""
        return sum(each.num_values for each in self._segments)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (int, np.integer)):
            found = self._given(self.segments(slice(place := range(len(self))[index], place + 1)))
            return found[0] if self._header.kind == "multi_vector" else found
        return self._given(self.segments(index))

    def segments(self, index: Any) -> Segments:
        """As ``rows[index]``, in the arrays of the files."""
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            pairs = list(zip(self._segments, map(int, self._starts), strict=False))
            parts = [
                each[max(start - first, 0) : stop - first]
                for each, first in pairs
                if start < first + len(each) and stop > first
            ] or [self._nothing]
            return parts[0] if len(parts) == 1 else Segments.joined(parts)
        places = np.arange(len(self))[index]
        which = np.searchsorted(self._starts, places, side="right") - 1
        order = np.argsort(which, kind="stable")
        some = [
            self._segments[number][places[which == number] - self._starts[number]] for number in np.unique(which)
        ] or [self._nothing]
        back = np.empty(len(places), np.int64)
        back[order] = np.arange(len(places))
        return Segments.joined(some)[back]

    def _given(self, segments: Segments) -> Any:
        return as_given(segments, self._header.kind, self._header.dimension)

    def __repr__(self) -> str:
        return f"StoredSegments({len(self)} rows, {self.num_values} values, {self.dtype})"


class StoredRows:
    """All rows as one array that stays on the disk: ``rows[5]``, ``rows[10:20]``, ``rows[[3, 1, 2]]``, ``numpy.asarray(rows)``.

    A slice within one shard is a view of the file; whatever else is asked for is copied, and only that.
    """

    ndim = 2

    def __init__(self, shards: Sequence[Shard], dtype: str, dimension: int) -> None:
        self._arrays: list[Any] = [shard.rows_view for shard in shards]
        self._starts = np.cumsum([0, *map(len, self._arrays)])
        self.dtype, self.shape = np.dtype(dtype), (int(self._starts[-1]), dimension)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        if isinstance(index, tuple):
            return self[index[0]][
                (slice(None), *index[1:]) if np.ndim(index[0]) or isinstance(index[0], slice) else index[1:]
            ]
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        places = np.asarray(index)
        if places.dtype == bool:
            if places.shape != (len(self),):
                raise IndexError(f"a mask of shape {places.shape} for {len(self)} rows")
            places = np.flatnonzero(places)
        if places.size and not np.issubdtype(places.dtype, np.integer):
            raise IndexError(f"rows are chosen by ints, slices or masks, not by {places.dtype}")
        places = places.astype(np.int64)
        if ((places < -len(self)) | (places >= len(self))).any():
            raise IndexError(f"row out of range; there are {len(self)}")
        return self._take(np.where(places < 0, places + len(self), places))

    def _slice(self, start: int, stop: int, step: int) -> Array:
        if step != 1:
            return self._take(np.arange(start, stop, step))
        parts: list[Array] = [
            array[max(start - int(first), 0) : stop - int(first)]
            for array, first in zip(self._arrays, self._starts, strict=False)
            if start < int(first) + len(array) and stop > int(first)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), self.dtype)

    def _take(self, places: Array) -> Array:
        taken = np.empty((*places.shape, self.shape[1]), self.dtype)
        which = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(which):
            here = which == number
            taken[here] = self._arrays[number][places[here] - self._starts[number]]
        return taken

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("rows lie on the disk in several files: one array of them is a copy")
        whole = self._slice(0, len(self), 1)
        return np.array(whole, dtype=dtype or self.dtype)

    def __repr__(self) -> str:
        return f"StoredRows(shape={self.shape}, dtype={self.dtype})"


class StoredIds(Sequence[Id]):
    """Ids, read from the disk when asked for."""

    def __init__(self, shards: Sequence[Shard], starts: Array) -> None:
        self._shards, self._starts = shards, starts

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Id: ...
    @overload
    def __getitem__(self, index: slice) -> list[Id]: ...
    def __getitem__(self, index: int | slice) -> Id | list[Id]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[place] for place in range(start, stop, step)]
            return self._slice(start, stop)
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"id {index} of {len(self)}")
        return self._slice(place, place + 1)[0]

    def _slice(self, start: int, stop: int) -> list[Id]:
        found: list[Id] = []
        for shard, first in zip(self._shards, self._starts, strict=False):
            low, high = max(start - int(first), 0), min(stop - int(first), shard.rows)
            if low < high:
                found += shard.ids(low, high)
        return found

    def __iter__(self) -> Iterator[Id]:
        for start in range(0, len(self), 4096):
            yield from self._slice(start, min(start + 4096, len(self)))

    def __repr__(self) -> str:
        return f"StoredIds({len(self)})"
