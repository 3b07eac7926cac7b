"""What Embedder and Reranker share: the way of a call through a model, and its end."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from memsafe.config import MemoryPolicy
from memsafe.engine.feeding import feed
from memsafe.engine.jobs import Backlog, Job
from memsafe.engine.lanes import in_a_lane, lanes_of
from memsafe.engine.residence import Residence
from memsafe.engine.runner import Runner
from memsafe.engine.sinks import Rows
from memsafe.errors import BusyError, ConfigError
from memsafe.events import EventHook, InputsTruncated, ReportBuilder, RunReport
from memsafe.machine import allocator
from memsafe.machine.device import Device
from memsafe.machine.heap import heap
from memsafe.models.model import LoadedModel, ModelSpec
from memsafe.models.ways import Way
from memsafe.planning.batch import BatchShape
from memsafe.planning.sizing import usual_block
from memsafe.planning.turns import BULK, QUERY, Fixed, QueueKey

__all__ = ["Engine"]

_numbers = itertools.count()


class Engine:
    """One model on one or more devices, one queue in front of them. Thread-safe.

    devices, residence: what is to hold the copies of the model, see :class:`Residence`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        devices: Sequence[str | Device | None],
        policy: MemoryPolicy,
        hooks: Sequence[EventHook] = (),
        residence: Callable[..., Residence] = Residence,
    ) -> None:
        for hook in hooks:
            if not callable(hook):
                raise ConfigError(f"hooks: got a {type(hook).__name__}; give callables that take one event")
        self.policy = policy
        self._told = bool(hooks)
        state = allocator.configure(policy.alloc_conf)
        self._notes = (state.note,) if state.note and state.status not in ("set", "off") else ()
        if policy.strict_heap:
            heap.wish()
        self._home = residence(spec, devices, policy, hooks)

    @property
    def backlog(self) -> Backlog:
        """The queue in front of all devices."""
        return self._home.backlog

    @property
    def runners(self) -> Sequence[Runner]:
        """What runs the model's micro-batches, one for each device; none while the weights are away."""
        return self._home.runners

    @property
    def models(self) -> Sequence[LoadedModel]:
        """The copies, one for each device; none while the weights are away."""
        return self._home.models

    @property
    def model(self) -> LoadedModel:
        """The first device's copy: what may be asked about the model may be asked of it."""
        with self.in_use():
            self._home.ready()
            return self.models[0]

    @property
    def device_names(self) -> list[str]:
        return [device.name for device in self._home.devices]

    def in_use(self) -> AbstractContextManager[None]:
        """While one is inside, the weights do not leave; :meth:`ready` sees to it that they are there."""
        return self._home.in_use()

    def ready(self) -> float:
        """Have the weights on the device; seconds that this took. Raises :class:`ModelTooLargeError` if they no longer fit."""
        started = time.perf_counter()
        return time.perf_counter() - started if self._home.ready() else 0.0

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
        self._home.ready()
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
        emit = self._home.hooks if self._told else None
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
        self._home.ready()
        return self.model.encoder.way(prompt, options)

    def usual_block(self) -> tuple[int, int]:
        """(texts of a block, tokens of a micro-batch) that suit the first device: see :func:`memsafe.planning.sizing.usual_block`."""
        with self.in_use():
            self._home.ready()
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
            self._home.hooks.settle()
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
        if self._home.closed:
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
            job.emit(InputsTruncated(self._home.devices[0].name, count, length))

    def close(self) -> None:
        """Free the model: calls in progress fail with :class:`ClosedError`, and the memory goes back to the device."""
        self._home.close()
