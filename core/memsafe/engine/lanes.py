"""One dispatcher per device and process: whoever calls, micro-batches start only when the device has room for them.

Lanes are threads that run one micro-batch at a time. On a CPU several lanes compute side by side; on an accelerator
two take turns, one preparing or fetching while the other computes. Queries go before bulk work; a query may use one
lane more than bulk work does, so that it need not wait for a whole micro-batch to end.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from memsafe.engine.admission import FAIRNESS, Ticket
from memsafe.engine.jobs import QUERY, Job
from memsafe.engine.runner import Executor
from memsafe.errors import ClosedError
from memsafe.machine.device import Device

__all__ = ["Dispatcher", "dispatcher_of"]

log = logging.getLogger("memsafe")

IDLE_S = 5.0
"""A lane without work ends after this many seconds; starting one again costs well under a millisecond."""

FORK_WAIT_S = 10.0
"""How long a fork waits for micro-batches in flight at most."""

_registry: dict[str, Dispatcher] = {}
_registry_lock = threading.Lock()


def dispatcher_of(device: Device) -> Dispatcher:
    """The process's dispatcher for `device`."""
    with _registry_lock:
        if device.name not in _registry:
            _registry[device.name] = Dispatcher(device)
        return _registry[device.name]


class _ChoosingError(Exception):
    """A fault while a micro-batch was chosen, and the jobs that waited then."""

    def __init__(self, waiters: list[Job]) -> None:
        super().__init__()
        self.waiters = waiters


class Dispatcher:
    """Owns a device's lanes and what is in flight on it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._executors: list[Executor] = []
        # `with` on the lock itself, never on the condition, whose __enter__ is Python code: a Ctrl-C inside it would leak the lock
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._in_flight: dict[Ticket, Executor] = {}
        self._paused: set[Ticket] = set()  # in flight, but waiting for memory: they hold none
        self._alone: set[Ticket] = set()  # nothing new starts beside them
        self._lanes: set[threading.Thread] = set()
        self._waiting = 0
        self._closing = False
        self._forking = False
        self._passed: dict[tuple[Executor, int], int] = {}  # grants to others while work of this priority waited
        self._last_done: float | None = None
        self._running: tuple[int, int | None] | None = None

    def attach(self, executor: Executor) -> None:
        with self._lock:
            self._executors.append(executor)
            executor.backlog.executors.append(executor)
            executor.backlog.listeners.append(self.wake)

    def detach(self, executor: Executor) -> None:
        """Forget `executor` when its last micro-batch is done."""
        with self._lock:
            if executor in self._executors:
                self._executors.remove(executor)
                executor.backlog.executors.remove(executor)
                executor.backlog.listeners.remove(self.wake)
            self._passed = {key: count for key, count in self._passed.items() if key[0] is not executor}
            if threading.current_thread() in self._lanes:
                return  # closed from a caller's hook: it cannot wait for the micro-batch that it is part of
            while executor in self._in_flight.values():
                self._condition.wait(0.1)

    def wake(self) -> None:
        """Work has come, or room."""
        with self._lock:
            closing = self._closing
            if not closing and not self._waiting:
                self._start_lane()
            self._condition.notify_all()  # a single one might reach somebody who waits for something else
            executors = list(self._executors) if closing else []
        for executor in executors:
            if executor.backlog.pending:
                executor.backlog.end(_exiting)

    def pause_for_fork(self) -> None:
        """Let micro-batches in flight end and start none: a fork in the middle of a matrix product may copy its
        library's locks as they are, held for ever in the child."""
        with self._lock:
            if threading.current_thread() not in self._lanes:
                self._forking = True
                self._condition.wait_for(lambda: all(ticket in self._paused for ticket in self._in_flight), FORK_WAIT_S)

    def resume(self) -> None:
        """The fork is over."""
        with self._lock:
            self._forking = False
            self._condition.notify_all()

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    def close(self) -> None:
        """End the lanes once their micro-batches are done; what waits, for work or for memory, fails, so this is prompt."""
        with self._lock:
            self._closing = True
            self._condition.notify_all()
            lanes = list(self._lanes)
            executors = list(self._executors)
            jobs = _jobs(self._in_flight)
        for executor in executors:
            executor.backlog.end(_exiting)
        for job in jobs:
            job.fail(_exiting())
        for lane in lanes:
            lane.join(timeout=10)

    # lanes

    def _start_lane(self) -> None:
        """Start a lane if one more could be of use. Call with the condition held."""
        wanted = max((executor.lanes[0] for executor in self._executors), default=0) + 1 + len(self._paused)
        if len(self._lanes) < wanted:
            lane = threading.Thread(
                target=self._lane, name=f"memsafe-{self.device.name}-{len(self._lanes)}", daemon=True
            )
            self._lanes.add(lane)
            try:
                lane.start()
            except RuntimeError:  # the system gives no more threads: those that there are will do
                self._lanes.discard(lane)
                if not self._lanes:
                    raise

    def _lane(self) -> None:
        set_threads, starved_seconds = _thread_tools(self.device)
        try:
            while (grant := self._next()) is not None:
                executor, ticket = grant
                judged = ticket.threads == 1 and not executor.lane_choice.done
                starved_before = starved_seconds() if judged else 0.0
                try:
                    if ticket.threads is not None:
                        set_threads(ticket.threads)
                    executor.run(ticket, _Site(self, ticket))
                except BaseException as error:  # a fault of ours: no caller may wait for ever
                    log.exception("a micro-batch ended in an unexpected error")
                    for job in _jobs([ticket]):
                        job.fail(self._death(error))
                finally:
                    self._done(ticket, starved_seconds() - starved_before if judged else 0.0)
                    if executor.broken is not None and not executor.backlog.has_others(executor):
                        executor.backlog.end(partial(_all_failed, executor.broken))
                    del executor, ticket, grant
        except BaseException as error:  # a fault of ours, before a micro-batch was chosen
            waiters = error.waiters if isinstance(error, _ChoosingError) else self._waiters()
            cause = error.__cause__ or error
            log.error("choosing a micro-batch ended in an unexpected error", exc_info=cause)
            for job in waiters:
                job.fail(self._death(cause))
        finally:
            with self._lock:
                self._lanes.discard(threading.current_thread())
                if not self._closing and not self._waiting and any(e.backlog.pending for e in self._executors):
                    self._start_lane()  # work that came while this lane was on its way out

    def _waiters(self) -> list[Job]:
        with self._lock:
            backlogs = {executor.backlog for executor in self._executors}
        return [job for backlog in backlogs for job in backlog.jobs()]

    def _death(self, error: BaseException) -> ClosedError:
        return ClosedError(f"the worker of {self.device.name} failed: {type(error).__name__}: {error}")

    def _next(self) -> tuple[Executor, Ticket] | None:
        with self._lock:
            idle_since = time.monotonic()
            while not self._closing:
                try:
                    grant = self._grant()
                except BaseException as error:  # those who wait now: who comes later has nothing to do with it
                    raise _ChoosingError(self._waiters()) from error
                if grant is not None:
                    if not self._waiting and any(executor.backlog.pending for executor in self._executors):
                        self._start_lane()
                    return grant
                if not self._in_flight and not any(executor.backlog.pending for executor in self._executors):
                    self._last_done = None
                    left = IDLE_S - (time.monotonic() - idle_since)
                    if left <= 0:
                        return None
                else:
                    left, idle_since = 0.5, time.monotonic()
                self._waiting += 1
                self._condition.wait(left)
                self._waiting -= 1
            return None

    def _grant(self) -> tuple[Executor, Ticket] | None:
        """The next micro-batch that may start now. Call with the condition held."""
        if self._forking:
            return None
        running = [ticket for ticket in self._in_flight if ticket not in self._paused]
        if self._alone or any(ticket.probe for ticket in running):
            return None  # it runs alone, to be measured, or because it failed beside others
        busy = len(running)
        waiting = self._who_waits()
        turn = FAIRNESS * max(len(waiting) - 1, 1)
        if busy and any(self._passed.get(each, 0) > turn for each in waiting):
            return None  # some work cannot start beside others: let the device run empty, or it never would
        for executor in self._order(waiting, turn):
            lanes, threads = executor.lanes
            keys = executor.backlog.keys()
            if not keys:
                continue
            urgent = keys[0].priority == QUERY
            if busy >= lanes + (1 if urgent else 0):
                continue
            if busy and self.device.kind == "cpu" and (lanes, threads) != self._running and not urgent:
                continue  # another division of the cores is still at work
            in_flight = sum(ticket.bound_bytes for ticket in running)
            trying = any(self._in_flight[each] is executor and each.size is not None for each in running)
            ticket = executor.admit(in_flight, busy, lanes, trying)
            if ticket is None:
                continue
            if threads is not None:
                alone = not busy and not executor.backlog.pending
                ticket = replace(ticket, threads=self.device.num_cores if alone or ticket.probe else threads)
            if not busy:
                self._running = (lanes, threads)
            self._in_flight[ticket] = executor
            for job in _jobs([ticket]):
                job.report.peak(lanes=busy + 1)
            served = (executor, ticket.batch.items[0].job.key.priority)
            self._passed = {each: self._passed.get(each, 0) + 1 for each in waiting if each != served}
            return executor, ticket
        return None

    def _who_waits(self) -> list[tuple[Executor, int]]:
        """(executor, priority) of all work that waits."""
        return [
            (executor, priority)
            for executor in self._executors
            if executor.broken is None and executor.backlog.pending
            for priority in executor.backlog.priorities()
        ]

    def _order(self, waiting: list[tuple[Executor, int]], turn: int) -> list[Executor]:
        """Executors with work: those passed over `turn` times first, then the most urgent, equals in turn; of replicas
        the least busy first."""
        if len(waiting) < 2:
            return [executor for executor, _ in waiting]
        in_flight = list(self._in_flight.values())

        def rank(each: tuple[Executor, int]) -> tuple[bool, int, int, int]:
            executor, priority = each
            passed = self._passed.get(each, 0)
            return passed < turn, priority, in_flight.count(executor), -passed

        return list(dict.fromkeys(executor for executor, _ in sorted(waiting, key=rank)))

    def _done(self, ticket: Ticket, starved_s: float = 0.0) -> None:
        now = time.perf_counter()
        with self._lock:
            executor = self._in_flight.pop(ticket)
            self._paused.discard(ticket)
            self._alone.discard(ticket)
            busy_on = executor.backlog.pending > 0
            # What was begun under another division of the cores says nothing about the one that is tried now.
            counts = ticket.fits and not ticket.probe and executor.lanes == self._running
            if self._last_done is not None and busy_on and counts:
                executor.record_lanes(executor.model.flops(ticket.batch.shape), now - self._last_done, starved_s)
            self._last_done = now if busy_on or self._in_flight else None
            self._condition.notify_all()


class _Site:
    """The dispatcher as one of its micro-batches sees it: see :class:`memsafe.engine.recover.Site`."""

    def __init__(self, dispatcher: Dispatcher, ticket: Ticket) -> None:
        self._dispatcher = dispatcher
        self._ticket = ticket

    def others(self) -> tuple[int, int]:
        with self._dispatcher._lock:
            running = self._running()
            return len(running), sum(ticket.bound_bytes for ticket in running)

    def pause(self, paused: bool) -> None:
        owner, ticket = self._dispatcher, self._ticket
        with owner._lock:
            if paused:
                owner._paused.add(ticket)
                owner._alone.discard(ticket)
                if not owner._waiting:
                    owner._start_lane()
            else:
                owner._paused.discard(ticket)
            owner._condition.notify_all()

    def clear(self, timeout_s: float) -> bool:
        owner, ticket = self._dispatcher, self._ticket
        with owner._lock:
            owner._alone.add(ticket)
            owner._paused.add(ticket)  # of two that wait for each other, the first to look goes first
            try:
                return owner._condition.wait_for(lambda: not self._running(), timeout_s)
            finally:
                owner._paused.discard(ticket)

    def _running(self) -> list[Ticket]:
        owner = self._dispatcher
        return [t for t in owner._in_flight if t is not self._ticket and t not in owner._paused]


def _thread_tools(device: Device) -> tuple[Callable[[int], None], Callable[[], float]]:
    """Sets how many threads torch's operations use in the calling thread; tells how long it has had no core."""
    if device.kind != "cpu":
        return lambda threads: None, lambda: 0.0
    from memsafe.machine.threads import set_threads, starved_seconds

    return set_threads, starved_seconds


def _jobs(tickets: Iterable[Ticket]) -> list[Job]:
    return list(dict.fromkeys(item.job for ticket in tickets for item in ticket.batch.items))


def _exiting() -> ClosedError:
    return ClosedError("the interpreter is exiting")


def _all_failed(error: BaseException) -> ClosedError:
    return ClosedError(f"every device of this model has failed, the last with {type(error).__name__}: {error}")


def _close_all() -> None:
    for dispatcher in list(_registry.values()):
        dispatcher.close()


def _before_fork() -> None:
    for dispatcher in list(_registry.values()):
        dispatcher.pause_for_fork()


def _resume_after_fork() -> None:
    for dispatcher in list(_registry.values()):
        dispatcher.resume()


def _after_fork() -> None:
    """A forked child has none of its parent's threads: its dispatchers start anew."""
    global _registry_lock
    _registry_lock = threading.Lock()
    _registry.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_resume_after_fork, after_in_child=_after_fork)
