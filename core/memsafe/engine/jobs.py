"""One call's work, and the queue in which calls wait: what callers and lanes share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, TimeoutError
from typing import Any

from memsafe.engine.sinks import Rows, RowWriter
from memsafe.errors import CancelledError, InputTooLargeError
from memsafe.events import ReportBuilder
from memsafe.planning.batch import TokenizedInput
from memsafe.planning.tenant import Tenant
from memsafe.planning.turns import QueueKey, Queues

__all__ = ["Backlog", "Job"]


class Job:
    """One call: its rows, its report, and how it ends, with the array of rows or with an error.

    A caller waits for a plain lock: a Ctrl-C inside a future's own methods, which are Python code, may leave its lock held, and then
    whoever ends the job waits for ever.

    extras: features beside the tokens that all its inputs share.
    positions: where each distinct input first stands in the caller's list; None if that is its own index. keep: see
    :class:`RowWriter`.
    """

    def __init__(
        self,
        num_inputs: int,
        key: QueueKey,
        extras: dict[str, Any],
        report: ReportBuilder,
        progress: Callable[[int], None] | None = None,
        emit: Callable[[Any], None] | None = None,
        positions: Sequence[int] | None = None,
        keep: Callable[[Rows], Rows] | None = None,
    ) -> None:
        self.key = key
        self._positions = positions
        self.extras = extras
        self.report = report
        self.emit = emit
        self.writer = RowWriter(num_inputs, keep)
        self._future: Future[Rows | None] | None = None
        self.backlog: Backlog | None = None
        self.started = 0.0
        self.process_bytes_before: list[int] = []  # on each device
        self._progress = progress
        self._pending = num_inputs
        self._failed: dict[int, InputTooLargeError] = {}
        self._lock = threading.Lock()
        self._running = threading.Lock()  # held until the end
        self._running.acquire()
        self._rows: Rows | None = None
        self._error: BaseException | None = None
        self.done = False
        """Whether nothing more is wanted of this job: finished, failed or cancelled."""
        if num_inputs == 0:
            self._end(None)

    def position(self, index: int) -> int:
        """Where input `index` of the job stands in the caller's list: what messages and errors name."""
        return index if self._positions is None else self._positions[index]

    def future(self) -> Future[Rows | None]:
        """What asyncio can wait for. Once a job."""
        future: Future[Rows | None] = Future()
        # asyncio cancels a wrapped future behind our back, unless it runs; then cancelling goes through :meth:`cancel`
        future.set_running_or_notify_cancel()
        with self._lock:
            self._future, done = future, self.done
        if done:
            self._tell(future)
        return future

    def _tell(self, future: Future[Rows | None]) -> None:
        if self._error is None:
            future.set_result(self._rows)
        else:
            future.set_exception(self._error)

    def deliver(self, items: Sequence[TokenizedInput], rows: Rows) -> None:
        """Write the rows of `items`; finishes the job with the last one. What goes wrong here ends this job alone."""
        if self.done:
            return
        try:
            self.writer.write([item.index for item in items], rows)
        except Exception as error:  # no memory for the array of all rows
            self.fail(error)
            return
        self._finish(len(items))

    def give_up(self, item: TokenizedInput, error: InputTooLargeError) -> None:
        """One input cannot be done. The others go on; the error is raised at the end with what was finished."""
        with self._lock:
            self._failed[item.index] = error
        self._finish(1)

    def fail(self, error: BaseException) -> None:
        """End the job with `error`; rows still waiting are dropped."""
        if self._end(error) and self.backlog is not None:
            self.backlog.withdraw(self)

    def cancel(self) -> None:
        """End the job; its places in the queue are free at once, micro-batches in flight are not waited for."""
        self.fail(CancelledError("the call was cancelled; nothing of it waits any more"))

    def result(self, timeout_s: float | None = None) -> Rows | None:
        """Wait for the rows: float32, one per input; None if there were no inputs. Interrupting cancels the job."""
        try:
            if not self._running.acquire(timeout=-1 if timeout_s is None else timeout_s):
                raise TimeoutError(f"the rows did not come within {timeout_s:g} seconds")
            self._running.release()  # whoever else waits
        except BaseException:
            self.cancel()  # unless it is done
            raise
        try:
            if self._error is not None:
                raise self._error
            return self._rows
        finally:
            self = None  # type: ignore[assignment]  # as futures do: else the error holds the job, and the job the error

    def _finish(self, count: int) -> None:
        with self._lock:
            self._pending -= count
            last = self._pending == 0 and not self.done
            failed = dict(self._failed) if last else {}
        if self._progress is not None:
            try:
                self._progress(count)
            except BaseException as failure:  # the caller's own code: its failure is the caller's, not the worker's
                self.fail(failure)
                return
        if not last:
            return
        if failed:
            error = failed[min(failed)]
            error.partial, error.failed = self.writer.array, sorted(failed)
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> bool:
        """Set the outcome; False if there was one already (a cancelled job's last rows may arrive late)."""
        rows = self.writer.array if error is None else None
        with self._lock:
            if self.done:
                return False
            self._rows, self._error, self.done = rows, error, True
            future = self._future
        self._running.release()
        if future is not None:
            self._tell(future)
        return True


class Backlog:
    """Inputs of one model that wait: planning's queues, behind the scheduling lock. Thread-safe.

    lock: the scheduling lock of this process. Several devices may take from one backlog; :attr:`listeners` are told when
    there is work, or less. tenants: the model's copies, one a device.
    """

    def __init__(self, lock: threading.RLock | None = None) -> None:
        self.lock = lock or threading.RLock()
        self.queues = Queues()
        self.listeners: list[Callable[[], None]] = []
        self.tenants: list[Tenant] = []
        self._room = threading.Condition(self.lock)
        self._ended: Callable[[], BaseException] | None = None

    @property
    def pending(self) -> int:
        """Inputs that wait."""
        return self.queues.pending

    def announce(self, job: Job, num_inputs: int, max_pending: int | None = None) -> int | None:
        """Let `job` in, to come with :meth:`extend`; or return how many inputs wait, if it would make more than `max_pending`.

        A job larger than that is let in when nothing else waits.
        """
        with self.lock:
            waiting = self.queues.pending + self.queues.coming
            if max_pending is not None and waiting and waiting + num_inputs > max_pending:
                return waiting
            job.backlog = self
            self.queues.announce(job, num_inputs)
        return None

    def extend(
        self, job: Job, items: Iterable[TokenizedInput], max_pending: int | None = None, *, whole: bool = False
    ) -> None:
        """Put `items` of `job` in the queue, waiting for room while `max_pending` others wait. Ends early if it is done.

        whole: all at once, when there is room for all or nothing else waits.
        """
        items = list(items)
        job.backlog = self  # before looking whether it is done: who ends it from now on takes its items out again
        while items and not job.done:
            with self.lock:
                if max_pending is not None:
                    most = max(max_pending - len(items) + 1, 1) if whole else max_pending
                    while self.queues.pending >= most and not job.done and self._ended is None:
                        self._room.wait(0.1)
                    room = len(items) if whole else max(max_pending - self.queues.pending, 0)
                else:
                    room = len(items)
                now, items = items[:room], items[room:]
                ended = self._ended
                if job.done:
                    return
                if ended is None:
                    self.queues.add(job.key, now)
                    self.queues.arrived(job, len(now))
            if ended is not None:
                job.fail(ended())
                return
            self._tell()

    def end(self, error: Callable[[], BaseException]) -> None:
        """Nobody serves these queues any more: all that waits, and whatever comes later, fails with a new `error`."""
        with self.lock:
            self._ended = self._ended or error
            self._room.notify_all()
        for job in self.jobs():
            job.fail(error())

    def put_back(self, items: Sequence[TokenizedInput]) -> None:
        """Return items that were taken but not run."""
        ended: list[Job] = []
        with self.lock:
            for item in items:
                if item.job.done:
                    continue
                if self._ended is None:
                    self.queues.add(item.job.key, [item])
                else:
                    ended.append(item.job)
        for job in ended:
            if self._ended is not None:
                job.fail(self._ended())
        self._tell()

    def withdraw(self, job: Job) -> None:
        """Nothing of `job` is wanted any more."""
        with self.lock:
            self.queues.withdraw(job.key, job)
            self._room.notify_all()
        self._tell()

    def taken(self) -> None:
        """A micro-batch has left the queues: there is room. Hold the lock."""
        self._room.notify_all()

    def has_others(self, tenant: Tenant) -> bool:
        """Whether another copy of the model, still in order, takes from this backlog."""
        return any(other is not tenant and other.broken is None for other in self.tenants)

    def jobs(self) -> set[Job]:
        with self.lock:
            return self.queues.jobs()

    def _tell(self) -> None:
        for listener in list(self.listeners):
            listener()
