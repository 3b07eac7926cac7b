"""What the tests of planning share: a device without anything behind it, and models of plain arithmetic on it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from memsafe.config import FALLBACKS, GiB, MemoryPolicy, MiB
from memsafe.planning.batch import BatchShape, MicroBatch, TokenizedInput
from memsafe.planning.budget import MemoryBudget, MemorySnapshot
from memsafe.planning.cost import CostKey, CostModel, CostPrior
from memsafe.planning.instructions import Measured, Start, Ticket, TidyFirst
from memsafe.planning.scheduler import Scheduler
from memsafe.planning.sizing import Pending, Size
from memsafe.planning.speed import Sample
from memsafe.planning.tenant import Tenant
from memsafe.planning.tidying import Seen
from memsafe.planning.traits import Traits
from memsafe.planning.turns import BULK, QueueKey, Queues

KEY = CostKey("m", "r", "float32", "sdpa", "packed", "x", "2")
POLICY = MemoryPolicy(wait_s=0, reserve=0, learn=False, fallback=FALLBACKS)
_numbers = itertools.count()


class PlainModel:
    """A token costs 1 MiB and one operation; nothing else costs anything."""

    packed, pad_multiple, workspace_bytes, dtype_name = True, 1, 0, "float32"
    one_core_each: bool = False
    counts_process: bool = False
    most_padding: float | None = None

    def cost_shape(self, batch: MicroBatch) -> BatchShape:
        return batch.shape

    def flops(self, shape: BatchShape) -> float:
        return float(shape.tokens)

    def can(self, rung: str) -> bool:
        return rung != "half"

    def rung_bound(self, rung: str, shape: BatchShape, bound_bytes: int) -> int:
        return 0 if rung == "cpu" else bound_bytes // 2


class FixedSizing:
    """A size that is given, and a division of the cores that a test sets."""

    settled = True

    def __init__(self, tokens: int = 64, lanes: tuple[int, int | None] = (2, None)) -> None:
        self.tokens, self.lanes = tokens, lanes
        self.asked: list[Pending] = []
        self.judged: list[float] = []
        self.trial = False
        self.found = False  # what the next observation answers
        self.samples: list[Sample] = []

    def propose(self, pending: Pending, *, capped: bool = False) -> Size | None:
        self.asked.append(pending)
        return Size(self.tokens, self.trial)

    def took(self, size: Size) -> None:
        pass

    def observe(self, sample: Sample, lengths: object = None) -> bool:
        self.samples.append(sample)
        return self.found

    def observe_lanes(self, work: float, seconds: float, starved_seconds: float) -> bool:
        self.judged.append(work)
        return False


class Call:
    """A job, as far as queues know it."""

    def __init__(self, started: float) -> None:
        self.started = started


class World:
    """A device's scheduler, with memory that a test sets. seen: what is read before a decision."""

    def __init__(self, kind: str = "cuda", cores: int = 1, **traits: Any) -> None:
        self.traits = dataclasses.replace(Traits.of(kind, cores), **traits)
        self.scheduler = Scheduler(self.traits)
        self.now = 0.0
        self.seen = seen(GiB)

    def tenant(
        self, *, policy: MemoryPolicy = POLICY, sizing: FixedSizing | None = None, known: bool = True, **model: Any
    ) -> Tenant:
        """Another model on the device; its sizes are fixed, at 64 tokens, unless `sizing` is given."""
        plain = PlainModel()
        for name, value in model.items():
            setattr(plain, name, value)
        cost = CostModel(KEY, CostPrior(0.0, float(MiB), 0.0, 0.0))
        for tokens in (8, 16, 32, 64, 128, 256) if known else ():
            cost.observe(BatchShape.of([tokens], packed=True), tokens * MiB, tokens * MiB)
        budget = MemoryBudget(limit_bytes=policy.limit_bytes(GiB), reserve_bytes=policy.reserve_bytes(GiB))
        tenant = Tenant(plain, self.traits, policy, cost, budget, Queues())
        tenant.sizing = sizing or FixedSizing(  # type: ignore[assignment]
            lanes=(self.traits.cores, 1) if self.traits.side_by_side else (2, None)
        )
        self.scheduler.attach(tenant)
        return tenant

    def add(
        self, tenant: Tenant, lengths: Sequence[int], priority: int = BULK, *, max_rows: int | None = None
    ) -> list[TokenizedInput]:
        job = Call(next(_numbers))
        items = [TokenizedInput(index, None, num_tokens=length, job=job) for index, length in enumerate(lengths)]
        tenant.queues.add(QueueKey((priority, max_rows, ())), items)
        return items

    def next(self) -> Start | TidyFirst | None:
        return self.scheduler.next(self.now, self.seen)

    def start(self) -> Ticket:
        """The next micro-batch, which must be allowed to start."""
        action = self.next()
        assert isinstance(action, Start), action
        return action.ticket

    def end(self, ticket: Ticket, seconds: float = 0.0, *, measured: bool = True) -> list[Any]:
        """`ticket` has run, `seconds` later; what is to be done then."""
        self.now += seconds
        shape = ticket.batch.shape
        live = shape.tokens * MiB
        told: list[Any] = []
        if measured:
            told += self.scheduler.ran(ticket, ticket.batch, Measured(live, live, seconds or None, None))
        return told + list(self.scheduler.done(ticket, self.now))


def seen(free_bytes: int, *, process_bytes: int = 0, cached_bytes: int = 0, exact_heap: bool = False) -> Seen:
    """A device with so much free, and so much more in this process's cache."""
    snapshot = MemorySnapshot(free_bytes, GiB, 0, cached_bytes)
    return Seen(snapshot, process_bytes or cached_bytes, exact_heap)
