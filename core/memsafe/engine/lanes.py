"""The threads, and the only scheduling lock: lanes ask a device's scheduler, and perform what it says outside the lock.

Lanes run one micro-batch at a time. On a CPU several compute side by side; on an accelerator two take turns, one preparing
or fetching while the other computes. Nothing under the lock waits for a disk, a driver or the heap.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial

from memsafe.engine.delivery import jobs_of
from memsafe.engine.jobs import Job
from memsafe.engine.runner import Runner
from memsafe.engine.site import LaneSite
from memsafe.errors import ClosedError
from memsafe.machine.device import Device
from memsafe.machine.heap import heap
from memsafe.planning.instructions import Start, TidyFirst
from memsafe.planning.scheduler import Scheduler
from memsafe.planning.tenant import Tenant
from memsafe.planning.tidying import Seen, Tidy

__all__ = ["Lanes", "in_a_lane", "lanes_of", "scheduling_lock"]

log = logging.getLogger("memsafe")

IDLE_S = 5.0
"""A lane without work ends after this many seconds; starting one again costs well under a millisecond."""

FORK_WAIT_S = 10.0
"""How long a fork waits for micro-batches in flight at most."""

_lock = threading.RLock()  # of every scheduler and queue; decisions take well under a millisecond
_registry: dict[str, Lanes] = {}


def scheduling_lock() -> threading.RLock:
    """The lock of every decision in this process."""
    return _lock


def lanes_of(device: Device) -> Lanes:
    """The process's lanes for `device`."""
    with _lock:
        if device.name not in _registry:
            _registry[device.name] = Lanes(device)
        return _registry[device.name]


_here = threading.local()


def in_a_lane() -> bool:
    """Whether the calling thread runs micro-batches: whoever waits in it for another one may wait for itself."""
    return getattr(_here, "lane", False)


class _ChoosingError(Exception):
    """A fault while a micro-batch was chosen, and the jobs that waited then."""

    def __init__(self, waiters: list[Job]) -> None:
        super().__init__()
        self.waiters = waiters


class Lanes:
    """A device's threads, and what they run. Its scheduler is only ever touched with the scheduling lock held."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.scheduler = Scheduler(device.traits)
        # `with` on the lock itself, never on the condition, whose __enter__ is Python code: a Ctrl-C inside it would leak the lock
        self.lock = _lock
        self.condition = threading.Condition(self.lock)
        self._runners: dict[Tenant, Runner] = {}  # those that are leaving too, until their last micro-batch is done
        self._threads: set[threading.Thread] = set()
        self._changes = 0  # whoever looked at memory before the last one should look again before it waits
        self._waiting = 0
        self._closing = False
        self._forking = False

    # models come and go

    def attach(self, runner: Runner) -> None:
        with self.lock:
            self._runners[runner.tenant] = runner
            self.scheduler.attach(runner.tenant)
            runner.backlog.tenants.append(runner.tenant)
            runner.backlog.listeners.append(self.wake)

    def works_on(self, runner: Runner) -> bool:
        """Whether a micro-batch of `runner` is in flight."""
        with self.lock:
            return runner.tenant in self.scheduler.in_flight.values()

    def detach(self, runner: Runner) -> None:
        """Forget `runner` when its last micro-batch is done."""
        tenant = runner.tenant
        with self.lock:
            if tenant in self.scheduler.tenants:
                self.scheduler.detach(tenant)
                runner.backlog.tenants.remove(tenant)
                runner.backlog.listeners.remove(self.wake)
            while tenant in self.scheduler.in_flight.values():
                if threading.current_thread() in self._threads:
                    return  # closed from a caller's hook: it cannot wait for the micro-batch that it is part of
                self.condition.wait(0.1)
            self._runners.pop(tenant, None)

    def wake(self) -> None:
        """Work has come, or room."""
        with self.lock:
            closing = self._closing
            if not closing and not self._waiting:
                self._start_lane()
            self.notify()
            runners = list(self._runners.values()) if closing else []
        for runner in runners:
            if runner.backlog.pending:
                runner.backlog.end(_exiting)

    def release_after_run(self, runner: Runner, before_bytes: int, *, busy: bool) -> int:
        """At the end of a run: give cached memory back as the policy says; returns how much. before_bytes: what the process
        held when the run began. busy: other calls are at work."""
        process_bytes = self.device.process_bytes()
        with self.lock:
            tidying = self.scheduler.tidying
            wanted = tidying.after_run(runner.policy.release, before_bytes, process_bytes, busy=busy)
        return self.tidy(Tidy.RELEASE) if wanted else 0

    # forks and the end

    def pause_for_fork(self) -> None:
        """Let micro-batches in flight end and start none: a fork in the middle of a matrix product may copy its
        library's locks as they are, held for ever in the child."""
        with self.lock:
            if threading.current_thread() not in self._threads:
                self._forking = True
                self.condition.wait_for(lambda: not self.scheduler.running(), FORK_WAIT_S)

    def resume(self) -> None:
        """The fork is over."""
        with self.lock:
            self._forking = False
            self.notify()

    def close(self) -> None:
        """End the lanes once their micro-batches are done; what waits, for work or for memory, fails, so this is prompt."""
        with self.lock:
            self._closing = True
            self.notify()
            threads, runners = list(self._threads), list(self._runners.values())
            jobs = [job for ticket in self.scheduler.in_flight for job in jobs_of(ticket.batch)]
        for runner in runners:
            runner.backlog.end(_exiting)
        for job in jobs:
            job.fail(_exiting())
        for thread in threads:
            thread.join(timeout=10)

    # lanes

    def notify(self) -> None:
        """Something has changed. Call with the lock held."""
        self._changes += 1
        self.condition.notify_all()  # a single one might reach somebody who waits for something else

    def make_room(self) -> None:
        """A micro-batch pauses: somebody else may run meanwhile. Call with the lock held."""
        if not self._waiting:
            self._start_lane()

    def _start_lane(self) -> None:
        """Start a lane if one more could be of use. Call with the lock held."""
        if len(self._threads) < self.scheduler.most_lanes:
            lane = threading.Thread(
                target=self._lane, name=f"memsafe-{self.device.name}-{len(self._threads)}", daemon=True
            )
            self._threads.add(lane)
            try:
                lane.start()
            except RuntimeError:  # the system gives no more threads: those that there are will do
                self._threads.discard(lane)
                if not self._threads:
                    raise
            except BaseException:
                self._threads.discard(lane)  # a Ctrl-C: whether it runs is not known, so it must not be counted on
                raise

    def _lane(self) -> None:
        _here.lane = True
        tools = _thread_tools(self.device)
        try:
            while (start := self._next()) is not None:
                self._perform(start, *tools)
                del start
        except BaseException as error:  # a fault of ours, before a micro-batch was chosen
            waiters = error.waiters if isinstance(error, _ChoosingError) else self._waiters()
            cause = error.__cause__ or error
            log.error("choosing a micro-batch ended in an unexpected error", exc_info=cause)
            for job in waiters:
                job.fail(self._death(cause))
        finally:
            with self.lock:
                self._threads.discard(threading.current_thread())
                if not self._closing and not self._waiting and self.scheduler.pending:
                    self._start_lane()  # work that came while this lane was on its way out

    def _waiters(self) -> list[Job]:
        with self.lock:
            return [job for backlog in {runner.backlog for runner in self._runners.values()} for job in backlog.jobs()]

    def _death(self, error: BaseException) -> ClosedError:
        return ClosedError(f"the worker of {self.device.name} failed: {type(error).__name__}: {error}")

    def _next(self) -> Start | None:
        """The next micro-batch, waited for; None when the lane may end."""
        idle_since = time.monotonic()
        while True:
            with self.lock:
                if self._closing:
                    return None
                changes, pending = self._changes, self.scheduler.pending and not self._forking
            start = self.choose() if pending else None
            if start is not None:
                return start
            with self.lock:
                if self._closing:
                    return None
                if pending and changes != self._changes:
                    continue  # what was decided upon is no longer so
                if self.scheduler.idle:
                    left = IDLE_S - (time.monotonic() - idle_since)
                    if left <= 0:
                        return None
                else:
                    left, idle_since = 0.5, time.monotonic()
                self._waiting += 1
                self.condition.wait(left)
                self._waiting -= 1

    def choose(self) -> Start | None:
        """The micro-batch that may start now, its memory made ready; None if there is none."""
        while True:
            try:
                seen = self.look()
                with self.lock:
                    if self._forking or self._closing:
                        return None
                    action = self.scheduler.next(time.perf_counter(), seen)
                    if isinstance(action, Start):
                        self._admitted(action)
                        return action
                if action is None:
                    return None
                self.tidy(action.tidy, action)
            except BaseException as error:  # those who wait now: who comes later has nothing to do with it
                raise _ChoosingError(self._waiters()) from error

    def _admitted(self, start: Start) -> None:
        """Call with the lock held."""
        self._runners[start.tenant].backlog.taken()
        if not self._waiting and self.scheduler.pending:
            self._start_lane()

    def look(self) -> Seen:
        """Memory as it is now. Asks the driver: never with the lock held."""
        exact = self.device.traits.keeps_freed and heap.exact
        return Seen(self.device.snapshot(), self.device.process_bytes(), exact)

    def tidy(self, tidy: Tidy, first: TidyFirst | None = None) -> int:
        """Do it, without the lock; returns how many bytes went back."""
        released = 0
        if tidy is Tidy.RELEASE:
            with self.lock:
                models = [runner.model for runner in self._runners.values()]
            released = sum(model.release() for model in models) + self.device.release()
        elif tidy is Tidy.TIGHTEN:
            heap.tighten()
        else:
            heap.loosen()
        process_bytes = self.device.process_bytes()
        with self.lock:
            if first is not None:
                self.scheduler.did(first, released, process_bytes)
            else:
                self.scheduler.tidying.did(tidy, process_bytes)
        return released

    def perform(self, start: Start) -> None:
        """Run what was chosen, in this thread."""
        self._perform(start, *_thread_tools(self.device))

    def _perform(self, start: Start, set_threads: Callable[[int], None], starved_seconds: Callable[[], float]) -> None:
        ticket, tenant = start.ticket, start.tenant
        with self.lock:
            runner = self._runners[tenant]
            judged = ticket.threads == 1 and not tenant.sizing.lane_choice.done
        for job in jobs_of(ticket.batch):
            job.report.peak(lanes=start.busy)
        starved_before = starved_seconds() if judged else 0.0
        try:
            if ticket.threads is not None:
                set_threads(ticket.threads)
            runner.run(start, LaneSite(self, runner, ticket))
        except BaseException as error:  # a fault of ours: no caller may wait for ever
            log.exception("a micro-batch ended in an unexpected error")
            for job in jobs_of(ticket.batch):
                job.fail(self._death(error))
        finally:
            starved = starved_seconds() - starved_before if judged else 0.0
            with self.lock:
                actions = self.scheduler.done(ticket, time.perf_counter(), starved)
                if tenant not in self.scheduler.tenants and tenant not in self.scheduler.in_flight.values():
                    self._runners.pop(tenant, None)  # it was closed meanwhile
                self.notify()
            for action in actions:
                runner.remember(action.key, action.text)
            if tenant.broken is not None and not runner.backlog.has_others(tenant):
                runner.backlog.end(partial(_all_failed, tenant.broken))


def _thread_tools(device: Device) -> tuple[Callable[[int], None], Callable[[], float]]:
    """Sets how many threads torch's operations use in the calling thread; tells how long it has had no core."""
    if not device.traits.side_by_side:
        return lambda threads: None, lambda: 0.0
    from memsafe.machine.threads import set_threads, starved_seconds

    return set_threads, starved_seconds


def _exiting() -> ClosedError:
    return ClosedError("the interpreter is exiting")


def _all_failed(error: BaseException) -> ClosedError:
    return ClosedError(f"every device of this model has failed, the last with {type(error).__name__}: {error}")


def _close_all() -> None:
    for lanes in list(_registry.values()):
        lanes.close()


def _before_fork() -> None:
    for lanes in list(_registry.values()):
        lanes.pause_for_fork()


def _resume_after_fork() -> None:
    for lanes in list(_registry.values()):
        lanes.resume()


def _after_fork() -> None:
    """A forked child has none of its parent's threads: its lanes start anew, under a lock that nobody holds."""
    global _lock
    _lock = threading.RLock()
    _registry.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_resume_after_fork, after_in_child=_after_fork)
