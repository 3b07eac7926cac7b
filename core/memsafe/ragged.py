"""Rows of different lengths in one array: what a model gives that has a vector for every token."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from memsafe.errors import StoreError

__all__ = ["RaggedArray"]


class RaggedArray:
    """Rows end to end.

    values: shape (vectors of all rows, dim), float32 or float16; any array, memory-mapped ones too. offsets: int64, shape
    (rows + 1,): row i is ``values[offsets[i]:offsets[i + 1]]``.

    ``rows[3]`` is that row, a view of shape (its vectors, dim); ``rows[a:b]`` and ``rows[[3, 1, 3]]`` are ragged arrays, a slice
    without a copy.
    """

    def __init__(self, values: NDArray[Any], offsets: Any) -> None:
        offsets = np.asarray(offsets, dtype=np.int64)
        if values.ndim != 2 or offsets.ndim != 1 or not len(offsets) or np.any(np.diff(offsets) < 0):
            raise ValueError("values must have two dimensions, and offsets one, ascending")
        if offsets[0] < 0 or offsets[-1] > len(values):
            raise ValueError(f"offsets run from {offsets[0]} to {offsets[-1]}, but there are {len(values)} values")
        self.values = values
        self.offsets = offsets

    @staticmethod
    def of(rows: Sequence[NDArray[Any]], dim: int | None = None) -> RaggedArray:
        """`rows`, each of shape (its vectors, dim), end to end. dim: for the case that there are none."""
        if not rows:
            return RaggedArray(np.empty((0, dim or 0), np.float32), [0])
        return RaggedArray(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``values.npy`` and ``offsets.npy`` into `folder`, which is made if need be; numpy reads both. What is not part of
        a row is left out. Replaces what an earlier call wrote there; whoever has that open keeps it.

        Raises :class:`StoreError` where it cannot be written.
        """
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        place = Path(folder)
        arrays = {"values.npy": self.values[first:last], "offsets.npy": self.offsets - first}
        try:
            place.mkdir(parents=True, exist_ok=True)
            for name, array in arrays.items():
                with open(place / f"{name}.part", "wb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            (place / "offsets.npy").unlink(missing_ok=True)  # until both are there, none is: old and new do not mix
            for name in arrays:
                os.replace(place / f"{name}.part", place / name)
        except OSError as error:
            raise StoreError(f"{place} cannot be written: {error.strerror or error}", path=str(place)) from error

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> RaggedArray:
        """What :meth:`save` wrote to `folder`, memory-mapped: vectors are read when they are asked for.

        Raises :class:`StoreError` for a folder that lacks one of the files, or holds others.
        """
        values, offsets = Path(folder) / "values.npy", Path(folder) / "offsets.npy"
        for file in (offsets, values):
            if not file.is_file():
                raise StoreError(
                    f"{file} is missing; give a folder that RaggedArray.save has written to its end", path=str(folder)
                )
        try:
            rows = RaggedArray(np.load(values, mmap_mode="r"), np.load(offsets))
            if len(rows.values) != rows.offsets[-1]:
                raise ValueError(f"{len(rows.values)} vectors where {rows.offsets[-1]} are due")
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(
                f"{folder} holds no rows that can be read ({error}); save them again", path=str(folder)
            ) from error
        return rows

    @property
    def counts(self) -> NDArray[np.int64]:
        """Vectors of each row: int64, shape (rows,)."""
        counts: NDArray[np.int64] = np.diff(self.offsets)
        return counts

    @property
    def dim(self) -> int:
        return int(self.values.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes + self.offsets.nbytes)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[place] for place in range(len(self)))

    @overload
    def __getitem__(self, key: int) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | NDArray[Any]) -> RaggedArray: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, np.integer)):
            place = range(len(self))[key]  # negative ones, and IndexError
            return self.values[self.offsets[place] : self.offsets[place + 1]]
        if isinstance(key, slice) and key.step in (None, 1):
            start, stop, _ = key.indices(len(self))
            return RaggedArray(self.values, self.offsets[start : max(start, stop) + 1])
        places = np.arange(len(self))[key]
        counts = self.counts[places]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        taken = np.repeat(self.offsets[places] - offsets[:-1], counts) + np.arange(offsets[-1])
        return RaggedArray(self.values[taken], offsets)

    def __repr__(self) -> str:
        return f"RaggedArray({len(self)} rows, {int(self.offsets[-1] - self.offsets[0])} vectors of {self.dim}, {self.dtype})"
