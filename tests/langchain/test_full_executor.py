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
from langchain_core.documents import Document

from langchain_memsafe import MemsafeByteStore, MemsafeCrossEncoder, MemsafeEmbeddings, MemsafeRerank

QUERY = "How is a string split into words?"


class Embeddings(MemsafeEmbeddings):
    """Overrides the synchronous methods, so that the asynchronous ones go through them."""

    def embed_query(self, text: str) -> list[float]:
        return super().embed_query(text)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return super().embed_documents(texts)


class Rerank(MemsafeRerank):
    def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> Any:
        return super().compress_documents(documents, query, callbacks)

    def rerank(self, documents: Any, query: str, *, top_n: int | None = -1) -> Any:
        return super().rerank(documents, query, top_n=top_n)


class CrossEncoder(MemsafeCrossEncoder):
    def score(self, text_pairs: Any) -> Any:
        return super().score(text_pairs)


def embedding(model: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    return {
        "aembed_documents": lambda: model.aembed_documents(["a", "b"]),
        "aembed_query": lambda: model.aembed_query("a"),
    }


def reranking(model: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    return {
        "acompress_documents": lambda: model.acompress_documents([Document(page_content="a")], QUERY),
        "arerank": lambda: model.arerank(["a", "b"], QUERY),
    }


def scoring(model: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    return {"ascore": lambda: model.ascore([("a", "b")])}


def keeping(store: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    async def keys() -> list[str]:
        return [key async for key in store.ayield_keys(prefix="k")]

    return {
        "amset": lambda: store.amset([("k", b"v")]),
        "amget": lambda: store.amget(["k"]),
        "ayield_keys": keys,
        "amdelete": lambda: store.amdelete(["k"]),
    }


def names(kind: type) -> set[str]:
    """Public async methods of `kind`, inherited ones too."""
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return {
        name for name, _ in inspect.getmembers(kind, lambda each: any(is_a(each) for is_a in kinds)) if name[0] != "_"
    }


def unloaded(model: Any, kind: type) -> Any:
    """A copy of `model`, of the class `kind`, that has yet to load its model."""
    copied = pickle.loads(pickle.dumps(model))
    copied.__class__ = kind
    return copied


@pytest.mark.timeout(60)
def test_no_method_needs_a_free_thread(
    ours: MemsafeEmbeddings, reranker: MemsafeRerank, cross_encoder: MemsafeCrossEncoder, tmp_path: Path
) -> None:
    """As they are, and with a synchronous method overridden in a copy that has yet to load its model."""
    calls = [
        *[(model, embedding(model)) for model in (ours, unloaded(ours, Embeddings))],
        *[(model, reranking(model)) for model in (reranker, unloaded(reranker, Rerank))],
        *[(model, scoring(model)) for model in (cross_encoder, unloaded(cross_encoder, CrossEncoder))],
        *[(store, keeping(store)) for store in (MemsafeByteStore(tmp_path / "cache.db"),)],
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
        assert len(found["Embeddings.aembed_query"]) == 384 and len(found["MemsafeEmbeddings.aembed_documents"]) == 2
        assert len(found["Rerank.arerank"]) == 2 and len(found["CrossEncoder.ascore"]) == 1
        assert found["MemsafeByteStore.amget"] == [b"v"] and found["MemsafeByteStore.ayield_keys"] == ["k"]

    asyncio.run(main())
