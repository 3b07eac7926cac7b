"""`make demo`: the same corpus searched through LlamaIndex and through LangChain, and what it took in memory.

python examples/demo.py [EMBEDDING_MODEL [RERANKER]]
"""

from __future__ import annotations

import sys
import textwrap
import time
import warnings
from collections.abc import Iterable

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode
from transformers.utils import logging as transformers_logging

import langchain_memsafe
import llama_index_memsafe
from memsafe import RunReport
from models import demo_reranker, minilm
from passages import QUESTIONS, Passage, load_passages

TOP_K, TOP_N = 20, 3
RERANKER_NOTE = (
    "The reranker is a small demo model made for this repository (examples/assets/demo-reranker): it shows the plumbing, "
    "not quality. For real work name BAAI/bge-reranker-v2-m3 or Alibaba-NLP/gte-multilingual-reranker-base instead."
)


def main(embedding_model: str | None = None, reranker_model: str | None = None) -> None:
    started = time.perf_counter()
    warnings.filterwarnings("ignore", message=".* longer than .* tokens")  # the report counts them
    transformers_logging.disable_progress_bar()
    passages = load_passages()
    questions = list(QUESTIONS.items())[:3]
    lengths = sorted(len(passage.text) for passage in passages)
    print(f"{len(passages)} passages from this Python's standard library, {lengths[0]} to {lengths[-1]:,} characters,")
    print(f"median {lengths[len(lengths) // 2]}; embedded with {embedding_model or 'all-MiniLM-L6-v2'}.")
    print(f"A star marks the passage that is known to answer; the first {TOP_K} by vector are reranked.")
    if reranker_model is None:
        print(textwrap.fill(RERANKER_NOTE, 100))
    embedding_model, reranker_model = embedding_model or minilm(), reranker_model or demo_reranker()

    reports = {
        **through_llama_index(passages, questions, embedding_model, reranker_model),
        **through_langchain(passages, questions, embedding_model, reranker_model),
    }
    heading("What it took")
    for name, report in reports.items():
        print(f"{name}\n{textwrap.indent(str(report), '  ')}\n")
    print(f"Done in {time.perf_counter() - started:.0f} s.")


def through_llama_index(
    passages: list[Passage], questions: list[tuple[str, str]], embedding_model: str, reranker_model: str
) -> dict[str, RunReport]:
    """Index, ask through a query engine, and return the reports of the same work done once more by the core."""
    heading("LlamaIndex: VectorStoreIndex, query engine with MemsafeRerank")
    Settings.llm = MockLLM()  # nothing is generated here
    Settings.embed_model = embed_model = llama_index_memsafe.MemsafeEmbedding(model_name=embedding_model)
    rerank = llama_index_memsafe.MemsafeRerank(model=reranker_model, top_n=TOP_N)
    nodes = [TextNode(id_=passage.name, text=passage.text) for passage in passages]
    index = VectorStoreIndex(nodes)
    engine = index.as_query_engine(response_mode="no_text", similarity_top_k=TOP_K, node_postprocessors=[rerank])
    for question, answer in questions:
        found = engine.query(question).source_nodes
        show(question, answer, ((node.score or 0.0, node.node.node_id, node.node.get_content()) for node in found))

    retriever = index.as_retriever(similarity_top_k=TOP_K)
    pairs = [(question, node.get_content()) for question, _ in questions for node in retriever.retrieve(question)]
    return {
        f"Embedding {len(passages)} passages": embed_model.embedder.run([passage.text for passage in passages]).report,
        f"Reranking {len(pairs)} pairs": rerank.reranker.run(pairs).report,
    }


def through_langchain(
    passages: list[Passage], questions: list[tuple[str, str]], embedding_model: str, reranker_model: str
) -> dict[str, RunReport]:
    """Index and ask through a compression retriever; the report is that of embedding the questions."""
    heading("LangChain: InMemoryVectorStore, ContextualCompressionRetriever with MemsafeRerank")
    embeddings = langchain_memsafe.MemsafeEmbeddings(model_name=embedding_model)
    store = InMemoryVectorStore(embeddings)
    store.add_documents([Document(passage.text, id=passage.name) for passage in passages])
    retriever = ContextualCompressionRetriever(
        base_retriever=store.as_retriever(search_kwargs={"k": TOP_K}),
        base_compressor=langchain_memsafe.MemsafeRerank(model_name=reranker_model, top_n=TOP_N),
    )
    for question, answer in questions:
        found = retriever.invoke(question)
        show(question, answer, ((d.metadata["relevance_score"], d.id or "", d.page_content) for d in found))
    asked = [question for question, _ in questions]
    return {f"Embedding {len(asked)} questions": embeddings.embedder.run(asked, kind="query").report}


def show(question: str, answer: str, found: Iterable[tuple[float, str, str]]) -> None:
    print(f"\n{question}")
    for place, (score, name, text) in enumerate(found, start=1):
        first_line = " ".join(text.removeprefix(name).split())
        mark = "*" if name == answer else " "
        print(f" {mark}{place}. {score:.3f}  {name:<28} {textwrap.shorten(first_line, 64, placeholder=' ...')}")


def heading(text: str) -> None:
    print(f"\n== {text} ==")


if __name__ == "__main__":
    main(*sys.argv[1:3])
