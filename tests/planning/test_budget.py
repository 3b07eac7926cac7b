"""memsafe.planning.budget: what may be taken, after what was seen to fail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe.planning.budget import MemoryBudget, MemorySnapshot

sizes = st.integers(0, 1 << 40)


def snapshot(free: int, *, total: int = 1000, allocated: int = 0, reserved: int | None = None) -> MemorySnapshot:
    return MemorySnapshot(free, total, allocated, allocated if reserved is None else reserved)


def test_headroom_is_what_is_free_less_the_reserve() -> None:
    """Free memory and the process's own unused cache count; the reserve and what is in flight do not."""
    budget = MemoryBudget(limit_bytes=None, reserve_bytes=100)
    assert budget.admissible_bytes(snapshot(500)) == 400
    assert budget.admissible_bytes(snapshot(500, allocated=200, reserved=250)) == 450
    assert budget.admissible_bytes(snapshot(500), in_flight_bytes=150) == 250
    assert budget.admissible_bytes(snapshot(50)) == 0
    assert budget.headroom_bytes(snapshot(50)) == -50


def test_the_limit_counts_from_before_the_model_was_loaded() -> None:
    """A limit of 300 with 120 taken since the start leaves 180, however much is free."""
    budget = MemoryBudget(limit_bytes=300, reserve_bytes=0, baseline_bytes=1000)
    assert budget.admissible_bytes(snapshot(5000, total=9999, allocated=1120)) == 180
    assert budget.admissible_bytes(snapshot(5000, total=9999, allocated=900)) == 300
    assert budget.admissible_bytes(snapshot(100, total=9999, allocated=1120)) == 100
    assert budget.admissible_bytes(snapshot(5000, total=9999, allocated=1500)) == 0


def test_a_snapshot_never_has_negative_cache() -> None:
    """Counters read one after the other may disagree; what is reusable is then nothing."""
    assert snapshot(10, allocated=20, reserved=15).reusable_bytes == 0


def test_a_failure_halves_and_successes_grow_back_below_it() -> None:
    """After 400 bytes failed: 200, then after every 4 successes near the cap a quarter more, never 95 % of 400 or more."""
    budget = MemoryBudget(limit_bytes=None, reserve_bytes=0)
    now = snapshot(1000)
    assert budget.shrink(400, now) == 200
    assert budget.admissible_bytes(now) == 200
    caps = [budget.cap_bytes for _ in range(40) if budget.succeed(budget.cap_bytes or 0)]
    assert caps == [251, 314, 380]
    assert budget.admissible_bytes(now) == 380


def test_small_successes_prove_nothing() -> None:
    """Micro-batches far below the cap do not make it grow."""
    budget = MemoryBudget(limit_bytes=None, reserve_bytes=0)
    budget.shrink(400, snapshot(1000))
    assert not any(budget.succeed(49) for _ in range(100))
    assert budget.cap_bytes == 200


def test_success_without_a_failure_changes_nothing() -> None:
    """Where nothing failed there is no cap to grow."""
    budget = MemoryBudget(limit_bytes=None, reserve_bytes=0)
    assert not any(budget.succeed(1000) for _ in range(10))
    assert budget.cap_bytes is None


def test_a_second_failure_shrinks_further() -> None:
    """The cap is half of the smallest size that failed; a failure starts the count of successes again."""
    budget = MemoryBudget(limit_bytes=None, reserve_bytes=0)
    now = snapshot(1000)
    budget.shrink(400, now)
    for _ in range(3):
        budget.succeed(200)
    assert budget.shrink(200, now) == 100
    assert not budget.succeed(100)
    assert budget.shrink(900, now) == 100, "a larger failure teaches nothing"


def test_a_failure_of_next_to_nothing_still_leaves_a_cap_above_zero() -> None:
    """The cap never becomes 0, which would stop everything for good."""
    budget = MemoryBudget(limit_bytes=None, reserve_bytes=0)
    assert budget.shrink(0, snapshot(10)) == 1


def test_the_cap_goes_when_a_neighbour_leaves() -> None:
    """Half as much again free as when it failed: the failure says nothing any more. Less than that: it still does."""
    budget = MemoryBudget(limit_bytes=None, reserve_bytes=0)
    budget.shrink(400, snapshot(1000, total=9999))
    assert budget.admissible_bytes(snapshot(1500, total=9999)) == 200
    assert budget.admissible_bytes(snapshot(1501, total=9999)) == 1501
    assert budget.cap_bytes is None


@given(sizes, sizes, sizes, sizes, sizes, st.none() | sizes, sizes)
def test_never_more_than_is_free_or_allowed(
    free: int, allocated: int, cache: int, reserve: int, flight: int, limit: int | None, failed: int
) -> None:
    """Whatever the figures: not negative, within free plus own cache less the reserve, within the limit, within the cap."""
    budget = MemoryBudget(limit_bytes=limit, reserve_bytes=reserve)
    now = MemorySnapshot(free, 1 << 41, allocated, allocated + cache)
    before = budget.admissible_bytes(now, flight)
    assert 0 <= before <= max(free + cache - reserve - flight, 0)
    if limit is not None:
        assert before <= limit
    budget.shrink(failed, now)
    after = budget.admissible_bytes(now, flight)
    assert 0 <= after <= min(before, max(failed // 2, 1))


def test_the_baseline_is_no_credit() -> None:
    """A process that shrank below its baseline may take the limit, not more."""
    budget = MemoryBudget(limit_bytes=300, reserve_bytes=0, baseline_bytes=10_000)
    assert budget.admissible_bytes(snapshot(50_000, total=99_999, allocated=0)) == 300


@pytest.mark.parametrize("growth", [1.25, 2.0])
def test_growth_ends_below_the_failed_size(growth: float) -> None:
    """Growing back never reaches what was seen to fail under the same free memory."""
    budget = MemoryBudget(limit_bytes=None, reserve_bytes=0, patience=1, growth=growth)
    budget.shrink(1000, snapshot(2000))
    for _ in range(50):
        budget.succeed(budget.cap_bytes or 0)
    assert budget.cap_bytes == 950
