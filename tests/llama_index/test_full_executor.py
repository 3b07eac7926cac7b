"""Every async method answers while the one thread of asyncio's default executor is taken."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import NodeWithScore, TextNode

from llama_index_memsafe import MemsafeEmbedding, MemsafeKVStore, MemsafeRerank


class Embedding(MemsafeEmbedding):
    """Overrides the synchronous methods, so that the asynchronous ones go through them."""

    def _get_query_embedding(self, query: str) -> list[float]:
        return super()._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return super()._get_text_embedding(text)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return super()._get_text_embeddings(texts)


class Rerank(MemsafeRerank):
    def _postprocess_nodes(self, nodes: Any, query_bundle: Any = None) -> Any:
        return super()._postprocess_nodes(nodes, query_bundle)


def embedding(model: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    return {
        "aget_query_embedding": lambda: model.aget_query_embedding("a"),
        "aget_agg_embedding_from_queries": lambda: model.aget_agg_embedding_from_queries(["a", "b"]),
        "aget_text_embedding": lambda: model.aget_text_embedding("b"),
        "aget_text_embedding_batch": lambda: model.aget_text_embedding_batch(["a", "c"]),
        "acall": lambda: model.acall([TextNode(text="d")]),
    }


def reranking(model: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("a", "b")]
    return {"apostprocess_nodes": lambda: model.apostprocess_nodes(nodes, query_str="a")}


def keeping(store: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    return {
        "aput": lambda: store.aput("k", {"a": 1}),
        "aput_all": lambda: store.aput_all([("l", {"b": 2})]),
        "aget": lambda: store.aget("k"),
        "aget_all": lambda: store.aget_all(),
        "adelete": lambda: store.adelete("k"),
    }


def names(kind: type) -> set[str]:
    """Public async methods of `kind`, inherited ones too."""
    return {name for name, _ in inspect.getmembers(kind, inspect.iscoroutinefunction) if name[0] != "_"}


def unloaded(model: Any, kind: type) -> Any:
    """A copy of `model`, of the class `kind`, that has yet to load its model."""
    copied = pickle.loads(pickle.dumps(model))
    copied.__class__ = kind
    return copied


@pytest.mark.timeout(60)
def test_no_method_needs_a_free_thread(plain: str, reranker: MemsafeRerank, tmp_path: Path) -> None:
    """As they are, through a cache, and with synchronous methods overridden in a copy that has yet to load its model."""
    store = MemsafeKVStore(tmp_path / "cache.db")
    ours = MemsafeEmbedding(plain, device="cpu")
    cached = ours.model_copy(update={"embeddings_cache": store})
    calls = [
        *[(model, embedding(model)) for model in (cached, ours, unloaded(ours, Embedding))],
        *[(model, reranking(model)) for model in (reranker, unloaded(reranker, Rerank))],
        (store, keeping(store)),
    ]
    for model, methods in calls:
        assert names(type(model)) == set(methods)

    async def main() -> None:
        release = threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        blocked = loop.run_in_executor(None, release.wait, 50)
        await asyncio.sleep(0.01)
        try:
            found = {
                f"{type(model).__name__}.{name}": await asyncio.wait_for(call(), 20)
                for model, methods in calls
                for name, call in methods.items()
            }
            assert not blocked.done()
        finally:
            release.set()
            await blocked
        assert found["Embedding.aget_query_embedding"] and found["Embedding.acall"][0].embedding
        assert len(found["Rerank.apostprocess_nodes"]) == 2
        assert found["MemsafeKVStore.aget"] == {"a": 1} and found["MemsafeKVStore.adelete"] is True

    asyncio.run(main())
