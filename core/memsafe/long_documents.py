"""Texts that are longer than a model reads at once: cut, as ever, or read in windows whose results become one.

``"truncate"``: the model's own way. For a :class:`Reranker` ``"max_passage"`` and ``"mean_passage"``: the best and the mean score of a
document's windows. For an :class:`Embedder` ``"mean_windows"``: the mean of its windows' embeddings, weighted by their tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe import inputs
from memsafe.calls import Work
from memsafe.errors import ConfigError, InputError

__all__ = ["EMBEDDING", "RERANKING", "LongDocuments", "check", "prepare_chunks"]

RERANKING = ("truncate", "max_passage", "mean_passage")
EMBEDDING = ("truncate", "mean_windows")
MAX_WINDOWS = 64
"""Of one document, unless told otherwise: half a million tokens for a model that reads 8,192 at once. What is beyond is cut, counted
and warned of."""
Array = NDArray[Any]


@dataclass(frozen=True)
class LongDocuments:
    """How a model treats long texts. overlap: tokens that two windows share; None for an eighth. most: windows of one text."""

    mode: str
    overlap: int | None
    most: int

    def prepare(self, fold: Callable[[Array, Array, Array], Array]) -> Callable[[inputs.Distinct, Any], Work]:
        """For a call. fold(rows of windows, owners, tokens): rows of texts; owners ascend, and none is left out."""

        def work(distinct: inputs.Distinct, way: Any) -> Work:
            from memsafe.engine.feeding import failure
            from memsafe.models import windows
            from memsafe.models.ways import Fast

            if not isinstance(way, Fast):
                raise ConfigError(
                    f"long_documents: got {self.mode!r}, but this model's own preprocessing must run unchanged and shows no tokens "
                    "to cut at; use 'truncate'"
                )

            def position(place: int) -> int:
                return place if distinct.positions is None else distinct.positions[place]

            began = time.perf_counter()
            try:
                found = windows.cut(way, distinct.values, self.overlap, self.most)
            except Exception as error:
                raise failure(error, position, distinct.values, range(len(distinct.values))) from None
            owners, tokens = np.asarray(found.owners, dtype=np.int64), np.asarray(found.tokens, dtype=np.float32)
            several = [count for count in found.counts.values() if count > 1]
            most_tokens = None if way.room is None else way.room * self.most
            return Work(
                found.pieces,
                windows.WindowWay(way, most_tokens),
                [position(owner) for owner in found.owners],
                lambda rows: fold(rows, owners, tokens),
                found.owners,
                {"distinct_texts": len(distinct.values), "windowed": len(several), "windows": sum(several)},
                time.perf_counter() - began,
            )

        return work


def check(mode: Any, modes: tuple[str, ...], overlap: Any, most: Any) -> LongDocuments | None:
    """None for "truncate". Raises :class:`ConfigError` for what is out of range."""
    if mode not in modes:
        raise ConfigError(f"long_documents: got {mode!r}; choose from {', '.join(modes)}")
    for name, value, least in (("window_overlap", overlap, 0), ("max_windows", most, 1)):
        given = value is not None or name == "max_windows"
        if given and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{name}: got {value!r}; give an int of at least {least}")
    return None if mode == "truncate" else LongDocuments(mode, overlap, most)


def best(rows: Array, owners: Array, tokens: Array) -> Array:
    """The largest of each document's scores: (windows, ...) -> (documents, ...). NaN if one of them is."""
    return np.asarray(np.maximum.reduceat(rows, _firsts(owners), axis=0))


def mean(rows: Array, owners: Array, tokens: Array) -> Array:
    """The mean of each document's scores."""
    return _weighted(rows, owners, np.ones(len(owners), dtype=np.float32))


def weighted(rows: Array, owners: Array, tokens: Array) -> Array:
    """The mean of each text's rows, weighted by the tokens of its windows; that of a text of one window is its row, unchanged."""
    return _weighted(rows, owners, np.maximum(tokens, 1))


def _weighted(rows: Array, owners: Array, weights: Array) -> Array:
    firsts = _firsts(owners)
    column = weights.reshape(-1, *[1] * (rows.ndim - 1)).astype(np.float64)
    sums = np.add.reduceat(rows * column, firsts, axis=0) / np.add.reduceat(column, firsts, axis=0)
    found = sums.astype(rows.dtype)
    alone = np.diff([*firsts, len(owners)]) == 1
    found[alone] = rows[firsts[alone]]  # not even rounded
    return np.asarray(found)


def _firsts(owners: Array) -> Array:
    """Where each owner's windows begin."""
    return np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])


def check_spans(spans: Any, length: int) -> list[tuple[int, int]]:
    """`spans` as (first character, behind the last) of a document of `length` characters; anything else: :class:`InputError`."""
    checked: list[tuple[int, int]] = []
    if isinstance(spans, (str, bytes)) or not hasattr(spans, "__iter__"):
        raise InputError(
            f"spans: got a {type(spans).__name__}; give (start, stop) of each chunk, in characters", index=None
        )
    for index, span in enumerate(spans):
        try:
            start, stop = (int(value) if hasattr(value, "__index__") else None for value in span)
        except (TypeError, ValueError):
            start = stop = None
        if start is None or stop is None or not 0 <= start < stop <= length:
            raise InputError(
                f"spans: entry {index} is no (start, stop) with 0 <= start < stop <= {length}, the characters of the document",
                index=index,
            )
        checked.append((start, stop))
    return checked


def prepare_chunks(spans: list[tuple[int, int]]) -> Callable[[inputs.Distinct, Any], Work]:
    """For a call with one document, whose row becomes one row for each span."""

    def work(distinct: inputs.Distinct, way: Any) -> Work:
        from memsafe.engine.feeding import failure
        from memsafe.models import windows
        from memsafe.models.ways import Fast

        if not isinstance(way, Fast):
            raise ConfigError(
                "embed_chunks: this model's own preprocessing must run unchanged and shows no tokens to pool; embed the chunks "
                "themselves"
            )
        try:
            piece, chunks = windows.chunks_of(way, distinct.values[0], spans)
        except Exception as error:
            raise failure(error, lambda place: place, distinct.values, [0]) from None
        return Work([piece], windows.ChunkWay(way, chunks))

    return work
