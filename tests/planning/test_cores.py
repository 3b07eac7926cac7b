"""memsafe.planning.cores: the division of the cores is found on simulated machines, noisy ones too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memsafe.planning.cores import LaneChoice


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (1, [(1, 1)]),
        (2, [(2, 1), (1, 2)]),
        (3, [(3, 1), (1, 3)]),
        (6, [(6, 1), (2, 3), (1, 6)]),
        (8, [(8, 1), (4, 2), (2, 4), (1, 8)]),
        (12, [(12, 1), (4, 3), (2, 6), (1, 12)]),
    ],
)
def test_candidates_use_every_core_exactly_once(cores: int, expected: list[tuple[int, int]]) -> None:
    """lanes * threads is always the number of cores."""
    assert LaneChoice(cores).candidates == expected


def settle(choice: LaneChoice, rate: Callable[[int], float]) -> list[int]:
    """Feed windows of 0.3 s until the choice is made; the lanes that were tried, in order."""
    tried: list[int] = []
    for _ in range(200):
        if choice.done:
            return tried
        lanes, _ = choice.current()
        if not tried or tried[-1] != lanes:
            tried.append(lanes)
        choice.record(rate(lanes) * 0.3, 0.3)
    raise AssertionError("the choice is never made")


@pytest.mark.parametrize(
    ("rates", "tried", "chosen"),
    [
        ({1: 100, 2: 110, 4: 130, 8: 125}, [8, 4, 2, 1, 4, 8], (4, 2)),
        ({1: 500, 2: 90, 4: 80, 8: 100}, [8, 4, 2], (8, 1)),
        ({1: 100, 2: 120, 4: 110, 8: 100}, [8, 4, 2, 1, 2, 4], (2, 4)),
        ({1: 100, 2: 101, 4: 101.5, 8: 101}, [8, 4, 2, 1, 4, 8], (1, 8)),
    ],
)
def test_the_fastest_split_of_the_cores_wins(
    rates: dict[int, float], tried: list[int], chosen: tuple[int, int]
) -> None:
    """The best rate wins, the search ends after two worse in a row, and lanes that gain under 2 % are not worth it."""
    choice = LaneChoice(8)
    assert settle(choice, lambda lanes: rates[lanes]) == tried
    assert choice.current() == chosen
    assert choice.rates == pytest.approx({(n, 8 // n): rates[n] for n in set(tried)})


def test_one_core_needs_no_search() -> None:
    """With one core, or one lane allowed, there is nothing to choose."""
    assert LaneChoice(1).done
    assert LaneChoice(1).current() == (1, 1)
    limited = LaneChoice(8, max_lanes=1)
    assert (limited.done, limited.current()) == (True, (1, 8))
    assert LaneChoice(8, max_lanes=4).candidates == [(4, 2), (2, 4), (1, 8)]


def test_lanes_chosen_earlier_are_used_if_they_still_can_be() -> None:
    """A learnt choice is taken over on the same kind of machine and searched anew on another."""
    assert LaneChoice(8, chosen=4).current() == (4, 2)
    assert LaneChoice(8, chosen=4).done
    assert not LaneChoice(6, chosen=4).done
    assert not LaneChoice(8, chosen=8, max_lanes=4).done


def test_the_first_record_of_each_candidate_only_warms_up() -> None:
    """Starting threads takes time that says nothing about the rate."""
    choice = LaneChoice(2, window_s=1.0)
    choice.record(1, 5.0)  # warm-up of (2, 1), very slow
    choice.record(100, 1.0)
    assert choice.current() == (1, 2)
    choice.record(1, 5.0)  # warm-up of (1, 2)
    choice.record(52.5, 0.5)
    choice.record(0, 0.0)  # no time passed: no measurement
    assert not choice.done
    choice.record(52.5, 0.5)
    assert choice.rates == {(2, 1): 100.0, (1, 2): 105.0}
    for _ in range(2):  # both once more: a slow second window changes nothing
        assert not choice.done
        choice.record(1, 5.0)
        choice.record(50, 1.0)
    assert (choice.done, choice.current()) == (True, (1, 2))
    assert choice.rates == {(2, 1): 100.0, (1, 2): 105.0}
    choice.record(1, 100.0)
    assert choice.current() == (1, 2), "once chosen it stays"


def test_a_candidate_far_behind_is_given_up_early() -> None:
    """A few micro-batches at half the best rate are enough; as many as lanes and one, since lanes may end together."""
    choice = LaneChoice(2, window_s=1.0)
    for _ in range(2):
        choice.record(100, 1.0)
    for _ in range(2):  # a warm-up, and one that may be an accident
        choice.record(5, 0.1)
        assert not choice.done
    choice.record(5, 0.1)
    assert (choice.done, choice.current()) == (True, (2, 1))
    other = LaneChoice(2, window_s=1.0)
    for units in (100, 100, 8, 8, 8):
        other.record(units, 1.0 if units == 100 else 0.1)
    assert not other.done, "not so far behind: its whole window is measured"


def test_lanes_are_measured_again_while_others_take_their_cores() -> None:
    """Windows in which lanes waited for cores are repeated, and the best one counts."""
    choice = LaneChoice(2, window_s=1.0)
    choice.record(50, 1.0, 1.0)
    for _ in range(2):
        choice.record(50, 1.0, 1.0)  # half of the two lanes' time
        assert choice.current() == (2, 1) and not choice.rates
    choice.record(100, 1.0, 0.1)
    assert choice.rates == {(2, 1): 100}
    for _ in range(2):
        choice.record(75, 1.0, 1.0)  # only N x 1 is repeated: it is the usual choice
    assert (choice.done, choice.current(), choice.steady) == (True, (2, 1), True)


def test_a_choice_made_among_others_is_not_kept() -> None:
    """If others compute all the time the search ends all the same, and says that it is not to be relied upon."""
    choice = LaneChoice(2, window_s=1.0)
    choice.record(50, 1.0, 1.0)
    for window in range(4):
        assert choice.current() == (2, 1)
        choice.record(40 + window, 1.0, 1.0)
    for _ in range(2):
        choice.record(80, 1.0, 0.1)
    assert (choice.done, choice.current(), choice.steady) == (True, (1, 2), False)
    assert choice.rates == {(2, 1): 43, (1, 2): 80}


def test_no_cores_are_refused() -> None:
    """A machine has at least one core."""
    with pytest.raises(ValueError, match="num_cores"):
        LaneChoice(0)
