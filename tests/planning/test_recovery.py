"""memsafe.planning.recovery: the exact sequences after refusals of memory, and that all of them end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsafe.config import FALLBACKS, MemoryPolicy
from memsafe.planning.batch import BatchShape, MicroBatch, TokenizedInput
from memsafe.planning.recovery import (
    Action,
    Clear,
    Failure,
    FallBack,
    GiveUp,
    RecoveryPolicy,
    ReleaseCache,
    Retry,
    ShrinkBudget,
    Split,
    Wait,
    Work,
    follow,
)

RELEASE, RETRY, SHRINK, SPLIT = ReleaseCache(), Retry(), ShrinkBudget(), Split()


def failure(tokens: int = 100, rows: int = 1, attempt: int = 1, **changes: object) -> Failure:
    shape = BatchShape(tokens, rows, tokens * tokens, tokens)
    made = Failure(shape=shape, attempt=attempt, alone=rows == 1, tokens=tokens)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def fail_for_good(policy: RecoveryPolicy, start: Failure, most: int = 200) -> list[tuple[Action, ...]]:
    """What is decided when one input fails at every attempt, up to and including giving up."""
    decided: list[tuple[Action, ...]] = []
    while True:
        actions = policy.decide(start)
        decided.append(actions)
        if isinstance(actions[-1], (GiveUp, Split)):
            return decided
        assert len(decided) < most, "recovery does not end"
        waited = sum(action.seconds for action in actions if isinstance(action, Wait))
        rungs = tuple(action.rung for action in actions if isinstance(action, FallBack))
        start = dataclasses.replace(
            start,
            attempt=start.attempt + 1,
            waited_s=start.waited_s + waited,
            rungs_used=start.rungs_used + rungs,
        )


def test_a_micro_batch_is_retried_once_and_then_split() -> None:
    """Several inputs: the same again after releasing the cache, then half the budget and two halves; never a wait or a
    fallback, which are for inputs that fail alone."""
    policy = RecoveryPolicy(MemoryPolicy(fallback=FALLBACKS))
    assert policy.decide(failure(rows=8)) == (RELEASE, RETRY)
    assert policy.decide(failure(rows=8, attempt=2, has_neighbours=True)) == (SHRINK, SPLIT)
    assert policy.decide(failure(rows=2, attempt=7)) == (SHRINK, SPLIT)


def test_one_input_with_neighbours_waits_then_falls_back_then_gives_up() -> None:
    """The whole ladder: retry, waits that double and add up to wait_s, chunk, half, cpu, the end."""
    policy = RecoveryPolicy(MemoryPolicy(wait_s=1.0, fallback=FALLBACKS))
    decided = fail_for_good(policy, failure(has_neighbours=True))
    waits = [actions for actions in decided if isinstance(actions[0], Wait)]
    assert decided[0] == (RELEASE, RETRY)
    assert [actions[0].seconds for actions in waits if isinstance(actions[0], Wait)] == pytest.approx(
        [0.05, 0.1, 0.2, 0.4, 0.25]
    )
    assert all(actions[1:] == (RELEASE, RETRY) for actions in waits)
    assert decided[1:6] == waits
    assert decided[6:9] == [(RELEASE, FallBack("chunk")), (RELEASE, FallBack("half")), (RELEASE, FallBack("cpu"))]
    assert len(decided) == 10
    assert isinstance(decided[-1][-1], GiveUp)


def test_waits_are_two_seconds_at_most() -> None:
    """With the default of 30 s: 0.05 s doubling to 2 s, then every 2 s, 30 s in all."""
    decided = fail_for_good(RecoveryPolicy(MemoryPolicy()), failure(has_neighbours=True))
    waits = [action.seconds for actions in decided for action in actions if isinstance(action, Wait)]
    assert waits[:7] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0])
    assert set(waits[6:-1]) == {2.0}
    assert sum(waits) == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("fallback", "changes", "expected"),
    [
        ((), {}, []),
        (("chunk",), {}, ["chunk"]),
        (("cpu", "chunk"), {}, ["chunk", "cpu"]),
        (FALLBACKS, {}, ["chunk", "half", "cpu"]),
        (FALLBACKS, {"half": True}, ["chunk", "cpu"]),
        (FALLBACKS, {"rungs_impossible": ("cpu",)}, ["chunk", "half"]),
        (FALLBACKS, {"rungs_impossible": ("cpu",), "half": True}, ["chunk"]),
        (FALLBACKS, {"rungs_impossible": ("chunk",)}, ["half", "cpu"]),
        (FALLBACKS, {"rungs_used": ("chunk", "half")}, ["cpu"]),
        (("cpu",), {"rungs_impossible": ("cpu",)}, []),
    ],
)
def test_rungs_are_those_allowed_and_possible_in_order(
    fallback: tuple[str, ...], changes: dict[str, object], expected: list[str]
) -> None:
    """One input, nobody else on the device: retry, then each allowed rung that makes sense here once, then give up."""
    decided = fail_for_good(RecoveryPolicy(MemoryPolicy(fallback=fallback)), failure(**changes))
    assert decided[:-1] == [(RELEASE, RETRY), *((RELEASE, FallBack(rung)) for rung in expected)]
    assert len(decided[-1]) == 1
    assert isinstance(decided[-1][0], GiveUp)


def test_without_neighbours_or_patience_nothing_is_waited_for() -> None:
    """Waiting helps only if somebody can give memory back, and only if the policy allows it."""
    for policy, neighbours in ((MemoryPolicy(wait_s=30), False), (MemoryPolicy(wait_s=0), True)):
        decided = fail_for_good(RecoveryPolicy(policy), failure(has_neighbours=neighbours))
        assert not any(isinstance(action, Wait) for actions in decided for action in actions)


def test_giving_up_names_what_was_tried_and_what_would_help() -> None:
    """The reason lists the steps and the policy that would allow more, and no more than exists."""
    policy = RecoveryPolicy(MemoryPolicy(wait_s=1.0))
    reason = fail_for_good(policy, failure(8192, has_neighbours=True))[-1][-1]
    assert reason == GiveUp(
        "one input of 8,192 tokens: released the cache and retried, waited 1.0 s, fell back to 'chunk'; lower "
        "max_length, or allow more fallbacks: MemoryPolicy(fallback=('chunk', 'half', 'cpu'))"
    )
    on_cpu = fail_for_good(policy, failure(8192, rungs_impossible=("cpu",), half=True))[-1][-1]
    assert on_cpu == GiveUp(
        "one input of 8,192 tokens: released the cache and retried, fell back to 'chunk'; lower max_length"
    )
    assert eval(reason.reason.split("more fallbacks: ")[1]) == MemoryPolicy(fallback=FALLBACKS)


def test_deciding_is_pure() -> None:
    """The same failure gives the same actions, whatever was decided in between."""
    policy = RecoveryPolicy(MemoryPolicy(fallback=FALLBACKS))
    cases = [failure(rows=4), failure(attempt=2, has_neighbours=True), failure(attempt=5, rungs_used=("chunk",))]
    first = [policy.decide(case) for case in cases]
    assert [policy.decide(case) for case in reversed(cases)] == first[::-1]


def test_actions_are_named_for_reports() -> None:
    """The last action says how the inputs go on, in the word that events carry."""
    policy = RecoveryPolicy(MemoryPolicy(fallback=("cpu",)))
    names = [
        policy.decide(case)[-1].name
        for case in (failure(), failure(rows=2, attempt=2), failure(attempt=2), failure(attempt=3, rungs_used=("cpu",)))
    ]
    assert names == ["retry", "split", "fallback", "give up"]


@settings(max_examples=200, deadline=None)
@given(
    fallback=st.sets(st.sampled_from(FALLBACKS)),
    wait_s=st.floats(0, 100) | st.sampled_from([0.0, 1e-9, 0.001, 0.05]),
    neighbours=st.booleans(),
    impossible=st.sets(st.sampled_from(FALLBACKS)),
    half=st.booleans(),
    tokens=st.integers(1, 100_000),
)
def test_one_input_always_comes_to_an_end(
    fallback: set[str], wait_s: float, neighbours: bool, impossible: set[str], half: bool, tokens: int
) -> None:
    """Whatever the policy and the device, an input that always fails is given up after a bounded number of steps, having
    waited at most wait_s and used each rung at most once."""
    policy = RecoveryPolicy(MemoryPolicy(fallback=tuple(fallback), wait_s=wait_s))
    start = failure(tokens, has_neighbours=neighbours, rungs_impossible=tuple(impossible), half=half)
    decided = fail_for_good(policy, start, most=int(wait_s / 2) + 16)
    actions = [action for step in decided for action in step]
    assert isinstance(actions[-1], GiveUp)
    assert sum(action.seconds for action in actions if isinstance(action, Wait)) <= wait_s + 1e-9
    rungs = [action.rung for action in actions if isinstance(action, FallBack)]
    assert len(rungs) == len(set(rungs))
    assert set(rungs) <= fallback - impossible


# ---------------------------------------------------------------- what follows from a decision


def work(rows: int = 1, **options: object) -> Work:
    items = tuple(TokenizedInput(index, None, num_tokens=10) for index in range(rows))
    return Work(MicroBatch(items, packed=True), 100, 200, **options)  # type: ignore[arg-type]


def test_following_a_decision_says_what_runs_next() -> None:
    """Each last action, and what becomes of the work: the same again, two halves, another way, or nothing."""
    one = work(failures=2, rungs=("chunk",), used=("chunk",), waited_s=0.5)
    (again,) = follow(one, (RELEASE, RETRY))
    assert vars(again) == {**vars(one), "via": "retry"}
    (waited,) = follow(one, (Wait(0.25), RELEASE, RETRY))
    assert (waited.waited_s, waited.via) == (0.75, "retry")
    (cleared,) = follow(one, (Clear(3.0),))
    assert cleared.cleared and cleared.via == "" and cleared.waited_s == 0.5
    (fallen,) = follow(one, (RELEASE, FallBack("cpu")))
    assert (fallen.rung, fallen.rungs, fallen.used, fallen.via) == ("cpu", ("chunk", "cpu"), ("chunk",), "cpu")
    left, right = follow(work(8, failures=2), (ShrinkBudget(50), SPLIT))
    assert [item.index for half in (left, right) for item in half.batch.items] == list(range(8))
    assert (left.failures, left.bound_bytes, left.rungs) == (0, 0, ())
    assert follow(one, (GiveUp("no"),)) == ()


def test_what_was_never_started_is_looked_at_once_more() -> None:
    """A prediction is no proof: before it is given up it is looked at again, as it was asked for; once."""
    refused = work(refused=True, rung="cpu", rungs=("cpu",))
    (again,) = follow(refused, (GiveUp("no"),))
    assert (again.reprieved, again.rung, again.refused) == (True, None, True)
    assert follow(again, (GiveUp("no"),)) == ()
    assert follow(work(failures=3), (GiveUp("no"),)) == ()


# ------------------------------------------------- a fake device that carries the decisions out


class FakeDevice:
    """Refuses micro-batches as `refuses(indices, rung, attempt number)` says, and performs what the policy decides."""

    def __init__(self, policy: MemoryPolicy, refuses: Callable[[list[int], str | None, int], bool]) -> None:
        self.policy = RecoveryPolicy(policy)
        self.refuses = refuses
        self.log: list[str] = []
        self.done: list[int] = []
        self.lost: list[int] = []

    def run(self, count: int) -> None:
        items = tuple(TokenizedInput(index, None, num_tokens=10) for index in range(count))
        self._run(MicroBatch(items, packed=True), failure(rows=count, attempt=0), None)

    def _run(self, batch: MicroBatch, state: Failure, rung: str | None) -> None:
        indices = [item.index for item in batch.items]
        self.log.append(f"run {indices[0]}-{indices[-1]}" + (f" {rung}" if rung else ""))
        state = dataclasses.replace(state, attempt=state.attempt + 1, alone=len(batch) == 1, shape=batch.shape)
        if not self.refuses(indices, rung, len(self.log)):
            self.done += indices
            return
        for action in self.policy.decide(state):
            if isinstance(action, Retry):
                self._run(batch, state, rung)
            elif isinstance(action, Split):
                for half in batch.split():
                    self._run(half, dataclasses.replace(state, attempt=0), None)
            elif isinstance(action, FallBack):
                used = (*state.rungs_used, action.rung)
                self._run(batch, dataclasses.replace(state, rungs_used=used), action.rung)
            elif isinstance(action, Wait):
                self.log.append(f"wait {action.seconds:g}")
                state = dataclasses.replace(state, waited_s=state.waited_s + action.seconds)
            elif isinstance(action, GiveUp):
                self.lost += indices
            else:
                self.log.append(action.name)


def test_a_spurious_refusal_costs_one_retry() -> None:
    """The device refuses once and then does not: the same micro-batch runs again, nothing is split."""
    device = FakeDevice(MemoryPolicy(), lambda indices, rung, run: run == 1)
    device.run(8)
    assert device.log == ["run 0-7", "release", "run 0-7"]
    assert device.done == list(range(8))


def test_a_device_that_holds_two_inputs() -> None:
    """Eight inputs where at most two fit: only what failed is split, what is finished stays finished, in order."""
    device = FakeDevice(MemoryPolicy(), lambda indices, rung, run: len(indices) > 2)
    device.run(8)
    assert device.log == [
        *("run 0-7", "release", "run 0-7", "shrink"),
        *("run 0-3", "release", "run 0-3", "shrink", "run 0-1", "run 2-3"),
        *("run 4-7", "release", "run 4-7", "shrink", "run 4-5", "run 6-7"),
    ]
    assert (device.done, device.lost) == (list(range(8)), [])


def test_one_input_that_fits_nowhere_is_lost_alone() -> None:
    """Input 2 needs more than there is, by any strategy: the other three are computed, it climbs its ladder and ends."""
    policy = MemoryPolicy(fallback=("chunk", "cpu"), wait_s=0)
    device = FakeDevice(policy, lambda indices, rung, run: 2 in indices)
    device.run(4)
    assert device.log == [
        *("run 0-3", "release", "run 0-3", "shrink", "run 0-1"),
        *("run 2-3", "release", "run 2-3", "shrink"),
        *("run 2-2", "release", "run 2-2", "release", "run 2-2 chunk", "release", "run 2-2 cpu", "run 3-3"),
    ]
    assert (device.done, device.lost) == ([0, 1, 3], [2])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.sets(st.integers(0, 39)), st.integers(1, 40))
def test_every_input_ends_exactly_once_whatever_fails(count: int, cursed: set[int], fits: int) -> None:
    """Any set of inputs that never fit, any size that does: each input is either computed or given up, exactly once, in
    order, and the work is bounded: a few runs for every input."""
    device = FakeDevice(
        MemoryPolicy(fallback=()), lambda indices, rung, run: len(indices) > fits or not cursed.isdisjoint(indices)
    )
    device.run(count)
    assert sorted(device.done + device.lost) == list(range(count))
    assert device.done == sorted(device.done)
    assert set(device.lost) == cursed & set(range(count))
    assert sum(entry.startswith("run") for entry in device.log) <= 4 * count
