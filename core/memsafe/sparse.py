"""Texts to sparse rows over a vocabulary: SPLADE and its kin, for hybrid search."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError
from memsafe.events import EventHook, RunReport
from memsafe.texts import TextModel

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["SparseEmbedder", "SparseRun"]


@dataclass(frozen=True)
class SparseRun:
    """embeddings: ``scipy.sparse.csr_array`` of float32, shape (texts, vocabulary), in the caller's order, the columns of a row
    ascending; report: what it took."""

    embeddings: csr_array
    report: RunReport


class SparseEmbedder(TextModel[SparseRun]):
    """Embeds texts as sparse rows with any model that sentence-transformers loads as a SparseEncoder, inside the memory that is
    really there.

    Numbers and prompts are those of ``SparseEncoder.encode_query`` / ``encode_document``; there is no batch size. Scores over
    the vocabulary are made tile by tile, so that memory grows with tokens, not with tokens times vocabulary.

    Args:
        model: folder, hub id such as ``"naver/splade-v3"``, or a loaded SparseEncoder.
        max_length: tokens after which texts are cut; None as the model says.
        max_active_dims: keep only so many numbers of each row, the largest; None as the model says.
        device, dtype, memory, hooks, show_progress: as for :class:`memsafe.Embedder`.
        options: whatever else the installed SparseEncoder takes.

    Raises:
        ConfigError: an option is unknown or out of range. ModelError, ModelTooLargeError: see there.
    """

    _kind = "sparse"
    _width: int | None = None

    def __init__(
        self,
        model: Any,
        *,
        device: Any = None,
        dtype: Any = None,
        max_length: int | None = None,
        max_active_dims: int | None = None,
        memory: MemoryPolicy | dict[str, Any] | None = None,
        hooks: Sequence[EventHook] = (),
        show_progress: bool = False,
        **options: Any,
    ) -> None:
        self._settings = {
            **options,
            "model": model,
            "device": device,
            "dtype": dtype,
            "max_length": max_length,
            "max_active_dims": max_active_dims,
            "memory": memory,
            "hooks": hooks,
            "show_progress": show_progress,
        }
        self._most = _check_most(max_active_dims)
        if self._most is not None and isinstance(model, (str, os.PathLike)):
            options["max_active_dims"] = self._most
        super().__init__(model, device, dtype=dtype, max_length=max_length, memory=memory, hooks=hooks, options=options)
        self._show_progress = show_progress

    def embed_documents(self, texts: Sequence[str], **options: Any) -> csr_array:
        """Rows of `texts` as documents. Options as for :meth:`run`, and `max_active_dims`: that of the model, or fewer."""
        return self.run(texts, kind="document", **options).embeddings

    def embed_queries(self, texts: Sequence[str], **options: Any) -> csr_array:
        """Rows of `texts` as queries, which overtake documents that wait."""
        return self.run(texts, kind="query", **options).embeddings

    async def aembed_documents(self, texts: Sequence[str], **options: Any) -> csr_array:
        """:meth:`embed_documents` for asyncio."""
        return (await self.arun(texts, kind="document", **options)).embeddings

    async def aembed_queries(self, texts: Sequence[str], **options: Any) -> csr_array:
        """:meth:`embed_queries` for asyncio."""
        return (await self.arun(texts, kind="query", **options)).embeddings

    @property
    def dimension(self) -> int:
        """Columns of a row: the size of the vocabulary, of a CSR model that of its dictionary."""
        if self._width is None:  # modules may tell the encoder's width, or know theirs after the first forward only
            self._width = int(self.embed_documents(["a"]).shape[1])
        return self._width

    def _decisive(self, options: dict[str, Any]) -> dict[str, Any]:
        most = options.get("max_active_dims")
        most = self._most if most is None else most
        known = getattr(self.model, "max_active_dims", None)
        return {"max_active_dims": known if most is None else most, "dimension": self.dimension}

    def _keep(self, options: dict[str, Any]) -> Callable[[Any], Any] | None:
        given = _check_most(options.pop("max_active_dims", None))
        most = self._most if given is None else given
        known = getattr(self.model, "max_active_dims", None)
        if most is not None and known is not None and most > known:
            raise ConfigError(f"max_active_dims: got {most}, but the model keeps {known}; give that or less")
        return None if most is None or most == known else partial(_largest, most=most)

    def _finish(self, rows: Any, report: RunReport) -> SparseRun:
        if rows is None:
            from scipy.sparse import csr_array

            rows = csr_array((0, self.dimension), dtype=np.float32)
        return SparseRun(rows, report)


def _largest(rows: csr_array, most: int) -> csr_array:
    """`rows` with only the `most` numbers of each that are furthest from zero, of equal ones the first."""
    counts = np.diff(rows.indptr)
    row_of = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-np.abs(rows.data), row_of))
    rank = np.arange(len(order)) - np.repeat(rows.indptr[:-1], counts)
    kept = np.sort(order[rank < most])
    offsets = np.concatenate([[0], np.cumsum(np.minimum(counts, most))]).astype(rows.indptr.dtype)
    return type(rows)((rows.data[kept], rows.indices[kept], offsets), shape=rows.shape)


def _check_most(most: Any) -> int | None:
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ConfigError(f"max_active_dims: got {most!r}; give an int of at least 1, or None for all")
    return most
