"""What may start next on one device, and how large: composes queues, sizes, costs and recovery. Decides, never acts.

``next`` is asked what to do with memory as it was just read; ``ran``, ``refused`` and ``done`` tell what came of it. What
they return is for others to perform: no thread, no clock and no device is known here, so all of it can be replayed
and simulated. Not thread-safe: its owner holds one lock for every call, and none while it performs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memsafe.config import FALLBACKS
from memsafe.planning.batch import MicroBatch, TokenizedInput
from memsafe.planning.instructions import Grew, Measured, Remember, Start, Ticket, TidyFirst
from memsafe.planning.planner import BatchPlanner
from memsafe.planning.recovery import Action, Clear, Failure, ShrinkBudget, Work
from memsafe.planning.sizing import Pending, Size
from memsafe.planning.speed import Sample
from memsafe.planning.tenant import Tenant
from memsafe.planning.tidying import Seen, Tidy, Tidying
from memsafe.planning.traits import Traits
from memsafe.planning.turns import QUERY, QueueKey, Turns

__all__ = ["Scheduler"]


class Scheduler:
    """The models of one device, and what is in flight on it."""

    def __init__(self, traits: Traits) -> None:
        self.traits = traits
        self.tidying = Tidying(traits)
        self.tenants: list[Tenant] = []
        self.in_flight: dict[Ticket, Tenant] = {}
        self.paused: set[Ticket] = set()  # in flight, but waiting for memory: they hold none
        self.alone: set[Ticket] = set()  # nothing new starts beside them
        self._turns: Turns[Tenant] = Turns()
        self._division: tuple[int, int | None] | None = None  # of the cores, among those that run now
        self._last_done: float | None = None

    # who is here

    def attach(self, tenant: Tenant) -> None:
        self.tenants.append(tenant)

    def detach(self, tenant: Tenant) -> None:
        self.tenants.remove(tenant)
        self._turns.forget(tenant)

    @property
    def pending(self) -> bool:
        """Whether anything waits."""
        return any(tenant.queues.pending for tenant in self.tenants)

    @property
    def idle(self) -> bool:
        return not self.in_flight and not self.pending

    @property
    def most_lanes(self) -> int:
        """How many micro-batches could be in flight at once: of bulk work, and one query more."""
        lanes = max((tenant.sizing.lanes[0] for tenant in self.tenants), default=0)
        if self.traits.side_by_side and lanes:
            lanes = max(lanes, self.traits.cores)  # those of a call whose micro-batches are fixed
        return lanes + 1 + len(self.paused)

    def running(self, besides: Ticket | None = None) -> list[Ticket]:
        """In flight and not paused."""
        return [ticket for ticket in self.in_flight if ticket is not besides and ticket not in self.paused]

    # what starts

    def next(self, now: float, seen: Seen) -> Start | TidyFirst | None:
        """What to do at `now`, in seconds of any clock; None if nothing may start before something in flight ends, or comes."""
        running = self.running()
        if self.alone or any(ticket.probe for ticket in running):
            return None  # it runs alone, to be measured, or because it failed beside others
        waiting = self._waiting()
        if running and self._turns.overdue(waiting):
            return None  # some work cannot start beside others: let the device run empty, or it never would
        for tenant, priority in self._turns.order(waiting, list(self.in_flight.values())):
            found = self._consider(tenant, priority, running, seen, now)
            if isinstance(found, Ticket):
                self.in_flight[found] = tenant
                self._turns.served((tenant, priority), waiting)
                self.tidying.started()
                return Start(tenant, found, len(running) + 1)
            if found is not None:
                return TidyFirst(tenant, found)
        if not self.in_flight and not waiting:
            self._last_done = None
        return None

    def did(self, first: TidyFirst, released_bytes: int, process_bytes: int) -> None:
        """What :meth:`next` asked for was done, and gave `released_bytes` back."""
        first.tenant.released_bytes += released_bytes
        self.tidying.did(first.tidy, process_bytes)

    def _waiting(self) -> list[tuple[Tenant, int]]:
        return [
            (tenant, priority)
            for tenant in self.tenants
            if tenant.broken is None
            for priority in tenant.queues.priorities()
        ]

    def _consider(
        self, tenant: Tenant, priority: int, running: Sequence[Ticket], seen: Seen, now: float
    ) -> Ticket | Tidy | None:
        key = tenant.queues.first(priority)
        lanes, threads = self._lanes(tenant, key)
        busy, urgent = len(running), priority == QUERY
        if busy >= lanes + urgent:  # a query may use one lane more, so that it need not wait for a whole micro-batch
            return None
        if busy and self.traits.side_by_side and (lanes, threads) != self._division and not urgent:
            return None  # another division of the cores is still at work
        items, tokens = tenant.queues.view(key)
        tenant.ledger.cost.exact_heap = seen.exact_heap
        room_bytes = tenant.ledger.room(seen.snapshot, sum(ticket.bound_bytes for ticket in running))
        sized = self._size(tenant, key, items, tokens, room_bytes, running, now)
        if sized is None:
            return None
        size, start, extra = sized
        planner = tenant.planner(key.max_rows, raw=items[0].raw is not None)
        batch = planner.take(items, start, cost=tenant.ledger.cost, budget_bytes=room_bytes, max_tokens=size.tokens)
        bound_bytes = tenant.ledger.bound(batch.shape)
        fits = bound_bytes <= room_bytes
        cut = not fits or _is_cut(planner, batch, start, items, size.tokens)
        tidy = self.tidying.before(
            seen,
            tenant.policy.release,
            refused=not fits,
            cut=cut,
            busy=busy,
            lanes=lanes,
            bound_bytes=bound_bytes,
            predicted_bytes=tenant.ledger.predict(batch.shape),
        )
        if tidy is not None:
            return tidy
        probe = fits and self._wants_probe(tenant, batch.shape.tokens)
        if busy and (probe or not fits or (cut and key.fixed is not None)):
            return None  # a probe runs alone; or those in flight will give memory back
        tenant.queues.take(key, start, len(batch))
        tenant.sizing.took(size)
        tenant.extra_probes -= extra
        if not busy:
            self._division = (lanes, threads)
        if threads is not None and key.fixed is None and (probe or (not busy and not tenant.queues.pending)):
            threads = self.traits.cores  # nobody else wants them
        released, tenant.released_bytes = tenant.released_bytes, 0
        return Ticket(batch, bound_bytes, room_bytes, probe, fits, size, threads, released, seen.exact_heap)

    def _lanes(self, tenant: Tenant, key: QueueKey) -> tuple[int, int | None]:
        """(micro-batches in flight, cores of each): as was found best, but a core each where bits must not depend on that."""
        if key.fixed is not None and self.traits.side_by_side:
            return self.traits.cores, 1
        return tenant.sizing.lanes

    def _size(
        self,
        tenant: Tenant,
        key: QueueKey,
        items: Sequence[TokenizedInput],
        tokens: int,
        room_bytes: int,
        running: Sequence[Ticket],
        now: float,
    ) -> tuple[Size, int, bool] | None:
        """How large the next micro-batch may be, where in `items` it begins, and whether it is one more to be measured; None
        if it should wait for what is in flight."""
        sizing, ledger = tenant.sizing, tenant.ledger
        if key.fixed is not None:
            return Size(min(key.fixed.tokens, tenant.policy.max_tokens or key.fixed.tokens)), 0, False
        mean_len = sum(item.num_tokens for item in items[:: max(len(items) // 16, 1)]) / min(len(items), 16)
        pending = Pending(
            tokens,
            lengths=tenant.queues.lengths,
            coming=tenant.queues.coming > 0,
            room_tokens=1 << 62 if sizing.settled else ledger.room_tokens(room_bytes, mean_len),
            inflow=tenant.inflow(now),
            trying=any(self.in_flight[each] is tenant and each.size.trial for each in running),
        )
        size = sizing.propose(pending, capped=key.max_rows is not None)
        if size is None:
            return None
        if key.max_rows is None and not size.trial and tenant.extra_probes:
            least = self.traits.least_probe_tokens
            wanted = ledger.cost.wanted_probe(least)
            if wanted is not None and wanted <= min(4 * size.tokens, tokens // 4):
                wanted = min(wanted, tenant.policy.max_tokens or wanted)
                return Size(wanted), _representative(items, wanted), True
        return size, _representative(items, size.tokens) if size.trial else 0, False

    def _wants_probe(self, tenant: Tenant, tokens: int) -> bool:
        traits = self.traits
        return (
            not traits.counts_peaks and tokens >= traits.least_probe_tokens and tenant.ledger.cost.needs_probe(tokens)
        )

    # what came of it

    def ran(self, ticket: Ticket, batch: MicroBatch, measured: Measured) -> list[Remember | Grew | Tidy]:
        """`batch`, all or part of the ticket's, has run as it is, by no fallback; learn from it."""
        tenant = self.in_flight[ticket]
        ledger, shape = tenant.ledger, batch.shape
        actions: list[Remember | Grew | Tidy] = []
        unknown = ledger.cost.needs_probe(shape.tokens)
        grown = ledger.settle(
            tenant.model.cost_shape(batch), ticket.bound_bytes, measured.live_bytes, measured.resident_bytes
        )
        if grown is not None:
            actions.append(Grew(grown))
        found = False
        if measured.seconds is not None:
            linear = tenant.model.flops(replace(shape, squares=0))
            share = 1 - linear / max(tenant.model.flops(shape), linear, 1.0)
            sample = Sample(shape.tokens, measured.seconds, measured.host_seconds, share)
            found = tenant.sizing.observe(sample, tenant.queues.lengths)
        if found and self.tidying.after_search(tenant.policy.release):
            actions.append(Tidy.RELEASE)
        if found or (unknown and not ledger.cost.needs_probe(shape.tokens)):
            actions.append(Remember(ledger.cost.key, ledger.cost.to_json()))
        return actions

    def checked(self, ticket: Ticket, work: Work, seen: Seen) -> Work:
        """`work` with its bound, and refused if that is not free now, whatever earlier failures have capped."""
        tenant = self.in_flight[ticket]
        in_flight_bytes = sum(each.bound_bytes for each in self.running(besides=ticket))
        bound = tenant.ledger.bound(work.batch.shape)
        if work.rung is not None:
            bound = tenant.model.rung_bound(work.rung, work.batch.shape, bound)
        room = tenant.ledger.headroom(seen.snapshot, in_flight_bytes)
        return replace(work, bound_bytes=bound, budget_bytes=room, refused=bound > room)

    def refused(self, ticket: Ticket, work: Work, seen: Seen) -> tuple[Action, ...]:
        """What to do, in this order, after memory ran out for `work` or was predicted to."""
        tenant = self.in_flight[ticket]
        alone = len(work.batch) == 1
        # A single input that failed beside others has not shown that it does not fit: once more, by itself.
        if alone and not work.cleared and (work.refused or work.failures > 1) and self.running(besides=ticket):
            return (Clear(tenant.policy.wait_s),)
        actions = tenant.recovery.decide(
            Failure(
                shape=work.batch.shape,
                attempt=max(work.failures, 1) + (1 if work.refused else 0),
                alone=alone,
                tokens=work.batch.num_tokens,
                rungs_used=work.rungs,
                rungs_refused=tuple(rung for rung in work.rungs if rung not in work.used),
                rungs_impossible=tuple(rung for rung in FALLBACKS if not tenant.model.can(rung)),
                waited_s=work.waited_s,
                has_neighbours=tenant.ledger.may_wait(work.bound_bytes, seen.snapshot),
                half=tenant.model.dtype_name != "float32",
                started=work.failures > 0,
            )
        )
        told: list[Action] = []
        for action in actions:
            if not isinstance(action, ShrinkBudget):
                told.append(action)
            elif not work.refused:  # what was never tried has not shown anything
                told.append(ShrinkBudget(tenant.ledger.refuse(work.bound_bytes, seen.snapshot)))
        return tuple(told)

    def done(self, ticket: Ticket, now: float, starved_s: float = 0.0) -> list[Remember]:
        """The ticket's micro-batch is over, however it ended. now: seconds of any clock. starved_s: how long its lane was
        ready to run and had no core."""
        tenant = self.in_flight.pop(ticket)
        self.paused.discard(ticket)
        self.alone.discard(ticket)
        actions: list[Remember] = []
        busy_on = tenant.queues.pending > 0
        # What was begun under another division of the cores says nothing about the one that is tried now.
        counts = ticket.fits and not ticket.probe and tenant.sizing.lanes == self._division
        if self._last_done is not None and busy_on and counts:
            work = tenant.model.flops(ticket.batch.shape)
            if tenant.sizing.observe_lanes(work, now - self._last_done, starved_s):
                tenant.ledger.cost.lanes = tenant.sizing.lanes[0]
                actions.append(Remember(tenant.ledger.cost.key, tenant.ledger.cost.to_json()))
        self._last_done = now if busy_on or self.in_flight else None
        return actions


def _is_cut(
    planner: BatchPlanner, batch: MicroBatch, start: int, items: Sequence[TokenizedInput], max_tokens: int
) -> bool:
    """Whether the budget ended `batch`, where neither the queue nor a cap on rows or tokens did."""
    stop, rows = start + len(batch), len(batch)
    if stop >= len(items) or rows == planner.max_rows:
        return False
    more = batch.num_tokens + items[stop].num_tokens if batch.packed else (rows + 1) * batch.shape.longest
    return more <= max_tokens


def _representative(items: Sequence[TokenizedInput], max_tokens: int) -> int:
    """Where to cut a micro-batch that is to be measured: from the middle on, whose lengths stand for all, or further where
    only shorter ones fill `max_tokens` closely; earlier if there are too few behind."""
    start = len(items) // 2
    while start < len(items) - 1 and items[start].num_tokens > max(max_tokens // 4, items[-1].num_tokens):
        start += max((len(items) - start) // 8, 1)
    while start > 0 and max_tokens > items[start].num_tokens * (len(items) - start):
        start = max(0, start - max(1, len(items) // 8))
    return start
