"""A LangChain compression retriever on memsafe: retrieve from a vector store, then rerank.

python examples/langchain_rag.py [EMBEDDING_MODEL [RERANKER]]
"""

from __future__ import annotations

import sys

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from langchain_memsafe import MemsafeEmbeddings, MemsafeRerank
from models import demo_reranker, minilm
from passages import load_passages


def main(embedding_model: str | None = None, reranker_model: str | None = None) -> None:
    documents = [Document(passage.text, metadata={"name": passage.name}) for passage in load_passages()]

    store = InMemoryVectorStore(MemsafeEmbeddings(model_name=embedding_model or minilm()))
    store.add_documents(documents)
    retriever = ContextualCompressionRetriever(
        base_retriever=store.as_retriever(search_kwargs={"k": 10}),
        base_compressor=MemsafeRerank(model_name=reranker_model or demo_reranker(), top_n=3),
    )
    question = "How do I split a string with the syntax of a shell command line?"
    print(question)
    for found in retriever.invoke(question):
        print(f"  {found.metadata['relevance_score']:.3f}  {found.metadata['name']}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
