"""A LangChain document compressor that reranks and never runs out of memory: :class:`MemsafeRerank`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import Field

from langchain_memsafe._callbacks import Reports
from langchain_memsafe._core import is_overridden
from langchain_memsafe._reranking import RerankerModel, relevance
from memsafe import ConfigError, InputError, in_thread

if TYPE_CHECKING:
    from langchain_core.callbacks import Callbacks

    from memsafe import Reranker

__all__ = ["MemsafeRerank"]


class MemsafeRerank(RerankerModel, BaseDocumentCompressor):
    """Keeps the `top_n` documents that a cross-encoder finds most relevant, best first.

    Takes the place of ``CrossEncoderReranker(model=HuggingFaceCrossEncoder(...))``. The documents it returns are
    copies, ids kept, with ``relevance_score`` in their metadata; `parity` returns the very documents, without it.

    Raises:
        memsafe.ModelError: The model is missing, broken or not a cross-encoder.
        memsafe.ConfigError: `top_n` is negative.
        pydantic.ValidationError: An unknown field, or a value of the wrong type.
    """

    top_n: int | None = 3
    """How many documents to keep; None keeps all, 0 none."""

    instruction: str | None = None
    """What a decoder (Qwen3-Reranker) is told to look for: the ``prompt`` of `predict_kwargs`, in a field of its own."""

    parity: bool = False
    """Do exactly as ``CrossEncoderReranker``: the caller's own documents, no score; a negative `top_n` drops the last."""

    score_key: str = Field(default="relevance_score", min_length=1)
    """Where in the metadata the score goes. A value that is already there is replaced."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._num_kept(self.top_n)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return the most relevant of `documents`, best first; equal scores stay in the caller's order.

        Args:
            documents: Any sequence of documents; never edited.
            query: What they are to be relevant to.
            callbacks: Told of the run's figures, ``on_custom_event("memsafe_run", RunReport.to_dict())``; None: those of the
                chain that this is part of.

        Raises:
            memsafe.InputError: `query` is not a string, or an entry is not a document; ``index`` says which.
        """
        documents, texts = _checked(documents, Document)
        if not texts:
            return []
        reranker = self.reranker
        reports = Reports(callbacks)
        scores = reranker.score(query, texts, **self._options(reranker), on_report=reports)
        reports.tell()
        return self._keep(documents, scores)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """As :meth:`compress_documents`; the event loop stays free, and cancelling the task cancels the work."""
        if is_overridden(self, _compress_documents, "compress_documents"):
            return await in_thread(self.compress_documents, documents, query, callbacks)
        documents, texts = _checked(documents, Document)
        if not texts:
            return []
        reranker = await self._shared.aget(self._build)
        reports = Reports(callbacks)
        scores = await reranker.ascore(query, texts, **self._options(reranker), on_report=reports)
        await reports.atell()
        return self._keep(documents, scores)

    def rerank(
        self, documents: Sequence[str | Document], query: str, *, top_n: int | None = -1
    ) -> list[dict[str, Any]]:
        """Return ``{"index", "relevance_score"}`` of the most relevant of `documents`, best first.

        Args:
            documents: Texts, documents, or both.
            query: What they are to be relevant to.
            top_n: How many; None for all, -1 for the `top_n` of this object.
        """
        kept = self._num_kept(self.top_n if top_n == -1 else top_n)
        documents, texts = _checked(documents, (str, Document))
        if not texts:
            return []
        reranker = self.reranker
        reports = Reports()
        scores = reranker.score(query, texts, **self._options(reranker), on_report=reports)
        reports.tell()
        return _ranking(scores, kept)

    async def arerank(
        self, documents: Sequence[str | Document], query: str, *, top_n: int | None = -1
    ) -> list[dict[str, Any]]:
        """As :meth:`rerank`; the event loop stays free, and cancelling the task cancels the work."""
        if is_overridden(self, _rerank, "rerank"):
            return await in_thread(self.rerank, documents, query, top_n=top_n)
        kept = self._num_kept(self.top_n if top_n == -1 else top_n)
        documents, texts = _checked(documents, (str, Document))
        if not texts:
            return []
        reranker = await self._shared.aget(self._build)
        reports = Reports()
        scores = await reranker.ascore(query, texts, **self._options(reranker), on_report=reports)
        await reports.atell()
        return _ranking(scores, kept)

    def _options(self, reranker: Reranker) -> dict[str, Any]:
        options = super()._options(reranker)
        return options if self.instruction is None else {**options, "prompt": self.instruction}

    def _num_kept(self, top_n: int | None) -> int | None:
        """`top_n` as the end of a slice."""
        if top_n is not None and top_n < 0 and not self.parity:
            raise ConfigError(f"top_n: got {top_n}; give 0 or more, or None for all documents")
        return top_n

    def _keep(self, documents: list[Document], scores: np.ndarray) -> list[Document]:
        ranking = _ranking(scores, self._num_kept(self.top_n))
        if self.parity:
            return [documents[entry["index"]] for entry in ranking]
        return [_scored(documents[entry["index"]], self.score_key, entry["relevance_score"]) for entry in ranking]


# As they are here: a test that patches the class is obeyed too.
_compress_documents, _rerank = MemsafeRerank.compress_documents, MemsafeRerank.rerank


def _ranking(scores: np.ndarray, kept: int | None) -> list[dict[str, Any]]:
    """Best first, stable; a score that is not a number goes last."""
    scores = relevance(scores)
    order = np.argsort(-scores, kind="stable")[:kept]
    return [{"index": int(index), "relevance_score": float(scores[index])} for index in order]


def _scored(document: Document, key: str, score: float) -> Document:
    """A copy with `score` in its metadata: id and class are kept. The metadata is a dict of its own; what is in it is shared,
    since it may be large, or nothing that can be copied (a handle, a lock)."""
    return document.model_copy(update={"metadata": {**(document.metadata or {}), key: score}})


def _checked(documents: Any, kinds: type | tuple[type, ...]) -> tuple[list[Any], list[str]]:
    """`documents` as a list, and what the model is to read of each."""
    if isinstance(documents, (str, bytes, Mapping, Document)) or not isinstance(documents, Iterable):
        raise InputError(f"documents: got a {type(documents).__name__}; give a list of documents", index=None)
    documents = list(documents)
    for index, document in enumerate(documents):
        if not isinstance(document, kinds):
            raise InputError(f"documents: entry {index} is a {type(document).__name__}, not a document", index=index)
    return documents, [entry.page_content if isinstance(entry, Document) else entry for entry in documents]
