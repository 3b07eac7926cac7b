"""A LlamaIndex query engine on memsafe: retrieve, then rerank. No language model is called.

python examples/llama_index_rag.py [EMBEDDING_MODEL [RERANKER]]
"""

from __future__ import annotations

import sys

from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode

from llama_index_memsafe import MemsafeEmbedding, MemsafeRerank
from models import demo_reranker, minilm
from passages import load_passages


def main(embedding_model: str | None = None, reranker_model: str | None = None) -> None:
    nodes = [TextNode(text=passage.text, metadata={"name": passage.name}) for passage in load_passages()]
    for node in nodes:
        node.excluded_embed_metadata_keys = ["name"]  # the text says it already

    Settings.llm = MockLLM()  # nothing is generated here
    Settings.embed_model = MemsafeEmbedding(model_name=embedding_model or minilm())
    rerank = MemsafeRerank(model=reranker_model or demo_reranker(), top_n=3)

    index = VectorStoreIndex(nodes)
    engine = index.as_query_engine(response_mode="no_text", similarity_top_k=10, node_postprocessors=[rerank])
    question = "Which function makes a random token that is safe in a URL?"
    print(question)
    for found in engine.query(question).source_nodes:
        print(f"  {found.score:.3f}  {found.node.metadata['name']}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
