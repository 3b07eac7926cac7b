"""One call's work, and the queues in which calls wait: data shared between callers and lanes, with its locks."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from memsafe.errors import CancelledError, InputTooLargeError
from memsafe.events import ReportBuilder
from memsafe.planning.batch import TokenizedInput
from memsafe.runtime.output import Rows, RowWriter

__all__ = ["BULK", "QUERY", "Backlog", "Job", "QueueKey"]

QUERY, BULK = 0, 1


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
        """Write the rows of `items`; finishes the job with the last one."""
        if self.done:
            return
        self.writer.write([item.index for item in items], rows)
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
            self._progress(count)
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
        self.pending = 0

    def extend(self, job: Job, items: Iterable[TokenizedInput], max_pending: int | None = None) -> None:
        """Put `items` of `job` in the queue, waiting for room while `max_pending` others wait. Ends early if it is done."""
        items = list(items)
        while items and not job.done:
            with self._room:
                if max_pending is not None:
                    while self.pending >= max_pending and not job.done:
                        self._room.wait(0.1)
                    room = max(max_pending - self.pending, 0)
                else:
                    room = len(items)
                now, items = items[:room], items[room:]
                if job.done:
                    return
                job.backlog = self
                self._queues.setdefault(job.key, _Queue()).add(now)
                self.pending += len(now)
            self._tell()

    def put_back(self, items: Sequence[TokenizedInput]) -> None:
        """Return items that were taken but not run."""
        with self.lock:
            for item in items:
                if not item.job.done:
                    self._queues.setdefault(item.job.key, _Queue()).add([item])
                    self.pending += 1
        self._tell()

    def withdraw(self, job: Job) -> None:
        with self._room:
            queue = self._queues.get(job.key)
            if queue is not None:
                self.pending -= queue.drop(job)
                self._room.notify_all()
        self._tell()

    def keys(self) -> list[QueueKey]:
        """Queues with work, most urgent first."""
        with self.lock:
            return sorted((key for key, queue in self._queues.items() if queue.items), key=lambda key: key.priority)

    def view(self, key: QueueKey) -> tuple[list[TokenizedInput], int]:
        """The items of a queue, longest first, and their tokens. Hold :attr:`lock` while using them."""
        queue = self._queues[key]
        return queue.items, queue.tokens

    def take(self, key: QueueKey, start: int, count: int) -> None:
        """Remove items ``start:start + count`` of a queue. Hold :attr:`lock` from :meth:`view` on."""
        queue = self._queues[key]
        queue.remove(start, count)
        if not queue.items:
            del self._queues[key]
        self.pending -= count
        self._room.notify_all()

    def has_others(self, executor: Any) -> bool:
        """Whether another executor, still in order, takes from this backlog."""
        return any(other is not executor and other.broken is None for other in self.executors)

    def jobs(self) -> set[Job]:
        with self.lock:
            return {item.job for queue in self._queues.values() for item in queue.items}

    def _tell(self) -> None:
        for listener in list(self.listeners):
            listener()


class _Queue:
    """Items longest first; equal lengths in order of arrival."""

    __slots__ = ("items", "tokens")

    def __init__(self) -> None:
        self.items: list[TokenizedInput] = []
        self.tokens = 0

    def add(self, items: list[TokenizedInput]) -> None:
        self.tokens += sum(item.num_tokens for item in items)
        if len(items) == 1 and self.items:
            place = bisect_right(self.items, -items[0].num_tokens, key=lambda item: -item.num_tokens)
            self.items.insert(place, items[0])
            return
        self.items.extend(items)
        self.items.sort(key=lambda item: -item.num_tokens)  # nearly sorted already: timsort merges the runs

    def remove(self, start: int, count: int) -> None:
        taken = self.items[start : start + count]
        self.tokens -= sum(item.num_tokens for item in taken)
        del self.items[start : start + count]

    def drop(self, job: Job) -> int:
        kept = [item for item in self.items if item.job is not job]
        dropped = len(self.items) - len(kept)
        self.items = kept
        self.tokens = sum(item.num_tokens for item in kept)
        return dropped
