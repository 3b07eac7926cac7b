"""The upstream packages' own tests, in our words, with our classes put in the place of theirs.

llama-index-embeddings-huggingface (tests/test_embeddings_huggingface.py, test_hf_utils.py), llama-index-core
(tests/embeddings/test_with_cache.py), llama-index-postprocessor-sbert-rerank and -flag-embedding-reranker.
Hub names are mapped to folders, since tests run without a network.
"""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import MockEmbedding
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings.utils import resolve_embed_model
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.core.utils import infer_torch_device

from llama_index_memsafe import MemsafeEmbedding, MemsafeRerank

pytestmark = pytest.mark.peers


@pytest.fixture
def substituted(monkeypatch: pytest.MonkeyPatch, plain: str, tiny_cross: str) -> None:
    """llama_index.embeddings.huggingface and .postprocessor.sbert_rerank export our classes, on local models."""
    embeddings = pytest.importorskip("llama_index.embeddings.huggingface")
    postprocessor = pytest.importorskip("llama_index.postprocessor.sbert_rerank")
    folders = {"BAAI/bge-small-en": plain, "cross-encoder/stsb-distilroberta-base": tiny_cross}

    class LocalEmbedding(MemsafeEmbedding):
        def __init__(self, model_name: str = "BAAI/bge-small-en", *args: Any, **kwargs: Any) -> None:
            super().__init__(folders.get(model_name, model_name), *args, **kwargs)

    class LocalRerank(MemsafeRerank):
        def __init__(self, model: str = "cross-encoder/stsb-distilroberta-base", *args: Any, **kwargs: Any) -> None:
            super().__init__(folders.get(model, model), *args, **kwargs)

    monkeypatch.setattr(embeddings, "HuggingFaceEmbedding", LocalEmbedding)
    monkeypatch.setattr(postprocessor, "SentenceTransformerRerank", LocalRerank)


def test_embedding_class(substituted: None) -> None:
    """The class has BaseEmbedding among its bases, by name."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    assert BaseEmbedding.__name__ in [base.__name__ for base in HuggingFaceEmbedding.__mro__]


def test_embedding_retry(substituted: None) -> None:
    """_embed with one text returns one list of floats."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    rows = HuggingFaceEmbedding()._embed(["This is a test sentence"])
    assert isinstance(rows, list) and len(rows) == 1
    assert isinstance(rows[0], list) and all(isinstance(x, float) for x in rows[0])


def test_resolve_embed_model(substituted: None, plain: str) -> None:
    """None is the mock; "local:folder" builds the exported class; an instance passes unchanged."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    assert isinstance(resolve_embed_model(None), MockEmbedding)
    built = resolve_embed_model(f"local:{plain}")
    assert isinstance(built, HuggingFaceEmbedding) and isinstance(built, MemsafeEmbedding)
    assert resolve_embed_model(built) is built
    with pytest.raises(ValueError, match="`model_name` argument must be provided"):
        resolve_embed_model("local")


def test_with_cache_sync(substituted: None) -> None:
    """A text that is in the cache comes from it; one that is not is put there."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding()
    model.embeddings_cache = SimpleKVStore()
    text = "hello there"
    assert model.embeddings_cache.get(key=text, collection="embeddings") is None
    first = model.get_text_embedding(text)
    stored = model.embeddings_cache.get(key=text, collection="embeddings")
    assert stored is not None and next(iter(stored.values())) == first
    assert model.get_text_embedding_batch([text, "another"])[0] == first
    assert model.embeddings_cache.get(key="another", collection="embeddings") is not None


async def test_with_cache_async(substituted: None) -> None:
    """The same through the asynchronous methods."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding()
    model.embeddings_cache = SimpleKVStore()
    text = "hello there"
    first = await model.aget_text_embedding(text)
    stored = await model.embeddings_cache.aget(key=text, collection="embeddings")
    assert stored is not None and next(iter(stored.values())) == first
    assert (await model.aget_text_embedding_batch([text, "another"]))[0] == first
    assert await model.embeddings_cache.aget(key="another", collection="embeddings") is not None


def test_batches_keep_their_order(substituted: None) -> None:
    """Rows of a batch belong to their texts, whatever the group size."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    texts = [f"text {'x ' * ((7 * n) % 11)}{n}" for n in range(17)]
    singles = [HuggingFaceEmbedding().get_text_embedding(text) for text in texts[:3]]
    rows = HuggingFaceEmbedding(embed_batch_size=3).get_text_embedding_batch(texts)
    for row, single in zip(rows[:3], singles, strict=True):
        assert row == pytest.approx(single, abs=1e-5)


def test_sbert_rerank_class(substituted: None) -> None:
    """The class has BaseNodePostprocessor among its bases; the default model and device are found."""
    from llama_index.postprocessor.sbert_rerank import SentenceTransformerRerank

    assert BaseNodePostprocessor.__name__ in [base.__name__ for base in SentenceTransformerRerank.__mro__]
    model = SentenceTransformerRerank()
    assert model
    assert model._device == infer_torch_device()


def test_flag_reranker_class() -> None:
    """What from_flag returns has BaseNodePostprocessor among its bases."""
    assert BaseNodePostprocessor.__name__ in [base.__name__ for base in MemsafeRerank.__mro__]
