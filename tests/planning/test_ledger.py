"""memsafe.planning.ledger: cost and budget behind one counter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe.config import GiB, MiB
from memsafe.planning.batch import BatchShape
from memsafe.planning.budget import MemoryBudget, MemorySnapshot
from memsafe.planning.cost import CostModel, CostPrior
from memsafe.planning.ledger import Ledger
from tests.planning.helpers import KEY


def ledger(*, limit_bytes: int | None = None, reserve_bytes: int = 0, baseline_bytes: int = 0) -> Ledger:
    """A token takes 1 MiB, as measurements of many sizes show."""
    cost = CostModel(KEY, CostPrior(0.0, float(MiB), 0.0, 0.0))
    for tokens in (8, 16, 32, 64, 128, 256):
        cost.observe(shape(tokens), tokens * MiB, tokens * MiB)
    return Ledger(
        cost, MemoryBudget(limit_bytes=limit_bytes, reserve_bytes=reserve_bytes, baseline_bytes=baseline_bytes)
    )


def shape(*lengths: int) -> BatchShape:
    return BatchShape.of(lengths, packed=True)


def snapshot(free: int, *, allocated: int = 0, reserved: int = 0, total: int = GiB) -> MemorySnapshot:
    return MemorySnapshot(free, total, allocated, reserved)


def test_room_is_what_is_free_less_the_reserve_and_what_is_in_flight() -> None:
    """Free and cached memory count, under the limit, under the cap that failures left; headroom ignores the cap."""
    book = ledger(limit_bytes=300 * MiB, reserve_bytes=10 * MiB)
    assert book.room(snapshot(100 * MiB), 0) == 90 * MiB
    assert book.room(snapshot(100 * MiB), 40 * MiB) == 50 * MiB
    assert book.room(snapshot(50 * MiB, allocated=20 * MiB, reserved=70 * MiB), 0) == 90 * MiB
    assert book.room(snapshot(800 * MiB), 0) == 300 * MiB
    assert book.room(snapshot(800 * MiB), 400 * MiB) == 0
    book.refuse(80 * MiB, snapshot(100 * MiB))
    assert book.room(snapshot(100 * MiB), 0) == 40 * MiB
    assert book.headroom(snapshot(100 * MiB)) == 90 * MiB
    assert book.headroom(snapshot(5 * MiB)) == 0


def test_tokens_that_fit_are_those_whose_bound_fits() -> None:
    """room_tokens answers with the same bound that micro-batches are charged."""
    book = ledger()
    tokens = book.room_tokens(100 * MiB, 10)
    assert 80 <= tokens < 100
    assert book.bound(shape(*[10] * (tokens // 10))) <= 100 * MiB
    assert book.bound(shape(*[10] * (tokens // 10 + 1))) > 100 * MiB
    assert book.bound(shape(64)) > book.predict(shape(64)) == pytest.approx(64 * MiB, rel=1e-3)


def test_settling_learns_what_was_measured_and_nothing_else() -> None:
    """Bytes that were measured are an observation; a forward that was not measured is none."""
    book = ledger()
    before = book.cost.num_observations
    assert book.settle(shape(500), 600 * MiB, None, None) is None
    assert book.cost.num_observations == before
    book.settle(shape(500), 600 * MiB, 500 * MiB, None)
    assert book.cost.num_observations == before + 1


def test_the_cap_grows_back_and_says_so() -> None:
    """After a refusal, every fourth success near the cap answers with the new cap; without a cap nothing is told."""
    book = ledger()
    assert [book.settle(shape(8), 80 * MiB, None, None) for _ in range(8)] == [None] * 8
    cap = book.refuse(80 * MiB, snapshot(100 * MiB))
    assert cap == 40 * MiB
    told = [book.settle(shape(8), 30 * MiB, None, None) for _ in range(8)]
    grown = [each for each in told if each is not None]
    assert [place for place, each in enumerate(told) if each is not None] == [3, 7]
    assert cap < grown[0] < grown[1] < 80 * MiB


@pytest.mark.parametrize(
    ("need", "free", "limit", "expected"),
    [
        (100, 50, None, True),  # 1,024 MiB in all, of which others hold most
        (100, 1024, None, False),  # nobody holds anything: waiting changes nothing
        (2000, 50, None, False),  # more than the device has
        (100, 50, 80, False),  # more than the limit allows, whoever leaves
        (70, 50, 80, True),
        (70, 900, 80, False),
    ],
)
def test_waiting_helps_only_where_others_hold_what_is_needed(
    need: int, free: int, limit: int | None, expected: bool
) -> None:
    """Neighbours are waited for if an empty device, under the limit, would have room, and has none now."""
    book = ledger(limit_bytes=None if limit is None else limit * MiB)
    assert book.may_wait(need * MiB, snapshot(free * MiB)) is expected


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 300), st.none() | st.integers(1, 2000))
def test_room_is_never_negative_nor_above_headroom(free: int, flying: int, reserve: int, limit: int | None) -> None:
    """Whatever is free and in flight, with a cap or without."""
    book = ledger(limit_bytes=None if limit is None else limit * MiB, reserve_bytes=reserve * MiB)
    seen = snapshot(free * MiB, total=2 * GiB)
    for _ in range(2):
        assert 0 <= book.room(seen, flying * MiB) <= book.headroom(seen, flying * MiB) <= free * MiB
        book.refuse(100 * MiB, seen)
