"""Weights that leave the device when nobody calls: given back, back with the next call, the same rows, safe at every moment."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from memsafe import ClosedError, ConfigError, Embedder, Event, MemoryPolicy, MiB, ModelTooLargeError
from memsafe.engine.idle import Presence
from memsafe.engine.lanes import lanes_of
from memsafe.events import ModelReloaded, ModelUnloaded
from memsafe.machine.device import open_device
from memsafe.models.loading import move
from memsafe.testing import SimulatedDevice, SimulatedEmbedder, SimulatedReranker
from tests.tiny_models import save_embedder, save_reranker

SOON = MemoryPolicy(unload_after_s=0.05)
PATIENCE_S = 20.0
WEIGHTS = 64 * MiB
TEXTS = [f"note {number} " * (number % 7 + 1) for number in range(40)]


def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, which is to come."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def gone(*models: Any) -> bool:
    """Whether the weights of all have left, and nothing of that is still under way."""
    return all(not model._engine.models and not model._engine._home._lock.locked() for model in models)


def test_weights_leave_and_come_back_with_the_same_rows() -> None:
    """What the weights took on the device is free while nobody calls; the next call has equal rows, and the report says what it
    waited; whoever listens is told of both."""
    device, events = SimulatedDevice("1GiB"), list[Event]()
    with SimulatedEmbedder(device, memory=SOON, hooks=[events.append]) as embedder:
        first = embedder.run(TEXTS)
        assert first.report.reload_s == 0 and "came back" not in str(first.report)
        until(lambda: device.snapshot().reserved_bytes == 0)
        assert embedder.device == device.name
        second = embedder.run(TEXTS)
        assert np.array_equal(first.embeddings, second.embeddings)
        assert second.report.reload_s > 0 and "weights came back" in str(second.report)
        assert device.snapshot().allocated_bytes == WEIGHTS
        told = [event for event in events if isinstance(event, (ModelUnloaded, ModelReloaded))]
        assert isinstance(told[0], ModelUnloaded) and told[0].released_bytes >= WEIGHTS
        assert isinstance(told[1], ModelReloaded) and told[1].weights_bytes == WEIGHTS


def test_who_calls_often_keeps_the_weights() -> None:
    """The time begins anew with each call; without the option nothing ever leaves."""
    device = SimulatedDevice("1GiB")
    with (
        SimulatedEmbedder(device, memory=MemoryPolicy(unload_after_s=0.5)) as embedder,
        SimulatedEmbedder(device) as other,
    ):
        for _ in range(8):
            assert embedder.run(TEXTS[:2]).report.reload_s == 0
            time.sleep(0.1)
        until(lambda: gone(embedder))
        assert not gone(other)


def test_one_thread_watches_all_models() -> None:
    """Three models with a time of their own add no thread, and each leaves in its own time."""
    threads = set(threading.enumerate())
    devices = [SimulatedDevice("1GiB") for _ in range(3)]
    models = [
        SimulatedEmbedder(device, memory=MemoryPolicy(unload_after_s=0.05 + 0.001 * number))
        for number, device in enumerate(devices)
    ]
    until(lambda: gone(*models))
    new = {thread.name for thread in set(threading.enumerate()) - threads}
    assert new <= {"memsafe-reaper"}
    assert sum(device.snapshot().reserved_bytes for device in devices) == 0
    for model in models:
        model.close()


def test_a_call_in_progress_keeps_the_weights() -> None:
    """However long it takes, and though the time is over many times."""
    device, go = SimulatedDevice("1GiB"), threading.Event()
    with SimulatedEmbedder(device, memory=SOON) as embedder:
        device.at(1, lambda: go.wait(PATIENCE_S))
        thread = threading.Thread(target=embedder.embed_documents, args=(TEXTS,))
        thread.start()
        time.sleep(0.4)
        assert not gone(embedder) and device.snapshot().allocated_bytes >= WEIGHTS
        go.set()
        thread.join()
        until(lambda: gone(embedder))


def test_a_micro_batch_of_a_cancelled_call_is_waited_for() -> None:
    """Nobody waits for the call any more, but its micro-batch still computes with the weights."""
    device, started, go = SimulatedDevice("1GiB"), threading.Event(), threading.Event()
    with SimulatedEmbedder(device, memory=SOON) as embedder:

        def hold() -> None:
            started.set()
            go.wait(PATIENCE_S)

        async def main() -> None:
            task = asyncio.create_task(embedder.aembed_documents(TEXTS))
            await asyncio.to_thread(started.wait, PATIENCE_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        device.at(1, hold)
        asyncio.run(main())
        time.sleep(0.3)
        assert not gone(embedder)
        go.set()
        until(lambda: gone(embedder))
        assert embedder.embed_documents(TEXTS).shape == (40, 8)


def test_calls_at_the_very_moment() -> None:
    """Many threads call whenever the time is just over: every row is right, and the memory adds up in the end."""
    device = SimulatedDevice("1GiB")
    with SimulatedEmbedder(device) as plain:
        wanted = plain.embed_documents(TEXTS)
    policy = MemoryPolicy(unload_after_s=0.01)
    events: list[Event] = []
    with (
        SimulatedEmbedder(device, memory=policy, hooks=[events.append]) as embedder,
        SimulatedReranker(device, memory=policy) as reranker,
    ):
        failures: list[BaseException] = []

        def call(number: int) -> None:
            try:
                for turn in range(4):
                    time.sleep(0.008 + 0.0005 * ((number + turn) % 11))
                    if number % 3 == 0:
                        rows = asyncio.run(embedder.aembed_documents(TEXTS))
                    else:
                        rows = embedder.embed_documents(TEXTS)
                    assert np.array_equal(rows, wanted)
                    reranker.score("note", TEXTS[:3])
            except BaseException as error:
                failures.append(error)

        for crowd in (1, 3):  # alone it leaves between the calls, in company sometimes
            threads = [threading.Thread(target=call, args=(number,)) for number in range(crowd)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not failures, failures[0]
        until(lambda: gone(embedder, reranker))  # whether it ever was between the calls is a matter of milliseconds
        assert np.array_equal(embedder.embed_documents(TEXTS), wanted)
        assert sum(isinstance(event, ModelReloaded) for event in events) >= 1
        until(lambda: gone(embedder, reranker))
        assert device.snapshot().reserved_bytes == 0


def test_weights_that_no_longer_fit() -> None:
    """A neighbour has come meanwhile: the caller gets the usual error, nothing is left behind, and when he has gone the call is
    served."""
    device = SimulatedDevice("1GiB")
    with SimulatedEmbedder([device, SimulatedDevice("1GiB")], memory=SOON) as embedder:
        first = embedder.embed_documents(TEXTS)
        for crowded in [each.device for each in embedder.simulated]:
            until(lambda: gone(embedder))
            crowded.take("1000MiB")
            with pytest.raises(ModelTooLargeError, match=r"need 64\.0 MiB, but"):
                embedder.embed_documents(TEXTS)
            assert all(each.device.snapshot().reserved_bytes == 0 for each in embedder.simulated)
            crowded.give()
            assert np.array_equal(embedder.embed_documents(TEXTS), first)


def test_closing_at_any_time() -> None:
    """close() of what has left is prompt and final; while it leaves or comes back, a call ends well or with ClosedError."""
    device = SimulatedDevice("1GiB")
    embedder = SimulatedEmbedder(device, memory=SOON)
    until(lambda: gone(embedder))
    embedder.close()
    with pytest.raises(ClosedError):
        embedder.embed_documents(TEXTS)
    for number in range(4):
        embedder = SimulatedEmbedder(device, memory=MemoryPolicy(unload_after_s=0.01))
        closer = threading.Timer(0.009 + 0.0012 * number, embedder.close)
        closer.start()
        try:
            while True:
                embedder.embed_documents(TEXTS[:2])
                time.sleep(0.009)
        except ClosedError:
            pass
        closer.join()
    assert device.snapshot().reserved_bytes == 0


def test_what_is_dropped_is_not_watched_for_ever() -> None:
    """An embedder that nobody holds goes, whether its weights are there or not."""
    import weakref

    device = SimulatedDevice("1GiB")
    here, left = (
        SimulatedEmbedder(device, memory=MemoryPolicy(unload_after_s=600)),
        SimulatedEmbedder(device, memory=SOON),
    )
    engines = [weakref.ref(here._engine), weakref.ref(left._engine)]
    until(lambda: gone(left))  # noqa: F821 - it is deleted below
    del here, left

    def dropped() -> bool:
        gc.collect()
        return all(engine() is None for engine in engines)

    until(dropped)
    assert device.snapshot().reserved_bytes == 0


def test_what_was_learnt_stays() -> None:
    """Costs measured before the weights left serve the call that brings them back, though nothing is kept on disk."""
    device = SimulatedDevice("1GiB")
    with SimulatedEmbedder(device, memory=MemoryPolicy(unload_after_s=0.05, learn=False), prior_scale=3.0) as embedder:
        embedder.embed_documents(TEXTS * 20)
        cost = embedder._engine.runners[0].tenant.ledger.cost
        until(lambda: gone(embedder))
        embedder.embed_documents(TEXTS)
        assert embedder._engine.runners[0].tenant.ledger.cost is cost
        assert len(lanes_of(device).scheduler.tenants) == 1


def test_the_process_shrinks_on_a_cpu(minilm: str, passages: list[str]) -> None:
    """A real model: its 86.7 MiB leave the process, and the rows are the same bits of the same path afterwards."""
    cpu = open_device("cpu")
    texts = [passage[:200] for passage in passages[:30]]
    with Embedder(minilm, device="cpu", memory=MemoryPolicy(unload_after_s=0.5)) as embedder:
        first, path = embedder.embed_documents(texts, fixed_tokens=500), embedder.path
        loaded = cpu.process_bytes()
        until(lambda: gone(embedder) and cpu.process_bytes() < loaded - 60 * MiB)
        second = embedder.run(texts, fixed_tokens=500)
        assert np.array_equal(first, second.embeddings) and embedder.path == path
        assert second.report.reload_s > 0
        twin = pickle.loads(pickle.dumps(embedder))
        assert twin.memory == embedder.memory


def test_other_outputs_leave_and_come_back_too(tmp_path: Path) -> None:
    """Sparse rows and a vector for every token: the same class of calls, the same life."""
    pytest.importorskip("sentence_transformers", minversion="6")
    from memsafe import MultiVectorEmbedder, SparseEmbedder
    from tests.sparse_models import save_late_interaction, save_splade

    memory = MemoryPolicy(unload_after_s=0.3)
    sparse = SparseEmbedder(save_splade(tmp_path / "splade"), device="cpu", memory=memory)
    vectors = MultiVectorEmbedder(save_late_interaction(tmp_path / "late"), device="cpu", memory=memory)
    with sparse, vectors:
        first, many = sparse.embed_documents(TEXTS[:4]), vectors.embed_documents(TEXTS[:4])
        until(lambda: gone(sparse, vectors))
        assert np.allclose(sparse.embed_documents(TEXTS[:4]).toarray(), first.toarray(), atol=1e-6)
        assert all(
            np.allclose(one, other, atol=1e-6)
            for one, other in zip(vectors.embed_documents(TEXTS[:4]), many, strict=True)
        )


def test_a_loaded_model_on_a_cpu_cannot_leave(tmp_path: Path) -> None:
    """Whoever handed it in holds it: it would be a promise of nothing, so it is refused."""
    st = SentenceTransformer(str(save_embedder(tmp_path)), device="cpu")
    with pytest.raises(ConfigError, match="unload_after_s: a loaded model on the CPU cannot be unloaded"):
        Embedder(st, device="cpu", memory=SOON)
    with Embedder(st, device="cpu") as embedder:
        assert embedder.embed_documents(["a"]).shape[0] == 1


class _Card(SimulatedDevice):
    """An accelerator whose tensors are those of the CPU: what is moved to it is counted."""

    def __init__(self) -> None:
        super().__init__("1GiB", kind="card")
        self.name = "cpu"


def test_a_loaded_model_on_a_card_waits_in_main_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to main memory and back to the device, the very object; where it no longer fits it stays, and the call says so."""
    st = SentenceTransformer(str(save_embedder(tmp_path)), device="cpu")
    card, moved = _Card(), list[str]()
    with Embedder(st, device="cpu") as plain:
        wanted = plain.embed_documents(TEXTS)
    monkeypatch.setattr("memsafe.engine.residence.open_device", lambda name: card)
    monkeypatch.setattr(st, "to", lambda device: moved.append(device) or st)
    with Embedder(st, device="cpu", memory=MemoryPolicy(unload_after_s=0.2, learn=False, limit=None)) as embedder:
        assert np.allclose(embedder.embed_documents(TEXTS), wanted, atol=1e-6)
        until(lambda: gone(embedder))
        until(lambda: moved == ["cpu"])
        card.take("1GiB")
        with pytest.raises(ModelTooLargeError):
            embedder.embed_documents(TEXTS)
        card.give()
        moved.clear()
        assert np.allclose(embedder.embed_documents(TEXTS), wanted, atol=1e-6)
        assert moved[0] == card.name and embedder.model is st


def test_running_out_while_moving_is_the_same_error() -> None:
    """What was free a moment ago is taken: the model is back in main memory, whole."""
    moved: list[str] = []

    class Model(torch.nn.Linear):
        def to(self, device: Any, *rest: Any, **more: Any) -> Any:
            moved.append(device)
            if device != "cpu":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
            return self

    device = SimulatedDevice("1GiB")
    with pytest.raises(ModelTooLargeError):
        move(Model(4, 4), device, 1 << 30)
    assert moved == [device.name, "cpu"]


def test_presence() -> None:
    """Weights leave after their time, never in use; a use that begins later finds them gone."""
    presence = Presence()
    presence.here = True
    with presence.use(), presence.use():
        assert presence.leave(0.01) == 0.01
    assert 0 < presence.leave(100) <= 100 and presence.here
    time.sleep(0.02)
    assert presence.leave(0.01) == 0 and not presence.here


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "1"])
def test_times_that_are_none(value: Any) -> None:
    """A time to wait is a finite number above 0."""
    with pytest.raises(ConfigError, match="unload_after_s"):
        MemoryPolicy(unload_after_s=value)


def test_through_both_adapters(tmp_path: Path) -> None:
    """`memory=` is all it takes, in LlamaIndex and in LangChain, for embeddings and for rerankers."""
    from langchain_core.documents import Document

    from langchain_memsafe import MemsafeRerank
    from llama_index_memsafe import MemsafeEmbedding

    memory = {"unload_after_s": 0.3}
    embedding = MemsafeEmbedding(str(save_embedder(tmp_path / "embedder")), device="cpu", memory=memory)
    folder = str(save_reranker(tmp_path / "reranker"))
    rerank = MemsafeRerank(model_name=folder, model_kwargs={"device": "cpu"}, memory=memory)

    def rows() -> Any:
        ranked = rerank.compress_documents([Document("a bird"), Document("a city")], "a crane")
        return *embedding.get_text_embedding("a crane"), *(each.metadata["relevance_score"] for each in ranked)

    first = rows()
    until(lambda: gone(embedding.embedder, rerank.reranker))
    assert np.allclose(first, rows(), atol=1e-6)
    embedding.embedder.close()
    rerank.reranker.close()
