"""How a typed program uses memsafe: checked by mypy and pyright in test_typing.py, never run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from typing_extensions import assert_type

import langchain_memsafe
import llama_index_memsafe
from memsafe import (
    Embedder,
    EmbeddingRun,
    EventHook,
    InputError,
    MemoryPolicy,
    MemsafeError,
    RankedDocument,
    Reranker,
    RerankRun,
    RunReport,
)


def hook(event: object) -> None: ...


def core(texts: list[str]) -> None:
    policy = MemoryPolicy(limit="2GiB", fallback=("chunk", "cpu"), release="run")
    hooks: list[EventHook] = [hook]
    with Embedder("folder", device="cpu", memory=policy, hooks=hooks) as embedder:
        run = embedder.run(texts, kind="document", normalize=True)
        assert_type(run, EmbeddingRun)
        assert_type(run.report, RunReport)
        assert_type(run.report.padding_ratio, float)
        vectors: np.ndarray[Any, Any] = embedder.embed_documents(texts)
        vectors = embedder.embed_queries(texts)
        vectors = run.embeddings
        assert_type(embedder.dimension, int)
        print(vectors.shape)
    reranker = Reranker("folder", max_length=512)
    try:
        ranked = reranker.rerank("question", texts, top_n=3)
        assert_type(ranked, list[RankedDocument])
        assert_type(ranked[0].index, int)
        assert_type(ranked[0].score, float)
        assert_type(reranker.run([("question", text) for text in texts]), RerankRun)
        scores: np.ndarray[Any, Any] = reranker.score("question", texts)
        print(scores.tolist())
    except InputError as error:
        assert_type(error.index, int | None)
        problem: MemsafeError | ValueError = error
        print(problem)
    finally:
        reranker.close()


async def asynchronous(embedder: Embedder, reranker: Reranker, texts: list[str]) -> None:
    assert_type(await embedder.arun(texts), EmbeddingRun)
    vectors: np.ndarray[Any, Any] = await embedder.aembed_documents(texts)
    assert_type(await reranker.arerank("question", texts), list[RankedDocument])
    print(vectors)


def frameworks(documents: list[Document]) -> None:
    embed_model: BaseEmbedding = llama_index_memsafe.MemsafeEmbedding(model_name="folder")
    postprocessor: BaseNodePostprocessor = llama_index_memsafe.MemsafeRerank(model="folder", top_n=3)
    embeddings: Embeddings = langchain_memsafe.MemsafeEmbeddings(model_name="folder")
    compressor: BaseDocumentCompressor = langchain_memsafe.MemsafeRerank(model_name="folder", top_n=3)
    print(embed_model.get_text_embedding("text"), embeddings.embed_query("text"))
    print(postprocessor, list(compressor.compress_documents(documents, "question")))
    flag = llama_index_memsafe.MemsafeRerank.from_flag(top_n=3, model="folder", use_fp16=True)
    assert_type(flag, llama_index_memsafe.MemsafeRerank)
    scorer: BaseCrossEncoder = langchain_memsafe.MemsafeCrossEncoder(model_name="folder")
    assert_type(scorer.score([("question", "text")]), list[float])


async def asynchronous_frameworks(texts: list[str], documents: list[Document]) -> None:
    embed_model = llama_index_memsafe.MemsafeEmbedding(model_name="folder")
    assert_type(await embed_model.aget_text_embedding_batch(texts), list[list[float]])
    embeddings = langchain_memsafe.MemsafeEmbeddings(model_name="folder")
    assert_type(await embeddings.aembed_documents(texts), list[list[float]])
    compressor = langchain_memsafe.MemsafeRerank(model_name="folder")
    assert_type(await compressor.acompress_documents(documents, "question"), Sequence[Document])
    scorer = langchain_memsafe.MemsafeCrossEncoder(model_name="folder")
    assert_type(await scorer.ascore([("question", "text")]), list[float])
