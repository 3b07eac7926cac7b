"""One model on its devices: brought there, served, gone when nobody calls, back with the next call, closed."""

from __future__ import annotations

import gc
import importlib
import os
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from memsafe.config import MemoryPolicy, cache_dir
from memsafe.engine import reaper
from memsafe.engine.hooks import Hooks
from memsafe.engine.idle import Presence
from memsafe.engine.jobs import Backlog
from memsafe.engine.lanes import lanes_of, scheduling_lock
from memsafe.engine.runner import Runner
from memsafe.errors import ClosedError, ConfigError
from memsafe.events import EventHook, ModelReloaded, ModelUnloaded
from memsafe.machine.device import Device, open_device
from memsafe.machine.store import CostStore
from memsafe.models.loading import load, move, size_of
from memsafe.models.model import LoadedModel, ModelSpec
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostKey, CostModel

__all__ = ["Residence"]

_fork_lock = threading.Lock()  # of a forked child's first use; others may be held for ever there

BUSY_S = 0.05
"""When to ask again whether a model can be unloaded that is just being closed, loaded or left by its last micro-batch."""


class Residence:
    """The copies of one model, one for each of `devices`, and the queue that all of them serve. Thread-safe.

    devices: torch's names, None for the best one, or opened ones. Naming a device twice gives two copies of the model on it.
    backlog, hooks: those of this process: a forked child begins with new ones.
    """

    def __init__(
        self, spec: ModelSpec, devices: Sequence[str | Device | None], policy: MemoryPolicy, hooks: Sequence[EventHook]
    ) -> None:
        self.policy = policy
        self._given_hooks = tuple(hooks)
        self.hooks = Hooks(self._given_hooks)
        self._store = CostStore(os.path.join(cache_dir(), "costs")) if policy.learn else None
        self.spec = spec
        self.models: list[LoadedModel] = []
        self._baselines: list[int] = []
        self._costs: dict[str, CostModel] = {}  # what was learnt before the weights left, by digest
        self._pid = os.getpid()
        self.closed = False
        self._lock = threading.Lock()
        self._presence = Presence()
        self.devices = [each if isinstance(each, Device) else open_device(each) for each in devices]
        self._moves = self._moved = False  # whether the model that was handed in can leave its device, and has done so
        if not isinstance(spec.model, str) and spec.model is not None:
            self._check_handed_in(str(spec.model.device))
        self.backlog = Backlog(scheduling_lock())
        self.runners: list[Runner] = []
        self._bring()

    def _check_handed_in(self, where: str) -> None:
        first = self.devices[0]
        if where != first.name:
            return  # copies of it run, and these can go
        self._moves = first.kind != "cpu"
        if self.policy.unload_after_s is not None and not self._moves:
            raise ConfigError(
                "unload_after_s: a loaded model on the CPU cannot be unloaded, since whoever handed it in holds it; give its folder or "
                "its hub id instead, or leave unload_after_s out"
            )

    def _bring(self) -> None:
        """Load the model onto its devices and begin to serve it. Leaves nothing behind if one of them lacks room."""
        reaper.settle()  # what the caller has just dropped may be what the model needs
        try:
            for position, device in enumerate(self.devices):
                if position == 0 and self._moved:
                    self._move(device)
                self._load(self.spec, device, position)
        except BaseException:
            self._drop_models(to_host=self._moved)
            raise
        self._attach()
        self._presence.here = True
        if self.policy.unload_after_s is not None:
            reaper.watch(self)

    def _move(self, device: Device) -> None:
        """The model that was handed in, from main memory back to `device`."""
        seen = device.snapshot()
        move(self.spec.model, device, self._budget(device, seen.allocated_bytes).headroom_bytes(seen))

    def _load(self, spec: ModelSpec, device: Device, position: int) -> None:
        # Libraries are no part of the model: the limit counts from here.
        importlib.import_module("sentence_transformers")
        before = device.snapshot()
        baseline = before.allocated_bytes
        budget = self._budget(device, baseline)
        room_bytes = budget.headroom_bytes(before)
        # a loaded model stays as it is, and where it is; other devices get copies
        stays = not isinstance(spec.model, str) and position == 0 and str(spec.model.device) == device.name
        if stays:
            baseline -= size_of(spec.model)
            room_bytes = device.total_bytes if budget.limit_bytes is None else budget.limit_bytes
        self.models.append(load(spec, device, self.policy, room_bytes, copied=not stays))
        self._baselines.append(max(baseline, 0))

    def _budget(self, device: Device, baseline_bytes: int) -> MemoryBudget:
        total = device.total_bytes
        return MemoryBudget(
            limit_bytes=self.policy.limit_bytes(total),
            reserve_bytes=self.policy.reserve_bytes(total),
            baseline_bytes=baseline_bytes,
        )

    def _attach(self) -> None:
        for model, baseline in zip(self.models, self._baselines, strict=True):
            key, prior = model.cost_key(), model.cost_prior()
            cost = self._costs.pop(key.digest(), None)
            if cost is None and self._store is not None:
                cost = self._store.load(key)
            if cost is not None:
                cost.expect(prior)
            runner = Runner(
                model,
                self.policy,
                cost or CostModel(key, prior),
                self._budget(model.device, baseline),
                self.backlog,
                remember=self._remember,
            )
            self.runners.append(runner)
            lanes_of(model.device).attach(runner)

    def _remember(self, key: CostKey, text: str) -> None:
        if self._store is not None:
            self._store.write(key, text)

    # life

    def in_use(self) -> AbstractContextManager[None]:
        """While one is inside, the weights do not leave; :meth:`ready` sees to it that they are there."""
        return self._presence.use()

    def ready(self) -> bool:
        """See that calls can be served; whether the weights had to come back for that. To be called :meth:`in_use`.

        Raises :class:`ClosedError` after :meth:`close`, :class:`ModelTooLargeError` if the weights no longer fit.
        """
        if self.closed:
            raise ClosedError("closed; make a new one")
        if os.getpid() != self._pid:
            with _fork_lock:
                if os.getpid() != self._pid:
                    self._begin_in_child()
        if self._presence.here:
            return False
        with self._lock:
            if self.closed:
                raise ClosedError("closed; make a new one")
            if self._presence.here:
                return True  # another call has seen to it, and this one has waited
            started = time.perf_counter()
            self._bring()
        if self._given_hooks:
            seconds = time.perf_counter() - started
            for model in self.models:
                self.hooks(ModelReloaded(model.device.name, model.weights_bytes, seconds))
        return True

    def _begin_in_child(self) -> None:
        """A forked child has the weights, if they were there, but none of the threads, and locks in an unknown state."""
        for device in self.devices:
            if device.kind != "cpu":
                raise ClosedError(
                    f"this process was forked after {device.name} was in use, and CUDA does not survive a fork; "
                    "use the 'spawn' start method, or load the model in the child"
                )
        if not all(model.survives_fork for model in self.models):
            raise ClosedError(
                f"this process was forked after {self.spec.engine} had loaded a model, whose threads do not survive a fork; use the "
                "'spawn' start method, or load the model in the child"
            )
        here = self._presence.here
        self._lock, self._presence, self.hooks = threading.Lock(), Presence(), Hooks(self._given_hooks)
        self.backlog, self.runners = Backlog(scheduling_lock()), []
        if here:
            for model in self.models:
                model.after_fork()
            self._attach()
            self._presence.here = True
            if self.policy.unload_after_s is not None:
                reaper.watch(self)
        else:
            self.models, self._baselines = [], []
        self._pid = os.getpid()

    def unload_if_idle(self) -> float | None:
        """Take the weights off the devices if nobody has called for as long as the policy says; see :class:`reaper.Unloadable`."""
        after_s = self.policy.unload_after_s
        if after_s is None or self.closed:
            return None
        if not self._lock.acquire(blocking=False):
            return BUSY_S
        try:
            if self.closed or not self._presence.here:
                return None
            if any(lanes_of(runner.device).works_on(runner) for runner in self.runners):
                return BUSY_S  # a call that was cancelled
            left_s = self._presence.leave(after_s)
            if left_s > 0:
                return max(left_s, 0.001)
            before = [device.process_bytes() for device in self.devices]
            self._costs = {runner.tenant.ledger.cost.key.digest(): runner.tenant.ledger.cost for runner in self.runners}
            self._moved = self._moves
            self._drop_models(to_host=self._moved)
        finally:
            self._lock.release()
        if self._given_hooks:
            for device, bytes_before in zip(self.devices, before, strict=True):
                self.hooks(ModelUnloaded(device.name, max(bytes_before - device.process_bytes(), 0)))
        return None

    def _drop_models(self, *, to_host: bool) -> None:
        """Serve no more, and let the weights go. to_host: those of a model that was handed in, which go to main memory."""
        while self.runners:  # no variable may hold the last one, and with it the model
            lanes_of(self.runners[-1].device).detach(self.runners.pop())
        while self.models:
            self.models.pop().close()
        self._baselines.clear()
        if to_host:
            self.spec.model.to("cpu")
        gc.collect()  # models hold themselves in cycles
        for device in self.devices:
            device.release()

    def close(self) -> None:
        """Free the model: calls in progress fail with :class:`ClosedError`, and the memory goes back to the device."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        self.backlog.end(lambda: ClosedError("closed while the call was waiting"))
        self.spec = ModelSpec(self.spec.kind, None, {})
        self._drop_models(to_host=False)


def _new_fork_lock() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_fork_lock)
