"""One model on one device: carries a micro-batch out, with everything that recovery makes of it."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from memsafe.config import MemoryPolicy
from memsafe.engine.delivery import deliver, tell
from memsafe.engine.jobs import Backlog, Job
from memsafe.engine.recover import Rescue, Site
from memsafe.engine.sinks import HostCopy, Rows, finite, replaced, to_host
from memsafe.events import CacheReleased, NonFiniteRedone
from memsafe.machine.device import Device
from memsafe.machine.refusals import is_out_of_memory
from memsafe.models.protocol import Runnable
from memsafe.planning.batch import MicroBatch, TokenizedInput
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostModel
from memsafe.planning.instructions import Measured, Start, Ticket
from memsafe.planning.recovery import Work
from memsafe.planning.tenant import Tenant

__all__ = ["Runner"]

log = logging.getLogger("memsafe")

_Result = TypeVar("_Result")

REDO_TOKENS = 4096
"""Tokens, padding included, that are computed again on the CPU at a time: rows that came out as NaN."""


class Runner:
    """Runs the micro-batches of one model on its device; lanes call :meth:`run`, several at a time.

    remember: keeps a text under a key for another day, where the policy allows it.
    """

    def __init__(
        self,
        model: Runnable,
        policy: MemoryPolicy,
        cost: CostModel,
        budget: MemoryBudget,
        backlog: Backlog,
        *,
        remember: Callable[[Any, str], object] = lambda key, text: None,
    ) -> None:
        self.model = model
        self.device: Device = model.device
        self.policy = policy
        self.backlog = backlog
        self.remember = remember
        self.tenant = Tenant(model, self.device.traits, policy, cost, budget, backlog.queues)
        self._rescue = Rescue(self.device)
        # Launches never overlap, so that what one allocates at its peak is not taken twice.
        self._launch = None if self.device.traits.side_by_side else threading.Lock()
        self._last_end = 0.0  # when the device was last seen to end a micro-batch

    def run(self, start: Start, site: Site) -> None:
        """Carry out what was admitted, until every input is done or has its own error; rows go to their jobs."""
        ticket = start.ticket
        if ticket.released_bytes:
            event = CacheReleased(self.device.name, ticket.released_bytes, "pressure")
            tell(ticket.batch, event, released_bytes=ticket.released_bytes)
        first = Work(ticket.batch, ticket.bound_bytes, ticket.budget_bytes, refused=not ticket.fits)
        todo = [first]
        while todo:
            work = todo.pop()
            if work is not first:  # what ran since may have taught something, and others may have come
                work = site.checked(work)
            live = tuple(item for item in work.batch.items if not item.job.done)
            if len(live) < len(work.batch.items):
                if not live:
                    continue
                work = replace(work, batch=MicroBatch(live, work.batch.packed, work.batch.multiple))
            if work.refused:  # predicted not to fit: never started, straight to the policy
                todo.extend(self._rescue.recover(work, site))
                continue
            if work.via:
                work = self._rescue.begin(work)
            error = self._attempt(work, ticket, site)
            if error is None:
                continue
            if is_out_of_memory(error):
                del error
                todo.extend(self._rescue.recover(replace(work, failures=work.failures + 1), site))
            elif is_device_failure(error) and self.backlog.has_others(self.tenant):
                self.tenant.broken = error
                log.error("%s failed (%s); the other devices finish its work", self.device.name, type(error).__name__)
                self.backlog.put_back([item for left in (work, *todo) for item in left.batch.items])
                return
            else:
                todo.extend(_isolate(work, error))

    def _attempt(self, work: Work, ticket: Ticket, site: Site) -> BaseException | None:
        """Run once; deliver rows and return None, or return the error without its traceback."""
        batch, extras = work.batch, work.batch.items[0].job.extras
        started = time.perf_counter()
        ran = _tried(self._forward, work, ticket)
        if isinstance(ran, Exception):
            return ran
        rows, measured = ran
        seconds = time.perf_counter() - started
        if work.rung is None:
            site.ran(batch, measured)
        guarded = _tried(self._guard, batch, rows, extras)
        if isinstance(guarded, Exception):
            return guarded
        predicted = site.predict(batch.shape)[0]
        if work.rung is not None:
            predicted = self.model.rung_bound(work.rung, batch.shape, predicted)
        deliver(
            batch,
            guarded,
            self.device,
            seconds=seconds,
            predicted_bytes=predicted,
            measured_bytes=measured.live_bytes,
            budget_bytes=work.budget_bytes,
        )
        return None

    def _forward(self, work: Work, ticket: Ticket) -> tuple[Rows, Measured]:
        extras = work.batch.items[0].job.extras
        if self._launch is None:
            return self._forward_here(work, ticket, extras)
        with self._launch, self.model.measure(live=True) as peak:
            launched, begin = time.perf_counter(), self.device.mark()
            copy = HostCopy(self.model.forward(work.batch, extras, work.rung))
            end = self.device.mark()
            host_seconds = time.perf_counter() - launched
        rows = copy.wait()
        now = time.perf_counter()
        seconds = self.device.seconds_between(begin, end)
        if seconds is None:  # no clock of its own: from when the last one ended, or this one was launched
            seconds = now - max(self._last_end, launched)
        self._last_end = now
        return rows, Measured(peak.live_bytes, peak.resident_bytes, seconds, host_seconds)

    def _forward_here(self, work: Work, ticket: Ticket, extras: Any) -> tuple[Rows, Measured]:
        """On a CPU: this thread computes, beside others."""
        probe = ticket.probe and not work.failures
        began = time.thread_time()
        with self.model.measure(live=probe) if probe or ticket.exact_heap else nullcontext() as peak:
            rows = to_host(self.model.forward(work.batch, extras, work.rung))
        seconds = time.thread_time() - began
        alone = ticket.threads == 1 and not probe  # on one core; the tracker of live bytes takes time itself
        return rows, Measured(
            None if peak is None else peak.live_bytes,
            None if peak is None else peak.resident_bytes,
            seconds if alone else None,
        )

    def _guard(self, batch: MicroBatch, rows: Rows, extras: Any) -> Rows:
        """Redo rows that half precision turned into NaN or infinity; float32 rows are the model's own affair."""
        if self.model.dtype_name == "float32" or (flags := finite(rows)).all():
            return rows
        bad = np.flatnonzero(~flags)
        warnings.warn(
            f"{len(bad)} rows came out of {self.model.dtype_name} as NaN or infinity; computed again in float32 on the CPU",
            stacklevel=2,
        )
        tell(batch, NonFiniteRedone(self.device.name, len(bad)), non_finite_rows=len(bad))
        start = 0
        while start < len(bad):  # longest first; a few at a time, since the host's memory is not endless either
            width = batch.items[bad[start]].num_tokens
            some = bad[start : start + max(REDO_TOKENS // max(width, 1), 1)]
            again = MicroBatch(tuple(batch.items[i] for i in some), packed=False)
            rows = replaced(rows, some, to_host(self.model.redo_in_float32(again, extras)))
            start += len(some)
        return rows

    def released(self, job: Job, released_bytes: int) -> None:
        """At the end of a run: cached memory was given back."""
        job.report.add(released_bytes=released_bytes)
        if job.emit is not None:
            job.emit(CacheReleased(self.device.name, released_bytes, "run"))


def _tried(function: Callable[..., _Result], *arguments: Any) -> _Result | Exception:
    """What `function` returns, or the error that it raised; of memory without its traceback, which would keep every tensor of the
    failed forward alive."""
    try:
        return function(*arguments)
    except Exception as error:
        return _bare(error) if is_out_of_memory(error) else error


def is_device_failure(error: BaseException) -> bool:
    """Whether a device, rather than an input, is at fault: its context is gone until the process ends."""
    return type(error).__name__ == "AcceleratorError" or str(error).startswith(
        ("CUDA error", "HIP error", "MPS backend")
    )


def _isolate(work: Work, error: BaseException) -> list[Work]:
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


def _bare(error: Exception) -> Exception:
    """`error` without tracebacks, and those that it came from without theirs."""
    seen: list[BaseException] = [error]
    for each in seen:  # grows while it is read; a chain may be a ring
        each.__traceback__ = None
        seen.extend(e for e in (each.__cause__, each.__context__) if e is not None and all(e is not s for s in seen))
    return error
