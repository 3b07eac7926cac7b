"""Any call of device, model, tokenizer, store, hook or progress may raise anything at any time: nothing hangs, nothing is lost, and
who has no part in it is not harmed."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memsafe import MemoryPolicy
from memsafe.engine import hooks as hooks_module
from memsafe.engine.lanes import lanes_of
from memsafe.testing import SimulatedDevice, SimulatedEmbedder
from tests.concurrency.helpers import PATIENCE_S, start, wait_until

POLICY = MemoryPolicy(reserve=0, wait_s=0.02, fallback=("chunk", "cpu"), learn=False, max_tokens=48, max_pending=60)
COSTS = {"weights_bytes": 1 << 20, "per_token_bytes": 32 << 10}
ERRORS: list[Callable[[], BaseException]] = [
    lambda: RuntimeError("a fault"),
    lambda: torch.OutOfMemoryError("CUDA out of memory (injected)."),
    MemoryError,
    lambda: KeyError("a fault"),
    lambda: RecursionError("too deep"),
    lambda: OSError(5, "input/output error"),
    lambda: SystemExit(3),
]
OWN = {
    "model": ["forward"],
    "tokenizer": ["encode"],
    "store": ["remember"],
    "hook": ["hook"],
    "progress": ["progress"],
}
"""What belongs to one model, or one call of it."""
SHARED = {
    "device": ["snapshot", "process_bytes", "release", "measure", "mark", "seconds_between"],
    "arithmetic": ["cost_shape", "flops", "rung_bound", "can"],
}
"""What decisions for the whole device rest upon: who waits for one that fails is told, and nobody later."""


class Faults:
    """Raises in some of the calls that go through :meth:`wrapped`, while :attr:`rate` says so."""

    def __init__(self, seed: int, rate: float) -> None:
        self.random, self.rate, self.count = random.Random(seed), rate, 0

    def maybe(self) -> None:
        if self.random.random() < self.rate:
            self.count += 1
            raise self.random.choice(ERRORS)()

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.maybe()
            result = function(*args, **options)
            if self.random.random() < 0.5:  # before it has done something, or after
                self.maybe()
            return result

        return call

    def block(self, enter: Callable[..., Any]) -> Callable[..., Any]:
        """The same for what is entered with ``with``: on the way in, and on the way out."""

        @contextmanager
        def call(*args: Any, **options: Any) -> Iterator[Any]:
            self.maybe()
            with enter(*args, **options) as value:
                yield value
            self.maybe()

        return call

    def into(self, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, (self.block if name == "measure" else self.wrapped)(getattr(owner, name)))


def inject(where: str, faults: Faults, device: SimulatedDevice, embedder: SimulatedEmbedder) -> None:
    if where == "device":
        faults.into(device, *SHARED["device"])
    elif where in ("model", "arithmetic"):
        faults.into(embedder.simulated[0], *{**OWN, **SHARED}[where])
    elif where == "store":
        faults.into(embedder._engine.runners[0], "remember")
    elif where == "tokenizer":
        encoder = embedder.simulated[0].encoder
        way = encoder.way

        def faulty(*args: Any) -> Any:
            chosen = way(*args)
            faults.into(chosen, "encode")
            return chosen

        encoder.way = faulty  # type: ignore[method-assign]


def texts_of(seed: int, count: int) -> list[str]:
    random_ = random.Random(seed)
    return [" ".join(f"w{random_.randrange(9999)}" for _ in range(random_.randrange(1, 25))) for _ in range(count)]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(hooks_module, "IDLE_S", 0.05)
    caplog.set_level(logging.CRITICAL, logger="memsafe")


@pytest.mark.timeout(150)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # what threads do cannot be shrunk
)
@given(
    where=st.sets(st.sampled_from([*SHARED, *OWN]), min_size=1),
    kind=st.sampled_from(["cpu", "simulated"]),
    rate=st.sampled_from([0.01, 0.1, 0.6]),
    seed=st.integers(0, 1 << 30),
)
def test_faults_anywhere(where: set[str], kind: str, rate: float, seed: int) -> None:
    """Four calls of a model whose surroundings fail, two of a neighbour on the device: each ends, with its rows or an error; the
    neighbour's with its rows, unless what both stand on fails; afterwards both work, and nothing is left over."""
    device, faults = SimulatedDevice("96MiB", kind=kind), Faults(seed, 0.0)
    embedder = SimulatedEmbedder(
        device, memory=POLICY, hooks=[lambda event: "hook" in where and faults.maybe()], **COSTS
    )
    other = SimulatedEmbedder(device, memory=POLICY, **COSTS)
    with SimulatedEmbedder(SimulatedDevice("1TiB"), memory=POLICY, **COSTS) as quiet, embedder, other:
        for place in where:
            inject(place, faults, device, embedder)
        inputs = [texts_of(seed + i, 25) for i in range(6)]
        faults.rate = rate
        progress = (lambda count: faults.maybe()) if "progress" in where else None
        calls = [start(embedder.embed_documents, given, progress=progress) for given in inputs[:4]]
        neighbours = [start(other.embed_documents, given) for given in inputs[4:]]
        for call, given_texts in zip([*calls, *neighbours], inputs, strict=True):
            error = call.exception(PATIENCE_S)
            if error is None:
                assert np.array_equal(call.result(), quiet.embed_documents(given_texts))
            elif call in neighbours:
                assert where & SHARED.keys(), f"a neighbour was harmed: {error!r}"
        faults.rate = 0.0
        lanes = lanes_of(device)
        wait_until(
            lambda: lanes.scheduler.idle and lanes._waiting == len(lanes._threads), "lanes that have seen it all"
        )
        for model in (embedder, other):
            again = start(model.embed_documents, inputs[0])
            assert np.array_equal(again.result(PATIENCE_S), quiet.embed_documents(inputs[0]))
        scheduler = lanes.scheduler
        wait_until(lambda: scheduler.idle, "nothing in flight")
        assert not scheduler.paused and not scheduler.alone
        for model in (embedder, other):
            queues = model._engine.backlog.queues
            assert (queues.pending, queues.coming, queues.keys()) == (0, 0, [])
        assert device.snapshot().allocated_bytes == 2 * COSTS["weights_bytes"]
    assert scheduler.tenants == [] and device.snapshot().allocated_bytes == 0
