"""Carries out what the recovery policy decides, until every input is done, or has its own error."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

from memsafe.config import FALLBACKS, MemoryPolicy, format_bytes
from memsafe.engine.jobs import Job
from memsafe.errors import InputTooLargeError
from memsafe.events import BudgetChanged, CacheReleased, Event, FallbackUsed, OutOfMemory, Waited
from memsafe.machine.device import Device
from memsafe.planning.batch import MicroBatch, TokenizedInput
from memsafe.planning.budget import MemoryBudget, MemorySnapshot
from memsafe.planning.cost import CostModel
from memsafe.planning.recovery import (
    Failure,
    FallBack,
    GiveUp,
    RecoveryPolicy,
    ReleaseCache,
    Retry,
    ShrinkBudget,
    Split,
    Wait,
)

__all__ = ["NOBODY", "Rescue", "Site", "Work", "tell"]

log = logging.getLogger("memsafe")

_LOOK_S = 0.05
"""How often a wait looks whether its inputs are still wanted."""


class Site(Protocol):
    """The device as a micro-batch in trouble sees it: who else runs there."""

    def others(self) -> tuple[int, int]:
        """How many other micro-batches run now, and the bytes they were admitted for."""

    def pause(self, paused: bool) -> None:
        """Say that this micro-batch holds no memory for now (it waits), or that it is about to go on."""

    def clear(self, timeout_s: float) -> bool:
        """Let nothing new start and wait until no other runs; False if that took too long."""


class _Nobody:
    def others(self) -> tuple[int, int]:
        return 0, 0

    def pause(self, paused: bool) -> None:
        return

    def clear(self, timeout_s: float) -> bool:
        return True


NOBODY: Site = _Nobody()
"""The site of a micro-batch that runs outside a dispatcher."""


@dataclass(frozen=True, eq=False)
class Work:
    """Inputs on their way through recovery.

    bound_bytes: what they are predicted to need at most. budget_bytes: what was free for them then. failures: how often
    memory ran out on them. refused: their bound is above the budget, so they were not started. rungs: fallbacks tried or predicted not to fit; used: those really run.
    reprieved: memory came free just before they were given up.
    """

    batch: MicroBatch
    bound_bytes: int = 0
    budget_bytes: int = 0
    failures: int = 0
    refused: bool = False
    rung: str | None = None
    rungs: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    waited_s: float = 0.0
    cleared: bool = False
    reprieved: bool = False


class Rescue:
    """Recovery of one executor's micro-batches. `lock` guards `cost` and `budget`."""

    def __init__(
        self,
        model: Any,
        device: Device,
        policy: MemoryPolicy,
        cost: CostModel,
        budget: MemoryBudget,
        lock: threading.Lock,
    ) -> None:
        self._model = model
        self._device = device
        self._policy = policy
        self._cost = cost
        self._budget = budget
        self._lock = lock
        self._decider = RecoveryPolicy(policy)

    def recover(self, work: Work, site: Site) -> list[Work]:
        """What is to run next, last first, after memory ran out for `work` or was predicted to.

        Nothing that comes back, unless `refused`, has a bound above what is free now.
        """
        batch, alone = work.batch, len(work.batch) == 1
        # A single input that failed beside others has not shown that it does not fit: once more, by itself.
        if alone and not work.cleared and (work.refused or work.failures > 1) and site.others()[0]:
            work = replace(work, cleared=True)
            if site.clear(self._policy.wait_s):
                self._announce(work, "retry")
                return [self.checked(work, site)]
        snapshot = self._device.snapshot()
        actions = self._decider.decide(self._failure(work, snapshot))
        self._announce(work, actions[-1].name)
        next_work: list[Work] = []
        for action in actions:
            if isinstance(action, ReleaseCache):
                self._release(batch)
            elif isinstance(action, ShrinkBudget):
                if not work.refused:  # what was never tried has not shown anything
                    with self._lock:
                        cap = self._budget.shrink(work.bound_bytes, snapshot)
                    tell(batch, BudgetChanged(self._device.name, cap, "shrink"), shrinks=1)
            elif isinstance(action, Wait):
                self._wait(action.seconds, batch, site)
                work = replace(work, waited_s=work.waited_s + action.seconds)
            elif isinstance(action, Retry):
                next_work.append(self.checked(work, site))
                if not next_work[-1].refused:
                    tell(batch, None, retries=1)
            elif isinstance(action, Split):
                tell(batch, None, splits=1)
                next_work.extend(self.checked(Work(half), site) for half in reversed(batch.split()))
            elif isinstance(action, FallBack):
                work = self.checked(replace(work, rung=action.rung, rungs=(*work.rungs, action.rung)), site)
                if not work.refused:
                    work = replace(work, used=(*work.used, action.rung))
                    self._tell_fallback(action.rung, batch.items[0])
                next_work.append(work)
            elif isinstance(action, GiveUp):
                again = self.checked(replace(work, rung=None, reprieved=True), site)
                if work.refused and not work.reprieved and not again.refused:
                    next_work.append(again)  # others gave memory back since it was refused
                else:
                    self._give_up(action.reason, work)
        return next_work

    def _failure(self, work: Work, snapshot: MemorySnapshot) -> Failure:
        return Failure(
            shape=work.batch.shape,
            attempt=max(work.failures, 1) + (1 if work.refused else 0),
            alone=len(work.batch) == 1,
            tokens=work.batch.num_tokens,
            rungs_used=work.rungs,
            rungs_refused=tuple(rung for rung in work.rungs if rung not in work.used),
            rungs_impossible=tuple(rung for rung in FALLBACKS if not self._model.can(rung)),
            waited_s=work.waited_s,
            has_neighbours=self._has_neighbours(snapshot, work.bound_bytes),
            device_kind=self._device.kind,
            half=self._model.dtype_name != "float32",
            started=work.failures > 0,
        )

    def checked(self, work: Work, site: Site) -> Work:
        """`work` with its bound, and refused if that is not free now, whatever earlier failures have capped."""
        # The dispatcher's lock comes first, as in admission; asked for inside ours the two could wait for each other.
        in_flight_bytes, snapshot = site.others()[1], self._device.snapshot()
        with self._lock:
            bound = self._cost.resident_bound(work.batch.shape)
            if work.rung is not None:
                bound = self._model.rung_bound(work.rung, work.batch.shape, bound)
            room = max(self._budget.headroom_bytes(snapshot, in_flight_bytes), 0)
        return replace(work, bound_bytes=bound, budget_bytes=room, refused=bound > room)

    def _has_neighbours(self, snapshot: MemorySnapshot, need_bytes: int) -> bool:
        """Whether waiting can help: an idle device would have room, but other processes hold it now."""
        limit = self._budget.limit_bytes
        most = snapshot.total_bytes - snapshot.allocated_bytes - self._budget.reserve_bytes
        if limit is not None:
            most = min(most, limit - max(snapshot.allocated_bytes - self._budget.baseline_bytes, 0))
        return need_bytes <= most and snapshot.free_bytes + snapshot.reusable_bytes < most

    def _wait(self, seconds: float, batch: MicroBatch, site: Site) -> None:
        started = time.perf_counter()
        site.pause(True)
        try:
            while (left := seconds - (time.perf_counter() - started)) > 0:
                if all(item.job.done for item in batch.items):
                    return
                time.sleep(min(left, _LOOK_S))
        finally:
            site.pause(False)
        tell(batch, Waited(self._device.name, seconds), waited_s=seconds)

    def _release(self, batch: MicroBatch) -> None:
        released = self._device.release()
        if released:
            tell(batch, CacheReleased(self._device.name, released, "failure"), released_bytes=released)

    def _announce(self, work: Work, action: str) -> None:
        """Memory ran out, and what happens next. Of what was only predicted nothing is told but the outcome."""
        if work.refused:
            return
        with self._lock:
            predicted = self._cost.predict(work.batch.shape)
        event = OutOfMemory(self._device.name, len(work.batch), work.batch.num_tokens, predicted, action)
        tell(work.batch, event, out_of_memory=1)

    def _tell_fallback(self, rung: str, item: TokenizedInput) -> None:
        index = item.job.position(item.index)
        what = {
            "chunk": "feed-forward layers run over slices of its tokens (same numbers)",
            "half": "it is computed in half precision (numbers differ slightly)",
            "cpu": "it is computed on the CPU (slow)",
        }[rung]
        log.warning("input %d of %d tokens does not fit on %s; %s", index, item.num_tokens, self._device.name, what)
        item.job.report.fall_back(rung)
        if item.job.emit is not None:
            item.job.emit(FallbackUsed(self._device.name, rung, index, item.num_tokens))

    def _give_up(self, reason: str, work: Work) -> None:
        with self._lock:
            need = self._cost.resident_bound(work.batch.shape)
            if work.refused:  # what is free may have changed since: the error tells what decided
                free = work.budget_bytes
            else:  # it was tried, and took more than was free
                free = max(self._budget.headroom_bytes(self._device.snapshot()), 0)
                need = max(need, free + 1)
        for item in work.batch.items:
            index = item.job.position(item.index)
            error = InputTooLargeError(
                f"input {index} needs {format_bytes(need)} alone ({item.num_tokens:,} tokens), "
                f"{format_bytes(free)} are free for it on {self._device.name}; {reason}",
                index=index,
                num_tokens=item.num_tokens,
                need_bytes=need,
                free_bytes=free,
            )
            item.job.give_up(item, error)


def tell(batch: MicroBatch, event: Event | None, **counts: float) -> None:
    """Every job of `batch` learns what happened: counts for its report, the event for its hooks."""
    jobs: dict[Job, None] = dict.fromkeys(item.job for item in batch.items)
    for job in jobs:
        if counts:
            job.report.add(**counts)
        if event is not None and job.emit is not None:
            job.emit(event)
