"""memsafe.planning.order: every input once, a sample while learning, the longest first otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe.planning.order import FIRST, LARGEST, PIECE_CHARS, pieces

Chars = st.lists(st.integers(0, 100_000), max_size=400)


@given(Chars, st.lists(st.booleans(), min_size=1, max_size=8))
def test_every_input_is_in_exactly_one_piece(chars: list[int], learning: list[bool]) -> None:
    """Whatever the lengths, and whenever learning begins or ends: a partition, no piece empty, none too large."""
    asked = iter(learning * 1000)
    seen: list[int] = []
    for piece in pieces(chars, lambda: next(asked)):
        assert len(piece) >= 1
        assert len(piece) == 1 or sum(chars) <= PIECE_CHARS or len(piece) <= 2 * LARGEST
        seen.extend(piece)
    assert sorted(seen) == list(range(len(chars)))


@given(Chars)
def test_when_nothing_is_to_be_learnt_the_longest_come_first(chars: list[int]) -> None:
    """Over all pieces the lengths never grow, and a piece of several stays within its characters."""
    all_pieces = list(pieces(chars, lambda: False))
    lengths = [chars[index] for piece in all_pieces for index in piece]
    assert lengths == sorted(chars, reverse=True)
    for piece in all_pieces:
        assert len(piece) == 1 or sum(chars[index] for index in piece) <= PIECE_CHARS


@pytest.mark.parametrize("learning", [True, False])
def test_a_small_call_is_one_piece(learning: bool) -> None:
    """What has no more characters than a piece may have is tokenised at once, so that it can be one micro-batch."""
    chars = [1, 5, 3, PIECE_CHARS - 9]
    assert list(pieces(chars, lambda: learning)) == [[3, 1, 2, 0]]
    assert len(list(pieces([*chars, *[1] * 1000], lambda: learning))) > 1
    assert list(pieces([], lambda: learning)) == []


def test_while_learning_each_piece_is_a_sample_across_all_lengths() -> None:
    """The first pieces have short and long texts in about the proportion of the whole call, longest first."""
    rng = np.random.default_rng(0)
    chars = np.clip(rng.lognormal(5.5, 1.0, 8000), 5, 30_000).astype(int).tolist()
    wanted = np.quantile(chars, [0.1, 0.5, 0.9])
    for number, piece in enumerate(pieces(chars, lambda: True)):
        lengths = [chars[index] for index in piece]
        assert lengths == sorted(lengths, reverse=True)
        if number < 3:
            assert np.quantile(lengths, [0.1, 0.5, 0.9]) == pytest.approx(wanted, rel=0.35)
            assert FIRST / 2 <= len(piece) <= 4 * FIRST * 2**number


def test_the_longest_come_first_as_soon_as_learning_ends() -> None:
    """After two samples: what is left, longest first, nothing twice."""
    chars = list(range(1, 5001))
    answers = iter([True, True])
    first, second, *rest = pieces(chars, lambda: next(answers, False))
    left = sorted(set(range(5000)) - set(first) - set(second), reverse=True)
    assert [index for piece in rest for index in piece] == left
    assert 1 < len(first) < 200 and min(first) < 500 and max(first) > 4500


def test_computing_begins_soon() -> None:
    """The first piece is small, later ones are larger: the device does not wait for a thousand texts to be tokenised."""
    sizes = [len(piece) for piece in pieces([100] * 10_000, lambda: False)]
    assert sizes[:5] == [64, 128, 256, 512, 1024] and max(sizes) == LARGEST
