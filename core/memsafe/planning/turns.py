"""Who is next: the queues of each model, and fairness among queues, priorities and models. Pure data; not thread-safe."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from memsafe.planning.batch import TokenizedInput
from memsafe.planning.speed import size_class

__all__ = ["BULK", "QUERY", "Fixed", "QueueKey", "Queues", "Turns"]

QUERY, BULK = 0, 1
FAIRNESS = 4
"""Others' micro-batches in a row before work that was passed over gets one turn: bulk keeps a fifth of the device at worst."""
OLDEST = 4
"""Of so many micro-batches from one queue, one begins with the job that has waited longest rather than with the longest."""

_Tenant = TypeVar("_Tenant", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Micro-batches that the texts of one call alone decide: of at most `tokens` tokens, shared with no other call and cut by
    neither what is being learnt nor what else is in flight, so that the same texts give the same bits again.

    number: of the call; of several, the first is finished first.
    """

    tokens: int
    number: int


class QueueKey(tuple[Any, ...]):
    """What inputs must share to run in one micro-batch: (priority, row cap, features), and who is alone in his queue may add a
    :class:`Fixed`. Lower priority runs first."""

    __slots__ = ()

    @property
    def priority(self) -> int:
        priority: int = self[0]
        return priority

    @property
    def max_rows(self) -> int | None:
        cap: int | None = self[1]
        return cap

    @property
    def fixed(self) -> Fixed | None:
        return self[3] if len(self) > 3 else None


class Queues:
    """Inputs of one model that wait, by what they must share, each queue longest first.

    pending: how many wait. A job is whatever ``item.job`` is; its ``started`` tells which one has waited longest.
    """

    def __init__(self) -> None:
        self._queues: dict[QueueKey, _Queue] = {}
        self._turns = 0  # micro-batches taken
        self._offset = 0  # where in its queue the last view began
        self.pending = 0
        self.lengths: Counter[int] = Counter()
        """How many texts of each :func:`size_class` have come in this run."""
        self.came_tokens = 0
        """Tokens that have come in this run."""
        self.runs = 0
        """How often something came when nothing waited and nothing more was due."""
        self._coming: dict[Any, int] = {}  # inputs of each job that are not in a queue yet

    # coming and going

    def announce(self, job: Any, num_inputs: int) -> None:
        """So many inputs of `job` will be added."""
        if num_inputs:
            self._begin()
            self._coming[job] = num_inputs

    def _begin(self) -> None:
        if not self.pending and not self._coming:
            self.lengths.clear()
            self.came_tokens = 0
            self.runs += 1

    @property
    def coming(self) -> int:
        """Inputs that were announced and are not here yet."""
        return sum(self._coming.values())

    def add(self, key: QueueKey, items: Sequence[TokenizedInput]) -> None:
        """Put `items`, of one job, in the queue of `key`."""
        if not items:
            return
        if key not in self._queues:
            self._queues[key] = _Queue(self._turns)  # a new queue comes after those that wait already
        self._begin()
        self.came_tokens += sum(item.num_tokens for item in items)
        self.lengths.update(size_class(item.num_tokens) for item in items)
        self._queues[key].add(items)
        self.pending += len(items)

    def arrived(self, job: Any, num_inputs: int) -> None:
        """So many of the inputs that `job` announced are here, or will not come."""
        left = self._coming.get(job, 0) - num_inputs
        if left > 0:
            self._coming[job] = left
        else:
            self._coming.pop(job, None)

    def withdraw(self, key: QueueKey, job: Any) -> None:
        """Nothing of `job` is wanted any more."""
        self._coming.pop(job, None)
        queue = self._queues.get(key)
        if queue is not None:
            self.pending -= queue.drop(job)
            if not queue.items:
                del self._queues[key]

    def jobs(self) -> set[Any]:
        """Jobs of which something waits in a queue."""
        return {job for queue in self._queues.values() for job in queue.jobs}

    # whose turn it is

    def keys(self) -> list[QueueKey]:
        """Queues with work, most urgent first; of equals the one that has waited longest for its turn."""
        return sorted(self._queues, key=lambda key: (key.priority, self._queues[key].turn))

    def priorities(self) -> list[int]:
        """Of the queues with work, the most urgent first."""
        return sorted({key.priority for key in self._queues})

    def first(self, priority: int) -> QueueKey:
        """Of the queues of this priority, which must have one, the one that has waited longest for its turn. Of those that are
        :class:`Fixed` only the first call's has one: the next one's is to follow without a gap, not to be done with it."""
        keys = [key for key in self.keys() if key.priority == priority]
        first = min((key.fixed.number for key in keys if key.fixed is not None), default=None)
        return next(key for key in keys if key.fixed is None or key.fixed.number == first)

    def view(self, key: QueueKey) -> tuple[list[TokenizedInput], int]:
        """Items of a queue that may run next, longest first, and the tokens of the whole queue.

        Mostly all items; every :data:`OLDEST`-th time those from the oldest job's longest on, so that short inputs do not
        wait for ever while longer ones keep coming.
        """
        queue = self._queues[key]
        self._offset = queue.oldest() if queue.takes % OLDEST == OLDEST - 1 else 0
        return queue.items[self._offset :] if self._offset else queue.items, queue.tokens

    def take(self, key: QueueKey, start: int, count: int) -> None:
        """Remove items ``start:start + count`` of what :meth:`view` last gave."""
        queue = self._queues[key]
        queue.remove(self._offset + start, count)
        self._turns += 1
        queue.turn, queue.takes = self._turns, queue.takes + 1
        if not queue.items:
            del self._queues[key]
        self.pending -= count


class _Queue:
    """Items longest first; equal lengths in order of arrival. turn: when it was last served, in micro-batches of all queues."""

    __slots__ = ("items", "jobs", "takes", "tokens", "turn")

    def __init__(self, turn: int) -> None:
        self.items: list[TokenizedInput] = []
        self.jobs: dict[Any, int] = {}  # how many items of each wait
        self.takes = self.tokens = 0
        self.turn = turn

    def add(self, items: Sequence[TokenizedInput]) -> None:
        self.tokens += sum(item.num_tokens for item in items)
        for item in items:
            self.jobs[item.job] = self.jobs.get(item.job, 0) + 1
        if len(items) == 1 and self.items:
            place = bisect_right(self.items, _shortness(items[0]), key=_shortness)
            self.items.insert(place, items[0])
            return
        new = sorted(items, key=_shortness)
        # Calls are fed longest first, so that mostly all that waits is longer: only what lies among the new is sorted anew.
        place = bisect_right(self.items, _shortness(new[0]), key=_shortness)
        if place < len(self.items):
            new = sorted(self.items[place:] + new, key=_shortness)
        self.items[place:] = new

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

    def drop(self, job: Any) -> int:
        kept = [item for item in self.items if item.job is not job]
        dropped = len(self.items) - len(kept)
        self.items = kept
        self.jobs.pop(job, None)
        self.tokens = sum(item.num_tokens for item in kept)
        return dropped


def _shortness(item: TokenizedInput) -> int:
    return -item.num_tokens


class Turns(Generic[_Tenant]):
    """Fairness on one device, among (model, priority): the most urgent first, but nobody is passed over for ever."""

    def __init__(self) -> None:
        self._passed: dict[tuple[_Tenant, int], int] = {}  # grants to others while this waited

    def order(self, waiting: Sequence[tuple[_Tenant, int]], in_flight: Sequence[_Tenant]) -> list[tuple[_Tenant, int]]:
        """`waiting`, in the order in which they should be tried: those whose turn has come first, then the most urgent; of
        equals the model that has least in flight, then the one that was passed over most often."""
        if len(waiting) < 2:
            return list(waiting)

        def rank(each: tuple[_Tenant, int]) -> tuple[bool, int, int, int]:
            passed = self._passed.get(each, 0)
            return passed < self._turn(waiting), each[1], in_flight.count(each[0]), -passed

        return sorted(waiting, key=rank)

    def overdue(self, waiting: Iterable[tuple[_Tenant, int]]) -> bool:
        """Whether somebody's turn has come and gone: his work cannot start beside others, so the device must run empty."""
        waiting = list(waiting)
        return any(self._passed.get(each, 0) > self._turn(waiting) for each in waiting)

    def served(self, one: tuple[_Tenant, int], waiting: Iterable[tuple[_Tenant, int]]) -> None:
        """A micro-batch of `one` starts while `waiting` waited, `one` among them."""
        self._passed = {each: self._passed.get(each, 0) + 1 for each in waiting if each != one}

    def forget(self, tenant: _Tenant) -> None:
        self._passed = {each: count for each, count in self._passed.items() if each[0] is not tenant}

    @staticmethod
    def _turn(waiting: Sequence[object]) -> int:
        return FAIRNESS * max(len(waiting) - 1, 1)
