"""memsafe.planning.turns: what waits, in which order, and that nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe.planning.batch import TokenizedInput
from memsafe.planning.speed import size_class
from memsafe.planning.turns import BULK, FAIRNESS, OLDEST, QUERY, QueueKey, Queues, Turns
from tests.planning.helpers import Call

KEY = QueueKey((BULK, None, ()))
ASKED = QueueKey((QUERY, None, ()))


def items(lengths: list[int], job: Any) -> list[TokenizedInput]:
    return [TokenizedInput(index, None, num_tokens=length, job=job) for index, length in enumerate(lengths)]


def lengths_of(queues: Queues, key: QueueKey = KEY) -> list[int]:
    return [item.num_tokens for item in queues.view(key)[0]]


def take(queues: Queues, key: QueueKey, start: int, count: int) -> list[TokenizedInput]:
    taken = queues.view(key)[0][start : start + count]
    queues.take(key, start, count)
    return taken


# -- queues --------------------------------------------------------------------------------------------------------


def test_a_queue_is_longest_first_and_equals_keep_their_order() -> None:
    """Whatever is added when, in pieces or one by one: sorted by length, equal ones as they came."""
    queues, first, second = Queues(), Call(1), Call(2)
    queues.add(KEY, items([5, 9, 5], first))
    queues.add(KEY, items([7], second))
    queues.add(KEY, items([5, 12, 1], second))
    found = [(item.num_tokens, item.job.started, item.index) for item in queues.view(KEY)[0]]
    assert found == [(12, 2, 1), (9, 1, 1), (7, 2, 0), (5, 1, 0), (5, 1, 2), (5, 2, 0), (1, 2, 2)]
    assert (queues.pending, queues.view(KEY)[1]) == (7, 44)


def test_taking_removes_what_was_seen() -> None:
    """Counts, tokens and jobs follow; an empty queue is gone."""
    queues, job, other = Queues(), Call(1), Call(2)
    queues.add(KEY, items([4, 3, 2, 1], job))
    queues.add(KEY, items([10], other))
    assert [item.num_tokens for item in take(queues, KEY, 1, 2)] == [4, 3]
    assert (queues.pending, queues.view(KEY)[1], queues.jobs()) == (3, 13, {job, other})
    assert [item.num_tokens for item in take(queues, KEY, 0, 1)] == [10]
    assert queues.jobs() == {job}
    take(queues, KEY, 0, 2)
    assert (queues.pending, queues.keys(), queues.jobs(), queues.priorities()) == (0, [], set(), [])


def test_the_oldest_job_has_its_turn() -> None:
    """Every OLDEST-th time the view begins with the longest input of the job that began first; else with the longest."""
    queues, early, late = Queues(), Call(1), Call(2)
    queues.add(KEY, items([2] * 4, early))
    queues.add(KEY, items([9] * 50, late))
    taken = [take(queues, KEY, 0, 1)[0].num_tokens for _ in range(4 * OLDEST)]
    assert taken == ([9] * (OLDEST - 1) + [2]) * 4
    assert take(queues, KEY, 0, 1)[0].num_tokens == 9


def test_withdrawing_leaves_others_alone() -> None:
    """All that waits of a job goes, nothing of another; so does what it had announced."""
    queues, job, other = Queues(), Call(1), Call(2)
    queues.announce(job, 10)
    queues.announce(other, 3)
    queues.add(KEY, items([4, 3], job))
    queues.add(KEY, items([5], other))
    queues.arrived(job, 2)
    assert (queues.coming, queues.pending) == (11, 3)
    queues.withdraw(KEY, job)
    assert (queues.coming, queues.pending, lengths_of(queues), queues.jobs()) == (3, 1, [5], {other})
    queues.withdraw(KEY, other)
    queues.withdraw(KEY, other)
    assert (queues.coming, queues.pending, queues.keys()) == (0, 0, [])


def test_what_was_announced_is_coming_until_it_is_here() -> None:
    """Counted down as it arrives; more than was announced, or a stranger, leaves nothing behind."""
    queues, job = Queues(), Call(1)
    queues.announce(job, 5)
    queues.announce(Call(2), 0)
    for arrived, left in ((2, 3), (2, 1), (9, 0)):
        queues.arrived(job, arrived)
        assert queues.coming == left
    queues.arrived(Call(3), 4)
    assert queues.coming == 0


def test_lengths_are_those_since_nothing_waited() -> None:
    """A run's texts are counted by size until the queues are empty, then anew."""
    queues, job = Queues(), Call(1)
    queues.add(KEY, items([100, 101, 400], job))
    take(queues, KEY, 0, 2)
    queues.add(ASKED, items([8], job))
    assert queues.lengths == {size_class(100): 2, size_class(400): 1, size_class(8): 1}
    take(queues, KEY, 0, 1)
    take(queues, ASKED, 0, 1)
    queues.add(KEY, items([9], job))
    assert queues.lengths == {size_class(9): 1}


def test_queues_of_one_priority_take_turns() -> None:
    """The one that was served longest ago is next; a new one comes after those that wait; urgent ones come first."""
    queues, job = Queues(), Call(1)
    keys = [QueueKey((BULK, cap, ())) for cap in (1, 2, 3)]
    queues.add(keys[0], items([1] * 9, job))
    queues.add(keys[1], items([1] * 9, job))
    served = []
    for turn in range(6):
        key = queues.first(BULK)
        served.append(keys.index(key))
        take(queues, key, 0, 1)
        if turn == 1:
            queues.add(keys[2], items([1] * 9, job))
    assert served == [0, 1, 0, 1, 2, 0]
    queues.add(ASKED, items([1], job))
    assert queues.keys()[0] == ASKED and queues.priorities() == [QUERY, BULK]
    assert queues.first(BULK) in keys


def test_a_key_says_its_priority_and_cap() -> None:
    """Keys are what inputs must share."""
    assert (ASKED.priority, QueueKey((BULK, 7, "x")).max_rows) == (QUERY, 7)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 50), max_size=12), st.integers(0, 6)), max_size=30)
)
def test_queues_lose_nothing(steps: list[tuple[int, list[int], int]]) -> None:
    """Any mix of adding, taking and withdrawing: what is there is exactly what was added and not yet taken, in order."""
    queues, jobs = Queues(), [Call(number) for number in range(3)]
    there: dict[int, TokenizedInput] = {}
    for who, lengths, count in steps:
        new = items(lengths, jobs[who])
        queues.add(KEY, new)
        there.update({id(item): item for item in new})
        if count == 6:
            queues.withdraw(KEY, jobs[who])
            there = {key: item for key, item in there.items() if item.job is not jobs[who]}
        elif queues.pending:
            view = queues.view(KEY)[0]
            assert [item.num_tokens for item in view] == sorted((item.num_tokens for item in view), reverse=True)
            start = min(count // 2, len(view) - 1)
            for item in take(queues, KEY, start, min(count, len(view) - start)):
                del there[id(item)]
        assert queues.pending == len(there)
        assert queues.jobs() == {item.job for item in there.values()}
        if there:
            assert queues.view(KEY)[1] == sum(item.num_tokens for item in there.values())


# -- turns ---------------------------------------------------------------------------------------------------------


def test_the_most_urgent_first_until_others_were_passed_over() -> None:
    """FAIRNESS urgent ones in a row, then one of what waited; alone nobody waits."""
    turns: Turns[str] = Turns()
    waiting = [("a", BULK), ("a", QUERY)]
    order = []
    for _ in range(2 * (FAIRNESS + 1)):
        one = turns.order(waiting, [])[0]
        order.append(one[1])
        turns.served(one, waiting)
    assert order == ([QUERY] * FAIRNESS + [BULK]) * 2
    assert turns.order([("a", BULK)], []) == [("a", BULK)]


def test_with_many_waiting_a_turn_comes_later_but_comes() -> None:
    """With three waiting, each is served within FAIRNESS times the others."""
    turns: Turns[str] = Turns()
    waiting = [("a", BULK), ("b", BULK), ("a", QUERY)]
    order = []
    for _ in range(60):
        one = turns.order(waiting, [])[0]
        order.append(one)
        turns.served(one, waiting)
    for each in waiting:
        places = [place for place, one in enumerate(order) if one == each]
        assert max(b - a for a, b in zip([-1, *places], places, strict=False)) <= 2 * FAIRNESS + 2


def test_equals_are_ordered_by_what_is_in_flight_then_by_patience() -> None:
    """The model with the least in flight; of two with as much, the one that was passed over."""
    turns: Turns[str] = Turns()
    waiting = [("a", BULK), ("b", BULK)]
    assert turns.order(waiting, ["a", "a", "b"])[0][0] == "b"
    assert turns.order(waiting, ["b"])[0][0] == "a"
    turns.served(("a", BULK), waiting)
    assert turns.order(waiting, [])[0][0] == "b"


def test_overdue_is_who_was_passed_over_once_more_than_his_turn() -> None:
    """Not while his turn merely comes; served, or forgotten, he is not."""
    turns: Turns[str] = Turns()
    waiting = [("a", BULK), ("b", QUERY)]
    for _ in range(FAIRNESS):
        turns.served(("b", QUERY), waiting)
    assert not turns.overdue(waiting)
    turns.served(("b", QUERY), waiting)
    assert turns.overdue(waiting) and not turns.overdue([("b", QUERY)])
    turns.forget("a")
    assert not turns.overdue(waiting)


@pytest.mark.parametrize("names", ["a", "ab", "abcd"])
def test_nobody_who_waits_is_passed_over_for_ever(names: str) -> None:
    """Models with queries and bulk, the last one first each time it may: everybody is served again and again."""
    turns: Turns[str] = Turns()
    waiting = [(name, priority) for name in names for priority in (QUERY, BULK)]
    last = dict.fromkeys(waiting, 0)
    for step in range(500):
        one = turns.order(waiting, [])[0]
        turns.served(one, waiting)
        last[one] = step
    assert min(last.values()) > 500 - FAIRNESS * len(waiting) * 2 - len(waiting)
