"""From a store of embeddings into vector stores, a few rows at a time: none of them needs the whole in memory twice.

python examples/into_vector_stores.py [MODEL]     # faiss-cpu, lancedb, qdrant-client and the frameworks, those that are installed
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from memsafe import Embedder, Store, embed_corpus, open_store
from models import minilm
from passages import load_passages


def faiss_index(store: Store, folder: Path) -> Any:
    """An index of FAISS; positions in it are those of the store."""
    import faiss

    index = faiss.IndexFlatIP(store.dimension)
    for _, rows in store.iter_batches(1024):
        index.add(rows)  # float32 rows go in as they lie on the disk
    return lambda query, k: [store.ids[int(place)] for place in index.search(query[None], k)[1][0]]


def lance_table(store: Store, folder: Path) -> Any:
    """A table of LanceDB, fed with Arrow batches."""
    import lancedb
    import pyarrow as arrow

    schema = arrow.schema([("id", arrow.string()), ("vector", arrow.list_(arrow.float32(), store.dimension))])

    def batches() -> Iterator[Any]:
        for ids, rows in store.iter_batches(1024):
            vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.reshape(-1)), store.dimension)
            yield arrow.record_batch([arrow.array(list(ids)), vectors], schema=schema)

    table = lancedb.connect(folder / "lance").create_table("notes", batches(), schema=schema)
    return lambda query, k: [hit["id"] for hit in table.search(query).metric("cosine").limit(k).to_list()]


def qdrant_collection(store: Store, folder: Path) -> Any:
    """A collection of Qdrant; ids go into the payload, since Qdrant's own are numbers or UUIDs."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(folder / "qdrant"))
    client.create_collection(
        "notes", vectors_config=models.VectorParams(size=store.dimension, distance=models.Distance.COSINE)
    )
    places = count()
    for ids, rows in store.iter_batches(1024):
        points = models.Batch(
            ids=[next(places) for _ in ids], vectors=rows.tolist(), payloads=[{"id": name} for name in ids]
        )
        client.upsert("notes", points)
    return lambda query, k: [
        point.payload["id"] for point in client.query_points("notes", query.tolist(), limit=k).points
    ]


def langchain_store(store: Store, folder: Path) -> Any:
    """FAISS in LangChain: rows are handed over, so nothing is embedded again."""
    import faiss
    from langchain_community.docstore.in_memory import InMemoryDocstore
    from langchain_community.vectorstores import FAISS
    from langchain_core.embeddings import DeterministicFakeEmbedding

    unused = DeterministicFakeEmbedding(size=store.dimension)  # yours, for questions
    index = FAISS(unused, faiss.IndexFlatIP(store.dimension), InMemoryDocstore(), {})
    for ids, rows in store.iter_batches(1024):
        index.add_embeddings(zip(map(str, ids), rows.tolist(), strict=True))
    return lambda query, k: [found.page_content for found in index.similarity_search_by_vector(query.tolist(), k)]


def llama_index_store(store: Store, folder: Path) -> Any:
    """FAISS in LlamaIndex, as nodes that have their embeddings already."""
    import faiss
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores import VectorStoreQuery
    from llama_index.vector_stores.faiss import FaissVectorStore

    vectors = FaissVectorStore(faiss_index=faiss.IndexFlatIP(store.dimension))
    for ids, rows in store.iter_batches(1024):
        vectors.add([TextNode(id_=str(name), embedding=row) for name, row in zip(ids, rows.tolist(), strict=True)])

    def search(query: Any, k: int) -> list[Any]:
        found = vectors.query(VectorStoreQuery(query_embedding=query.tolist(), similarity_top_k=k))
        return [store.ids[int(place)] for place in found.ids]  # FAISS knows places, not names

    return search


STORES = {
    "FAISS": (faiss_index, "faiss"),
    "LanceDB": (lance_table, "lancedb"),
    "Qdrant": (qdrant_collection, "qdrant_client"),
    "FAISS in LangChain": (langchain_store, "langchain_community"),
    "FAISS in LlamaIndex": (llama_index_store, "llama_index"),
}


def main(model: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="memsafe-stores-"))
    question = "Which function makes a random token that is safe in a URL?"
    with Embedder(model) as embedder:
        embed_corpus(embedder, ((passage.name, passage.text) for passage in load_passages()), folder / "store")
        query = embedder.embed_queries([question])[0]
    store = open_store(folder / "store")
    print(f"{question}\n  {'ours, exact':<20} {', '.join(store.search(query, k=3).ids[0])}")
    for name, (fill, package) in STORES.items():
        found = fill(store, folder)(query, 3) if find_spec(package) else ["is not installed"]
        print(f"  {name:<20} {', '.join(map(str, found))}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else minilm())
