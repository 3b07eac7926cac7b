"""One model on one device: carries micro-batches out, learns from them, and performs what the recovery policy decides."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memsafe.config import MemoryPolicy, MiB, format_bytes
from memsafe.errors import InputTooLargeError
from memsafe.events import (
    BudgetChanged,
    CacheReleased,
    Event,
    FallbackUsed,
    MicroBatchDone,
    NonFiniteRedone,
    OutOfMemory,
    Waited,
)
from memsafe.planning.batch import MicroBatch, TokenizedInput
from memsafe.planning.budget import MemoryBudget, MemorySnapshot
from memsafe.planning.cost import CostModel
from memsafe.planning.planner import BatchPlanner
from memsafe.planning.ramp import LaneChoice, Ramp
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
from memsafe.runtime.device import Device, is_out_of_memory
from memsafe.runtime.jobs import Backlog, Job, QueueKey
from memsafe.runtime.output import HostCopy, Rows, to_host

__all__ = ["Executor", "Ticket"]

log = logging.getLogger("memsafe")

FAIRNESS = 4
"""Urgent micro-batches in a row before bulk work gets one turn: bulk keeps a fifth of the device at worst."""
WORTH_RELEASING = 64 * MiB
"""Growth of the process during a run that is given back at its end; less is not worth the page faults of the next run."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """Leave to run one micro-batch. `probe`: alone on the device, so that its peak and its speed can be measured.

    bound_bytes: what it was admitted for. `fits`: False if one input exceeds what is admissible even alone.
    """

    batch: MicroBatch
    bound_bytes: int
    budget_bytes: int
    probe: bool
    fits: bool = True
    threads: int | None = None


class Executor:
    """Runs micro-batches of one :class:`LoadedModel`. Its dispatcher calls :meth:`admit` under a lock, lanes :meth:`run`.

    model: anything with the methods of LoadedModel (memsafe.testing has a simulated one).
    """

    def __init__(
        self,
        model: Any,
        device: Device,
        policy: MemoryPolicy,
        cost: CostModel,
        budget: MemoryBudget,
        backlog: Backlog,
        *,
        remember: Callable[[CostModel], None] = lambda cost: None,
    ) -> None:
        self.model = model
        self.device = device
        self.policy = policy
        self.cost = cost
        self.budget = budget
        self.backlog = backlog
        self.ramp = Ramp(policy.knee, ceiling=policy.max_tokens)
        self.lane_choice = LaneChoice(device.num_cores if device.kind == "cpu" else 1)
        self._streak = 0
        self.broken: BaseException | None = None
        self._recovery = RecoveryPolicy(policy)
        self._remember = remember
        self._lock = threading.Lock()
        self._launch = threading.Lock() if device.kind != "cpu" else None
        self._planners: dict[int | None, BatchPlanner] = {}

    # what the search has found, or what an earlier process found

    @property
    def target_tokens(self) -> int:
        """How many tokens the next micro-batch should hold."""
        tokens = self.cost.target_tokens or self.ramp.max_tokens
        return tokens if self.policy.max_tokens is None else min(tokens, self.policy.max_tokens)

    @property
    def lanes(self) -> tuple[int, int | None]:
        """(micro-batches side by side, threads each). On an accelerator two: one computes, one is prepared or fetched."""
        if self.device.kind != "cpu":
            return 2, None
        cores = self.device.num_cores
        if self.cost.lanes is not None and cores % self.cost.lanes == 0:
            return self.cost.lanes, cores // self.cost.lanes
        return self.lane_choice.current() if self.cost.target_tokens is not None else (1, cores)

    def record_lanes(self, units: float, seconds: float) -> None:
        """Tell what all lanes together did; see :class:`LaneChoice`. Called under the dispatcher's lock."""
        if self.device.kind != "cpu" or self.cost.lanes is not None or self.cost.target_tokens is None:
            return
        self.lane_choice.record(units, seconds)
        if self.lane_choice.done:
            self.cost.lanes = self.lane_choice.current()[0]
            self._remember(self.cost)

    # admission

    def planner(self, max_rows: int | None) -> BatchPlanner:
        if max_rows not in self._planners:
            self._planners[max_rows] = BatchPlanner(self.model.packed, self.model.pad_multiple, max_rows)
        return self._planners[max_rows]

    def admit(self, in_flight_bytes: int, busy: int, lanes: int) -> Ticket | None:
        """Take the next micro-batch from the backlog, if it may start now; None if it must wait for others.

        Called under the dispatcher's lock. `busy`: micro-batches in flight on the device.
        """
        keys = self.backlog.keys()
        if not keys:
            return None
        with self.backlog.lock:
            keys = self.backlog.keys()
            if not keys:
                return None
            key = self._next_key(keys)
            items, tokens = self.backlog.view(key)
            probe = self._wants_probe(tokens)
            if probe and busy:
                return None
            snapshot = self.device.snapshot()
            budget_bytes = self.budget.admissible_bytes(snapshot, in_flight_bytes)
            start, max_tokens = 0, self._max_tokens(tokens, lanes)
            if probe:
                start = self._representative(items, max_tokens)
            planner = self.planner(key.max_rows)
            with self._lock:
                batch = planner.take(items, start, cost=self.cost, budget_bytes=budget_bytes, max_tokens=max_tokens)
                bound = self.cost.resident_bound(batch.shape)
            if bound > budget_bytes and self.policy.release != "never" and self._release("pressure", batch):
                budget_bytes = self.budget.admissible_bytes(self.device.snapshot(), in_flight_bytes)
                with self._lock:
                    batch = planner.take(items, start, cost=self.cost, budget_bytes=budget_bytes, max_tokens=max_tokens)
                    bound = self.cost.resident_bound(batch.shape)
            fits = bound <= budget_bytes
            if not fits and busy:
                return None  # those in flight will give memory back
            self.backlog.take(key, start, len(batch))
        return Ticket(batch, bound, budget_bytes, probe, fits)

    def _next_key(self, keys: list[QueueKey]) -> QueueKey:
        """The most urgent queue; after a row of urgent ones, one turn for the others, so that bulk never starves."""
        urgent = [key for key in keys if key.priority == keys[0].priority]
        others = keys[len(urgent) :]
        if others and self._streak >= FAIRNESS:
            self._streak = 0
            return others[0]
        self._streak = self._streak + 1 if others else 0
        return urgent[0]

    def _wants_probe(self, pending_tokens: int) -> bool:
        """Whether the next micro-batch is worth measuring alone: while the ramp climbs and there is enough to climb on."""
        return self.cost.target_tokens is None and pending_tokens >= self.target_tokens

    def _max_tokens(self, pending_tokens: int, lanes: int) -> int:
        most = self.target_tokens
        if lanes > 1:  # the end of a run is shared out evenly, so that no lane stands idle
            most = min(most, max(-(-pending_tokens // lanes), 128))
        return most

    def _representative(self, items: Sequence[TokenizedInput], max_tokens: int) -> int:
        """Where to take a probe: the middle of the backlog, whose lengths stand for all."""
        middle = len(items) // 2
        need, start = max_tokens, middle
        while start > 0 and need > items[start].num_tokens * (len(items) - start):
            start = max(0, start - max(1, len(items) // 8))
        return start

    # running

    def run(self, ticket: Ticket) -> None:
        """Carry out one admitted micro-batch and everything that recovery makes of it; rows go to their jobs."""
        todo: list[_Work] = [_Work(ticket.batch, 0 if ticket.fits else 1, ticket.bound_bytes, not ticket.fits)]
        while todo:
            work = todo.pop()
            live = tuple(item for item in work.batch.items if not item.job.done)
            if len(live) < len(work.batch.items):
                if not live:
                    continue
                work = replace(work, batch=MicroBatch(live, work.batch.packed, work.batch.multiple))
            if work.refused:  # predicted not to fit: never started, straight to the policy
                todo.extend(self._recover(work, ticket))
                continue
            error = self._attempt(work, ticket)
            if error is None:
                continue
            if is_out_of_memory(error):
                del error
                todo.extend(self._recover(replace(work, failures=work.failures + 1), ticket))
            elif is_device_failure(error) and self.backlog.has_others(self):
                self.broken = error
                log.error("%s failed (%s); the other devices finish its work", self.device.name, type(error).__name__)
                self.backlog.put_back([item for left in (work, *todo) for item in left.batch.items])
                return
            else:
                todo.extend(self._isolate(work, error))

    def _attempt(self, work: _Work, ticket: Ticket) -> BaseException | None:
        """Run once; deliver rows and return None, or return the error without its traceback."""
        batch, probe = work.batch, ticket.probe and not work.failures
        with self._lock:
            live = probe and self.cost.needs_probe(batch.shape.tokens)
        started = time.perf_counter()
        failure: BaseException | None = None
        live_bytes = resident_bytes = None
        rows: Any = None
        try:
            if self._launch is None:
                with self.device.measure(live=live) if probe else nullcontext() as peak:
                    rows = to_host(self.model.forward(batch, batch.items[0].job.extras, work.rung))
            else:
                with self._launch, self.device.measure(live=True) as peak:
                    copy = HostCopy(self.model.forward(batch, batch.items[0].job.extras, work.rung))
                rows = copy.wait()
            if peak is not None:
                live_bytes, resident_bytes = peak.live_bytes, peak.resident_bytes
        except Exception as error:
            failure = _bare(error) if is_out_of_memory(error) else error
        if failure is not None:
            return failure
        seconds = time.perf_counter() - started
        if work.rung is None:
            timed = probe and not (
                live and self._launch is None
            )  # the tracker of live bytes on a CPU takes time itself
            self._learn(batch, ticket, seconds if timed else None, live_bytes, resident_bytes)
        else:
            self._drop_copies()
        rows = self._guard(batch, rows)
        self._deliver(batch, rows, seconds, live_bytes, ticket)
        return None

    def _learn(
        self,
        batch: MicroBatch,
        ticket: Ticket,
        seconds: float | None,
        live_bytes: int | None,
        resident_bytes: int | None,
    ) -> None:
        with self._lock:
            if live_bytes is not None or resident_bytes is not None:
                self.cost.observe(batch.shape, live_bytes, resident_bytes)
            if seconds is not None and self.cost.target_tokens is None:
                if batch.shape.tokens < 0.7 * self.ramp.max_tokens:  # the budget, or long inputs, set this size
                    self.ramp.limit(max(batch.shape.tokens, 1))
                self.ramp.record(batch.shape.tokens, seconds, self.model.flops(batch.shape))
                if self.ramp.done:
                    self.cost.target_tokens = self.ramp.target_tokens
            grew = self.budget.succeed(ticket.bound_bytes)
            cap = self.budget.cap_bytes
        if ticket.probe:
            self._remember(self.cost)
        if grew and cap is not None:
            self._tell(batch, BudgetChanged(self.device.name, cap, "grow"), grows=1)

    def _guard(self, batch: MicroBatch, rows: Rows) -> Rows:
        """Redo rows that half precision turned into NaN or infinity; float32 rows are the model's own affair."""
        if self.model.dtype_name == "float32" or np.isfinite(rows).all():
            return rows
        bad = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
        again = MicroBatch(tuple(batch.items[i] for i in bad), packed=False, multiple=1)
        warnings.warn(
            f"{len(bad)} rows came out of {self.model.dtype_name} as NaN or infinity; computed again in float32 on the CPU",
            stacklevel=2,
        )
        self._tell(batch, NonFiniteRedone(self.device.name, len(bad)), non_finite_rows=len(bad))
        rows = rows.copy()
        rows[bad] = to_host(self.model.redo_in_float32(again, batch.items[0].job.extras))
        self._drop_copies()
        return rows

    def _deliver(self, batch: MicroBatch, rows: Rows, seconds: float, live_bytes: int | None, ticket: Ticket) -> None:
        with self._lock:
            predicted = self.cost.predict(batch.shape)
        by_job: dict[Job, list[int]] = {}
        for place, item in enumerate(batch.items):
            by_job.setdefault(item.job, []).append(place)
        shape = batch.shape
        event = MicroBatchDone(
            self.device.name,
            len(batch),
            batch.num_tokens,
            shape.tokens,
            predicted,
            live_bytes,
            ticket.budget_bytes,
            seconds,
        )
        process = self.device.process_bytes()
        for job, places in by_job.items():
            whole = len(places) == len(batch)
            items = batch.items if whole else tuple(batch.items[i] for i in places)
            tokens = sum(item.num_tokens for item in items)
            share = tokens / max(batch.num_tokens, 1)
            report = job.report
            report.add(
                tokens=tokens, computed_tokens=round(shape.tokens * share), micro_batches=1, compute_s=seconds * share
            )
            report.peak(
                largest_micro_batch_tokens=batch.num_tokens,
                predicted_peak_bytes=predicted,
                measured_peak_bytes=live_bytes,
                process_peak_bytes=process,
                budget_max_bytes=ticket.budget_bytes,
            )
            report.least(budget_min_bytes=ticket.budget_bytes)
            if job.emit is not None:
                job.emit(event)
            job.deliver(items, rows if whole else rows[places])

    # recovering

    def _recover(self, work: _Work, ticket: Ticket) -> list[_Work]:
        """Perform the policy's actions for one failure; returns what is to run next, last first."""
        batch = work.batch
        alone = len(batch) == 1
        snapshot = self.device.snapshot()
        impossible = tuple(rung for rung in ("chunk", "half", "cpu") if not self.model.can(rung))
        failure = Failure(
            shape=batch.shape,
            attempt=max(work.failures, 1) + (1 if work.refused else 0),
            alone=alone,
            tokens=batch.num_tokens,
            rungs_used=(*impossible, *work.rungs),
            waited_s=work.waited_s,
            has_neighbours=self._has_neighbours(snapshot, work.need_bytes),
            device_kind=self.device.kind,
            half=self.model.dtype_name != "float32",
        )
        next_work: list[_Work] = []
        actions = self._recovery.decide(failure)
        with self._lock:
            predicted = self.cost.predict(batch.shape)
        if not work.refused:
            event = OutOfMemory(self.device.name, len(batch), batch.num_tokens, predicted, actions[-1].name)
            self._tell(batch, event, out_of_memory=1)
        for action in actions:
            if isinstance(action, ReleaseCache):
                self._release("failure", batch)
            elif isinstance(action, ShrinkBudget):
                with self._lock:
                    cap = self.budget.shrink(work.need_bytes, snapshot)
                self._tell(batch, BudgetChanged(self.device.name, cap, "shrink"), shrinks=1)
            elif isinstance(action, Wait):
                self._wait(action.seconds, batch)
                work = replace(work, waited_s=work.waited_s + action.seconds)
            elif isinstance(action, Retry):
                if work.refused:
                    work = replace(work, refused=not self._fits_now(batch, ticket))
                self._tell(batch, None, retries=1)
                next_work.append(work)
            elif isinstance(action, Split):
                self._tell(batch, None, splits=1)
                for half in reversed(batch.split()):
                    need = work.need_bytes * half.shape.tokens // max(batch.shape.tokens, 1)
                    next_work.append(_Work(half, 0, need, False))
            elif isinstance(action, FallBack):
                self._warn_fallback(action.rung, batch)
                next_work.append(replace(work, rung=action.rung, rungs=(*work.rungs, action.rung), refused=False))
            elif isinstance(action, GiveUp):
                self._give_up(action.reason, work)
        return next_work

    def _fits_now(self, batch: MicroBatch, ticket: Ticket) -> bool:
        with self._lock:
            return self.cost.resident_bound(batch.shape) <= self.budget.admissible_bytes(self.device.snapshot())

    def _has_neighbours(self, snapshot: MemorySnapshot, need_bytes: int) -> bool:
        """Whether waiting can help: an idle device would have room, but others hold it now."""
        limit = self.budget.limit_bytes
        most = snapshot.total_bytes - snapshot.reserved_bytes - self.budget.reserve_bytes
        if limit is not None:
            most = min(most, limit - max(snapshot.allocated_bytes - self.budget.baseline_bytes, 0))
        return need_bytes <= most and snapshot.free_bytes < most

    def _wait(self, seconds: float, batch: MicroBatch) -> None:
        started = time.perf_counter()
        while (left := seconds - (time.perf_counter() - started)) > 0:
            if all(item.job.done for item in batch.items):
                return
            time.sleep(min(left, 0.05))
        self._tell(batch, Waited(self.device.name, seconds), waited_s=seconds)

    def _warn_fallback(self, rung: str, batch: MicroBatch) -> None:
        item = batch.items[0]
        index = item.job.position(item.index)
        what = {
            "chunk": "feed-forward layers run over slices of its tokens (same numbers)",
            "half": "it is computed in half precision (numbers differ slightly)",
            "cpu": "it is computed on the CPU (slow)",
        }[rung]
        log.warning("input %d of %d tokens does not fit on %s; %s", item.index, item.num_tokens, self.device.name, what)
        item.job.report.fall_back(rung)
        if item.job.emit is not None:
            item.job.emit(FallbackUsed(self.device.name, rung, index, item.num_tokens))

    def _give_up(self, reason: str, work: _Work) -> None:
        snapshot = self.device.snapshot()
        free = self.budget.admissible_bytes(snapshot)
        for item in work.batch.items:
            index = item.job.position(item.index)
            error = InputTooLargeError(
                f"input {index} needs {format_bytes(work.need_bytes)} alone ({item.num_tokens:,} tokens), "
                f"{format_bytes(free)} are free for it on {self.device.name}; {reason}",
                index=index,
                num_tokens=item.num_tokens,
                need_bytes=work.need_bytes,
                free_bytes=free,
            )
            item.job.give_up(item, error)

    def _isolate(self, work: _Work, error: BaseException) -> list[_Work]:
        """An error that is not about memory: it reaches the one job that has it, and no other."""
        by_job: dict[Job, list[TokenizedInput]] = {}
        for item in work.batch.items:
            by_job.setdefault(item.job, []).append(item)
        if len(by_job) == 1:
            next(iter(by_job)).fail(error)
            return []
        return [
            _Work(MicroBatch(tuple(items), work.batch.packed, work.batch.multiple), 0, work.need_bytes, False)
            for items in by_job.values()
        ]

    def _release(self, reason: str, batch: MicroBatch | None) -> int:
        released = self.device.release()
        if released and batch is not None:
            self._tell(batch, CacheReleased(self.device.name, released, reason), released_bytes=released)
        return released

    def _drop_copies(self) -> None:
        self.model.drop_host_copy()

    def release_after_run(self, job: Job, process_bytes_before: int) -> None:
        """At the end of a run: give cached memory back as the policy says."""
        if self.policy.release == "never":
            return
        if self.policy.release == "pressure" and self.device.process_bytes() < process_bytes_before + WORTH_RELEASING:
            return
        released = self.device.release()
        if released:
            job.report.add(released_bytes=released)
            if job.emit is not None:
                job.emit(CacheReleased(self.device.name, released, "run"))

    def _tell(self, batch: MicroBatch, event: Event | None, **counts: float) -> None:
        for job in {item.job for item in batch.items}:
            if counts:
                job.report.add(**counts)
            if event is not None and job.emit is not None:
                job.emit(event)


@dataclass(frozen=True, eq=False)
class _Work:
    """Inputs on their way through recovery. refused: predicted not to fit, so not started."""

    batch: MicroBatch
    failures: int
    need_bytes: int
    refused: bool
    rung: str | None = None
    rungs: tuple[str, ...] = ()
    waited_s: float = 0.0


def is_device_failure(error: BaseException) -> bool:
    """Whether a device, rather than an input, is at fault: its context is gone until the process ends."""
    return type(error).__name__ == "AcceleratorError" or str(error).startswith(
        ("CUDA error", "HIP error", "MPS backend")
    )


def _bare(error: Exception) -> Exception:
    """`error` without tracebacks, which would keep every tensor of the failed forward alive."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error
