"""Texts to a vector for every token, and reranking with them: ColBERT and its kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe import inputs
from memsafe.calls import in_thread
from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError
from memsafe.events import EventHook, RunReport
from memsafe.ragged import RaggedArray
from memsafe.reranker import RankedDocument, check_top_n, ranked
from memsafe.similarity import maxsim
from memsafe.texts import TextModel

__all__ = ["LateInteractionReranker", "MultiVectorEmbedder", "MultiVectorRun"]

PRECISIONS = ("float32", "float16")


@dataclass(frozen=True)
class MultiVectorRun:
    """embeddings: a row of vectors for each text, in the caller's order; report: what it took."""

    embeddings: RaggedArray
    report: RunReport


class MultiVectorEmbedder(TextModel[MultiVectorRun]):
    """Embeds texts as one vector per token with any model that sentence-transformers loads as a MultiVectorEncoder (ColBERT,
    PyLate), or with the token head of BGE-M3, inside the memory that is really there.

    Numbers, prompts, query expansion and the tokens left out are those of ``MultiVectorEncoder.encode_query`` /
    ``encode_document``, and for BGE-M3 those of FlagEmbedding's ``colbert_vecs``; there is no batch size.

    Args:
        model: folder, hub id such as ``"lightonai/GTE-ModernColBERT-v1"`` or ``"BAAI/bge-m3"``, or a loaded MultiVectorEncoder.
        max_length: tokens after which texts are cut; None as the model says.
        normalize: True scales vectors to length 1; None and False leave them as the model makes them (most scale them).
        precision: ``"float32"``, or ``"float16"``, which halves what is kept.
        device, dtype, memory, hooks, show_progress: as for :class:`memsafe.Embedder`.
        options: whatever else the installed MultiVectorEncoder takes.
    """

    _kind = "multi_vector"

    def __init__(
        self,
        model: Any,
        *,
        device: Any = None,
        dtype: Any = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        precision: str = "float32",
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
            "normalize": normalize,
            "precision": precision,
            "memory": memory,
            "hooks": hooks,
            "show_progress": show_progress,
        }
        self._normalize, self._precision = normalize, checked_precision(precision)
        super().__init__(model, device, dtype=dtype, max_length=max_length, memory=memory, hooks=hooks, options=options)
        self._show_progress = show_progress

    def embed_documents(self, texts: Sequence[str], **options: Any) -> RaggedArray:
        """Rows of `texts` as documents. Options as for :meth:`run`, and `normalize` and `precision` of this call."""
        return self.run(texts, kind="document", **options).embeddings

    def embed_queries(self, texts: Sequence[str], **options: Any) -> RaggedArray:
        """Rows of `texts` as queries, which overtake documents that wait."""
        return self.run(texts, kind="query", **options).embeddings

    async def aembed_documents(self, texts: Sequence[str], **options: Any) -> RaggedArray:
        """:meth:`embed_documents` for asyncio."""
        return (await self.arun(texts, kind="document", **options)).embeddings

    async def aembed_queries(self, texts: Sequence[str], **options: Any) -> RaggedArray:
        """:meth:`embed_queries` for asyncio."""
        return (await self.arun(texts, kind="query", **options)).embeddings

    @property
    def dimension(self) -> int:
        """Width of a vector."""
        return self.embed_documents(["a"]).dim

    def _decisive(self, options: dict[str, Any]) -> dict[str, Any]:
        normalize, precision = options.get("normalize"), options.get("precision")
        return {
            "normalize": bool(self._normalize if normalize is None else normalize),
            "precision": self._precision if precision is None else precision,
            "dimension": self.dimension,
        }

    def _keep(self, options: dict[str, Any]) -> Callable[[Any], Any] | None:
        given = options.pop("normalize", None), options.pop("precision", None)
        normalize = self._normalize if given[0] is None else given[0]
        precision = self._precision if given[1] is None else checked_precision(given[1])
        return partial(_kept, normalize=normalize, precision=precision) if normalize or precision != "float32" else None

    def _finish(self, rows: Any, report: RunReport) -> MultiVectorRun:
        return MultiVectorRun(RaggedArray.of([], dim=self.dimension) if rows is None else rows, report)


class LateInteractionReranker:
    """Ranks documents by MaxSim of their tokens' vectors and the query's; over a :class:`MultiVectorEmbedder`, or what that
    takes. Scores are dot products summed over the query's vectors, so they grow with its length."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.embedder = model if isinstance(model, MultiVectorEmbedder) else MultiVectorEmbedder(model, **options)

    def score(self, query: str, documents: Sequence[str], **options: Any) -> NDArray[np.float32]:
        """Scores of `documents` for `query`: float32, shape (len(documents),). Someone waits for it: it goes before bulk work,
        unless ``urgent=False``. Options as for :meth:`MultiVectorEmbedder.run`."""
        texts = inputs.check_texts(documents, name="documents")
        options = {"urgent": True, **options}
        asked = self.embedder.embed_queries([inputs.check_query(query)], **options)
        return maxsim(asked[0], self.embedder.embed_documents(texts, **options))

    def rerank(
        self, query: str, documents: Sequence[str], top_n: int | None = None, **options: Any
    ) -> list[RankedDocument]:
        """The `top_n` best documents (None: all), best first; equal scores keep their order."""
        check_top_n(top_n)
        return ranked(self.score(query, documents, **options), top_n)

    async def ascore(self, query: str, documents: Sequence[str], **options: Any) -> NDArray[np.float32]:
        """:meth:`score` for asyncio; cancelling the task cancels the work."""
        texts = inputs.check_texts(documents, name="documents")
        options = {"urgent": True, **options}
        asked = await self.embedder.aembed_queries([inputs.check_query(query)], **options)
        found = await self.embedder.aembed_documents(texts, **options)
        return await in_thread(maxsim, asked[0], found)

    async def arerank(
        self, query: str, documents: Sequence[str], top_n: int | None = None, **options: Any
    ) -> list[RankedDocument]:
        """:meth:`rerank` for asyncio."""
        check_top_n(top_n)
        return ranked(await self.ascore(query, documents, **options), top_n)

    def close(self) -> None:
        """Free the model and give its memory back."""
        self.embedder.close()

    def __enter__(self) -> LateInteractionReranker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _kept(rows: RaggedArray, *, normalize: bool | None, precision: str) -> RaggedArray:
    values = rows.values
    if normalize:  # as torch.nn.functional.normalize does
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.float32(1e-12))
    return RaggedArray(values.astype(precision, copy=False), rows.offsets)


def checked_precision(precision: Any) -> str:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: got {precision!r}; choose from {', '.join(PRECISIONS)}")
    return str(precision)
