"""Embed, search and rerank with memsafe alone.

python examples/quickstart.py [EMBEDDING_MODEL [RERANKER]]     # names on the hub or local folders
"""

from __future__ import annotations

import sys

from memsafe import Embedder, MemoryPolicy, Reranker
from models import demo_reranker, minilm
from passages import load_passages


def main(embedding_model: str | None = None, reranker_model: str | None = None) -> None:
    passages = load_passages()
    texts = [passage.text for passage in passages]
    question = "How can several sorted inputs be merged without reading them all into memory?"
    policy = MemoryPolicy(limit="2GiB")  # never more than this; leave it out to use what is free

    with Embedder(embedding_model or minilm(), memory=policy) as embedder:
        run = embedder.run(texts, kind="document")  # or embed_documents(texts): the array alone
        scores = run.embeddings @ embedder.embed_queries([question])[0]
    nearest = [int(index) for index in scores.argsort()[::-1][:10]]

    with Reranker(reranker_model or demo_reranker(), memory=policy) as reranker:
        ranked = reranker.rerank(question, [texts[index] for index in nearest], top_n=3)

    print(question)
    for place in ranked:
        print(f"  {place.score:.3f}  {passages[nearest[place.index]].name}")
    print(f"\n{run.report}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
