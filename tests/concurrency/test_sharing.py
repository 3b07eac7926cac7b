"""One device, many callers: forwards stay within the budget, micro-batches are shared, rows never mixed up."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from memsafe import Embedder, Reranker
from memsafe.config import MiB
from memsafe.engine.lanes import lanes_of
from memsafe.planning.sizing import Pending, Size
from memsafe.testing import SimulatedDevice, SimulatedEmbedder, SimulatedReranker
from tests.concurrency.helpers import PATIENCE_S, Watch, occupy, pending, start, wait_until
from tests.concurrency.test_priorities import texts


class Cores(SimulatedDevice):
    """A simulated CPU of four cores, on which forwards run side by side."""

    @property
    def num_cores(self) -> int:
        return 4

    most_allocated = 0

    def allocate(self, num_bytes: int) -> None:
        super().allocate(num_bytes)
        self.most_allocated = max(self.most_allocated, self._allocated)


def test_a_report_says_how_many_ran_side_by_side() -> None:
    """A single text runs alone, many on as many lanes as there are, whatever division of the cores is tried at the end."""
    with SimulatedEmbedder(Cores("4GiB", kind="cpu"), memory={"max_tokens": 128}) as embedder:
        assert embedder.run(["one text"]).report.lanes == 1
        assert embedder.run(texts(200, words=40)).report.lanes == 4


def test_lanes_know_what_others_are_trying() -> None:
    """While sizes are still looked for, the first micro-batch is told that nobody tries a size, those beside it that one does."""
    with SimulatedEmbedder(Cores("4GiB", kind="cpu")) as embedder:
        (runner,) = embedder._engine.runners
        scheduler, sizing = lanes_of(runner.device).scheduler, runner.tenant.sizing
        propose, told = sizing.propose, []

        def recorded(pending: Pending, *, capped: bool = False) -> Size | None:
            told.append((len(scheduler.in_flight), pending.trying))
            return propose(pending, capped=capped)

        sizing.propose = recorded  # type: ignore[method-assign]
        embedder.run(texts(400, words=40))
    assert told[0] == (0, False)
    assert any(trying for busy, trying in told if busy) and not any(trying for busy, trying in told if not busy)


@pytest.mark.parametrize("callers", [1, 32])
def test_memory_does_not_multiply_with_callers(callers: int) -> None:
    """With 1 and with 32 threads, asyncio tasks beside them, an embedder and a reranker on one device: never more
    forwards at once than lanes and one for queries, the limit is kept, and nothing runs out of memory."""
    device = Cores("4GiB", kind="cpu")
    policy = {"limit": "256MiB", "reserve": 0, "max_tokens": 512}  # weights: twice 64 MiB
    many = texts(40, words=40)

    async def tasks() -> list:
        scoring = [reranker.ascore("a query", many[:10]) for _ in range(callers // 4)]
        embedding = [embedder.aembed_queries([text]) for text in many[:callers]]
        return await asyncio.gather(*scoring, *embedding)

    with SimulatedEmbedder(device, memory=policy) as embedder, SimulatedReranker(device, memory=policy) as reranker:
        weights = device.snapshot().allocated_bytes
        watch = Watch(embedder, reranker, takes_s=0.001)
        expected = embedder.embed_documents(many)
        calls = [start(embedder.embed_documents, many) for _ in range(callers)]
        calls += [start(reranker.score, "a query", many) for _ in range(callers)]
        with ThreadPoolExecutor(1) as pool:
            rows = pool.submit(asyncio.run, tasks()).result(PATIENCE_S)
        assert all(np.array_equal(call.result(PATIENCE_S), expected) for call in calls[:callers])
        assert len({call.result(PATIENCE_S).tobytes() for call in calls[callers:]}) == 1
        queries = embedder.embed_queries(many[:callers])
        assert all(np.array_equal(row[0], query) for row, query in zip(rows[callers // 4 :], queries, strict=True))
        assert watch.most <= device.num_cores + 1
        assert {forward.outcome for forward in device.forwards} == {"done"}
        assert device.most_allocated <= weights + 2 * 192 * MiB - 64 * MiB
        assert device.most_allocated <= weights + 128 * MiB  # what the limit leaves beyond the weights


def test_concurrent_queries_share_micro_batches(device: SimulatedDevice) -> None:
    """64 threads that each embed one query take far fewer than 64 forwards, and each gets its own row."""
    with SimulatedEmbedder(device, memory={"reserve": 0}) as embedder:
        alone = embedder.embed_queries(texts(64))
        watch = Watch(embedder)
        occupy(embedder, watch)
        calls = [start(embedder.embed_queries, [text]) for text in texts(64)]
        wait_until(lambda: pending(embedder) == 66, "queries in the queue")
        watch.go()
        assert all(np.array_equal(call.result(PATIENCE_S)[0], row) for call, row in zip(calls, alone, strict=True))
        assert len(watch.batches) <= 5 + 4


def test_real_queries_share_micro_batches(minilm: str) -> None:
    """The same with a real model and 64 threads that start together: fewer than half as many forwards as calls."""
    queries = [f"question number {i} about {'nothing ' * (i % 7)}" for i in range(64)]
    with Embedder(minilm, device="cpu") as embedder:
        expected = embedder.embed_queries(queries)
        watch, together = Watch(embedder), threading.Barrier(64)

        def ask(query: str) -> np.ndarray:
            together.wait(PATIENCE_S)
            return embedder.embed_queries([query])[0]

        with ThreadPoolExecutor(64) as pool:
            rows = list(pool.map(ask, queries))
        assert np.abs(np.array(rows) - expected).max() < 1e-5
        assert sum(len(batch) for batch in watch.batches) == 64
        assert len(watch.batches) <= 32, [len(batch) for batch in watch.batches]


def test_different_lengths_under_threads(minilm: str) -> None:
    """Two embedders over one folder, with different `max_length`, under 8 threads: every row is as it is alone."""
    many = ["word " * (10 + 9 * i) + str(i) for i in range(12)]
    with Embedder(minilm, device="cpu", max_length=16) as short, Embedder(minilm, device="cpu", max_length=64) as long:
        _crowd((short, long), many)


def test_one_loaded_model_in_two_embedders(minilm: str) -> None:
    """Two embedders over one loaded SentenceTransformer: the rows are right under threads, and closing one leaves the
    other, and the model itself, as they were."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm, device="cpu")
    many = ["word " * (10 + 9 * i) + str(i) for i in range(12)]
    reference = model.encode(many)
    first, second = Embedder(model), Embedder(model)
    _crowd((first, second), many)
    first.close()
    assert np.abs(second.embed_documents(many) - reference).max() < 1e-5
    second.close()
    assert np.abs(model.encode(many) - reference).max() < 1e-6


def _crowd(embedders: tuple[Embedder, Embedder], many: list[str]) -> None:
    with pytest.warns() if embedders[0].max_length == 16 else _nothing():
        alone = [embedder.embed_documents(many) for embedder in embedders]
        if embedders[0].max_length != embedders[1].max_length:
            assert np.abs(alone[0] - alone[1]).max() > 1e-3
        calls = [(i % 2, start(embedders[i % 2].embed_documents, many[i % 3 :])) for i in range(8)]
        for number, (which, call) in enumerate(calls):
            assert np.abs(call.result(PATIENCE_S) - alone[which][number % 3 :]).max() < 1e-5


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.cuts
def test_replicas_of_a_real_model(minilm: str, passages: list[str]) -> None:
    """``device=["cpu", "cpu"]`` gives the rows of one device, in the caller's order."""
    some = passages[:40]
    with Embedder(minilm, device=["cpu", "cpu"]) as two, Embedder(minilm, device="cpu") as one:
        assert two.device == "cpu, cpu"
        watch = Watch(two)
        rows = two.embed_documents(some)
        assert np.abs(rows - one.embed_documents(some)).max() < 1e-5
        assert sum(len(batch) for batch in watch.batches) == len(set(some))


def test_embedder_and_reranker_in_both_worlds(minilm: str, demo_reranker: str) -> None:
    """Threads and coroutines, embedding and reranking real models on one device, all get what they get alone."""
    many = [f"passage {i} " + "about heaps and queues " * (i % 5) for i in range(16)]
    with Embedder(minilm, device="cpu") as embedder, Reranker(demo_reranker, device="cpu") as reranker:
        rows, scores = embedder.embed_documents(many), reranker.score("What is a heap?", many)
        watch = Watch(embedder, reranker)

        async def tasks() -> list:
            calls = [embedder.aembed_documents(many[i:]) for i in range(6)]
            return await asyncio.gather(*calls, *(reranker.ascore("What is a heap?", many[i:]) for i in range(6)))

        threads = [start(embedder.embed_documents, many[i:]) for i in range(4)]
        threads += [start(reranker.score, "What is a heap?", many[i:]) for i in range(4)]
        results = asyncio.run(tasks())
        for i in range(6):
            assert np.abs(results[i] - rows[i:]).max() < 1e-5
            assert np.abs(results[6 + i] - scores[i:]).max() < 1e-5
        for i in range(4):
            assert np.abs(threads[i].result(PATIENCE_S) - rows[i:]).max() < 1e-5
            assert np.abs(threads[4 + i].result(PATIENCE_S) - scores[i:]).max() < 1e-5
        lanes = max(e.tenant.sizing.lanes[0] for model in (embedder, reranker) for e in model._engine.runners)
        assert watch.most <= max(lanes, embedder._engine.models[0].device.num_cores) + 1
