"""Everything at once, with threads that change places at every chance; and nothing under the scheduling lock waits."""

from __future__ import annotations

import builtins
import logging
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from memsafe import CancelledError, ClosedError, Embedder, MemoryPolicy
from memsafe.engine.lanes import lanes_of, scheduling_lock
from memsafe.machine import heap as heap_module
from memsafe.machine.device import CpuDevice
from memsafe.machine.heap import heap
from memsafe.machine.store import Store
from memsafe.planning.batch import BatchShape
from memsafe.testing import SimulatedDevice, SimulatedEmbedder, SimulatedReranker
from tests.concurrency.helpers import PATIENCE_S, start, wait_until

CALLERS, CALLS = 8, 5


class Machine(SimulatedDevice):
    """Eight cores if it is a CPU; forwards take a moment, in which others run."""

    @property
    def num_cores(self) -> int:
        return 8 if self.kind == "cpu" else 1

    def forward(self, shape: BatchShape, num_bytes: int, rung: str | None = None) -> Any:
        if shape.tokens % 3 == 0:
            time.sleep(0.0005)
        return super().forward(shape, num_bytes, rung)


@pytest.fixture
def switching() -> Iterator[None]:
    """The interpreter lets another thread run every microsecond rather than every 5 milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where something that may wait for a driver, the heap or a disk was called by a thread with the scheduling lock held.

    The heap's settings are only pretended: they are the whole process's.
    """
    found: list[str] = []
    calls: set[str] = set()

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.add(name)
            if scheduling_lock()._is_owned():  # type: ignore[attr-defined]
                found.append(f"{name}\n{''.join(traceback.format_stack(limit=8))}")
            return function(*args, **options)

        return call

    for owner in (SimulatedDevice, CpuDevice):
        for name in ("snapshot", "process_bytes", "release", "measure"):
            monkeypatch.setattr(owner, name, guarded(f"device.{name}", getattr(owner, name)))
    monkeypatch.setattr(heap_module, "strict_heap", guarded("heap", lambda threshold_bytes=0: True))
    monkeypatch.setattr(heap, "exact", False)
    monkeypatch.setattr(heap, "_wished", False)
    monkeypatch.setattr(heap_module, "trim", guarded("trim", heap_module.trim))
    for name in ("load", "save", "write"):
        if hasattr(Store, name):
            monkeypatch.setattr(Store, name, guarded(f"store.{name}", getattr(Store, name)))
    monkeypatch.setattr(builtins, "open", guarded("open", builtins.open))
    found_calls = found
    yield found_calls
    assert "device.snapshot" in calls, "nothing was watched"


def texts_of(random_: random.Random, count: int) -> list[str]:
    return [
        " ".join(f"w{random_.randrange(10_000)}" for _ in range(int(random_.lognormvariate(2.5, 0.9)) + 1))
        for _ in range(count)
    ]


class Storm:
    """Callers of several models on one device, and what the world does to it meanwhile."""

    def __init__(self, device: SimulatedDevice, models: list[Any], quiet: list[Any], seed: int) -> None:
        self.device, self.models, self.quiet, self.seed = device, models, quiet, seed
        self.over = threading.Event()

    def caller(self, number: int) -> int:
        """Calls of every kind, each compared with what a quiet device gives; returns how many ended with rows."""
        random_, done = random.Random(self.seed * 1000 + number), 0
        for _ in range(CALLS):
            which = random_.randrange(len(self.models))
            model, quiet = self.models[which], self.quiet[which]
            kind = random_.choice(["documents", "documents", "query", "cancelled"])
            texts = texts_of(random_, random_.choice([1, 3, 40]) if kind != "query" else 1)
            if isinstance(model, SimulatedReranker):
                assert np.array_equal(model.score("what", texts), quiet.score("what", texts))
            elif kind == "query":
                assert np.array_equal(model.embed_queries(texts), quiet.embed_queries(texts))
            elif kind == "documents":
                cap = random_.choice([None, None, 5])
                assert np.array_equal(model.embed_documents(texts, max_rows=cap), quiet.embed_documents(texts))
            else:
                self.cancelled(model, texts)
                continue
            done += 1
        return done

    def cancelled(self, model: Any, texts: list[str]) -> None:
        engine = model._engine
        way = engine.way(None, {})
        job = engine.open(len(texts), way=way, urgent=False, max_rows=None)
        engine.announce(job)
        engine.feed(job, texts, way)
        job.cancel()
        with suppress(CancelledError):
            job.result(PATIENCE_S)

    def world(self) -> None:
        """Neighbours take and give, requests are refused, caches become useless."""
        random_ = random.Random(self.seed)
        while not self.over.is_set():
            what = random_.randrange(6)
            if what < 3:
                self.device.give()
                self.device.take(int(self.device.total_bytes * random_.random() * 0.8))
            elif what == 3:
                self.device.refuse(1)
            elif what == 4:
                self.device.fragment(int(self.device.total_bytes * random_.random() * 0.3))
            else:
                self.device.give()
            time.sleep(0.004)
        self.device.give()

    def comes_and_goes(self) -> None:
        """Another model is loaded, used and closed in the middle of its call, again and again."""
        random_ = random.Random(self.seed)
        while not self.over.is_set():
            try:
                other = SimulatedEmbedder(self.device, memory=POLICY, weights_bytes=0)
            except torch.OutOfMemoryError:  # its weights were refused
                continue
            call = start(other.embed_documents, texts_of(random_, 30))
            time.sleep(0.01)
            other.close()
            failure = call.exception(PATIENCE_S)
            assert failure is None or isinstance(failure, ClosedError), failure


POLICY = MemoryPolicy(reserve=0, wait_s=0.3, fallback=("chunk", "cpu"), learn=False)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.usefixtures("switching")
@pytest.mark.timeout(300)
def test_a_storm_leaves_every_row_in_its_place(kind: str, watched: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Three models on one device, eight callers, cancels, a fourth model that comes and goes, neighbours that take and give,
    refusals: every row as on a quiet device, no other error than those that were asked for, nothing left over, and
    nothing under the scheduling lock asked the device, the heap or the disk."""
    options = {"weights_bytes": 1 << 20, "per_token_bytes": 32 << 10}
    device, endless = Machine("96MiB", kind=kind), Machine("1TiB", kind=kind)
    kinds = (SimulatedEmbedder, SimulatedEmbedder, SimulatedReranker)
    models = [each(device, memory=POLICY, **options) for each in kinds]
    quiet = [each(endless, memory=POLICY, **options) for each in kinds]
    storm = Storm(device, models, quiet, seed=7)
    with caplog.at_level(logging.ERROR, logger="memsafe"):
        world: list[Future[Any]] = [start(storm.world), start(storm.comes_and_goes)]
        callers = [start(storm.caller, number) for number in range(CALLERS)]
        try:
            done = [call.result(200) for call in callers]
        finally:
            storm.over.set()
        for each in world:
            each.result(PATIENCE_S)
    assert sum(done) > CALLERS * CALLS / 2
    assert not watched, watched[0]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    outcomes = [forward.outcome for forward in device.forwards]
    assert "out of memory" in outcomes, "there was no storm"
    scheduler = lanes_of(device).scheduler
    wait_until(lambda: scheduler.idle, "nothing in flight")
    assert not scheduler.paused and not scheduler.alone
    for model in models:
        queues = model._engine.backlog.queues
        assert (queues.pending, queues.coming, queues.keys()) == (0, 0, [])
    assert device.snapshot().allocated_bytes == sum(each.weights_bytes for m in models for each in m.simulated)
    for model in (*models, *quiet):
        model.close()
    assert scheduler.tenants == [] and device.snapshot().allocated_bytes == 0


def test_nothing_under_the_lock_waits_with_a_real_model(minilm: str, watched: list[str]) -> None:
    """A real model that learns and remembers, on the real heap: files, memory figures and trimming are all outside."""
    texts = [f"passage {i} " + "about heaps and queues " * (i % 20) for i in range(60)]
    with Embedder(minilm, device="cpu", memory={"release": "run"}) as embedder:
        calls = [start(embedder.embed_documents, texts[i:]) for i in range(3)]
        for call in calls:
            assert np.isfinite(call.result(PATIENCE_S)).all()
        embedder.embed_queries(["one"])
    assert not watched, watched[0]
