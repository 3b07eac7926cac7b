"""Hooks and progress callbacks are others' code: it may raise, wait for ever, or call us again, and harms nobody else."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import pytest

from memsafe import ConfigError
from memsafe.engine import hooks as hooks_module
from memsafe.engine.hooks import Hooks
from memsafe.events import CacheReleased, Event, MicroBatchDone
from memsafe.testing import SimulatedDevice, SimulatedEmbedder
from tests.concurrency.helpers import PATIENCE_S, start, wait_until
from tests.concurrency.test_priorities import SMALL, texts


@pytest.fixture(autouse=True)
def _soon_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks_module, "IDLE_S", 0.05)


def event(number: int = 0) -> Event:
    return CacheReleased("cpu", number, "run")


# hooks


def test_a_call_has_told_its_events_when_it_returns(device: SimulatedDevice) -> None:
    """In their order, by a thread that computes nothing, and whatever a hook before has raised."""
    seen: list[Event] = []
    threads: set[str] = set()

    def slow(event: Event) -> None:
        time.sleep(0.002)
        threads.add(threading.current_thread().name)
        seen.append(event)

    def broken(event: Event) -> None:
        raise SystemExit(3)

    with SimulatedEmbedder(device, memory=SMALL, hooks=[broken, slow]) as embedder:
        for _ in range(3):
            seen.clear()
            report = embedder.run(texts(60)).report
            assert sum(isinstance(each, MicroBatchDone) for each in seen) == report.micro_batches > 3
    assert threads == {"memsafe-hooks"}


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
def test_a_hook_that_waits_for_ever_holds_nobody_up(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own calls go on after a moment, once, with a warning; another model on the device notices nothing; close() works."""
    monkeypatch.setattr(hooks_module, "PATIENCE_S", 0.3)
    device, go = SimulatedDevice("1GiB", kind=kind), threading.Event()

    def wait(event: Event) -> None:
        assert go.wait(PATIENCE_S)

    with SimulatedEmbedder(device, memory=SMALL) as other, SimulatedEmbedder(device, memory=SMALL) as plain:
        embedder = SimulatedEmbedder(device, memory=SMALL, hooks=[wait])
        calls = [start(embedder.embed_documents, texts(60, word=f"c{i}x")) for i in range(4)]
        calls.append(start(other.embed_documents, texts(60)))
        for call in calls:
            assert call.result(20).shape == (60, 8)
        assert np.array_equal(calls[-1].result(), plain.embed_documents(texts(60)))
        before = time.monotonic()
        embedder.embed_documents(texts(60))
        embedder.close()
        assert time.monotonic() - before < 20
        go.set()
    assert "event hook has taken more than" in caplog.text


def test_a_hook_may_call_the_embedder_again(device: SimulatedDevice) -> None:
    """The same one, from within: the call is served, its events are told later, and nothing waits for itself."""
    again: list[Any] = []
    seen: list[Event] = []

    def hook(event: Event) -> None:
        seen.append(event)
        if len(again) < 3:
            again.append(embedder.embed_documents([f"from within {len(again)}"]))

    with SimulatedEmbedder(device, memory=SMALL, hooks=[hook]) as embedder:
        call = start(embedder.embed_documents, texts(60))
        assert call.result(PATIENCE_S).shape == (60, 8)
        wait_until(lambda: len(again) == 3, "three calls from within")
        assert np.array_equal(again[1], embedder.embed_documents(["from within 1"]))
    assert len(seen) > 5


def test_events_that_nobody_takes_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond a number the oldest are dropped, with one warning; the newest are told."""
    monkeypatch.setattr(hooks_module, "MOST_WAITING", 5)
    begun, go, seen = threading.Event(), threading.Event(), []

    def slow(event: Any) -> None:
        begun.set()
        assert go.wait(PATIENCE_S)
        seen.append(event.released_bytes)

    hooks = Hooks([slow])
    hooks(event(-1))
    assert begun.wait(PATIENCE_S)
    for number in range(20):
        hooks(event(number))
    go.set()
    hooks.settle()
    assert seen == [-1, 15, 16, 17, 18, 19]
    assert len([record for record in caplog.records if "too slow" in record.getMessage()]) == 1


def test_without_a_thread_to_be_had_events_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives no thread: nothing is raised, nothing is waited for, and the next event brings the first."""
    seen: list[int] = []
    hooks = Hooks([lambda event: seen.append(event.released_bytes)])  # type: ignore[attr-defined]

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        hooks(event(1))
        hooks.settle()
        assert seen == []
    hooks(event(2))
    hooks.settle()
    assert seen == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_hooks_in_a_forked_child(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their thread is the parent's, and may have held their lock: the child has hooks of its own."""
    seen: list[Event] = []
    with SimulatedEmbedder(SimulatedDevice("1GiB", kind="cpu"), memory=SMALL, hooks=[seen.append]) as embedder:
        engine = embedder._engine
        embedder.embed_documents(texts(3))
        with engine._home.hooks._changed:  # as another thread of the parent would
            monkeypatch.setattr(engine._home, "_pid", -1)
            seen.clear()
            assert start(embedder.embed_documents, texts(5)).result(PATIENCE_S).shape == (5, 8)
        assert seen


# progress


def test_progress_that_calls_the_model_again_is_refused(device: SimulatedDevice) -> None:
    """It runs in the thread that computes, which would wait for itself: its own call says so, others go on."""

    def progress(count: int) -> None:
        embedder.embed_documents(["from within"])

    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        bad = start(embedder.embed_documents, texts(30), progress=progress)
        good = start(embedder.embed_documents, texts(30, word="good"))
        assert isinstance(error := bad.exception(PATIENCE_S), ConfigError) and "hand such work" in str(error)
        assert good.result(PATIENCE_S).shape == (30, 8)
        assert embedder.embed_documents(["later"]).shape == (1, 8)


def test_progress_that_waits_holds_its_lane_only(device: SimulatedDevice) -> None:
    """The caller's own affair while it lasts: queries of others are served beside it."""
    go, entered = threading.Event(), threading.Event()

    def progress(count: int) -> None:
        entered.set()
        assert go.wait(PATIENCE_S)

    with SimulatedEmbedder(device, memory=SMALL) as embedder:
        call = start(embedder.embed_queries, ["waits"], progress=progress)
        assert entered.wait(PATIENCE_S)
        assert start(embedder.embed_queries, ["goes on"]).result(PATIENCE_S).shape == (1, 8)
        go.set()
        assert call.result(PATIENCE_S).shape == (1, 8)
