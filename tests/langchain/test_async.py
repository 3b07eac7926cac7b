"""The async methods: the loop stays free, threads stay few, cancelling cancels."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from langchain_core.documents import Document

from langchain_memsafe import MemsafeCrossEncoder, MemsafeEmbeddings, MemsafeRerank

from .conftest import Calls, largest_difference

QUERY = "How is a string split into words?"


async def longest_silence(work: Callable[[], Awaitable[Any]]) -> tuple[float, float, Any]:
    """Seconds that `work` takes, the longest time in it that the loop did not come round, and its result."""
    silence = 0.0
    done = False

    async def watch() -> None:
        nonlocal silence
        while not done:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            silence = max(silence, time.perf_counter() - before)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    started = time.perf_counter()
    result = await work()
    taken = time.perf_counter() - started
    done = True
    await watcher
    return taken, silence, result


async def test_subclasses_are_obeyed(minilm: str, demo_reranker: str) -> None:
    """Who overrides a synchronous method finds it called by the asynchronous one too, as the interfaces' own methods do:
    prefixes, say, that documents got when the index was built."""

    class Prefixed(MemsafeEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            return super().embed_query("query: " + text)

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return super().embed_documents(["passage: " + text for text in texts])

    class First(MemsafeRerank):
        def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> Any:
            return list(super().compress_documents(documents, query, callbacks))[:1]

        def rerank(self, documents: Any, query: str, *, top_n: int | None = -1) -> Any:
            return super().rerank(documents, query, top_n=top_n)[:1]

    class Negated(MemsafeCrossEncoder):
        def score(self, text_pairs: Any) -> Any:
            return [-value for value in super().score(text_pairs)]

    embeddings, bare = Prefixed(model_name=minilm), MemsafeEmbeddings(model_name=minilm)
    assert largest_difference([await embeddings.aembed_query(QUERY)], [embeddings.embed_query(QUERY)]) < 1e-5
    assert largest_difference(await embeddings.aembed_documents([QUERY]), embeddings.embed_documents([QUERY])) < 1e-5
    assert largest_difference([embeddings.embed_query(QUERY)], [bare.embed_query(QUERY)]) > 1e-3
    documents = [Document(page_content=text) for text in ("a train", "words", "a ship")]
    reranker = First(model_name=demo_reranker)
    assert len(await reranker.acompress_documents(documents, QUERY)) == 1
    assert len(await reranker.arerank(documents, QUERY, top_n=2)) == 1
    pairs = [(QUERY, "words")]
    scorer = Negated(model_name=demo_reranker)
    assert (await scorer.ascore(pairs))[0] == pytest.approx(scorer.score(pairs)[0], abs=1e-5)
    assert (await scorer.ascore(pairs))[0] < 0


async def test_a_patched_class_is_obeyed(ours: MemsafeEmbeddings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that replaces a synchronous method of the class itself sees it used by the asynchronous one."""
    monkeypatch.setattr(MemsafeEmbeddings, "embed_query", lambda self, text: [float(len(text))])
    assert await ours.aembed_query("four") == [4.0]


async def test_loop_stays_free(ours: MemsafeEmbeddings, passages: list[str]) -> None:
    """While hundreds of passages are embedded, the event loop turns all the time: no silence near the whole work."""
    texts = [passage[:300] for passage in passages[:80]]
    taken, silence, rows = await longest_silence(lambda: ours.aembed_documents(texts))
    assert silence < taken / 3
    assert largest_difference(rows, ours.embed_documents(texts)) < 1e-5


async def test_loop_stays_free_while_reranking(reranker: MemsafeRerank, passages: list[str]) -> None:
    """While many passages are scored, the event loop turns all the time."""
    texts = [passage[:300] for passage in passages[:50]]
    taken, silence, ranking = await longest_silence(lambda: reranker.arerank(texts, QUERY, top_n=None))
    assert silence < taken / 3
    assert [entry["index"] for entry in ranking] == [
        entry["index"] for entry in reranker.rerank(texts, QUERY, top_n=None)
    ]


async def test_loop_stays_free_while_loading(ours: MemsafeEmbeddings) -> None:
    """An unpickled copy loads its model at its first use, and not on the event loop's thread."""
    copied = pickle.loads(pickle.dumps(ours))
    built_in: list[int] = []
    build = MemsafeEmbeddings._build

    def watched(self: MemsafeEmbeddings) -> Any:
        built_in.append(threading.get_ident())
        return build(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemsafeEmbeddings, "_build", watched)
        rows = await asyncio.gather(*(copied.aembed_query("an apple") for _ in range(4)))
    assert len(built_in) == 1 and built_in[0] != threading.get_ident()
    assert largest_difference(rows[0], ours.embed_query("an apple")) < 1e-5


async def test_threads_stay_few(ours: MemsafeEmbeddings) -> None:
    """A hundred calls at once do not start a hundred threads, and each gets its own answer."""
    most = before = threading.active_count()
    done = False

    async def watch() -> None:
        nonlocal most
        while not done:
            most = max(most, threading.active_count())
            await asyncio.sleep(0.001)

    watcher = asyncio.create_task(watch())
    queries = [f"query number {number}" for number in range(100)]
    rows = await asyncio.gather(*(ours.aembed_query(query) for query in queries))
    done = True
    await watcher
    assert most - before <= 40  # asyncio's own pool has at most 32, and the core a few
    assert largest_difference(rows, ours.embed_documents(queries)) < 1e-5


async def test_cancelling(ours: MemsafeEmbeddings, passages: list[str]) -> None:
    """Cancelling the task cancels the work, soon; the next call is served as ever."""
    texts = [passage[:300] for passage in passages[:120]]
    started = time.perf_counter()
    await ours.aembed_documents(texts)
    whole = time.perf_counter() - started
    task = asyncio.create_task(ours.aembed_documents(texts))
    await asyncio.sleep(whole / 10)
    started = time.perf_counter()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(await ours.aembed_query("an apple")) == 384
    assert time.perf_counter() - started < 0.7 * whole


async def test_no_default_executor_of_langchain(
    ours: MemsafeEmbeddings,
    reranker: MemsafeRerank,
    cross_encoder: MemsafeCrossEncoder,
    core_calls: Calls,
) -> None:
    """Every async method asks the core's async method, none runs the sync method in a thread."""
    await ours.aembed_documents(["a"])
    await ours.aembed_query("a")
    await reranker.arerank(["a"], QUERY)
    await cross_encoder.ascore([("a", "b")])
    assert [call["method"] for call in core_calls] == ["arun", "arun", "ascore", "ascore_pairs"]
    assert [call.get("urgent") for call in core_calls] == [None, True, True, True]


async def test_errors_arrive(ours: MemsafeEmbeddings, reranker: MemsafeRerank) -> None:
    """Bad input raises the same errors as in the sync methods."""
    with pytest.raises(ValueError, match="input 1"):
        await ours.aembed_documents(["a", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="bare"):
        await ours.aembed_documents("bare")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query"):
        await reranker.arerank(["a"], None)  # type: ignore[arg-type]
    assert await ours.aembed_documents([]) == [] == await reranker.arerank([], QUERY)
