"""How long a micro-batch takes, by its tokens: the lower envelope of what ran.

Other work on the machine, the first use of a kernel and a busy neighbour only ever make a micro-batch slower, so of those
of about one size the fastest tell what the size takes. Nothing is asked about what was planned: a sample counts for
the tokens that it really had.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memsafe.planning.fit import FloatArray

__all__ = ["Point", "Sample", "SpeedCurve", "size_class"]

KEPT = 8
"""Newest samples that are kept of each size: a device that has become slower or faster is followed."""
_SHORT = 0.15, 1.5
"""Samples tell about sizes if attention between tokens is at most this share of their arithmetic, or at most so many times
the least share seen: long texts run at another rate, and are mostly larger than any size worth having."""
_LONG = 0.4
"""From this share on a sample tells how much slower attention is than the rest."""
_DISAGREES = {4: 1.5, 2: 3.0}
"""All is learnt anew where what was learnt earlier turns out wrong: where so many micro-batches of its size were so many times
as fast, or as slow."""


_APART = 1.3
"""Sizes that are nearer to each other say nothing of the slope between them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One micro-batch that ran.

    tokens: computed, padding included. seconds: of the device, from when it could begin (a CPU lane's processor time).
    host_seconds: of the thread that launched it, None where nothing is launched; the two overlap those of other micro-batches,
    so that the longer one tells how many there can be. attention_share: of its arithmetic, that grows with squares of lengths.
    """

    tokens: int
    seconds: float
    host_seconds: float | None = None
    attention_share: float = 0.0

    @property
    def attention_ratio(self) -> float:
        """Arithmetic of attention, per arithmetic of all else."""
        return self.attention_share / (1 - self.attention_share)


class Point(NamedTuple):
    """What a size takes: `tokens` computed tokens in `seconds`, as `samples` measurements show."""

    tokens: int
    seconds: float
    samples: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def size_class(tokens: int) -> int:
    """What is of one class is of about one size: the nearest power of the square root of two."""
    return round(2 * math.log2(max(tokens, 1)))


class SpeedCurve:
    """Seconds by tokens, learnt from every micro-batch. learnt: the points of an earlier process.

    :attr:`points` are what was measured, one for each size; between them seconds are interpolated, and beyond the largest
    they grow as between the last corners of the points' lower convex hull, which noise, being one-sided, seldom passes.
    """

    def __init__(self, learnt: Iterable[Point] = ()) -> None:
        self.square_tokens = 0.0
        """The arithmetic of attention per pair of tokens, as a share of all other arithmetic per token. Not kept."""
        self._learnt = {size_class(point.tokens): point for point in learnt}
        self._samples: dict[int, deque[Sample]] = {}
        self._least_share = 1.0
        self._host_seconds: deque[float] = deque(maxlen=4 * KEPT)
        self._slowness: deque[float] = deque([2.0], maxlen=KEPT)  # of attention, per operation, against all else
        self._points: list[Point] | None = None
        self._slope = 0.0
        self._version = 0  # of what was learnt
        self._tables: dict[tuple[int, float, int], tuple[NDArray[np.int64], FloatArray]] = {}

    # learning

    def observe(self, sample: Sample) -> None:
        """Learn from one micro-batch. Those without tokens, or that took no time, say nothing."""
        if sample.tokens < 1 or not 0 < sample.seconds < math.inf or not 0 <= sample.attention_share < 1:
            return
        if sample.host_seconds is not None:
            self._host_seconds.append(sample.host_seconds)
        if sample.attention_share >= _LONG:
            self._learn_slowness(sample)
        self._points = None
        self._version += 1
        if not self._is_short(sample):
            return
        size = size_class(sample.tokens)
        self._samples.setdefault(size, deque(maxlen=KEPT)).append(sample)
        known, fresh = self._learnt.get(size), self._fresh().get(size)
        if known is not None and fresh is not None and _disagrees(fresh, known):
            self._learnt.clear()
            self._samples.clear()

    def _is_short(self, sample: Sample) -> bool:
        """Whether its texts are short enough to tell about sizes; drops earlier samples that no longer are."""
        if sample.attention_share < self._least_share:
            self._least_share = sample.attention_share
            limit = max(_SHORT[0], _SHORT[1] * self._least_share)
            kept = {
                size: deque((s for s in samples if s.attention_share <= limit), KEPT)
                for size, samples in self._samples.items()
            }
            self._samples = {size: samples for size, samples in kept.items() if samples}
        return sample.attention_share <= max(_SHORT[0], _SHORT[1] * self._least_share)

    def _learn_slowness(self, sample: Sample) -> None:
        per_token = self._seconds_per_token()
        if not per_token or sample.seconds <= 1.5 * self.host_seconds:
            return
        linear = max(per_token * sample.tokens, self.host_seconds)
        slow = (sample.seconds - linear) / (sample.attention_ratio * per_token * sample.tokens)
        self._slowness.append(min(max(slow, 0.5), 8.0))

    @property
    def _slow(self) -> float:
        return sorted(self._slowness)[len(self._slowness) // 2]

    def _seconds_per_token(self) -> float:
        """Of all arithmetic but attention's: the least that any sample shows."""
        slow = self._slow
        rates = [s.seconds / s.tokens / (1 + slow * s.attention_ratio) for kept in self._samples.values() for s in kept]
        return min((*rates, *(point.seconds / point.tokens for point in self._learnt.values())), default=0.0)

    def _fresh(self) -> dict[int, Point]:
        """The points of this process's samples, by size class."""
        attention = self._slow * self._seconds_per_token()
        return {
            size: _lowest(
                [(max(s.seconds - attention * s.attention_ratio * s.tokens, s.seconds / 2), s.tokens) for s in samples]
            )
            for size, samples in self._samples.items()
        }

    # asking

    @property
    def points(self) -> Sequence[Point]:
        """One for each size that was measured, smallest first, as texts so short would take it that attention is nothing.
        Seconds never fall with tokens: a small micro-batch cannot take longer than a larger one did."""
        if self._points is None:
            found = dict(self._learnt)
            for size, point in self._fresh().items():
                known = found.get(size)
                # What was learnt earlier stands against a few slow samples: the first forward of a process always is one.
                found[size] = point if known is None or point.samples >= 4 or point.rate > known.rate else known
            points: list[Point] = []
            most, host = math.inf, self.host_seconds
            for size in sorted(found, reverse=True):
                most = max(min(found[size].seconds, most), host)
                points.append(Point(found[size].tokens, most, found[size].samples))
            self._points = points[::-1]
            self._slope = _last_slope(self._points)
        return self._points

    def count(self, tokens: int) -> int:
        """Measurements of about this size."""
        size = size_class(tokens)
        return next((point.samples for point in self.points if size_class(point.tokens) == size), 0)

    @property
    def host_seconds(self) -> float:
        """What launching one micro-batch takes on average, whatever is in it; 0 if nothing is launched. A slow host slows every
        run, so that this is no envelope; only what is far off (a kernel's first use) is left out."""
        ordered = sorted(self._host_seconds)
        usual = [seconds for seconds in ordered if seconds <= 2 * ordered[(len(ordered) - 1) // 2]]
        return sum(usual) / len(usual) if usual else 0.0

    def seconds(self, tokens: float) -> float:
        """What `tokens` are expected to take; 0 if nothing was measured."""
        return float(self._seconds(np.array([tokens], dtype=np.float64))[0]) if self.points else 0.0

    def _seconds(self, tokens: FloatArray) -> FloatArray:
        points = self.points
        measured = np.interp(tokens, [point.tokens for point in points], [point.seconds for point in points])
        return np.asarray(measured + self._slope * np.maximum(tokens - points[-1].tokens, 0.0))

    def run_seconds(self, tokens: int, lengths: Mapping[int, int]) -> float:
        """What texts of these `lengths` (how many of each :func:`size_class`) take in micro-batches of at most `tokens`.

        A text longer than that has one for itself. Attention within texts, which no size changes, is counted as well. 0 if
        nothing was measured.
        """
        if not self.points:
            return 0.0
        return float(self._run_seconds(np.array([tokens]), lengths)[0])

    def _run_seconds(self, sizes: NDArray[np.int64], lengths: Mapping[int, int]) -> FloatArray:
        if not lengths:
            return np.asarray(self._seconds(sizes.astype(np.float64)) / np.maximum(sizes, 1))
        length = np.exp2(np.fromiter(lengths.keys(), np.float64, len(lengths)) / 2)
        count = np.fromiter(lengths.values(), np.float64, len(lengths))
        filled = np.maximum(sizes[:, None], length[None, :])
        attention = self._slow * self.square_tokens * self._slope  # no more than was seen that tokens take
        return np.asarray(
            self._seconds(filled) * length / filled @ count + attention * float(count @ (length * length))
        )

    def smallest(self, within: float, lengths: Mapping[int, int], *, beyond: float = 1.0) -> int:
        """The fewest tokens, not below the smallest measured, with which a run takes at most 1 / (1 - `within`) times what it
        takes at best, among sizes up to `beyond` times the largest measured. 0 if nothing was measured."""
        if not self.points:
            return 0
        sizes, times = self._table(lengths, beyond)
        return int(sizes[np.argmax(times <= times.min() / (1 - within))])

    def smallest_at(self, rate: float, lengths: Mapping[int, int]) -> int | None:
        """The smallest size measured with which texts of these `lengths` run at `rate` tokens per second or faster; None without."""
        if not self.points or not lengths:
            return None
        sizes = np.array([point.tokens for point in self.points])
        tokens = sum(count * math.pow(2, size / 2) for size, count in lengths.items())
        enough = self._run_seconds(sizes, lengths) <= tokens / rate
        return int(sizes[np.argmax(enough)]) if enough.any() else None

    def _table(self, lengths: Mapping[int, int], beyond: float) -> tuple[NDArray[np.int64], FloatArray]:
        """Sizes, four a doubling, and what a run takes with each; kept, since it is asked for several times in a row."""
        key = (self._version, beyond, sum(lengths.values()))
        if key not in self._tables:
            if any(known[0] != self._version for known in self._tables):
                self._tables.clear()
            least, most = self.points[0].tokens, beyond * self.points[-1].tokens
            steps = math.ceil(4 * math.log2(most / least))
            sizes = np.minimum(np.rint(least * np.exp2(np.arange(steps + 1) / 4)), most).astype(np.int64)
            self._tables[key] = sizes, self._run_seconds(sizes, lengths)
        return self._tables[key]

    # keeping

    def to_json(self) -> dict[str, Any]:
        """What was learnt, for :meth:`from_json` of another process."""
        points = [list(point) for point in self.points]
        return {"points": points, "attention": self._slow, "host_seconds": self.host_seconds}

    @classmethod
    def from_json(cls, state: object) -> SpeedCurve:
        """The curve that knows what :meth:`to_json` gave. Raises ``ValueError`` for anything else."""
        names = ("points", "attention", "host_seconds")
        rows, slow, host = (state.get(name) if isinstance(state, dict) else None for name in names)
        if not isinstance(slow, float) or not 0.5 <= slow <= 8:
            raise ValueError("not a speed curve")
        if not isinstance(host, (int, float)) or not 0 <= host < 1e6:
            raise ValueError("seconds out of range")
        if not isinstance(rows, list) or len(rows) > 128:
            raise ValueError("not the points of a speed curve")
        points = []
        for row in rows:
            if not isinstance(row, list) or len(row) != 3:
                raise ValueError("not a point of a speed curve")
            tokens, seconds, count = row
            whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (tokens, count))
            if not whole or not 0 < tokens < 1 << 40 or not 0 < count < 1 << 20:
                raise ValueError("a number out of range")
            if not isinstance(seconds, float) or not 0 < seconds < 1e6:
                raise ValueError("seconds out of range")
            points.append(Point(tokens, seconds, count))
        curve = cls(points)
        curve._slowness[0] = slow
        if host:
            curve._host_seconds.extend([host] * 2)
        return curve


def _lowest(samples: Sequence[tuple[float, int]]) -> Point:
    """The fastest of (seconds, tokens); of four or more the second fastest, since a clock may err to either side."""
    ordered = sorted(samples, key=lambda sample: sample[0] / sample[1])
    seconds, tokens = ordered[1] if len(ordered) >= 4 else ordered[0]
    return Point(tokens, seconds, len(ordered))


def _disagrees(fresh: Point, known: Point) -> bool:
    ratio = max(fresh.rate / known.rate, known.rate / fresh.rate)
    return any(fresh.samples >= samples and ratio > factor for samples, factor in _DISAGREES.items())


def _last_slope(points: Sequence[Point]) -> float:
    """Seconds per token at the end of the lower convex hull, between corners that are well apart; never more than the largest
    takes per token. 0 if nothing shows that more takes longer."""
    hull: list[Point] = []
    for point in points:
        while len(hull) >= 2 and _steepness(hull[-2], hull[-1]) >= _steepness(hull[-2], point):
            hull.pop()
        hull.append(point)
    before = next((point for point in hull[::-1] if _APART * point.tokens <= hull[-1].tokens), None)
    return min(_steepness(before, hull[-1]), 1 / hull[-1].rate) if before is not None else 0.0


def _steepness(a: Point, b: Point) -> float:
    return (b.seconds - a.seconds) / (b.tokens - a.tokens)
