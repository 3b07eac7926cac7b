"""`max_pending`: how many inputs may wait, and what happens to those that would be too many."""

from __future__ import annotations

import asyncio
import threading

import pytest

from memsafe import BusyError
from memsafe.testing import SimulatedDevice, SimulatedEmbedder
from tests.concurrency.helpers import PATIENCE_S, Watch, before_encoding, pending, start, wait_until
from tests.concurrency.test_priorities import texts


def test_a_full_queue_holds_callers_back(device: SimulatedDevice) -> None:
    """With ``on_full="wait"`` never more than `max_pending` inputs wait, over all callers; all calls finish."""
    seen: list[int] = []
    policy = {"max_tokens": 32, "max_pending": 10}
    with SimulatedEmbedder(device, memory=policy, hooks=[lambda event: seen.append(pending(embedder))]) as embedder:
        calls = [start(embedder.embed_documents, texts(25, word=f"c{i}x")) for i in range(6)]
        for call in calls:
            assert call.result(PATIENCE_S).shape == (25, 8)
        assert max(seen) <= 10
        assert pending(embedder) == 0


def test_a_call_larger_than_the_queue_finishes(device: SimulatedDevice) -> None:
    """One call with more inputs than may wait finishes, whether the policy says to wait or to raise."""
    for on_full in ("wait", "raise"):
        with SimulatedEmbedder(device, memory={"max_pending": 5, "on_full": on_full}) as embedder:
            assert embedder.embed_documents(texts(200)).shape == (200, 8)
            assert asyncio.run(embedder.aembed_documents(texts(200))).shape == (200, 8)


def test_a_full_queue_refuses_callers(device: SimulatedDevice) -> None:
    """With ``on_full="raise"`` a call that would be too many gets BusyError at once, says the numbers, and harms nobody."""
    with SimulatedEmbedder(device, memory={"max_tokens": 32, "max_pending": 20, "on_full": "raise"}) as embedder:
        watch = Watch(embedder)
        watch.hold()
        first = start(embedder.embed_documents, texts(24))
        watch.wait_for(1)
        wait_until(lambda: 12 <= pending(embedder) <= 20, "the first call in the queue")
        with pytest.raises(BusyError, match=r"this call has 9, but max_pending is 20"):
            embedder.embed_documents(texts(9, word="v"))
        with pytest.raises(BusyError):
            asyncio.run(embedder.aembed_documents(texts(9, word="v")))
        watch.go()
        assert first.result(PATIENCE_S).shape == (24, 8)
        assert embedder.embed_documents(texts(9, word="v")).shape == (9, 8)


def test_callers_that_come_at_the_same_moment_are_counted(device: SimulatedDevice) -> None:
    """Of many calls at once, those that `max_pending` has no room for get BusyError, though none is tokenised yet."""
    with SimulatedEmbedder(device, memory={"max_pending": 10, "on_full": "raise"}) as embedder:
        tokenise = threading.Event()
        before_encoding(embedder._engine.model.encoder, lambda: tokenise.wait(PATIENCE_S))
        calls = [start(embedder.embed_documents, texts(2, word=f"c{i}x")) for i in range(12)]
        wait_until(lambda: sum(call.done() for call in calls) == 7, "refusals")
        assert all(isinstance(call.exception(), BusyError) for call in calls if call.done())
        tokenise.set()
        assert sum(call.exception(PATIENCE_S) is None for call in calls) == 5
