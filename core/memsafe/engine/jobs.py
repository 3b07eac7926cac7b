"""One call's work, and the queues in which calls wait: data shared between callers and lanes, with its locks."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from memsafe.engine.sinks import Rows, RowWriter
from memsafe.errors import CancelledError, InputTooLargeError
from memsafe.events import ReportBuilder
from memsafe.planning.batch import TokenizedInput

__all__ = ["BULK", "QUERY", "Backlog", "Job", "QueueKey"]

QUERY, BULK = 0, 1
OLDEST = 4
"""Of so many micro-batches from one queue, one begins with the job that has waited longest rather than with the longest."""


class QueueKey(tuple[int, int | None, Hashable]):
    """What inputs must share to run in one micro-batch: (priority, row cap, features). Lower priority runs first."""

    __slots__ = ()

    @property
    def priority(self) -> int:
        return self[0]

    @property
    def max_rows(self) -> int | None:
        return self[1]


class Job:
    """One call: its rows, its report, and a future that ends with the array of rows or with an error.

    extras: features beside the tokens that all its inputs share.
    positions: where each distinct input first stands in the caller's list; None if that is its own index.
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
    ) -> None:
        self.key = key
        self._positions = positions
        self.extras = extras
        self.report = report
        self.emit = emit
        self.writer = RowWriter(num_inputs)
        self.future: Future[Rows | None] = Future()
        # asyncio cancels a wrapped future behind our back, unless it runs; then cancelling goes through :meth:`cancel`
        self.future.set_running_or_notify_cancel()
        self.backlog: Backlog | None = None
        self.started = 0.0
        self.process_bytes_before = 0
        self._progress = progress
        self._pending = num_inputs
        self._failed: dict[int, InputTooLargeError] = {}
        self._lock = threading.Lock()
        if num_inputs == 0:
            self.future.set_result(None)

    def position(self, index: int) -> int:
        """Where input `index` of the job stands in the caller's list: what messages and errors name."""
        return index if self._positions is None else self._positions[index]

    @property
    def done(self) -> bool:
        """Whether nothing more is wanted of this job: finished, failed or cancelled."""
        return self.future.done()

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
            return self.future.result(timeout_s)
        except BaseException:
            if not self.future.done():
                self.cancel()
            raise

    def _finish(self, count: int) -> None:
        with self._lock:
            self._pending -= count
            last = self._pending == 0 and not self.future.done()
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
        try:
            if error is None:
                self.future.set_result(self.writer.array)
            else:
                self.future.set_exception(error)
        except InvalidStateError:
            return False
        return True


class Backlog:
    """Inputs of one model that wait, by queue, each queue longest first. Thread-safe.

    Several devices may take from one backlog; :attr:`listeners` are told when there is work or none.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.listeners: list[Callable[[], None]] = []
        self.executors: list[Any] = []
        self._queues: dict[QueueKey, _Queue] = {}
        self._room = threading.Condition(self.lock)
        self._ended: Callable[[], BaseException] | None = None
        self._turns = 0  # micro-batches taken
        self._reserved: dict[Job, int] = {}  # inputs that were let in, but are not in a queue yet
        self._offset = 0  # where in its queue the last view began
        self.pending = 0

    def reserve(self, job: Job, num_inputs: int, max_pending: int) -> int | None:
        """Let `job` in, to come with :meth:`extend`; or return how many inputs wait, if it would make too many.

        A job larger than `max_pending` is let in when nothing else waits.
        """
        with self.lock:
            waiting = self.pending + sum(self._reserved.values())
            if waiting and waiting + num_inputs > max_pending:
                return waiting
            if num_inputs:
                job.backlog = self
                self._reserved[job] = num_inputs
        return None

    def extend(self, job: Job, items: Iterable[TokenizedInput], max_pending: int | None = None) -> None:
        """Put `items` of `job` in the queue, waiting for room while `max_pending` others wait. Ends early if it is done."""
        items = list(items)
        job.backlog = self  # before looking whether it is done: who ends it from now on takes its items out again
        while items and not job.done:
            with self.lock:
                if max_pending is not None:
                    while self.pending >= max_pending and not job.done and self._ended is None:
                        self._room.wait(0.1)
                    room = max(max_pending - self.pending, 0)
                else:
                    room = len(items)
                now, items = items[:room], items[room:]
                ended = self._ended
                if job.done:
                    return
                if ended is None:
                    self._add(job.key, now)
                    if job in self._reserved:
                        self._reserved[job] -= len(now)
                        if not self._reserved[job]:
                            del self._reserved[job]
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
                    self._add(item.job.key, [item])
                else:
                    ended.append(item.job)
        for job in ended:
            if self._ended is not None:
                job.fail(self._ended())
        self._tell()

    def withdraw(self, job: Job) -> None:
        with self.lock:
            self._reserved.pop(job, None)
            queue = self._queues.get(job.key)
            if queue is not None:
                self.pending -= queue.drop(job)
                if not queue.items:
                    del self._queues[job.key]
                self._room.notify_all()
        self._tell()

    def keys(self) -> list[QueueKey]:
        """Queues with work, most urgent first; of equals the one that has waited longest for its turn."""
        with self.lock:
            return sorted(self._queues, key=lambda key: (key.priority, self._queues[key].turn))

    def priorities(self) -> set[int]:
        """Of the queues with work."""
        with self.lock:
            return {key.priority for key in self._queues}

    def view(self, key: QueueKey) -> tuple[list[TokenizedInput], int]:
        """Items of a queue that may run next, longest first, and the tokens of the whole queue.

        Hold :attr:`lock` while using them. Mostly all items; every :data:`OLDEST`-th time those from the oldest job's
        longest on, so that short inputs do not wait for ever while longer ones keep coming.
        """
        queue = self._queues[key]
        self._offset = queue.oldest() if queue.takes % OLDEST == OLDEST - 1 else 0
        return queue.items[self._offset :] if self._offset else queue.items, queue.tokens

    def take(self, key: QueueKey, start: int, count: int) -> None:
        """Remove items ``start:start + count`` of what :meth:`view` last gave. Hold :attr:`lock` from there on."""
        queue = self._queues[key]
        queue.remove(self._offset + start, count)
        self._turns += 1
        queue.turn, queue.takes = self._turns, queue.takes + 1
        if not queue.items:
            del self._queues[key]
        self.pending -= count
        self._room.notify_all()

    def has_others(self, executor: Any) -> bool:
        """Whether another executor, still in order, takes from this backlog."""
        return any(other is not executor and other.broken is None for other in self.executors)

    def jobs(self) -> set[Job]:
        with self.lock:
            return {job for queue in self._queues.values() for job in queue.jobs}

    def _add(self, key: QueueKey, items: list[TokenizedInput]) -> None:
        if key not in self._queues:
            self._queues[key] = _Queue(self._turns)  # a new queue comes after those that wait already
        self._queues[key].add(items)
        self.pending += len(items)

    def _tell(self) -> None:
        for listener in list(self.listeners):
            listener()


class _Queue:
    """Items longest first; equal lengths in order of arrival. turn: of the backlog, when it was last served."""

    __slots__ = ("items", "jobs", "takes", "tokens", "turn")

    def __init__(self, turn: int) -> None:
        self.items: list[TokenizedInput] = []
        self.jobs: dict[Job, int] = {}  # how many items of each wait
        self.takes = self.tokens = 0
        self.turn = turn

    def add(self, items: list[TokenizedInput]) -> None:
        self.tokens += sum(item.num_tokens for item in items)
        for item in items:
            self.jobs[item.job] = self.jobs.get(item.job, 0) + 1
        if len(items) == 1 and self.items:
            place = bisect_right(self.items, -items[0].num_tokens, key=lambda item: -item.num_tokens)
            self.items.insert(place, items[0])
            return
        self.items.extend(items)
        self.items.sort(key=lambda item: -item.num_tokens)  # nearly sorted already: timsort merges the runs

    def oldest(self) -> int:
        """Where the longest item of the job that began first stands."""
        if len(self.jobs) < 2:
            return 0
        oldest = min(self.jobs, key=lambda job: job.started)
        return next(place for place, item in enumerate(self.items) if item.job is oldest)

    def remove(self, start: int, count: int) -> None:
        taken = self.items[start : start + count]
        self.tokens -= sum(item.num_tokens for item in taken)
        for item in taken:
            self.jobs[item.job] -= 1
            if not self.jobs[item.job]:
                del self.jobs[item.job]
        del self.items[start : start + count]

    def drop(self, job: Job) -> int:
        kept = [item for item in self.items if item.job is not job]
        dropped = len(self.items) - len(kept)
        self.items = kept
        self.jobs.pop(job, None)
        self.tokens = sum(item.num_tokens for item in kept)
        return dropped
