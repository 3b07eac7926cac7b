"""memsafe.planning.sizing: the rules by which a size is proposed. Whether sizes are good is tested against recorded curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from memsafe.planning.sizing import Pending, Size, Sizing
from memsafe.planning.speed import Point, Sample, SpeedCurve, size_class
from memsafe.planning.traits import Traits

CUDA, CPU = Traits.of("cuda", 16), Traits.of("cpu", 4)
PLENTY = Pending(1 << 40, coming=True)


def gpu(tokens: float) -> float:
    """Seconds: launching takes 10 ms, a token 1 us."""
    return 0.01 + tokens * 1e-6


def search(sizing: Sizing, seconds: Callable[[float], float], *, pending: Pending = PLENTY) -> list[Size]:
    """One micro-batch after another, each filled, until the search ends; what was proposed."""
    asked: list[Size] = []
    while not sizing.settled:
        assert len(asked) < 100, "the search does not end"
        size = sizing.propose(pending)
        assert size is not None
        sizing.took(size)
        asked.append(size)
        sizing.observe(Sample(size.tokens, seconds(size.tokens), min(seconds(0), 0.01)), pending.lengths)
    return asked


def test_a_search_begins_small_and_at_most_doubles() -> None:
    """While nothing is known and much is to come: start_tokens, and never more than twice what has run."""
    asked = search(Sizing(CUDA), gpu)
    assert asked[0] == Size(CUDA.start_tokens, True)
    largest = 0
    for size in asked:
        assert not largest or size.tokens <= 2 * largest
        largest = max(largest, size.tokens)


def test_a_search_ends_near_the_knee() -> None:
    """The size in use afterwards loses a few per cent at most, and none was tried that is far beyond it."""
    sizing = Sizing(CUDA)
    asked = search(sizing, gpu)
    used = sizing.propose(PLENTY)
    assert used is not None and not used.trial
    assert gpu(used.tokens) / used.tokens <= 1.1 * 1e-6
    assert max(size.tokens for size in asked) <= 2.1 * used.tokens


@pytest.mark.parametrize("most", [1, 100, 256, 300, 1000, 5000])
def test_the_ceiling_is_never_passed(most: int) -> None:
    """A policy's max_tokens holds for every proposal, in the search and after it, for small runs as well."""
    sizing = Sizing(CUDA, max_tokens=most)
    sizes = search(sizing, lambda tokens: 0.01 + tokens * 1e-9)
    sizes += [size for tokens in (10, 10_000, 1 << 30) if (size := sizing.propose(Pending(tokens))) is not None]
    assert 1 <= max(size.tokens for size in sizes) <= most


@pytest.mark.parametrize(("knee", "least", "most"), [(None, 0.95, 0.99), (0.1, 0.85, 0.95), (0.3, 0.6, 0.9)])
def test_the_policys_knee_says_what_speed_may_be_lost(knee: float | None, least: float, most: float) -> None:
    """None: the device's own; 0.3: much less memory will do."""
    curve = SpeedCurve([Point(256 << step, gpu(256 << step), 8) for step in range(16)])
    size = Sizing(CUDA, knee=knee, curve=curve).propose(PLENTY)
    assert size is not None and not size.trial
    best = gpu(256 << 15) / (256 << 15)
    assert least <= best / (gpu(size.tokens) / size.tokens) <= most


def test_a_knee_of_nothing_grows_for_as_long_as_larger_is_faster() -> None:
    """0: nothing may be lost; beyond the largest size that an earlier process knew, the next one is tried."""
    curve = SpeedCurve([Point(256 << step, gpu(256 << step), 8) for step in range(16)])
    size = Sizing(CUDA, knee=0.0, curve=curve).propose(PLENTY)
    assert size is not None and size.trial and size.tokens > 256 << 15


def test_what_was_learnt_earlier_is_used_at_once() -> None:
    """A curve of an earlier process: no search, no trial, from the first micro-batch on."""
    curve = SpeedCurve([Point(256 << step, gpu(256 << step), 8) for step in range(16)])
    sizing = Sizing(CUDA, curve=curve)
    assert sizing.settled
    size = sizing.propose(PLENTY)
    assert size is not None and not size.trial and size.tokens > 50_000


def test_small_work_before_anything_is_known_is_one_micro_batch() -> None:
    """A question, ten chunks, a hundred documents: where launching is the limit they are not cut into small sizes."""
    for tokens in (10, 5000, CUDA.short_run_tokens):
        assert Sizing(CUDA).propose(Pending(tokens)) == Size(tokens)
    assert Sizing(CUDA).propose(Pending(CUDA.short_run_tokens + 1)) == Size(CUDA.start_tokens, True)
    assert Sizing(CUDA).propose(Pending(5000, coming=True)) == Size(CUDA.start_tokens, True)
    large = Sizing(
        CUDA, token_flops=CUDA.launch_flops / 2000
    )  # a model so large that 2,000 tokens take as long as a launch
    assert large.propose(Pending(5000)) == Size(2000)


def test_a_cap_on_rows_is_no_time_to_try() -> None:
    """It says nothing about sizes: what is known is used."""
    sizing = Sizing(CUDA)
    sizing.observe(Sample(1024, 0.01, 0.01))
    assert sizing.propose(PLENTY, capped=True) == Size(1024)
    assert sizing.propose(PLENTY) == Size(2048, True)


@pytest.mark.parametrize(("inflow", "expected"), [(0.0, Size(2048, True)), (9e4, Size(2048, True)), (8e4, Size(1024))])
def test_no_size_is_larger_than_keeps_up_with_tokenising(inflow: float, expected: Size) -> None:
    """1,024 tokens run at 102,400 a second: enough for 80,000 that come a second, not for 90,000."""
    sizing = Sizing(CUDA)
    sizing.observe(Sample(512, 0.01, 0.01))
    sizing.observe(Sample(1024, 0.01, 0.01))
    lengths = {size_class(64): 1000}
    assert sizing.propose(Pending(1 << 30, lengths=lengths, coming=True, inflow=inflow)) == expected


def test_questions_that_wait_together_are_never_cut_in_two() -> None:
    """Up to 1,024 tokens: whatever size is known, all that waits is one micro-batch where launching is the limit, and none of it
    is taken from the middle to try a size. A CPU goes by its own sizes."""
    sizing = Sizing(CUDA)
    for tokens in (342, 294):
        sizing.observe(Sample(tokens, 0.013, 0.013))
    for waiting in (10, 354, 700, 1024):
        assert sizing.propose(Pending(waiting)) == Size(waiting)


def test_while_launching_is_the_limit_the_next_trial_waits_for_the_last() -> None:
    """A second one of the same size would take a launch and tell nothing; once work is the limit it may go on."""
    sizing = Sizing(CUDA)
    for tokens in (256, 512):
        sizing.observe(Sample(tokens, 0.01, 0.01))
    assert sizing.propose(dataclasses.replace(PLENTY, trying=True)) is None
    assert sizing.propose(PLENTY) is not None


def test_on_a_cpu_large_sizes_are_tried_by_one_lane() -> None:
    """Beside a trial, sizes above lone_trials are not tried; smaller ones are, by all lanes."""
    sizing = Sizing(CPU)
    beside = dataclasses.replace(PLENTY, trying=True)
    assert sizing.propose(beside) == Size(256, True)
    for tokens in (256, 256, 512, 512):
        sizing.observe(Sample(tokens, 0.1 + tokens * 1e-6))
    alone, other = sizing.propose(PLENTY), sizing.propose(beside)
    assert alone is not None and alone.trial and alone.tokens > CPU.lone_trials  # type: ignore[operator]
    assert other is not None and not other.trial and other.tokens <= 512


def test_a_size_that_nothing_fills_is_given_up() -> None:
    """Texts much longer than a size: a few tries, then what ran is what counts; the search does not stand still."""
    sizing = Sizing(CUDA)
    long = dataclasses.replace(PLENTY, lengths={size_class(6000): 100})
    for _ in range(60):
        size = sizing.propose(long)
        assert size is not None
        sizing.took(size)
        tokens = 6000 * max(size.tokens // 6000, 1)
        sizing.observe(Sample(tokens, gpu(tokens), 0.01), long.lengths)
    assert sizing.settled


def test_a_budget_that_allows_no_more_ends_the_search() -> None:
    """Sizes that do not fit are not tried again and again."""
    sizing = Sizing(CUDA)
    tight = dataclasses.replace(PLENTY, room_tokens=3000)
    asked = search(sizing, gpu, pending=tight)
    assert max(size.tokens for size in asked if size.trial) <= 3000
    used = sizing.propose(tight)
    assert used is not None and not used.trial


def test_the_end_of_a_run_is_shared_out() -> None:
    """Side by side: no lane stands idle. Taking turns: equal parts, no small rest that is launched by itself."""
    points = [Point(256 << step, gpu(256 << step), 8) for step in range(13)]
    sizing = Sizing(CPU, curve=SpeedCurve(points), lanes=4)
    assert sizing.propose(Pending(4000)) == Size(1000)
    assert sizing.propose(Pending(100)) == Size(128)
    turns = Sizing(CUDA, curve=SpeedCurve(points))
    size = turns.propose(PLENTY)
    assert size is not None
    assert turns.propose(Pending(size.tokens + 100)) == Size(-(-(size.tokens + 100) // 2))
    assert turns.propose(Pending(size.tokens + 100, coming=True)) == size
    assert turns.propose(Pending(10 * size.tokens)) == size


def test_on_a_cpu_the_cores_are_one_each_until_sizes_are_known() -> None:
    """Then the lanes are chosen, by what all of them do together; taking turns, two are in flight and there is no choice."""
    sizing = Sizing(CPU)
    assert sizing.lanes == (4, 1)
    assert not sizing.observe_lanes(100.0, 1.0, 0.0) and not sizing.lane_choice.rates
    search(sizing, lambda tokens: 0.001 + tokens * 1e-5)
    assert sizing.lanes == (4, 1)
    told = [sizing.observe_lanes(100.0 * (3 - sizing.lanes[0] % 3), 0.3, 0.0) for _ in range(40)]
    assert told.count(True) == 1 and sizing.lane_choice.done
    assert Sizing(CPU, curve=sizing.curve, lanes=2).lanes == (2, 2)
    assert Sizing(CUDA).lanes == (2, None)


def test_a_search_is_opened_again_where_much_more_is_to_be_had() -> None:
    """A first run of short work settled small; later micro-batches show that more tokens pay: sizes grow again."""
    sizing = Sizing(CUDA)
    for _ in range(4):
        sizing.observe(Sample(256, 0.0102, 0.01))
    sizing._settled = True
    size = sizing.propose(PLENTY)
    assert size is not None and size.tokens > 256
