"""How well documents answer a query when both have a vector for every token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe.ragged import RaggedArray

__all__ = ["TILE_BYTES", "maxsim"]

TILE_BYTES = 8 << 20
"""Similarities of one tile."""


def maxsim(query: NDArray[Any], documents: RaggedArray, *, tile_bytes: int = TILE_BYTES) -> NDArray[np.float32]:
    """Scores of `documents` for one `query`: for each of the query's vectors the largest dot product with any of a document's,
    summed. As ColBERT's MaxSim; a document without a vector scores minus infinity.

    query: shape (its vectors, dim). documents: of the same dim; they may be memory-mapped: what is read at a time, and the
    similarities, take about `tile_bytes`. Returns float32, shape (len(documents),).
    """
    query = np.asarray(query)
    if query.ndim != 2 or query.shape[1] != documents.dim:
        raise ValueError(f"query: got the shape {query.shape}; give (vectors, {documents.dim})")
    query = query.astype(np.float32, copy=False)
    scores = np.full(len(documents), -np.inf, dtype=np.float32)
    offsets = documents.offsets
    most = max(tile_bytes // (4 * (len(query) + documents.dim)), 1)  # vectors of one tile
    place = 0
    while place < len(documents):
        stop = int(np.searchsorted(offsets, offsets[place] + most, side="right")) - 1
        if stop > place:  # whole documents
            some = _similar(query, documents.values, offsets[place], offsets[stop])
            kept = np.flatnonzero(np.diff(offsets[place : stop + 1]))
            if len(kept):
                starts = offsets[place:stop][kept] - offsets[place]
                scores[place + kept] = np.maximum.reduceat(some, starts, axis=1).sum(axis=0)
            place = stop
            continue
        best = np.full(len(query), -np.inf, dtype=np.float32)  # one document of several tiles
        for start in range(offsets[place], offsets[place + 1], most):
            part = _similar(query, documents.values, start, min(start + most, offsets[place + 1]))
            best = np.maximum(best, part.max(axis=1))
        scores[place] = best.sum()
        place += 1
    return scores


def _similar(query: NDArray[Any], values: NDArray[Any], start: int, stop: int) -> NDArray[np.float32]:
    """float32, shape (query's vectors, stop - start)."""
    found: NDArray[np.float32] = query @ np.asarray(values[start:stop], dtype=np.float32).T
    return found
