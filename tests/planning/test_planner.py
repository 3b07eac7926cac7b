"""memsafe.planning.planner: every input exactly once, longest first, within tokens, rows and bytes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsafe.planning.batch import MicroBatch, TokenizedInput
from memsafe.planning.cost import CostKey, CostModel, CostPrior
from memsafe.planning.planner import BatchPlanner

EVERYTHING = 1 << 60


def cost(token: float = 1000.0, sequence: float = 0.0, square: float = 0.0) -> CostModel:
    """A model that has learnt exactly these bytes, without fixed part."""
    return CostModel(CostKey("m", "r", "float32", "sdpa", "x", "cpu", "2"), CostPrior(0.0, token, sequence, square))


def items(lengths: list[int]) -> list[TokenizedInput]:
    return [TokenizedInput(index, None, num_tokens=length) for index, length in enumerate(lengths)]


def cut(
    planner: BatchPlanner, inputs: list[TokenizedInput], *, cost: CostModel, budget_bytes: int, max_tokens: int
) -> list[MicroBatch]:
    """All of `inputs`, taken micro-batch by micro-batch."""
    backlog, start, batches = planner.order(inputs), 0, []
    while start < len(backlog):
        batch = planner.take(backlog, start, cost=cost, budget_bytes=budget_bytes, max_tokens=max_tokens)
        assert len(batch) >= 1
        batches.append(batch)
        start += len(batch)
    return batches


def test_order_is_longest_first_and_stable() -> None:
    """Equal lengths keep the order of the call, so that plans are reproducible."""
    ordered = BatchPlanner(packed=True).order(items([3, 9, 3, 5, 9]))
    assert [(item.num_tokens, item.index) for item in ordered] == [(9, 1), (9, 4), (5, 3), (3, 0), (3, 2)]


@pytest.mark.parametrize(
    ("packed", "multiple", "max_rows", "lengths", "expected"),
    [
        (True, 1, None, [4, 6, 2, 3], [[6, 4], [3, 2]]),
        (True, 1, None, [10, 10, 10], [[10], [10], [10]]),
        (True, 1, None, [25, 4, 4, 2], [[25], [4, 4, 2]]),
        (True, 1, None, [1] * 23, [[1] * 10, [1] * 10, [1] * 3]),
        (True, 1, 4, [1] * 10, [[1] * 4, [1] * 4, [1] * 2]),
        (False, 1, None, [4, 6, 2, 3], [[6], [4, 3], [2]]),
        (False, 1, None, [5, 5, 5, 1, 1], [[5, 5], [5, 1], [1]]),
        (False, 4, None, [3, 3, 3, 2], [[3, 3], [3, 2]]),
        (False, 8, None, [3, 3], [[3], [3]]),
        (False, 1, 1, [2, 2], [[2], [2]]),
        (True, 1, None, [], []),
    ],
)
def test_plans_of_at_most_ten_tokens(
    packed: bool, multiple: int, max_rows: int | None, lengths: list[int], expected: list[list[int]]
) -> None:
    """The exact cuts: packed by the sum of lengths, padded by rows times the longest, and never more than max_rows."""
    planner = BatchPlanner(packed, multiple, max_rows)
    batches = cut(planner, items(lengths), cost=cost(), budget_bytes=EVERYTHING, max_tokens=10)
    assert [batch.lengths for batch in batches] == expected
    assert all(batch.packed is packed for batch in batches)


def test_the_budget_cuts_where_the_bound_says() -> None:
    """The longest prefix whose resident bound fits: one input more would not."""
    model, planner = cost(1000.0, 500.0, 2.0), BatchPlanner(packed=True)
    backlog = planner.order(items([7, 30, 12, 5, 5, 18, 40, 3] * 5))
    for budget in range(50_000, 1_500_000, 50_000):
        batch = planner.take(backlog, 3, cost=model, budget_bytes=budget, max_tokens=10_000)
        longer = MicroBatch(tuple(backlog[3 : 3 + len(batch) + 1]), packed=True)
        assert len(batch) == 1 or model.resident_bound(batch.shape) <= budget
        assert len(batch) == len(backlog) - 3 or model.resident_bound(longer.shape) > budget


@pytest.mark.parametrize("packed", [True, False])
def test_one_input_is_returned_however_little_is_free(packed: bool) -> None:
    """With no budget at all a micro-batch holds one input: whether it can run is for the caller to judge."""
    backlog = items([500, 400, 300])
    batch = BatchPlanner(packed).take(backlog, 1, cost=cost(), budget_bytes=0, max_tokens=1)
    assert batch.lengths == [400]


def test_taking_from_the_middle_and_past_the_end() -> None:
    """`start` is a position in the backlog; one past the end is an error, not an empty batch."""
    backlog, planner = items([9, 8, 7, 6]), BatchPlanner(packed=True)
    batch = planner.take(backlog, 2, cost=cost(), budget_bytes=EVERYTHING, max_tokens=100)
    assert [item.index for item in batch.items] == [2, 3]
    for start in (-1, 4):
        with pytest.raises(IndexError):
            planner.take(backlog, start, cost=cost(), budget_bytes=EVERYTHING, max_tokens=100)


def test_inputs_of_no_tokens_are_planned_too() -> None:
    """Empty inputs are rows like others, and end."""
    for packed in (True, False):
        planner = BatchPlanner(packed, 8)
        batches = cut(planner, items([0, 0, 0, 5]), cost=cost(), budget_bytes=EVERYTHING, max_tokens=16)
        assert sorted(item.index for batch in batches for item in batch.items) == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [{"multiple": 0}, {"max_rows": 0}, {"max_rows": -3}])
def test_impossible_planners_are_refused(options: dict[str, int]) -> None:
    """A multiple or a row limit below 1 cannot be planned for."""
    with pytest.raises(ValueError):
        BatchPlanner(False, **options)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9000), max_size=80),
    packed=st.booleans(),
    multiple=st.sampled_from([1, 8]),
    max_rows=st.none() | st.integers(1, 10),
    max_tokens=st.integers(1, 20_000),
    budget=st.integers(0, 60_000_000),
    square=st.sampled_from([0.0, 5.0]),
)
def test_every_input_exactly_once_and_never_above_what_is_allowed(
    lengths: list[int],
    packed: bool,
    multiple: int,
    max_rows: int | None,
    max_tokens: int,
    budget: int,
    square: float,
) -> None:
    """For any inputs and limits: a partition, longest first, within tokens, rows and bytes unless of one input, and the
    same again when asked again."""
    planner, model = BatchPlanner(packed, multiple, max_rows), cost(1500.0, 100.0, square)
    inputs = items(lengths)
    batches = cut(planner, inputs, cost=model, budget_bytes=budget, max_tokens=max_tokens)
    planned = [item for batch in batches for item in batch.items]
    assert sorted(item.index for item in planned) == list(range(len(lengths)))
    assert [item.num_tokens for item in planned] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) >= 1
        assert max_rows is None or len(batch) <= max_rows
        if len(batch) > 1:
            assert batch.shape.tokens <= max_tokens
            assert model.resident_bound(batch.shape) <= budget
    again = cut(planner, inputs, cost=model, budget_bytes=budget, max_tokens=max_tokens)
    assert [batch.items for batch in again] == [batch.items for batch in batches]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 2000))
def test_a_packed_micro_batch_is_as_full_as_its_inputs_allow(lengths: list[int], max_tokens: int) -> None:
    """One input more would pass max_tokens, so every micro-batch but the last is more than half full, or a single input."""
    planner = BatchPlanner(packed=True)
    batches = cut(planner, items(lengths), cost=cost(), budget_bytes=EVERYTHING, max_tokens=max_tokens)
    for batch, following in zip(batches, batches[1:], strict=False):
        assert batch.num_tokens + following.lengths[0] > max_tokens
        assert batch.num_tokens > max_tokens / 2


def test_planning_costs_microseconds_per_input() -> None:
    """A hundred thousand inputs are planned in well under a second's work: 10 us each at the very most, on any machine."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.4, 0.8, 100_000), 3, 8192).astype(int).tolist()
    inputs = items(lengths)
    started = time.process_time()
    batches = cut(BatchPlanner(packed=True), inputs, cost=cost(), budget_bytes=EVERYTHING, max_tokens=16_384)
    assert time.process_time() - started < 1.0
    assert sum(batch.num_tokens for batch in batches) == sum(lengths)


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=80))
@settings(max_examples=50, deadline=None)
def test_padding_stays_below_the_share_that_is_allowed(lengths: list[int]) -> None:
    """Where a runtime takes padded rows only, no micro-batch has more than a twentieth of padding, and none is smaller than it
    must be for that: one input more would have been too much, or too many tokens."""
    planner = BatchPlanner(packed=False, most_padding=0.05)
    batches = cut(planner, items(lengths), cost=cost(), budget_bytes=EVERYTHING, max_tokens=2000)
    assert sorted(item.index for batch in batches for item in batch.items) == list(range(len(lengths)))
    for batch, after in zip(batches, [*batches[1:], None], strict=True):
        assert 1 - batch.num_tokens / batch.shape.tokens <= 0.05 + 1e-9
        if after is not None:
            width, rows = batch.shape.longest, len(batch) + 1
            more = batch.num_tokens + after.items[0].num_tokens
            assert more < 0.95 * width * rows + 1e-9 or width * rows > 2000


def test_padding_is_as_it_comes_unless_it_is_bounded() -> None:
    """Torch's padded batches are cut by tokens alone, as ever; packed ones have none."""
    inputs = items([100, 60, 20])
    for planner in (BatchPlanner(packed=False), BatchPlanner(packed=True, most_padding=0.05)):
        assert len(cut(planner, inputs, cost=cost(), budget_bytes=EVERYTHING, max_tokens=2000)) == 1
    tight = BatchPlanner(packed=False, most_padding=0.05)
    assert len(cut(tight, inputs, cost=cost(), budget_bytes=EVERYTHING, max_tokens=2000)) == 3
