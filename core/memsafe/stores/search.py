"""Exact search over rows that lie on the disk: blocked matrix products, and the best of each block kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe.errors import ConfigError
from memsafe.ragged import RaggedArray
from memsafe.similarity import maxsim

__all__ = ["ROWS", "Neighbours", "nearest", "nearest_sparse", "nearest_vectors", "norms"]

Array = NDArray[Any]
Found = tuple[NDArray[np.int64], NDArray[np.float32]]
ROWS = 65_536
"""Rows of a batch that is searched at a time, where they are not of one width."""
_EPS = np.float32(1e-12)


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows to each query, best first.

    ids: a list for each query. positions: int64, (queries, k), rows of the store. scores: float32, (queries, k). k is smaller
    where the store has fewer rows.
    """

    ids: list[list[Any]]
    positions: NDArray[np.int64]
    scores: NDArray[np.float32]


def norms(rows: Array, max_bytes: int) -> Array:
    """Lengths of `rows`: float32, (rows,)."""
    lengths = np.empty(len(rows), np.float32)
    for start, block in _blocks(rows, 1, max_bytes):
        lengths[start : start + len(block)] = np.sqrt(np.einsum("ij,ij->i", block, block))
    return np.maximum(lengths, _EPS)


def nearest(
    arrays: Sequence[Array],
    queries: Array,
    k: int,
    dimension: int,
    *,
    metric: str,
    norms: Sequence[Array] | None,
    max_bytes: int,
) -> Found:
    """(positions int64, scores float32), each (queries, k), best first. norms: lengths of the rows of each array, for "cosine"."""
    if metric not in ("cosine", "dot"):
        raise ConfigError(f"metric: got {metric!r}; choose 'cosine' or 'dot'")
    _check_k(k)
    asked = np.atleast_2d(queries).astype(np.float32)
    if asked.ndim != 2 or asked.shape[1] != dimension:
        raise ConfigError(f"queries: got shape {np.shape(queries)}; the rows have {dimension} dimensions")
    if metric == "cosine":
        asked = asked / np.maximum(np.linalg.norm(asked, axis=1, keepdims=True), _EPS)
    best = np.full((len(asked), 0), 0, np.float32)
    places = np.empty((len(asked), 0), np.int64)
    first = 0
    for number, array in enumerate(arrays):
        for start, block in _blocks(array, len(asked), max_bytes):
            scores = asked @ block.T
            if norms is not None:
                scores /= norms[number][start : start + len(block)]
            best, places = _merge(best, places, scores, first + start, k)
        first += len(array)
    return places, best


def nearest_sparse(
    batches: Iterator[Any], queries: Any, k: int, dimension: int, *, metric: str | None, max_bytes: int
) -> Found:
    """As :func:`nearest`, by dot products. batches: a csr_array each. queries: a sparse array, or one of numbers."""
    from scipy.sparse import csr_array

    _check_metric(metric, "dot", "sparse")
    _check_k(k)
    if isinstance(queries, RaggedArray):
        raise ConfigError(
            "queries: got a RaggedArray; the store is sparse: give what SparseEmbedder.embed_queries gives"
        )
    asked = csr_array(np.atleast_2d(queries) if isinstance(queries, (np.ndarray, list)) else queries, dtype=np.float32)
    if asked.shape[1] != dimension:
        raise ConfigError(f"queries: got shape {asked.shape}; the rows have {dimension} columns")
    columns, step = asked.T.tocsc(), max(max_bytes // (4 * max(asked.shape[0], 1)), 1)
    best, places, first = np.empty((asked.shape[0], 0), np.float32), np.empty((asked.shape[0], 0), np.int64), 0
    for rows in batches:
        for start in range(0, rows.shape[0], step):
            some = rows[start : start + step] if rows.shape[0] > step else rows
            scores = (some.astype(np.float32) @ columns).toarray().T
            best, places = _merge(best, places, scores, first + start, k)
        first += rows.shape[0]
    return places, best


def nearest_vectors(
    batches: Iterator[Any], queries: Any, k: int, dimension: int, *, metric: str | None, max_bytes: int
) -> Found:
    """As :func:`nearest`, by MaxSim: see :func:`memsafe.similarity.maxsim`. batches: a RaggedArray each. queries: one, or the
    vectors of one query."""
    _check_metric(metric, "maxsim", "of vectors of tokens")
    _check_k(k)
    asked = list(queries) if isinstance(queries, RaggedArray) else [np.asarray(queries)]
    for query in asked:
        if query.ndim != 2 or query.shape[1] != dimension:
            raise ConfigError(
                f"queries: got shape {query.shape}; give what MultiVectorEmbedder.embed_queries gives: vectors of {dimension}"
            )
    best, places, first = np.empty((len(asked), 0), np.float32), np.empty((len(asked), 0), np.int64), 0
    for rows in batches:
        scores = np.empty((len(asked), len(rows)), np.float32)
        for place, query in enumerate(asked):
            scores[place] = maxsim(query, rows, tile_bytes=max_bytes)
        best, places = _merge(best, places, scores, first, k)
        first += len(rows)
    return places, best


def _check_metric(metric: str | None, only: str, kind: str) -> None:
    if metric not in (None, only):
        raise ConfigError(f"metric: got {metric!r}; the store is {kind}: leave it out, or give {only!r}")


def _check_k(k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"k: got {k!r}; give an int of at least 1")


def _merge(best: Array, places: Array, scores: Array, start: int, k: int) -> tuple[Array, Array]:
    """The best `k` of what there was and of `scores`, whose first column is row `start`. Equal ones: the earlier row first."""
    columns = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    if scores.shape[1] > 4 * k:  # what may be among the best k, ties with the last of them included
        least = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
        if best.shape[1] == k:
            least = np.maximum(least, best[:, -1:])
        wanted = (scores >= least).any(axis=0)
        scores, columns = scores[:, wanted], columns[:, wanted]
    all_scores = np.concatenate((best, scores), axis=1)
    all_places = np.concatenate((places, columns + start), axis=1)
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(all_scores, order, axis=1), np.take_along_axis(all_places, order, axis=1)


def _blocks(rows: Array, num_queries: int, max_bytes: int) -> Iterator[tuple[int, Array]]:
    """(first row, float32 rows) such that rows and scores of a block take about `max_bytes`."""
    step = max(max_bytes // (4 * max(rows.shape[1], num_queries)), 1)
    for start in range(0, len(rows), step):
        yield start, rows[start : start + step].astype(np.float32, copy=False)
