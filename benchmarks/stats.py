"""Medians with their spread: every figure that is published is one of these."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

__all__ = ["Spread", "percentile", "ratios"]


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of `count` values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("a spread needs at least one value")
        return cls(statistics.median(values), min(values), max(values), len(values))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times our time theirs is, round by round: a machine that is slow for a while slows both sides of a round."""
    if len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} rounds against {len(ours)}")
    return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of 100 values do not exceed (nearest rank; no interpolation)."""
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[min(max(int(rank), 1), len(ordered)) - 1]
