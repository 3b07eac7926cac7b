"""memsafe.planning.speed: what a size takes is the lower envelope of what ran."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe.planning.speed import KEPT, Point, Sample, SpeedCurve, size_class


def curve(*samples: tuple[int, float]) -> SpeedCurve:
    made = SpeedCurve()
    for tokens, seconds in samples:
        made.observe(Sample(tokens, seconds))
    return made


def test_sizes_within_a_fifth_are_one_size() -> None:
    """Classes are half a doubling wide and cover everything, nothing included."""
    assert [size_class(tokens) for tokens in (0, 1, 2, 4, 256, 512)] == [0, 0, 2, 4, 16, 18]
    assert size_class(256) == size_class(230) == size_class(300) != size_class(362)


def test_nothing_measured_says_nothing() -> None:
    """An empty curve has no points, takes no time, and wants no size."""
    empty = SpeedCurve()
    assert (list(empty.points), empty.seconds(500), empty.host_seconds, empty.smallest(0.05, {})) == ([], 0.0, 0.0, 0)
    assert empty.count(256) == 0


@pytest.mark.parametrize(
    "sample",
    [
        Sample(0, 1.0),
        Sample(-5, 1.0),
        Sample(256, 0.0),
        Sample(256, -1.0),
        Sample(256, math.inf),
        Sample(256, math.nan),
        Sample(256, 1.0, None, 1.0),
        Sample(256, 1.0, None, -0.1),
    ],
)
def test_samples_that_cannot_be_are_ignored(sample: Sample) -> None:
    """No tokens, no time, or a share that is none: nothing is learnt, nothing breaks."""
    made = SpeedCurve()
    made.observe(sample)
    assert list(made.points) == []


def test_of_one_size_the_fastest_counts() -> None:
    """Others' work only slows: the fastest of up to three, the second fastest of more, as clocks err to either side."""
    assert curve((256, 3.0), (256, 1.0), (256, 2.0)).points == [Point(256, 1.0, 3)]
    assert curve((256, 3.0), (256, 1.0), (256, 2.0), (256, 1.1)).points == [Point(256, 1.1, 4)]
    assert curve((256, 3.0), (250, 1.0)).points == [Point(250, 1.0, 2)]
    assert curve((256, 3.0), (256, 1.0)).count(270) == 2


def test_the_first_use_of_a_kernel_is_set_aside() -> None:
    """A sample fifty times as slow changes nothing once the size was measured again."""
    made = curve((512, 5.0), (1024, 0.15))
    made.observe(Sample(512, 0.1))
    assert [point.seconds for point in made.points] == [0.1, 0.15]


def test_a_device_that_has_become_slower_is_followed() -> None:
    """Only the newest samples of a size are kept: after KEPT of them the old speed is forgotten."""
    made = curve(*[(512, 0.1)] * 20)
    for _ in range(KEPT - 2):
        made.observe(Sample(512, 0.3))
    assert made.points[0].seconds == 0.1
    for _ in range(2):
        made.observe(Sample(512, 0.3))
    assert made.points[0].seconds == 0.3


def test_seconds_never_fall_with_tokens() -> None:
    """A small size that happened to be slow is as fast as a larger one at least."""
    made = curve((256, 2.0), (1024, 1.0), (4096, 3.0))
    assert [point.seconds for point in made.points] == [1.0, 1.0, 3.0]
    assert [point.tokens for point in made.points] == [256, 1024, 4096]


@given(
    st.lists(
        st.tuples(st.integers(1, 1 << 20), st.floats(1e-6, 1e3), st.none() | st.floats(0, 1e2), st.floats(0, 0.99)),
        max_size=40,
    )
)
def test_any_samples_give_a_monotone_curve(rows: list[tuple[int, float, float | None, float]]) -> None:
    """Whatever ran: points rise in tokens, never fall in seconds, are finite; so is every answer, also after JSON."""
    made = SpeedCurve()
    for row in rows:
        made.observe(Sample(*row))
    for a, b in pairwise(made.points):
        assert a.tokens < b.tokens and a.seconds <= b.seconds
    asked = [made.seconds(1 << power) for power in range(24)]
    assert all(0 <= a <= b * (1 + 1e-9) < math.inf for a, b in pairwise(asked))
    lengths = {size_class(tokens): 3 for tokens, *_ in rows}
    assert 0 <= made.run_seconds(1024, lengths) < math.inf
    if made.points:
        assert made.points[0].tokens <= made.smallest(0.05, lengths, beyond=4) <= 4 * made.points[-1].tokens
        back = SpeedCurve.from_json(json.loads(json.dumps(made.to_json())))
        assert [point.tokens for point in back.points] == [point.tokens for point in made.points]
        assert [point.seconds for point in back.points] == pytest.approx([point.seconds for point in made.points])


def test_between_points_straight_lines_and_beyond_the_hulls_last_slope() -> None:
    """Launching limits the small sizes, work the large ones; beyond the largest the last slope goes on, noise or not."""
    made = curve((256, 1.0), (1024, 1.0), (4096, 4.0))
    assert made.seconds(100) == made.seconds(512) == 1.0
    assert made.seconds(2560) == pytest.approx(2.5)
    assert made.seconds(8192) == pytest.approx(4.0 + 4096 * 3.0 / 3072)
    noisy = curve((256, 1.0), (1024, 1.0), (2048, 2.6), (4096, 4.0))  # the third met a busy host
    assert noisy.seconds(8192) == pytest.approx(4.0 + 4096 * 3.0 / 3072)
    assert curve((256, 1.0)).seconds(512) == 1.0  # one size says nothing of a slope


def test_the_smallest_size_within_a_few_per_cent_is_found() -> None:
    """A launch of 10 ms and 10 us a token: five per cent of speed are lost at about 19,000 tokens, not before."""
    made = curve(*[(256 << step, 0.01 + (256 << step) * 1e-5) for step in range(9)])
    for within in (0.05, 0.2):
        found = made.smallest(within, {})
        best = made.seconds(65_536) / 65_536
        assert made.seconds(found) / found <= best / (1 - within)
        assert made.seconds(found * 0.8) / (found * 0.8) > best / (1 - within)
    assert made.smallest(0.0, {}) == 65_536
    assert made.smallest(0.05, {}, beyond=4) > made.smallest(0.05, {})


def test_long_texts_do_not_need_small_sizes_to_be_fast() -> None:
    """A text longer than a size has a micro-batch for itself: a run of long ones is as fast with small sizes."""
    made = curve(*[(256 << step, 0.01 + (256 << step) * 1e-5) for step in range(6)])
    long, short = {size_class(8192): 10}, {size_class(64): 1000}
    assert made.run_seconds(256, long) == pytest.approx(made.run_seconds(8192, long))
    assert made.run_seconds(256, short) > 3 * made.run_seconds(8192, short)
    assert made.smallest(0.05, long) == 256


def test_long_texts_attention_is_learnt_apart() -> None:
    """Samples of long texts do not count for sizes; what they show is how slow attention is, which runs of long texts have."""
    made = SpeedCurve()
    made.square_tokens = 1 / 4000  # of 4,000 tokens attention is half of all arithmetic
    for tokens in (512, 1024, 2048, 4096):
        made.observe(Sample(tokens, tokens * 1e-5, None, 0.01))
    seconds = [point.seconds for point in made.points]
    for _ in range(KEPT):
        made.observe(Sample(4000, 4000 * 1e-5 * (1 + 3), None, 0.5))  # attention is three times as slow as the rest
    assert [point.seconds for point in made.points] == pytest.approx(seconds, rel=0.05)
    assert made.to_json()["attention"] == pytest.approx(3.0, rel=0.1)
    long = {size_class(4096): 1}
    assert made.run_seconds(4096, long) == pytest.approx(4096e-5 * (1 + 3), rel=0.15)


def test_shorter_texts_replace_what_longer_ones_showed() -> None:
    """Until short texts come, longer ones have to do; then they are dropped, since they run at another rate."""
    made = SpeedCurve()
    for tokens in (1024, 4096):
        made.observe(Sample(tokens, tokens * 3e-5, None, 0.6))
    assert len(made.points) == 2
    made.observe(Sample(512, 512e-5, None, 0.02))
    assert [point.tokens for point in made.points] == [512]


def test_what_launching_takes_is_an_average_without_first_uses() -> None:
    """Half of the launches take 2 ms, half 4 ms, one half a second: 3 ms."""
    made = SpeedCurve()
    for host in (0.5, 0.002, 0.004, 0.002, 0.004):
        made.observe(Sample(256, 0.1, host))
    assert made.host_seconds == pytest.approx(0.003)
    assert made.points[0].seconds == 0.1
    made.observe(Sample(128, 1e-4, 0.003))
    assert made.points[0].seconds == made.host_seconds  # no micro-batch is faster than its launch


def test_a_curve_that_was_learnt_earlier_stands_against_a_slow_start() -> None:
    """The first forward of a process is slow: what was learnt counts until four samples of a size say otherwise."""
    made = SpeedCurve([Point(1024, 0.1, 8), Point(4096, 0.4, 8)])
    for seconds in (3.0, 0.11, 0.11):
        made.observe(Sample(1024, seconds))
    assert made.points[0].seconds == 0.1
    made.observe(Sample(4096, 0.3))
    assert made.points[1].seconds == 0.3  # faster counts at once


@pytest.mark.parametrize(("factor", "kept"), [(1.0, True), (1.4, True), (1.7, False), (0.5, False)])
def test_what_was_learnt_is_dropped_when_it_disagrees(factor: float, kept: bool) -> None:
    """Half as fast or twice as fast as what an earlier process found: all is learnt anew, from nothing."""
    made = SpeedCurve([Point(1024, 0.1, 8), Point(4096, 0.4, 8)])
    for _ in range(4):
        made.observe(Sample(1024, 0.1 * factor))
    assert [point.tokens for point in made.points] == ([1024, 4096] if kept else [])


@pytest.mark.parametrize(("factor", "kept"), [(2.5, True), (3.5, False)])
def test_what_is_far_off_is_dropped_after_two_samples(factor: float, kept: bool) -> None:
    """A card of another kind shows at once; two samples suffice where they are three times as slow, and no fewer."""
    made = SpeedCurve([Point(1024, 0.1, 8)])
    made.observe(Sample(1024, 0.1 * factor))
    assert made.points
    made.observe(Sample(1024, 0.1 * factor))
    assert bool(made.points) == kept


# -- keeping -------------------------------------------------------------------------------------------------------


def test_json_keeps_what_was_learnt() -> None:
    """Points, the slowness of attention and the launch come back."""
    made = curve((256, 0.01), (1024, 0.02), (1024, 0.021))
    made.observe(Sample(1024, 0.02, 0.004))
    made.observe(Sample(1024, 0.02, 0.004))
    back = SpeedCurve.from_json(json.loads(json.dumps(made.to_json())))
    assert back.points == made.points
    assert back.host_seconds == made.host_seconds == pytest.approx(0.004)
    assert back.to_json() == made.to_json()


GOOD: dict[str, Any] = {"points": [[256, 0.01, 3]], "attention": 2.0, "host_seconds": 0.001}


@pytest.mark.parametrize(
    "damage",
    [
        {"points": None},
        {"points": [[256, 0.01]]},
        {"points": [[256.0, 0.01, 3]]},
        {"points": [[True, 0.01, 3]]},
        {"points": [[0, 0.01, 3]]},
        {"points": [[1 << 40, 0.01, 3]]},
        {"points": [[256, 0, 3]]},
        {"points": [[256, -0.1, 3]]},
        {"points": [[256, math.nan, 3]]},
        {"points": [[256, math.inf, 3]]},
        {"points": [[256, 0.01, 0]]},
        {"points": [[256, "0.01", 3]]},
        {"points": [[256, 0.01, 3]] * 129},
        {"attention": None},
        {"attention": 0.1},
        {"attention": 9.0},
        {"attention": math.nan},
        {"host_seconds": None},
        {"host_seconds": -1.0},
        {"host_seconds": math.nan},
        {"host_seconds": "x"},
    ],
    ids=str,
)
def test_anything_else_is_a_value_error(damage: dict[str, Any]) -> None:
    """Each field is looked at."""
    assert SpeedCurve.from_json(GOOD).points == [Point(256, 0.01, 3)]
    with pytest.raises(ValueError):
        SpeedCurve.from_json({**GOOD, **damage})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(sorted(GOOD)), inner, max_size=3),
    max_leaves=12,
)


@given(json_values | st.fixed_dictionaries(dict.fromkeys(GOOD, json_values)))
def test_any_json_is_a_curve_or_a_value_error(state: Any) -> None:
    """Nothing else is raised, and what comes back answers."""
    try:
        made = SpeedCurve.from_json(state)
    except ValueError:
        return
    assert 0 <= made.seconds(1000) < math.inf and made.smallest(0.05, {}) >= 0


def test_noise_never_makes_a_curve_too_fast() -> None:
    """On 50 devices with one-sided noise of up to 30 % the envelope is never below the truth, mostly within 1 % above it."""
    above: list[float] = []
    for seed in range(50):
        rng, made = np.random.default_rng(seed), SpeedCurve()
        for step in range(6):
            tokens = 256 << step
            for _ in range(KEPT):
                slower = 1 + 0.3 * rng.random() ** 4
                made.observe(Sample(tokens, max(0.01, tokens * 1e-5) * slower))
        for point in made.points:
            truth = max(0.01, point.tokens * 1e-5)
            assert truth <= point.seconds * (1 + 1e-9)
            above.append(point.seconds / truth - 1)
    assert np.median(above) < 0.01 and max(above) < 0.1
