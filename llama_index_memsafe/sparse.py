"""LlamaIndex's sparse embedding functions, as ``QdrantVectorStore`` takes them for hybrid search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memsafe import SparseEmbedder

__all__ = ["sparse_functions"]

Encoder = Callable[[list[str]], tuple[list[list[int]], list[list[float]]]]
"""``llama_index.vector_stores.qdrant.utils.SparseEncoderCallable``: texts to columns and numbers of each."""


def sparse_functions(model: Any, **options: Any) -> tuple[Encoder, Encoder]:
    """(for documents, for queries) by one :class:`memsafe.SparseEmbedder`::

        documents, queries = sparse_functions("naver/splade-v3")
        QdrantVectorStore(..., enable_hybrid=True, sparse_doc_fn=documents, sparse_query_fn=queries)

    model: a SparseEmbedder, or what that takes. options: for that, if `model` is none.
    """
    embedder = model if isinstance(model, SparseEmbedder) else SparseEmbedder(model, **options)
    return lambda texts: _lists(embedder.embed_documents(texts)), lambda texts: _lists(embedder.embed_queries(texts))


def _lists(rows: Any) -> tuple[list[list[int]], list[list[float]]]:
    starts = rows.indptr.tolist()
    parts = [slice(start, stop) for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    return [rows.indices[part].tolist() for part in parts], [rows.data[part].tolist() for part in parts]
