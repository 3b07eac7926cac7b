"""Hybrid search: dense and sparse rows in Qdrant (in this process), fused there. Needs qdrant-client.

Without an argument no hub is needed: dense rows are MiniLM's, sparse ones count words by how rare they are in the passages. With
one, a model of BGE-M3's shape gives both of one pass: ``python examples/hybrid.py BAAI/bge-m3``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder
from examples.models import minilm
from examples.passages import QUESTIONS, load_passages
from memsafe import Embedder, HybridEmbedder, SparseEmbedder


def by_rarity(texts: list[str]) -> SparseEmbedder:
    """Sparse rows that hold, for each word of a text, how rare it is in `texts`: what a trained table would hold."""
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    found = np.zeros(len(tokenizer))
    for ids in tokenizer(texts, add_special_tokens=False, truncation=True)["input_ids"]:
        found[np.unique(ids).astype(int)] += 1
    rarity = torch.from_numpy(np.log((1 + len(texts)) / (1 + found))).float()
    return SparseEmbedder(SparseEncoder(modules=[SparseStaticEmbedding(tokenizer, weight=rarity)], device="cpu"))


def outputs(texts: list[str], queries: list[str]) -> list[tuple[Any, Any]]:
    """(dense rows, sparse rows) of `texts`, and of `queries`."""
    if len(sys.argv) > 1:
        both = HybridEmbedder(sys.argv[1], outputs=("dense", "sparse"))
        return [(run.dense, run.sparse) for run in (both.embed_documents(texts), both.embed_queries(queries))]
    dense, sparse = Embedder(minilm()), by_rarity(texts)
    return [
        (dense.embed_documents(texts), sparse.embed_documents(texts)),
        (dense.embed_queries(queries), sparse.embed_queries(queries)),
    ]


def vector(row: Any) -> models.SparseVector:
    """One row of a csr_array."""
    return models.SparseVector(indices=row.indices.tolist(), values=row.data.tolist())


def gain(names: list[str], answer: str) -> float:
    """nDCG@10 where one passage is right."""
    return 1 / float(np.log2(names.index(answer) + 2)) if answer in names[:10] else 0.0


def main() -> None:
    passages = load_passages()
    (dense, sparse), (asked, words) = outputs([passage.text for passage in passages], list(QUESTIONS))
    client = QdrantClient(":memory:")
    client.create_collection(
        "passages",
        vectors_config={"dense": models.VectorParams(size=dense.shape[1], distance=models.Distance.COSINE)},
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )
    points = [
        models.PointStruct(
            id=i, payload={"name": passage.name}, vector={"dense": dense[i].tolist(), "sparse": vector(sparse[[i]])}
        )
        for i, passage in enumerate(passages)
    ]
    client.upsert("passages", points)
    gains: dict[str, list[float]] = {"dense": [], "sparse": [], "fused": []}
    for place, (question, answer) in enumerate(QUESTIONS.items()):
        one, other = asked[place].tolist(), vector(words[[place]])
        ways: dict[str, dict[str, Any]] = {
            "dense": {"query": one, "using": "dense"},
            "sparse": {"query": other, "using": "sparse"},
            "fused": {
                "prefetch": [
                    models.Prefetch(query=one, using="dense", limit=20),
                    models.Prefetch(query=other, using="sparse", limit=20),
                ],
                "query": models.FusionQuery(fusion=models.Fusion.RRF),
            },
        }
        print(question)
        for way, options in ways.items():
            found = client.query_points("passages", limit=10, **options).points
            names = [str((point.payload or {})["name"]) for point in found]
            gains[way].append(gain(names, answer))
            print(f"  {way:6} {', '.join(names[:3])}")
    print("nDCG@10: " + ", ".join(f"{way} {np.mean(values):.2f}" for way, values in gains.items()))


if __name__ == "__main__":
    main()
