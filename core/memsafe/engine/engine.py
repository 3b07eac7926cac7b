"""What Embedder and Reranker share: models on devices, the way of a call through them, and its end."""

from __future__ import annotations

import gc
import importlib
import itertools
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from memsafe.config import MemoryPolicy, cache_dir
from memsafe.engine import reaper
from memsafe.engine.feeding import feed
from memsafe.engine.hooks import Hooks
from memsafe.engine.idle import Presence
from memsafe.engine.jobs import Backlog, Job
from memsafe.engine.lanes import in_a_lane, lanes_of, scheduling_lock
from memsafe.engine.runner import Runner
from memsafe.engine.sinks import Rows
from memsafe.errors import BusyError, ClosedError, ConfigError
from memsafe.events import (
    EventHook,
    InputsTruncated,
    ModelReloaded,
    ModelUnloaded,
    ReportBuilder,
    RunReport,
)
from memsafe.machine import allocator
from memsafe.machine.device import Device, open_device
from memsafe.machine.heap import heap
from memsafe.machine.store import CostStore
from memsafe.models.loading import load, move, size_of
from memsafe.models.model import LoadedModel, ModelSpec
from memsafe.models.ways import Way
from memsafe.planning.batch import BatchShape
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostKey, CostModel
from memsafe.planning.sizing import usual_block
from memsafe.planning.turns import BULK, QUERY, Fixed, QueueKey

__all__ = ["Engine"]

log = logging.getLogger("memsafe")

_numbers = itertools.count()
_fork_lock = threading.Lock()  # of a forked child's first use; others may be held for ever there

BUSY_S = 0.05
"""When to ask again whether a model can be unloaded that is just being closed, loaded or left by its last micro-batch."""


class Engine:
    """One model on one or more devices, one queue in front of them. Thread-safe.

    devices: torch's names, None for the best one, or opened ones. Naming a device twice gives two copies of the model on it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        devices: Sequence[str | Device | None],
        policy: MemoryPolicy,
        hooks: Sequence[EventHook] = (),
    ) -> None:
        self.policy = policy
        hooks = tuple(hooks)
        for hook in hooks:
            if not callable(hook):
                raise ConfigError(f"hooks: got a {type(hook).__name__}; give callables that take one event")
        self._given_hooks = hooks
        self._hooks = Hooks(hooks)
        state = allocator.configure(policy.alloc_conf)
        self._notes = (state.note,) if state.note and state.status not in ("set", "off") else ()
        if policy.strict_heap:
            heap.wish()
        self._store = CostStore(os.path.join(cache_dir(), "costs")) if policy.learn else None
        self.spec = spec
        self.models: list[LoadedModel] = []
        self._baselines: list[int] = []
        self._costs: dict[str, CostModel] = {}  # what was learnt before the weights left, by digest
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._presence = Presence()
        self._devices = [each if isinstance(each, Device) else open_device(each) for each in devices]
        self._moves = self._moved = False  # whether the model that was handed in can leave its device, and has done so
        if not isinstance(spec.model, str) and spec.model is not None:
            self._check_handed_in(str(spec.model.device))
        self.backlog = Backlog(scheduling_lock())
        self.runners: list[Runner] = []
        self._bring()

    def _check_handed_in(self, where: str) -> None:
        first = self._devices[0]
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
            for position, device in enumerate(self._devices):
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

    @property
    def model(self) -> LoadedModel:
        """The first device's copy: what may be asked about the model may be asked of it."""
        with self.in_use():
            self._check_usable()
            return self.models[0]

    @property
    def device_names(self) -> list[str]:
        return [device.name for device in self._devices]

    def in_use(self) -> AbstractContextManager[None]:
        """While one is inside, the weights do not leave; :meth:`ready` sees to it that they are there."""
        return self._presence.use()

    def ready(self) -> float:
        """Have the weights on the device; seconds that this took. Raises :class:`ModelTooLargeError` if they no longer fit."""
        started = time.perf_counter()
        return time.perf_counter() - started if self._check_usable() else 0.0

    # one call

    def open(
        self,
        num_inputs: int,
        *,
        way: Way,
        urgent: bool,
        max_rows: int | None,
        fixed_tokens: int | None = None,
        progress: Callable[[int], None] | None = None,
        positions: Sequence[int] | None = None,
        keep: Callable[[Rows], Rows] | None = None,
    ) -> Job:
        """Open a job for `num_inputs` distinct inputs, encoded in `way`: :meth:`announce` lets it in, :meth:`feed` gives it
        inputs, and whatever happens between, :meth:`Job.cancel` takes it out again.

        fixed_tokens: see :class:`memsafe.planning.turns.Fixed`. keep: see :class:`Job`.
        """
        self._check_usable()
        if in_a_lane():
            raise ConfigError(
                "progress: the callback called the model again, in the thread that computes, which would wait for itself; "
                "hand such work to another thread"
            )
        for name, value in (("max_rows", max_rows), ("fixed_tokens", fixed_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}: got {value!r}; give an int of at least 1, or None for no cap")
        key = QueueKey((QUERY if urgent else BULK, max_rows, way.key))
        if fixed_tokens is not None:
            key = QueueKey((*key, Fixed(fixed_tokens, next(_numbers))))
        emit = self._hooks if self._given_hooks else None
        return Job(num_inputs, key, way.extras, ReportBuilder(), progress, emit, positions, keep)

    def announce(self, job: Job) -> None:
        """Let `job` in. Raises :class:`BusyError` where the policy says not to wait."""
        num_inputs = job.writer.num_rows
        most = self.policy.max_pending if self.policy.on_full == "raise" else None
        job.started = time.perf_counter()
        job.process_bytes_before = [model.device.process_bytes() for model in self.models]
        waiting = self.backlog.announce(job, num_inputs, most)
        if waiting is not None:
            raise BusyError(
                f"{waiting} inputs wait already and this call has {num_inputs}, but max_pending is {most}; call again "
                "later, or use on_full='wait'"
            )

    def way(self, prompt: str | None, options: Mapping[str, Any]) -> Way:
        """How inputs of a call with `prompt` and the model's own `options` are encoded; see `models/tokenizing.py`."""
        self._check_usable()
        return self.model.encoder.way(prompt, options)

    def usual_block(self) -> tuple[int, int]:
        """(texts of a block, tokens of a micro-batch) that suit the first device: see :func:`memsafe.planning.sizing.usual_block`."""
        with self.in_use():
            self._check_usable()
            tenant, device = self.runners[0].tenant, self.runners[0].device
        seen = device.snapshot()
        with self.backlog.lock:
            room = tenant.ledger.room_tokens(tenant.ledger.room(seen, 0), 512)
        return usual_block(
            device.traits,
            token_flops=tenant.model.flops(BatchShape(1, 1, 0, 1)),
            room_tokens=room,
            max_tokens=self.policy.max_tokens,
        )

    def feed(self, job: Job, inputs: Sequence[Any], way: Way, *, warn: bool = True) -> None:
        """Tokenise `inputs`, piece by piece, while the devices compute what is tokenised already. warn: of those that were cut."""
        truncated = feed(self.backlog, job, inputs, way, self.policy.max_pending, self._learning)
        if truncated:
            self._tell_truncated(job, truncated, way.max_length or 0, way.cuts_because, warn=warn)

    def _learning(self) -> bool:
        """Whether a device is still looking for its best size, and can use a sample of all texts."""
        return any(not runner.tenant.sizing.settled for runner in self.runners)

    def finish(self, job: Job, *, num_texts: int) -> tuple[Rows | None, RunReport]:
        """Wait for the job's rows; returns them with the report. Raises what the job ended with."""
        try:
            rows = job.result()
        finally:
            self._release(job)
            self._hooks.settle()
        return rows, self._report(job, num_texts)

    def _report(self, job: Job, num_texts: int) -> RunReport:
        model = self.model
        job.report.set(
            device=", ".join(self.device_names),
            path=model.path,
            dtype=model.dtype_name,
            texts=num_texts,
            distinct_texts=job.writer.num_rows,
            weights_bytes=sum(m.weights_bytes for m in self.models),
            total_s=time.perf_counter() - job.started,
        )
        for note in (*self._notes, *model.notes):
            job.report.note(note)
        return job.report.build()

    def _release(self, job: Job) -> None:
        if self._closed:
            return
        busy = self.backlog.pending > 0
        for runner, before in zip(list(self.runners), job.process_bytes_before, strict=False):
            runner.model.drop_host_copy()
            released = lanes_of(runner.device).release_after_run(runner, before, busy=busy)
            if released:
                runner.released(job, released)

    def _tell_truncated(self, job: Job, count: int, length: int, because: str, *, warn: bool) -> None:
        job.report.add(truncated=count)
        if warn:
            some = "1 input was" if count == 1 else f"{count:,} inputs were"
            warnings.warn(f"{some} longer than {length:,} tokens and cut there, {because}", stacklevel=5)
        if job.emit is not None:
            job.emit(InputsTruncated(self._devices[0].name, count, length))

    # life

    def _check_usable(self) -> bool:
        """See that calls can be served; whether the weights had to come back for that. To be called :meth:`in_use`."""
        if self._closed:
            raise ClosedError("closed; make a new one")
        if os.getpid() != self._pid:
            with _fork_lock:
                if os.getpid() != self._pid:
                    self._begin_in_child()
        if self._presence.here:
            return False
        with self._lock:
            if self._closed:
                raise ClosedError("closed; make a new one")
            if self._presence.here:
                return True  # another call has seen to it, and this one has waited
            started = time.perf_counter()
            self._bring()
        if self._given_hooks:
            seconds = time.perf_counter() - started
            for model in self.models:
                self._hooks(ModelReloaded(model.device.name, model.weights_bytes, seconds))
        return True

    def _begin_in_child(self) -> None:
        """A forked child has the weights, if they were there, but none of the threads, and locks in an unknown state."""
        for device in self._devices:
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
        self._lock, self._presence, self._hooks = threading.Lock(), Presence(), Hooks(self._given_hooks)
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
        if after_s is None or self._closed:
            return None
        if not self._lock.acquire(blocking=False):
            return BUSY_S
        try:
            if self._closed or not self._presence.here:
                return None
            if any(lanes_of(runner.device).works_on(runner) for runner in self.runners):
                return BUSY_S  # a call that was cancelled
            left_s = self._presence.leave(after_s)
            if left_s > 0:
                return max(left_s, 0.001)
            before = [device.process_bytes() for device in self._devices]
            self._costs = {runner.tenant.ledger.cost.key.digest(): runner.tenant.ledger.cost for runner in self.runners}
            self._moved = self._moves
            self._drop_models(to_host=self._moved)
        finally:
            self._lock.release()
        if self._given_hooks:
            for device, bytes_before in zip(self._devices, before, strict=True):
                self._hooks(ModelUnloaded(device.name, max(bytes_before - device.process_bytes(), 0)))
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
        for device in self._devices:
            device.release()

    def close(self) -> None:
        """Free the model: calls in progress fail with :class:`ClosedError`, and the memory goes back to the device."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.backlog.end(lambda: ClosedError("closed while the call was waiting"))
        self.spec = ModelSpec(self.spec.kind, None, {})
        self._drop_models(to_host=False)


def _new_fork_lock() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_fork_lock)
