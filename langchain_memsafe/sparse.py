"""LangChain's sparse embeddings, as ``langchain_qdrant.QdrantVectorStore`` takes them for hybrid search."""

from __future__ import annotations

from typing import Any

from memsafe import MissingExtraError, SparseEmbedder

try:
    from langchain_qdrant.sparse_embeddings import SparseEmbeddings, SparseVector
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("langchain_qdrant"):
        raise
    raise MissingExtraError(
        'langchain-qdrant is not installed; run: pip install "memsafe[langchain-qdrant]"', name="langchain_qdrant"
    ) from error

__all__ = ["MemsafeSparseEmbeddings"]


class MemsafeSparseEmbeddings(SparseEmbeddings):
    """Sparse embeddings by :class:`memsafe.SparseEmbedder`, for ``QdrantVectorStore(sparse_embedding=...)``.

    Args:
        model: a SparseEmbedder, or what that takes. options: for that, if `model` is none.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.embedder = model if isinstance(model, SparseEmbedder) else SparseEmbedder(model, **options)

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Vectors of `texts` as documents, columns ascending."""
        return _vectors(self.embedder.embed_documents(texts))

    def embed_query(self, text: str) -> SparseVector:
        """The vector of `text` as a query; it overtakes documents that wait."""
        return _vectors(self.embedder.embed_queries([text]))[0]

    async def aembed_documents(self, texts: list[str]) -> list[SparseVector]:
        """:meth:`embed_documents` for asyncio; cancelling the task cancels the work."""
        return _vectors(await self.embedder.aembed_documents(texts))

    async def aembed_query(self, text: str) -> SparseVector:
        """:meth:`embed_query` for asyncio."""
        return _vectors(await self.embedder.aembed_queries([text]))[0]


def _vectors(rows: Any) -> list[SparseVector]:
    starts = rows.indptr.tolist()
    parts = [slice(start, stop) for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    return [SparseVector(indices=rows.indices[part].tolist(), values=rows.data[part].tolist()) for part in parts]
