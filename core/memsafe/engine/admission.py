"""What may start next on one device, and how large: the part of an executor that decides, under its dispatcher's lock."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memsafe.config import MemoryPolicy, MiB
from memsafe.engine.jobs import Backlog, QueueKey
from memsafe.machine.device import Device
from memsafe.machine.heap import heap
from memsafe.planning.batch import MicroBatch, TokenizedInput
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostModel
from memsafe.planning.planner import BatchPlanner
from memsafe.planning.ramp import LaneChoice, Ramp

__all__ = ["Admission", "Ticket"]

FAIRNESS = 4
"""Urgent micro-batches in a row before bulk work gets one turn: bulk keeps a fifth of the device at worst."""
LEAST_PROBE_TOKENS = 128
"""On a CPU, smaller micro-batches say little about larger ones, and single queries should not be slowed by measuring."""
KNEE, CPU_KNEE = 0.03, 0.05
"""Gains of a doubling that are worth its memory. MiniLM on two cores: 512 to 1,024 tokens gain 6 to 20 %, 1,024 to 2,048
from -6 to +6 %, for twice the memory in each lane."""
SIDE_BY_SIDE = 512
"""On a CPU, larger sizes than this are tried by one lane at a time: the other ones go on with the best size so far."""
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
CREEP = 32 * MiB
"""Growth of the heap that is let be on a CPU. Trimmed at this, runs of MiniLM grew the process by 122 to 149 MiB instead of 171
to 215, at the same speed; at 16 MiB they were a tenth slower."""
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


class Admission:
    """Cuts micro-batches from a backlog and admits those whose bound fits into what is free now.

    model: anything with the methods of LoadedModel (memsafe.testing has a simulated one). remember: keeps what was learnt.
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
        knee = policy.knee if policy.knee is not None else CPU_KNEE if device.kind == "cpu" else KNEE
        self.ramp = Ramp(knee, ceiling=policy.max_tokens, target_tokens=cost.target_tokens, further_until=until)
        self.lane_choice = LaneChoice(device.num_cores if device.kind == "cpu" else 1, chosen=cost.lanes)
        self._streak = 0
        self._extra_probes = EXTRA_PROBES if device.kind == "cpu" else 0  # an accelerator measures every forward
        self._remember = remember
        self._lock = threading.Lock()  # of cost and budget, which lanes change while another micro-batch is chosen
        self._trimmed_bytes = 0  # the process's size when cached memory was last given back
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

    def record_lanes(self, units: float, seconds: float, starved_seconds: float) -> None:
        """Tell what all lanes together did; see :meth:`LaneChoice.record`. Called under the dispatcher's lock."""
        if self.lane_choice.done or not self.ramp.done:
            return
        self.lane_choice.record(units, seconds, starved_seconds)
        if self.lane_choice.done and self.lane_choice.steady:
            self.cost.lanes = self.lane_choice.current()[0]
            self._remember(self.cost)

    # admission

    def planner(self, max_rows: int | None) -> BatchPlanner:
        if max_rows not in self._planners:
            most = max_rows if self.device.kind == "cpu" else min(max_rows or MOST_ROWS, MOST_ROWS)
            self._planners[max_rows] = BatchPlanner(self.model.packed, self.model.pad_multiple, most)
        return self._planners[max_rows]

    def admit(self, in_flight_bytes: int, busy: int, lanes: int, trying: bool = False) -> Ticket | None:
        """Take the next micro-batch from the backlog, if it may start now; None if it must wait for others.

        Called under the dispatcher's lock. `busy`: micro-batches in flight on the device. `trying`: whether one of them
        has the size that the ramp tries.
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
            if ramping and trying and self.device.kind == "cpu" and self.ramp.max_tokens > SIDE_BY_SIDE:
                max_tokens = min(max_tokens, self.ramp.best_tokens)
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
            if self._has_crept(batch, lanes):
                self._trim()
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
        """On a CPU, make the heap exact (see heap.py) when memory is short; returns whether that is new."""
        if self.device.kind != "cpu" or self.cost.exact_heap:
            return False
        self.cost.exact_heap = heap.tighten()
        return self.cost.exact_heap

    def _has_cache(self) -> bool:
        """Whether memory that was freed, but is kept by the process, is counted as used: so it is on a CPU."""
        if self.device.kind != "cpu" or self.policy.release == "never":
            return False
        return self.device.process_bytes() > self._trimmed_bytes + WORTH_RELEASING

    def _has_crept(self, batch: MicroBatch, lanes: int) -> bool:
        """Whether the heap of a CPU's process has grown by more than all lanes need for the likes of `batch`: what tensors of
        one size leave is often too small for the next."""
        if self.device.kind != "cpu" or self.policy.release == "never" or heap.exact:
            return False
        size = self.device.process_bytes()
        if not self._trimmed_bytes:
            self._trimmed_bytes = size
        if size <= self._trimmed_bytes + CREEP:
            return False
        with self._lock:
            return size > self._trimmed_bytes + lanes * self.cost.predict(batch.shape)

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


def _less_urgent(keys: list[QueueKey]) -> list[QueueKey]:
    """Of `keys`, most urgent first, those that come after the first one's equals."""
    return [key for key in keys if key.priority != keys[0].priority]
