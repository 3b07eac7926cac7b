"""What the tests of the engine share: one model on a simulated device, driven by its lanes without threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memsafe import Event, MemoryPolicy
from memsafe.config import MiB
from memsafe.engine.jobs import Backlog, Job
from memsafe.engine.lanes import Lanes, scheduling_lock
from memsafe.engine.runner import Runner
from memsafe.events import ReportBuilder
from memsafe.planning.batch import BatchShape, TokenizedInput
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostModel
from memsafe.planning.sizing import Size
from memsafe.planning.turns import BULK, QueueKey
from memsafe.testing import SimulatedDevice, SimulatedModel

NO_WAIT = MemoryPolicy(wait_s=0, reserve=0, learn=False)


class Bench:
    """One model without threads: its lanes choose micro-batches and run them one after another, here.

    A token costs 1 MiB and nothing else costs anything, so that the arithmetic can be done in the head. tokens: of each
    micro-batch at most; None for the real search. known: the cost model has seen exact measurements before.
    """

    def __init__(
        self,
        total: str = "1GiB",
        memory: MemoryPolicy = NO_WAIT,
        *,
        tokens: int | None = 64,
        known: bool = False,
        device: SimulatedDevice | None = None,
        **model: Any,
    ) -> None:
        self.device = device or SimulatedDevice(total)
        costs = {"fixed_bytes": 0, "per_token_bytes": MiB, "per_sequence_bytes": 0, "weights_bytes": 0}
        self.model = SimulatedModel(self.device, **{**costs, **model})
        cost = CostModel(self.model.cost_key(), self.model.cost_prior())
        for size in (8, 16, 32, 64, 128, 256) if known else ():
            shape = BatchShape.of([size], packed=True)
            cost.observe(shape, self.model.num_bytes(shape), self.model.num_bytes(shape))
        total_bytes = self.device.total_bytes
        budget = MemoryBudget(
            limit_bytes=memory.limit_bytes(total_bytes), reserve_bytes=memory.reserve_bytes(total_bytes)
        )
        self.backlog = Backlog(scheduling_lock())
        self.remembered: list[str] = []
        self.runner = Runner(
            self.model, memory, cost, budget, self.backlog, remember=lambda key, text: self.remembered.append(text)
        )
        if tokens is not None:
            self.runner.tenant.sizing.propose = (  # type: ignore[method-assign]
                lambda pending, *, capped=False: Size(tokens)
            )
        self.lanes = Lanes(self.device)
        self.lanes.attach(self.runner)
        self.backlog.listeners.clear()
        self.lanes._waiting = 1  # as if a lane waited: none is started
        self.events: list[Event] = []
        self.finished: list[int] = []

    def job(self, texts: Sequence[str], priority: int = BULK) -> Job:
        key = QueueKey((priority, None, ()))
        job = Job(len(texts), key, {}, ReportBuilder(), self.finished.append, self.tell)
        encoded = self.model.encoder.encode(texts)
        items = [TokenizedInput(index, one.input_ids, job=job) for index, one in enumerate(encoded)]
        self.backlog.extend(job, sorted(items, key=lambda item: -item.num_tokens))
        return job

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def drain(self, between: Callable[[], object] = lambda: None) -> None:
        while True:
            between()
            start = self.lanes.choose()
            if start is None:
                return
            self.lanes.perform(start)

    def run(self, texts: Sequence[str]) -> Any:
        job = self.job(texts)
        self.drain()
        return job.result(0)

    @property
    def forwards(self) -> list[tuple[int, str]]:
        return [(forward.sequences, forward.outcome) for forward in self.device.forwards]

    def told(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def lone(total: str, tokens: int, fallback: tuple[str, ...], *, known: bool, wait_s: float = 0, **model: Any) -> Bench:
    """A device, and a policy for one input. known: its cost is predicted as it is; else far too low."""
    policy = MemoryPolicy(wait_s=wait_s, reserve=0, learn=False, fallback=fallback)
    return Bench(total, policy, known=known, prior_scale=1.0 if known else 0.02, **model)


def texts_of(count: int, tokens: int = 8) -> list[str]:
    """`count` different texts of `tokens` tokens."""
    return [" ".join([f"w{number}"] * (tokens - 2)) for number in range(count)]


def reference(texts: Sequence[str], **model: Any) -> Any:
    """Rows of `texts`, each computed alone on a device with endless memory."""
    rows = [Bench("1TiB", per_token_bytes=1, **model).run([text]) for text in texts]
    return np.concatenate(rows)
