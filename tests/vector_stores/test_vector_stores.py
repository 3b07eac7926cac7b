"""From documents to ranked answers through the vector stores that people use, embedded, each as its own integration
has it: no server, no network, real model, real reranker. A store that is not installed is skipped by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUERY = "How is a string split into words as a shell would do it?"
ANSWER = "shlex.split: split a string into a list of words, using shell-like syntax."
TOPICS = ["trees", "trains", "apples", "ships", "bread"]


@pytest.fixture(scope="module")
def contents(passages: list[str]) -> list[str]:
    """Real passages, and the one that answers the question in the middle."""
    kept = list(dict.fromkeys(passage[:250] for passage in passages))[:24]
    return [*kept[:12], ANSWER, *kept[12:]]


def needs(*modules: str) -> Any:
    """Import the last of `modules`, or skip, naming the first that is missing."""
    module = None
    for name in modules:
        module = pytest.importorskip(name, reason=f"{name.replace('_', '-')} is not installed")
    return module


# LangChain ------------------------------------------------------------------------------------------------------------


def langchain_chroma(embeddings: Any, folder: Path) -> Any:
    chroma = needs("chromadb", "langchain_chroma")
    return chroma.Chroma("tests", embeddings, persist_directory=str(folder))


def langchain_qdrant(embeddings: Any, folder: Path) -> Any:
    client, qdrant = needs("qdrant_client"), needs("langchain_qdrant")
    local = client.QdrantClient(path=str(folder))
    vectors = client.models.VectorParams(size=embeddings.embedder.dimension, distance=client.models.Distance.COSINE)
    local.create_collection("tests", vectors)
    return qdrant.QdrantVectorStore(local, "tests", embeddings)


def langchain_faiss(embeddings: Any, folder: Path) -> Any:
    faiss, stores = needs("faiss"), needs("langchain_community", "langchain_community.vectorstores")
    docstores = importlib.import_module("langchain_community.docstore.in_memory")
    return stores.FAISS(embeddings, faiss.IndexFlatL2(embeddings.embedder.dimension), docstores.InMemoryDocstore(), {})


def langchain_lancedb(embeddings: Any, folder: Path) -> Any:
    lancedb, stores = needs("lancedb"), needs("langchain_community", "langchain_community.vectorstores")
    return stores.LanceDB(lancedb.connect(str(folder)), embeddings, table_name="tests")


@pytest.fixture(scope="session")
def langchain_models(minilm: str, demo_reranker: str) -> tuple[Any, Any]:
    adapter = needs("langchain_core", "langchain_memsafe")
    return adapter.MemsafeEmbeddings(model_name=minilm), adapter.MemsafeRerank(model_name=demo_reranker, top_n=3)


@pytest.mark.parametrize("make", [langchain_chroma, langchain_qdrant, langchain_faiss, langchain_lancedb])
async def test_langchain(
    make: Callable[[Any, Path], Any], langchain_models: tuple[Any, Any], contents: list[str], tmp_path: Path
) -> None:
    """Documents go in through our embeddings, the answer comes out first after our reranker; sync and async agree."""
    from langchain_core.documents import Document

    classic = "langchain_classic" if importlib.util.find_spec("langchain_classic") else "langchain"
    retriever_of = importlib.import_module(f"{classic}.retrievers").ContextualCompressionRetriever

    embeddings, reranker = langchain_models
    store = make(embeddings, tmp_path)
    store.add_documents([Document(text, metadata={"topic": TOPICS[i % 5]}) for i, text in enumerate(contents)])
    nearest = store.similarity_search(QUERY, k=5)
    assert ANSWER in [document.page_content for document in nearest]
    retriever = retriever_of(base_retriever=store.as_retriever(search_kwargs={"k": 8}), base_compressor=reranker)
    found = retriever.invoke(QUERY)
    assert found[0].page_content == ANSWER
    assert found[0].metadata["topic"] == TOPICS[12 % 5]
    scores = [document.metadata["relevance_score"] for document in found]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    again = await retriever.ainvoke(QUERY)
    assert [document.page_content for document in again] == [document.page_content for document in found]


# LlamaIndex -----------------------------------------------------------------------------------------------------------


def llama_index_chroma(dimension: int, folder: Path) -> Any:
    chromadb, integration = needs("chromadb"), needs("llama_index.vector_stores.chroma")
    collection = chromadb.PersistentClient(str(folder)).create_collection("tests")
    return integration.ChromaVectorStore(chroma_collection=collection)


def llama_index_qdrant(dimension: int, folder: Path) -> Any:
    client, integration = needs("qdrant_client"), needs("llama_index.vector_stores.qdrant")
    return integration.QdrantVectorStore("tests", client=client.QdrantClient(path=str(folder)))


def llama_index_faiss(dimension: int, folder: Path) -> Any:
    faiss, integration = needs("faiss"), needs("llama_index.vector_stores.faiss")
    return integration.FaissVectorStore(faiss_index=faiss.IndexFlatL2(dimension))


def llama_index_lancedb(dimension: int, folder: Path) -> Any:
    needs("lancedb", "pandas")  # the integration imports pandas without declaring it
    return needs("llama_index.vector_stores.lancedb").LanceDBVectorStore(uri=str(folder), table_name="tests")


@pytest.fixture(scope="session")
def llama_index_models(minilm: str, demo_reranker: str) -> tuple[Any, Any]:
    adapter = needs("llama_index.core", "llama_index_memsafe")
    return adapter.MemsafeEmbedding(model_name=minilm), adapter.MemsafeRerank(model=demo_reranker, top_n=3)


@pytest.mark.parametrize("make", [llama_index_chroma, llama_index_qdrant, llama_index_faiss, llama_index_lancedb])
# by its integration
@pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant:UserWarning")
def test_llama_index(
    make: Callable[[int, Path], Any], llama_index_models: tuple[Any, Any], contents: list[str], tmp_path: Path
) -> None:
    """Nodes go in through our embedding model, the answer comes out first after our postprocessor."""
    from llama_index.core import QueryBundle, StorageContext, VectorStoreIndex
    from llama_index.core.schema import TextNode

    embed_model, reranker = llama_index_models
    store = make(len(embed_model.get_text_embedding("a")), tmp_path)
    nodes = [TextNode(text=text, metadata={"topic": TOPICS[i % 5]}) for i, text in enumerate(contents)]
    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex(nodes, storage_context=context, embed_model=embed_model)
    nearest = index.as_retriever(similarity_top_k=8).retrieve(QUERY)
    assert ANSWER in [node.get_content() for node in nearest]
    found = reranker.postprocess_nodes(nearest, query_bundle=QueryBundle(QUERY))
    assert found[0].get_content() == ANSWER
    assert found[0].metadata["topic"] == TOPICS[12 % 5]
    scores = [node.score for node in found]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
