"""One model on one device: carries micro-batches out, learns from them, and performs what the recovery policy decides."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from memsafe.config import MemoryPolicy
from memsafe.engine.admission import WORTH_RELEASING, Admission, Ticket
from memsafe.engine.jobs import Backlog, Job
from memsafe.engine.recover import NOBODY, Rescue, Site, Work, tell
from memsafe.engine.sinks import HostCopy, Rows, to_host
from memsafe.events import BudgetChanged, CacheReleased, MicroBatchDone, NonFiniteRedone
from memsafe.machine.device import Device
from memsafe.machine.refusals import is_out_of_memory
from memsafe.planning.batch import MicroBatch, TokenizedInput
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostModel

__all__ = ["Executor"]

log = logging.getLogger("memsafe")

REDO_TOKENS = 4096
"""Tokens, padding included, that are computed again on the CPU at a time: rows that came out as NaN."""


class Executor(Admission):
    """Runs the micro-batches of one :class:`LoadedModel`. Its dispatcher calls :meth:`admit` under a lock, lanes :meth:`run`."""

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
        super().__init__(model, device, policy, cost, budget, backlog, remember=remember)
        self.broken: BaseException | None = None
        self._rescue = Rescue(model, device, policy, cost, budget, self._lock)
        self._launch = threading.Lock() if device.kind != "cpu" else None

    # running

    def run(self, ticket: Ticket, site: Site = NOBODY) -> None:
        """Carry out one admitted micro-batch and everything that recovery makes of it; rows go to their jobs."""
        if ticket.released_bytes:  # told only now, since hooks are called outside locks
            event = CacheReleased(self.device.name, ticket.released_bytes, "pressure")
            tell(ticket.batch, event, released_bytes=ticket.released_bytes)
        first = Work(ticket.batch, ticket.bound_bytes, ticket.budget_bytes, refused=not ticket.fits)
        todo = [first]
        while todo:
            work = todo.pop()
            if work is not first:  # what ran since may have taught something, and others may have come
                work = self._rescue.checked(work, site)
            live = tuple(item for item in work.batch.items if not item.job.done)
            if len(live) < len(work.batch.items):
                if not live:
                    continue
                work = replace(work, batch=MicroBatch(live, work.batch.packed, work.batch.multiple))
            if work.refused:  # predicted not to fit: never started, straight to the policy
                todo.extend(self._rescue.recover(work, site))
                continue
            error = self._attempt(work, ticket)
            if error is None:
                continue
            if is_out_of_memory(error):
                del error
                todo.extend(self._rescue.recover(replace(work, failures=work.failures + 1), site))
            elif is_device_failure(error) and self.backlog.has_others(self):
                self.broken = error
                log.error("%s failed (%s); the other devices finish its work", self.device.name, type(error).__name__)
                self.backlog.put_back([item for left in (work, *todo) for item in left.batch.items])
                return
            else:
                todo.extend(self._isolate(work, error))

    def _attempt(self, work: Work, ticket: Ticket) -> BaseException | None:
        """Run once; deliver rows and return None, or return the error without its traceback."""
        batch, probe = work.batch, ticket.probe and not work.failures
        measured = probe or (self.device.kind == "cpu" and self.cost.exact_heap)
        with self._lock:
            live = probe and self.cost.needs_probe(batch.shape.tokens)
        started, cpu_started = time.perf_counter(), time.thread_time()
        failure: BaseException | None = None
        live_bytes = resident_bytes = None
        rows: Any = None
        try:
            if self._launch is None:
                with self.device.measure(live=live) if measured else nullcontext() as peak:
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
            speed = None
            if self._launch is not None:
                speed = seconds if probe else None
            elif ticket.threads == 1 and not live:  # the tracker of live bytes takes time itself
                speed = time.thread_time() - cpu_started
            self._learn(batch, ticket, speed, live_bytes, resident_bytes)
        try:
            rows = self._guard(batch, rows)
        except Exception as error:
            failure = _bare(error) if is_out_of_memory(error) else error
        if failure is not None:
            return failure
        self._deliver(work, rows, seconds, live_bytes)
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
                self.cost.observe(self.model.cost_shape(batch), live_bytes, resident_bytes)
            climbed = seconds is not None and not self.ramp.done and ticket.size == self.ramp.max_tokens
            if climbed and seconds is not None:
                self.ramp.record(batch.shape.tokens, seconds, self.model.flops(batch.shape))
                if self.ramp.done and self.ramp.at_knee:
                    self.cost.target_tokens = self.ramp.target_tokens
            grew = self.budget.succeed(ticket.bound_bytes)
            cap = self.budget.cap_bytes
        if climbed and self.ramp.done and self.device.kind == "cpu" and self.policy.release != "never":
            self._trim()  # what sizes took that were tried in vain
        if ticket.probe or (climbed and self.ramp.done):
            self._remember(self.cost)
        if grew and cap is not None:
            tell(batch, BudgetChanged(self.device.name, cap, "grow"), grows=1)

    def _guard(self, batch: MicroBatch, rows: Rows) -> Rows:
        """Redo rows that half precision turned into NaN or infinity; float32 rows are the model's own affair."""
        if self.model.dtype_name == "float32" or np.isfinite(rows).all():
            return rows
        bad = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
        warnings.warn(
            f"{len(bad)} rows came out of {self.model.dtype_name} as NaN or infinity; computed again in float32 on the CPU",
            stacklevel=2,
        )
        tell(batch, NonFiniteRedone(self.device.name, len(bad)), non_finite_rows=len(bad))
        rows = rows.copy()
        start = 0
        while start < len(bad):  # longest first; a few at a time, since the host's memory is not endless either
            width = batch.items[bad[start]].num_tokens
            some = bad[start : start + max(REDO_TOKENS // max(width, 1), 1)]
            again = MicroBatch(tuple(batch.items[i] for i in some), packed=False)
            rows[some] = to_host(self.model.redo_in_float32(again, batch.items[0].job.extras))
            start += len(some)
        return rows

    def _deliver(self, work: Work, rows: Rows, seconds: float, live_bytes: int | None) -> None:
        batch, budget_bytes = work.batch, work.budget_bytes
        with self._lock:
            predicted = self.cost.predict(batch.shape)
        if work.rung is not None:
            predicted = self.model.rung_bound(work.rung, batch.shape, predicted)
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
            budget_bytes,
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
                budget_max_bytes=budget_bytes,
            )
            report.least(budget_min_bytes=budget_bytes)
            if job.emit is not None:
                job.emit(event)
            job.deliver(items, rows if whole else rows[places])

    # what is not about one micro-batch

    def _isolate(self, work: Work, error: BaseException) -> list[Work]:
        """An error that is not about memory: it reaches the one job that has it, and no other."""
        by_job: dict[Job, list[TokenizedInput]] = {}
        for item in work.batch.items:
            by_job.setdefault(item.job, []).append(item)
        if len(by_job) == 1:
            next(iter(by_job)).fail(error)
            return []
        return [
            Work(MicroBatch(tuple(items), work.batch.packed, work.batch.multiple), work.bound_bytes, work.budget_bytes)
            for items in by_job.values()
        ]

    def release_after_run(self, job: Job, process_bytes_before: int) -> None:
        """At the end of a run: give cached memory back as the policy says."""
        self.model.drop_host_copy()
        if self.policy.release == "never":
            return
        if self.policy.release == "pressure" and self.device.process_bytes() < process_bytes_before + WORTH_RELEASING:
            return
        released = self._trim()
        if released:
            job.report.add(released_bytes=released)
            if job.emit is not None:
                job.emit(CacheReleased(self.device.name, released, "run"))


def is_device_failure(error: BaseException) -> bool:
    """Whether a device, rather than an input, is at fault: its context is gone until the process ends."""
    return type(error).__name__ == "AcceleratorError" or str(error).startswith(
        ("CUDA error", "HIP error", "MPS backend")
    )


def _bare(error: Exception) -> Exception:
    """`error` without tracebacks, which would keep every tensor of the failed forward alive."""
    seen: list[BaseException] = [error]
    for each in seen:  # grows while it is read; a chain may be a ring
        each.__traceback__ = None
        seen.extend(e for e in (each.__cause__, each.__context__) if e is not None and all(e is not s for s in seen))
    return error
