"""Sparse rows through the frameworks' own Qdrant stores: searching for a text finds it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from memsafe import SparseEmbedder
from tests import sparse_models

pytest.importorskip("sentence_transformers", minversion="6")
qdrant_client = pytest.importorskip("qdrant_client")

TEXTS = ["open(path) iterates over lines", "sort a list with a key", "rivers run past old mills", "an empty cache"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> SparseEmbedder:
    return SparseEmbedder(sparse_models.save_splade(tmp_path_factory.mktemp("s"), max_active_dims=64), device="cpu")


async def test_langchain(embedder: SparseEmbedder) -> None:
    """As ``sparse_embedding`` of LangChain's store; the asynchronous methods give the same vectors."""
    pytest.importorskip("langchain_qdrant")
    from langchain_qdrant import QdrantVectorStore, RetrievalMode

    from langchain_memsafe.sparse import MemsafeSparseEmbeddings

    sparse = MemsafeSparseEmbeddings(embedder)
    options = {"sparse_embedding": sparse, "retrieval_mode": RetrievalMode.SPARSE, "location": ":memory:"}
    store = QdrantVectorStore.from_texts(TEXTS, collection_name="texts", **options)
    for text in TEXTS:
        assert store.similarity_search(text, k=1)[0].page_content == text
    vectors = sparse.embed_documents(TEXTS)
    assert [len(one.indices) for one in vectors] == [64] * 4 and sparse.embed_documents([]) == []
    assert (await sparse.aembed_documents(TEXTS))[1].indices == vectors[1].indices
    assert (await sparse.aembed_query(TEXTS[2])).indices == sparse.embed_query(TEXTS[2]).indices


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant:UserWarning")
def test_llama_index(embedder: SparseEmbedder) -> None:
    """As ``sparse_doc_fn`` and ``sparse_query_fn`` of LlamaIndex's store."""
    pytest.importorskip("llama_index.vector_stores.qdrant")
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode
    from llama_index.vector_stores.qdrant import QdrantVectorStore

    from llama_index_memsafe.sparse import sparse_functions

    documents, queries = sparse_functions(embedder)
    assert documents([]) == ([], [])
    client = qdrant_client.QdrantClient(":memory:")
    store = QdrantVectorStore(
        "texts", client=client, enable_hybrid=True, sparse_doc_fn=documents, sparse_query_fn=queries
    )
    store.add([TextNode(text=text, embedding=[1.0, 0.0]) for text in TEXTS])
    for text in TEXTS:
        query = VectorStoreQuery(query_str=text, sparse_top_k=1, mode=VectorStoreQueryMode.SPARSE)
        assert [node.get_content() for node in store.query(query).nodes or []] == [text]


def test_without_langchain_qdrant() -> None:
    """Its absence says what to install."""
    code = (
        "import sys; sys.modules['langchain_qdrant'] = None\nimport memsafe\n"
        "try:\n    import langchain_memsafe.sparse\nexcept memsafe.MissingExtraError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "memsafe[langchain-qdrant]"' in done.stdout
