"""Ours inside LangChain's own machinery: stores, caches, indexing, retrievers, compressor pipelines."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.stores import InMemoryByteStore
from langchain_core.vectorstores import InMemoryVectorStore

from langchain_memsafe import MemsafeCrossEncoder, MemsafeEmbeddings, MemsafeRerank

from .conftest import CLASSIC, Calls, same_ranking

compressors = importlib.import_module(f"{CLASSIC}.retrievers.document_compressors")
CacheBackedEmbeddings: Any = importlib.import_module(f"{CLASSIC}.embeddings").CacheBackedEmbeddings
ContextualCompressionRetriever: Any = importlib.import_module(f"{CLASSIC}.retrievers").ContextualCompressionRetriever
CrossEncoderReranker: Any = compressors.CrossEncoderReranker
DocumentCompressorPipeline: Any = compressors.DocumentCompressorPipeline
EmbeddingsFilter: Any = compressors.EmbeddingsFilter

QUERY = "How is a string split into words?"


@pytest.fixture(scope="module")
def documents(passages: list[str]) -> list[Document]:
    wanted = "Split the string into shell-like words with the syntax of a shell command line."
    texts = [*(passage[:150] for passage in passages[:12]), wanted]
    return [Document(text, id=f"id-{i}", metadata={"n": i, "source": f"file-{i}"}) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def store(ours: MemsafeEmbeddings, documents: list[Document]) -> InMemoryVectorStore:
    store = InMemoryVectorStore(ours)
    store.add_documents(documents)
    return store


def test_vector_store(store: InMemoryVectorStore) -> None:
    """A vector store on our embeddings finds the passage that answers the question."""
    assert store.similarity_search(QUERY, k=1)[0].metadata["n"] == 12


async def test_vector_store_async(ours: MemsafeEmbeddings, documents: list[Document], core_calls: Calls) -> None:
    """The async methods of a store reach the core's async methods, with the whole list at once."""
    store = InMemoryVectorStore(ours)
    await store.aadd_documents(documents)
    found = await store.asimilarity_search(QUERY, k=1)
    assert found[0].metadata["n"] == 12
    assert [(call["method"], call["inputs"]) for call in core_calls] == [("arun", len(documents)), ("arun", 1)]


class Recorder(BaseCallbackHandler):
    """Keeps what a retriever tells its callbacks."""

    def __init__(self) -> None:
        self.found: list[list[int]] = []

    def on_retriever_end(self, documents: Sequence[Document], **kwargs: Any) -> None:
        self.found.append([document.metadata["n"] for document in documents])


async def test_compression_retriever(store: InMemoryVectorStore, reranker: MemsafeRerank) -> None:
    """Retrieve, then rerank: sync and async give the same documents, with scores, ids kept; callbacks hear of both."""
    base = store.as_retriever(search_kwargs={"k": 6})
    retriever = ContextualCompressionRetriever(base_retriever=base, base_compressor=reranker)
    recorder = Recorder()
    found = retriever.invoke(QUERY, config={"callbacks": [recorder]})
    assert found[0].id == "id-12" and len(found) == 3
    scores = [document.metadata["relevance_score"] for document in found]
    assert scores == sorted(scores, reverse=True)
    assert same_ranking(await retriever.ainvoke(QUERY), found)
    assert [len(found) for found in recorder.found] == [6, 3]
    assert all("relevance_score" not in document.metadata for document in base.invoke(QUERY))


async def test_parity_retriever(
    store: InMemoryVectorStore, reranker: MemsafeRerank, cross_encoder: MemsafeCrossEncoder
) -> None:
    """parity=True in a retriever returns what CrossEncoderReranker on our cross-encoder returns, sync and async."""
    base = store.as_retriever(search_kwargs={"k": 6})
    compressors = (CrossEncoderReranker(model=cross_encoder), reranker.model_copy(update={"parity": True}))
    theirs, ours = (ContextualCompressionRetriever(base_retriever=base, base_compressor=it) for it in compressors)
    assert ours.invoke(QUERY) == theirs.invoke(QUERY) == await ours.ainvoke(QUERY) == await theirs.ainvoke(QUERY)


def test_retriever_that_finds_nothing(ours: MemsafeEmbeddings, reranker: MemsafeRerank) -> None:
    """An empty store: an empty result."""
    base = InMemoryVectorStore(ours).as_retriever()
    assert ContextualCompressionRetriever(base_retriever=base, base_compressor=reranker).invoke(QUERY) == []


class ToTuple(BaseDocumentCompressor):
    """A compressor whose result is a tuple, which the interface allows, and which takes no callbacks."""

    def compress_documents(self, documents: Sequence[Document], query: str) -> tuple[Document, ...]:  # type: ignore[override]
        return tuple(documents)

    async def acompress_documents(self, documents: Sequence[Document], query: str) -> tuple[Document, ...]:  # type: ignore[override]
        return tuple(documents)


class Shorten(BaseDocumentTransformer):
    """A transformer after which the documents are other objects."""

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        return tuple(
            document.model_copy(update={"page_content": document.page_content[:100]}) for document in documents
        )

    async def atransform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        return self.transform_documents(documents)


async def test_compressor_pipeline(documents: list[Document], reranker: MemsafeRerank) -> None:
    """In a DocumentCompressorPipeline ours takes tuples and gives what the next step takes, sync and async."""
    pipeline = DocumentCompressorPipeline(transformers=[ToTuple(), Shorten(), reranker, ToTuple(), reranker])
    got = list(pipeline.compress_documents(tuple(documents), QUERY, callbacks=[BaseCallbackHandler()]))
    assert got[0].id == "id-12" and len(got) == 3
    again = await pipeline.acompress_documents(documents, QUERY, callbacks=[BaseCallbackHandler()])
    assert same_ranking(again, got)


def test_embeddings_filter(documents: list[Document], ours: MemsafeEmbeddings, reranker: MemsafeRerank) -> None:
    """Our embeddings filter and our reranker ranks, in one pipeline."""
    pytest.importorskip("langchain_community", reason="EmbeddingsFilter needs langchain-community")
    pipeline = DocumentCompressorPipeline(transformers=[EmbeddingsFilter(embeddings=ours, k=5), reranker])
    assert pipeline.compress_documents(documents, QUERY)[0].metadata["n"] == 12


@pytest.mark.filterwarnings("ignore:.*SHA-1")
async def test_cache_backed_embeddings(ours: MemsafeEmbeddings, core_calls: Calls) -> None:
    """CacheBackedEmbeddings asks the core once for all misses and not at all for hits, sync and async."""
    cached = CacheBackedEmbeddings.from_bytes_store(ours, InMemoryByteStore(), namespace="m")
    first = cached.embed_documents(["a", "b"])
    again = cached.embed_documents(["c", "a", "d", "b"])
    assert [call["inputs"] for call in core_calls] == [2, 2]
    assert again[1::2] == first == await cached.aembed_documents(["a", "b"])
    assert [call["inputs"] for call in core_calls] == [2, 2]
    await cached.aembed_documents(["e"])
    assert core_calls[2]["method"] == "arun"


@pytest.mark.filterwarnings("ignore:.*SHA-1")
def test_indexing(ours: MemsafeEmbeddings, documents: list[Document]) -> None:
    """The indexing API adds what is new, skips what it has, and the store finds it."""
    store = InMemoryVectorStore(ours)
    records = InMemoryRecordManager(namespace="tests")
    records.create_schema()
    options: dict[str, Any] = {"cleanup": "incremental", "source_id_key": "source"}
    first = index(documents, records, store, **options)
    assert (first["num_added"], first["num_skipped"]) == (len(documents), 0)
    changed = [*documents[:-1], documents[-1].model_copy(update={"page_content": "Split a string into words."})]
    second = index(changed, records, store, **options)
    assert (second["num_added"], second["num_skipped"], second["num_deleted"]) == (1, len(documents) - 1, 1)
    assert store.similarity_search(QUERY, k=1)[0].page_content == "Split a string into words."
