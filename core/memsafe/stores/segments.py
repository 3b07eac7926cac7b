"""Rows of whatever kind a store holds, as the arrays that its files are made of.

A dense row has `dim` numbers. A sparse row has some columns of a vocabulary and as many numbers; a row of a model with a vector
for every token has some vectors: both are :class:`Segments`, rows of different numbers of values, end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe.ragged import RaggedArray

__all__ = ["KINDS", "Part", "Rows", "Segments", "as_given", "as_stored", "in_dtype", "lost_row", "parts_of", "placed"]

Array = NDArray[Any]

KINDS = ("dense", "sparse", "multi_vector")


@dataclass(frozen=True)
class Part:
    """One ``.npy`` file of a shard. width: its columns, None for an array of one dimension. per_row: whether it grows with the
    rows, not with their values."""

    name: str
    dtype: np.dtype[Any]
    width: int | None
    per_row: bool = False


def parts_of(kind: str, dtype: str, dimension: int) -> list[Part]:
    """The files that rows go to; of rows with different numbers of values the last is where each begins (and the last ends)."""
    numbers, starts = np.dtype(dtype).newbyteorder("<"), np.dtype("<i8")
    if kind == "sparse":
        columns = Part("indices", np.dtype("<i4"), None)
        return [Part("data", numbers, None), columns, Part("indptr", starts, None, per_row=True)]
    if kind == "multi_vector":
        return [Part("values", numbers, dimension), Part("offsets", starts, None, per_row=True)]
    return [Part("rows", numbers, dimension, per_row=True)]


class Segments:
    """Rows of different numbers of values, end to end.

    offsets: int64, (rows + 1,), from 0. values: arrays of ``offsets[-1]`` entries: (data, indices), each of one dimension, of
    sparse rows; (values,), of shape (vectors, dim), else. ``rows[a:b]`` is a view, ``rows[[3, 1]]`` a copy.
    """

    def __init__(self, values: Sequence[Array], offsets: Array) -> None:
        self.values, self.offsets = tuple(values), offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_values(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, key: Any) -> Segments:
        if isinstance(key, slice) and key.step in (None, 1):
            start, stop, _ = key.indices(len(self))
            offsets = np.asarray(self.offsets[start : max(start, stop) + 1])
            return Segments([each[offsets[0] : offsets[-1]] for each in self.values], offsets - offsets[0])
        places = np.arange(len(self))[key]
        first = self.offsets[:-1][places]
        counts = self.offsets[1:][places] - first
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        taken = np.repeat(first - offsets[:-1], counts) + np.arange(offsets[-1])
        return Segments([each[taken] for each in self.values], offsets)

    @staticmethod
    def joined(parts: Sequence[Segments]) -> Segments:
        """All rows of `parts`, of which there is one at least, in their order."""
        ends = np.cumsum([0, *(part.num_values for part in parts)])
        offsets = [part.offsets[1:] + end for part, end in zip(parts, ends, strict=False)]
        values = [np.concatenate(each) for each in zip(*(part.values for part in parts), strict=True)]
        return Segments(values, np.concatenate([np.zeros(1, np.int64), *offsets]))


Rows = Array | Segments
"""Rows as they are stored: dense ones are one array, (rows, dim)."""


def as_stored(rows: Any) -> Rows:
    """What an embedder gives: an array, a ``scipy.sparse.csr_array`` or a :class:`RaggedArray`, of which nothing is copied that
    need not be."""
    if isinstance(rows, RaggedArray):
        first = rows.offsets[0]
        return Segments([rows.values[first : rows.offsets[-1]]], rows.offsets - first)
    if hasattr(rows, "indptr"):
        return Segments([rows.data, rows.indices.astype(np.int32, copy=False)], rows.indptr.astype(np.int64))
    return np.asarray(rows)


def as_given(rows: Rows, kind: str, dimension: int) -> Any:
    """The inverse of :func:`as_stored`."""
    if not isinstance(rows, Segments):
        return rows
    if kind == "multi_vector":
        return RaggedArray(rows.values[0], rows.offsets)
    from scipy.sparse import csr_array

    data, indices = rows.values
    starts = (
        rows.offsets.astype(np.int32) if rows.num_values < 1 << 31 else rows.offsets
    )  # else scipy copies the indices
    return csr_array((data, indices, starts), shape=(len(rows), dimension))


def placed(parts: Sequence[tuple[Array, Rows]]) -> Rows:
    """Rows out of `parts`, each of (places, rows at them), in the order of their places, which are 0, 1, ... in all."""
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([places for places, _ in parts]))
    found: Any = [rows for _, rows in parts]
    whole = Segments.joined(found) if isinstance(found[0], Segments) else np.concatenate(found)
    return whole[order]


def in_dtype(rows: Rows, dtype: str) -> Rows:
    """`rows` with their numbers as `dtype`; what that cannot hold becomes infinite: see :func:`lost_row`."""
    with np.errstate(over="ignore"):
        if isinstance(rows, Segments):
            return Segments([rows.values[0].astype(dtype, copy=False), *rows.values[1:]], rows.offsets)
        return rows.astype(dtype, copy=False)


def lost_row(rows: Rows, converted: Rows) -> int | None:
    """The first of `rows` that has a finite number which is none in `converted`."""
    old, new = (each.values[0] if isinstance(each, Segments) else each for each in (rows, converted))
    lost = np.flatnonzero((~np.isfinite(new) & np.isfinite(old)).reshape(len(old), -1).any(axis=1))
    if not len(lost):
        return None
    return int(np.searchsorted(rows.offsets, lost[0], side="right")) - 1 if isinstance(rows, Segments) else int(lost[0])
