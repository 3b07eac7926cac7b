"""memsafe.planning.batch: what the cost of a micro-batch is computed from, and how one is halved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe.planning.batch import BatchShape, MicroBatch, TokenizedInput

lengths_of = st.lists(st.integers(0, 9000), min_size=1, max_size=60)


def micro_batch(lengths: list[int], *, packed: bool = True, multiple: int = 1) -> MicroBatch:
    items = [TokenizedInput(i, None, num_tokens=n) for i, n in enumerate(lengths)]
    return MicroBatch(tuple(items), packed, multiple)


def test_tokens_are_counted_from_the_ids_unless_given() -> None:
    """num_tokens is the length of input_ids; an opaque input says its own; neither is an input of no tokens."""
    assert TokenizedInput(3, np.arange(7, dtype=np.int32)).num_tokens == 7
    assert TokenizedInput(3, None, num_tokens=9, raw=object()).num_tokens == 9
    assert TokenizedInput(3, np.arange(7, dtype=np.int32), num_tokens=5).num_tokens == 5
    assert TokenizedInput(3, None).num_tokens == 0


def test_the_repr_holds_no_text() -> None:
    """What is logged of an input is its place and its length, never its content."""
    item = TokenizedInput(3, None, num_tokens=9, raw="a secret", job="a job")
    assert repr(item) == "TokenizedInput(index=3, num_tokens=9)"
    assert "secret" not in repr(MicroBatch((item,), packed=True))


@pytest.mark.parametrize(
    ("lengths", "packed", "multiple", "expected"),
    [
        ([], True, 1, BatchShape(0, 0, 0, 0)),
        ([5], True, 1, BatchShape(5, 1, 25, 5)),
        ([5, 3], True, 1, BatchShape(8, 2, 34, 5)),
        ([5, 3], True, 8, BatchShape(8, 2, 34, 5)),
        ([5, 3], False, 1, BatchShape(10, 2, 50, 5)),
        ([5, 3], False, 8, BatchShape(16, 2, 128, 8)),
        ([8, 3], False, 8, BatchShape(16, 2, 128, 8)),
        ([3, 9, 5], False, 4, BatchShape(36, 3, 432, 12)),
    ],
)
def test_shapes(lengths: list[int], packed: bool, multiple: int, expected: BatchShape) -> None:
    """Packed: what is there. Padded: rows times the longest, rounded up."""
    assert BatchShape.of(lengths, packed=packed, multiple=multiple) == expected


@given(lengths_of, st.integers(1, 16))
def test_padding_never_makes_a_batch_cheaper(lengths: list[int], multiple: int) -> None:
    """The padded shape is at least the packed one in every feature."""
    packed = BatchShape.of(lengths, packed=True)
    padded = BatchShape.of(lengths, packed=False, multiple=multiple)
    assert padded.tokens >= packed.tokens
    assert padded.squares >= packed.squares
    assert padded.sequences == packed.sequences
    assert padded.longest - packed.longest < multiple


@given(st.lists(st.integers(0, 9000), min_size=2, max_size=60), st.booleans())
def test_a_split_loses_nothing_and_keeps_the_order(lengths: list[int], packed: bool) -> None:
    """Both halves hold something, and one after the other they are the batch."""
    batch = micro_batch(sorted(lengths, reverse=True), packed=packed, multiple=8)
    left, right = batch.split()
    assert len(left) >= 1 and len(right) >= 1
    assert left.items + right.items == batch.items
    assert (left.packed, left.multiple, right.multiple) == (packed, 8, 8)


@given(st.lists(st.integers(1, 9000), min_size=2, max_size=60))
def test_a_packed_split_is_even_to_within_one_input(lengths: list[int]) -> None:
    """The halves of a packed batch differ by no more tokens than its longest input has."""
    batch = micro_batch(sorted(lengths, reverse=True))
    left, right = batch.split()
    assert abs(left.num_tokens - right.num_tokens) <= max(lengths)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=64))
def test_splitting_again_and_again_ends_with_single_inputs(lengths: list[int]) -> None:
    """However often a batch is split, the pieces are its inputs, each once, in order."""
    todo, singles = [micro_batch(lengths)], []
    while todo:
        batch = todo.pop()
        if len(batch) == 1:
            singles.append(batch.items[0].index)
        else:
            todo.extend(reversed(batch.split()))
    assert singles == list(range(len(lengths)))


def test_one_input_cannot_be_split() -> None:
    """Splitting a batch of one is a programming error and says so."""
    with pytest.raises(ValueError, match="one input"):
        micro_batch([5]).split()
