"""How long the texts are: given as numbers, as a few words of a distribution, or counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from memsafe.errors import ConfigError

__all__ = ["Lengths", "of_distribution", "of_numbers", "parse"]

_REMEDY = "give numbers of tokens, or 'median=300,longest=8192,count=1000'"
_COUNT = 1000
_SPREAD = 1.0
"""Sigma of the log-normal distribution that corpora of passages have in the project's benchmarks."""
_VERY_LONG = 0.01
"""The share of texts near the longest, likewise."""


@dataclass(frozen=True)
class Lengths:
    """How many texts there are of each number of tokens, special tokens included. said: where the numbers are from."""

    counts: Mapping[int, int]
    said: str

    @property
    def texts(self) -> int:
        return sum(self.counts.values())

    @property
    def tokens(self) -> int:
        return sum(length * count for length, count in self.counts.items())

    @property
    def longest(self) -> int:
        return max(self.counts, default=0)

    @property
    def median(self) -> int:
        left = (self.texts + 1) // 2
        for length in sorted(self.counts):
            left -= self.counts[length]
            if left <= 0:
                return length
        return 0

    def share_longer(self, length: int) -> float:
        """The share of texts with more than `length` tokens."""
        return sum(count for n, count in self.counts.items() if n > length) / max(self.texts, 1)

    def cut(self, max_length: int) -> Lengths:
        """The same, cut after `max_length` tokens."""
        counts: Counter[int] = Counter()
        for length, count in self.counts.items():
            counts[min(length, max_length)] += count
        return Lengths(counts, self.said)


def of_numbers(numbers: Sequence[int], said: str = "lengths as given") -> Lengths:
    """Raises :class:`ConfigError` for what is no number of tokens."""
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"lengths: got {number!r}; {_REMEDY}")
    if not numbers:
        raise ConfigError(f"lengths: got none; {_REMEDY}")
    return Lengths(Counter(numbers), said)


def of_distribution(median: int, longest: int, count: int = _COUNT) -> Lengths:
    """Log-normal around `median` (sigma 1), one in a hundred between half of `longest` and `longest`: as corpora are. Always the
    same: quantiles, no chance."""
    long = max(round(count * _VERY_LONG), 1) if longest > median else 0
    rest = max(count - long, 1)
    normal = NormalDist(math.log(median), _SPREAD)
    drawn = [round(math.exp(normal.inv_cdf((place + 0.5) / rest))) for place in range(rest)]
    drawn += [round(longest * (0.5 + 0.5 * (place + 1) / long)) for place in range(long)]
    counts = Counter(min(max(length, 1), longest) for length in drawn)
    return Lengths(counts, f"made up: {count:,} texts, median {median:,} tokens, longest {longest:,}")


def parse(lengths: Any) -> Lengths:
    """`lengths` as the user gives them: a :class:`Lengths`, numbers, a mapping or a string such as ``"median=300,longest=8192"``.

    Raises :class:`ConfigError` for anything else."""
    if isinstance(lengths, Lengths):
        return lengths
    if isinstance(lengths, str):
        lengths = _pairs(lengths)
    if isinstance(lengths, Mapping):
        given = {str(name): value for name, value in lengths.items()}
        unknown = sorted(set(given) - {"median", "longest", "count"})
        if unknown or "median" not in given:
            raise ConfigError(f"lengths: got {', '.join(sorted(given)) or 'nothing'}; {_REMEDY}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"lengths: {name} is {value!r}; {_REMEDY}")
        longest = max(given.get("longest", given["median"]), given["median"])
        return of_distribution(given["median"], longest, given.get("count", _COUNT))
    if isinstance(lengths, (bytes, int, float)) or not hasattr(lengths, "__iter__"):
        raise ConfigError(f"lengths: got a {type(lengths).__name__}; {_REMEDY}")
    return of_numbers([int(n) if hasattr(n, "__index__") and not isinstance(n, bool) else n for n in lengths])


def _pairs(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if not value.replace("_", "").isdigit():
            raise ConfigError(f"lengths: got {text!r}; {_REMEDY}")
        found[name] = int(value)
    return found
