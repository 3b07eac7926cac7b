"""The scheduler as one micro-batch sees it, while it runs and recovers."""

from __future__ import annotations

import threading
from typing import Protocol

from memsafe.engine.delivery import tell
from memsafe.engine.runner import Runner
from memsafe.events import BudgetChanged
from memsafe.machine.device import Device
from memsafe.planning.batch import BatchShape, MicroBatch
from memsafe.planning.instructions import Grew, Measured, Remember, Ticket
from memsafe.planning.recovery import Action, Work
from memsafe.planning.scheduler import Scheduler
from memsafe.planning.tidying import Seen, Tidy

__all__ = ["LaneSite"]


class Owner(Protocol):
    """A device's lanes, as far as a site needs them. lock: the scheduling lock; condition: on it."""

    device: Device
    scheduler: Scheduler
    lock: threading.RLock
    condition: threading.Condition

    def look(self) -> Seen: ...
    def tidy(self, tidy: Tidy) -> int: ...
    def make_room(self) -> None: ...
    def notify(self) -> None: ...


class LaneSite:
    """The scheduler as one of its micro-batches sees it: see :class:`memsafe.engine.recover.Site`."""

    def __init__(self, lanes: Owner, runner: Runner, ticket: Ticket) -> None:
        self._lanes, self._runner, self._ticket = lanes, runner, ticket

    def checked(self, work: Work) -> Work:
        seen = self._lanes.look()
        with self._lanes.lock:
            return self._lanes.scheduler.checked(self._ticket, work, seen)

    def refused(self, work: Work) -> tuple[Action, ...]:
        seen = self._lanes.look()
        with self._lanes.lock:
            return self._lanes.scheduler.refused(self._ticket, work, seen)

    def ran(self, batch: MicroBatch, measured: Measured) -> None:
        with self._lanes.lock:
            actions = self._lanes.scheduler.ran(self._ticket, batch, measured)
        for action in actions:
            if isinstance(action, Remember):
                self._runner.remember(action.key, action.text)
            elif isinstance(action, Grew):
                tell(batch, BudgetChanged(self._lanes.device.name, action.cap_bytes, "grow"), grows=1)
            else:
                self._lanes.tidy(action)

    def predict(self, shape: BatchShape) -> tuple[int, int, int]:
        seen = self._lanes.look()
        ledger = self._runner.tenant.ledger
        with self._lanes.lock:
            return ledger.predict(shape), ledger.bound(shape), ledger.headroom(seen.snapshot)

    def pause(self, paused: bool) -> None:
        lanes, ticket = self._lanes, self._ticket
        with lanes.lock:
            if paused:
                lanes.scheduler.paused.add(ticket)
                lanes.scheduler.alone.discard(ticket)
                lanes.make_room()
            else:
                lanes.scheduler.paused.discard(ticket)
            lanes.notify()

    def clear(self, timeout_s: float) -> bool:
        lanes, ticket = self._lanes, self._ticket
        with lanes.lock:
            lanes.scheduler.alone.add(ticket)
            lanes.scheduler.paused.add(ticket)  # of two that wait for each other, the first to look goes first
            try:
                return lanes.condition.wait_for(lambda: not lanes.scheduler.running(besides=ticket), timeout_s)
            finally:
                lanes.scheduler.paused.discard(ticket)
