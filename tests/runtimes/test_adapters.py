"""One word in each framework: their classes run an export as the core does."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from memsafe import Embedder, Reranker
from tests.runtimes.conftest import need
from tests.runtimes.test_runtimes import TEXTS


@pytest.fixture(scope="module")
def wanted(tiny: Path) -> np.ndarray:
    need("onnx")
    with Embedder(str(tiny), engine="onnx", dtype="int8") as embedder:
        return np.asarray(embedder.embed_documents(TEXTS[:3], normalize=True))


def test_llama_index(tiny: Path, tiny_reranker: Path, wanted: np.ndarray) -> None:
    """`engine` beside the other keywords; a pickle keeps it."""
    from llama_index.core.schema import NodeWithScore, TextNode

    from llama_index_memsafe import MemsafeEmbedding, MemsafeRerank

    embedding = MemsafeEmbedding(model_name=str(tiny), engine="onnx", dtype="int8")
    for each in (embedding, pickle.loads(pickle.dumps(embedding))):
        assert np.array_equal(np.float32(each.get_text_embedding_batch(TEXTS[:3])), wanted)
        assert "ONNX Runtime" in each.embedder.path
    rerank = MemsafeRerank(model=str(tiny_reranker), cross_encoder_kwargs={"engine": "onnx"}, top_n=3)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS[:3]]
    found = rerank.postprocess_nodes(nodes, query_str="which birds are tall")
    with Reranker(str(tiny_reranker), engine="onnx", max_length=512) as reranker:
        scores = reranker.score("which birds are tall", TEXTS[:3])
    assert sorted(float(node.score or 0) for node in found) == pytest.approx(sorted(scores.tolist()), abs=1e-6)


def test_langchain(tiny: Path, wanted: np.ndarray) -> None:
    """`engine` in model_kwargs, where what is for loading goes."""
    from langchain_memsafe import MemsafeEmbeddings

    embeddings = MemsafeEmbeddings(
        model_name=str(tiny),
        dtype="int8",
        model_kwargs={"engine": "onnx"},
        encode_kwargs={"normalize_embeddings": True},
    )
    assert np.array_equal(np.float32(embeddings.embed_documents(TEXTS[:3])), wanted)
    assert "ONNX Runtime" in embeddings.embedder.path
