"""One model on one device: carries micro-batches out, learns from them, and performs what the recovery policy decides."""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memsafe.config import MemoryPolicy, MiB
from memsafe.events import BudgetChanged, CacheReleased, MicroBatchDone, NonFiniteRedone
from memsafe.planning.batch import MicroBatch, TokenizedInput
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostModel
from memsafe.planning.planner import BatchPlanner
from memsafe.planning.ramp import LaneChoice, Ramp
from memsafe.runtime.allocator import heap
from memsafe.runtime.device import Device, is_out_of_memory
from memsafe.runtime.jobs import Backlog, Job, QueueKey
from memsafe.runtime.output import HostCopy, Rows, to_host
from memsafe.runtime.rescue import NOBODY, Rescue, Site, Work, tell

__all__ = ["Executor", "Ticket"]

log = logging.getLogger("memsafe")

FAIRNESS = 4
"""Urgent micro-batches in a row before bulk work gets one turn: bulk keeps a fifth of the device at worst."""
REDO_TOKENS = 4096
"""Tokens, padding included, that are computed again on the CPU at a time: rows that came out as NaN."""
LEAST_PROBE_TOKENS = 128
"""On a CPU, smaller micro-batches say little about larger ones, and single queries should not be slowed by measuring."""
FURTHER_UNTIL = 512
"""On a CPU, larger sizes are not tried in vain, and their memory held: lanes are timed by their own processor time, which
is steady. Yet 1 of 10 searches ended at 256 tokens, a sixth slower than at 1,024, since 512 had been 2 % faster only."""
EXTRA_PROBES = 2
"""At most so many micro-batches are run for their measurement alone: where few sizes were tried, a law is still told from
chance (errors at the 95th percentile fell from 5 % to under 1 % with a mask per pair of tokens)."""
MOST_ROWS = 32768
"""In one micro-batch on an accelerator: CUDA's attention kernels count sequences in a grid dimension of at most 65,535."""
AMPLE = 8
"""Memory is ample where so many times what a micro-batch needs is free."""
HEAP_SHARE = 1.0
"""Growth of the process beyond live bytes, as a share of them, with glibc's default heap: 0.55 to 0.87 was seen for one
input of 8,000 tokens (2 layers x 256), 0.87 to 1.03 in 3 of 320 random micro-batches (MiniLM)."""
WORTH_RELEASING = 64 * MiB
"""Growth of the process during a run that is given back at its end; less is not worth the page faults of the next run."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """Leave to run one micro-batch.

    bound_bytes: what it was admitted for. probe: alone on the device, so that its peak (and on an accelerator its speed)
    can be measured. fits: False if one input exceeds what is admissible even alone. size: the ramp's size that its
    speed stands for, None if for none. threads: cores it uses, None on an accelerator. released_bytes: cache that was
    given back to make room for it.
    """

    batch: MicroBatch
    bound_bytes: int
    budget_bytes: int
    probe: bool
    fits: bool = True
    size: int | None = None
    threads: int | None = None
    released_bytes: int = 0


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
        if device.kind == "cpu":
            cost.least_share, cost.workspace_bytes = HEAP_SHARE, model.workspace_bytes
        self.budget = budget
        self.backlog = backlog
        until = FURTHER_UNTIL if device.kind == "cpu" else math.inf
        self.ramp = Ramp(policy.knee, ceiling=policy.max_tokens, target_tokens=cost.target_tokens, further_until=until)
        self.lane_choice = LaneChoice(device.num_cores if device.kind == "cpu" else 1, chosen=cost.lanes)
        self._streak = 0
        self._extra_probes = EXTRA_PROBES if device.kind == "cpu" else 0  # an accelerator measures every forward
        self.broken: BaseException | None = None
        self._remember = remember
        self._lock = threading.Lock()
        self._rescue = Rescue(model, device, policy, cost, budget, self._lock)
        self._trimmed_bytes = 0  # the process's size when cached memory was last given back
        self._launch = threading.Lock() if device.kind != "cpu" else None
        self._planners: dict[int | None, BatchPlanner] = {}

    # what the search has found, or what an earlier process found

    @property
    def lanes(self) -> tuple[int, int | None]:
        """(micro-batches side by side, threads each). On an accelerator two: one computes, one is prepared or fetched."""
        if self.device.kind != "cpu":
            return 2, None
        if not self.ramp.done:  # one core each: their own processor time tells their speed, whatever else is running
            return self.device.num_cores, 1
        return self.lane_choice.current()

    def record_lanes(self, units: float, seconds: float, cpu_seconds: float) -> None:
        """Tell what all lanes together did; see :meth:`LaneChoice.record`. Called under the dispatcher's lock."""
        if self.lane_choice.done or not self.ramp.done:
            return
        self.lane_choice.record(units, seconds, cpu_seconds)
        if self.lane_choice.done and self.lane_choice.steady:
            self.cost.lanes = self.lane_choice.current()[0]
            self._remember(self.cost)

    # admission

    def planner(self, max_rows: int | None) -> BatchPlanner:
        if max_rows not in self._planners:
            most = max_rows if self.device.kind == "cpu" else min(max_rows or MOST_ROWS, MOST_ROWS)
            self._planners[max_rows] = BatchPlanner(self.model.packed, self.model.pad_multiple, most)
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
            if self.device.kind == "cpu":
                self.cost.exact_heap = heap.exact
            snapshot = self.device.snapshot()
            budget_bytes = self.budget.admissible_bytes(snapshot, in_flight_bytes)
            ramping = not self.ramp.done and key.max_rows is None
            start, max_tokens = 0, self._max_tokens(tokens, lanes)
            extra = None if ramping or key.max_rows is not None else self._extra_probe(tokens)
            if ramping or extra is not None:
                max_tokens = max_tokens if extra is None else min(extra, self.policy.max_tokens or extra)
                start = self._representative(items, max_tokens)
            planner = self.planner(key.max_rows)
            with self._lock:
                batch = planner.take(items, start, cost=self.cost, budget_bytes=budget_bytes, max_tokens=max_tokens)
                bound = self.cost.resident_bound(batch.shape)
            released = 0
            refused = bound > budget_bytes
            cut = refused or self._is_cut(batch, start, items, key.max_rows, max_tokens)
            tightened = cut and self._tighten()
            if (refused and not busy) or (cut and self._has_cache()):
                released = self._trim()
            if released or tightened:
                budget_bytes = self.budget.admissible_bytes(self.device.snapshot(), in_flight_bytes)
                with self._lock:
                    batch = planner.take(items, start, cost=self.cost, budget_bytes=budget_bytes, max_tokens=max_tokens)
                    bound = self.cost.resident_bound(batch.shape)
            elif not busy and not cut and AMPLE * bound < budget_bytes:
                heap.loosen()  # in flight is nothing whose bound relies on it
            fits = bound <= budget_bytes
            probe = fits and self._wants_probe(batch.shape.tokens, tokens)
            if busy and (probe or not fits):
                return None  # a probe runs alone; or those in flight will give memory back
            size = self.ramp.max_tokens if ramping and max_tokens >= self.ramp.max_tokens else None
            if size is not None and batch.shape.tokens < size // 2 and start + len(batch) < len(items):
                with self._lock:
                    self.ramp.bound()  # the budget cut it: nothing larger can be had
            self.backlog.take(key, start, len(batch))
            self._extra_probes -= extra is not None
            self._streak = self._streak + 1 if key.priority == keys[0].priority and _less_urgent(keys) else 0
        return Ticket(batch, bound, budget_bytes, probe, fits, size, released_bytes=released)

    def _is_cut(
        self, batch: MicroBatch, start: int, items: Sequence[TokenizedInput], max_rows: int | None, max_tokens: int
    ) -> bool:
        """Whether the budget ended `batch`, where neither the backlog nor a cap on rows or tokens did."""
        stop, rows = start + len(batch), len(batch)
        if stop >= len(items) or rows == max_rows:
            return False
        more = batch.num_tokens + items[stop].num_tokens if self.model.packed else (rows + 1) * batch.shape.longest
        return more <= max_tokens

    def _tighten(self) -> bool:
        """On a CPU, make the heap exact (see allocator.py) when memory is short; returns whether that is new."""
        if self.device.kind != "cpu" or self.cost.exact_heap:
            return False
        self.cost.exact_heap = heap.tighten()
        return self.cost.exact_heap

    def _has_cache(self) -> bool:
        """Whether memory that was freed, but is kept by the process, is counted as used: so it is on a CPU."""
        if self.device.kind != "cpu" or self.policy.release == "never":
            return False
        return self.device.process_bytes() > self._trimmed_bytes + WORTH_RELEASING

    def _trim(self) -> int:
        released = self.device.release()
        self._trimmed_bytes = self.device.process_bytes()
        return released

    def _next_key(self, keys: list[QueueKey]) -> QueueKey:
        """The most urgent queue; after a row of urgent ones, one turn for the others, so that bulk never starves."""
        others = _less_urgent(keys)
        return others[0] if others and self._streak >= FAIRNESS else keys[0]

    def _wants_probe(self, tokens: int, pending_tokens: int) -> bool:
        """Whether a micro-batch of `tokens` is worth running alone to measure it."""
        if self.device.kind != "cpu":  # its peak is counted anyway; its speed only shows alone
            return not self.ramp.done and pending_tokens >= self.ramp.max_tokens
        return tokens >= LEAST_PROBE_TOKENS and self.cost.needs_probe(tokens)

    def _extra_probe(self, pending_tokens: int) -> int | None:
        """The tokens of a micro-batch to be measured beside those of the ramp, which may have been too few; or None."""
        if not self._extra_probes:
            return None
        wanted = self.cost.wanted_probe(LEAST_PROBE_TOKENS)
        return wanted if wanted is not None and wanted <= min(4 * self.ramp.max_tokens, pending_tokens // 4) else None

    def _max_tokens(self, pending_tokens: int, lanes: int) -> int:
        most = self.ramp.max_tokens
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


def _less_urgent(keys: list[QueueKey]) -> list[QueueKey]:
    """Of `keys`, most urgent first, those that come after the first one's equals."""
    return [key for key in keys if key.priority != keys[0].priority]


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
