"""What happened in a run over time, in bounded memory: the data behind every picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

__all__ = ["MARKS", "Bar", "Mark", "Size", "Timeline"]

MARKS = {
    "oom": ("✕", "out of memory"),
    "split": ("÷", "out of memory, then split"),
    "fallback": ("◆", "fallback"),
    "non_finite": ("∞", "rows redone in float32"),
    "shrink": ("▼", "budget shrunk"),
    "grow": ("▲", "budget grown"),
    "wait": ("‖", "waited for neighbours"),
    "release": ("↺", "memory released"),
    "cut": ("✂\ufe0e", "inputs cut"),
    "unload": ("↥", "weights left"),
    "reload": ("↧", "weights came back"),
    "other": ("•", "something else"),
}
"""Kinds of marks: their sign, and what it means. The first four are trouble, and are drawn through the picture."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A micro-batch, or neighbours in time that were put together: sums of counts, largest bytes, the smallest budget.

    start_s, end_s: since the recording began. measured_bytes: None where nothing was measured. Bytes are beyond the weights.
    """

    device: str
    start_s: float
    end_s: float
    tokens: int
    predicted_bytes: int
    measured_bytes: int | None
    budget_bytes: int
    micro_batches: int = 1

    @property
    def used_bytes(self) -> int:
        """As measured, or else as predicted."""
        return self.predicted_bytes if self.measured_bytes is None else self.measured_bytes

    def with_next(self, other: Bar) -> Bar:
        measured = [each.measured_bytes for each in (self, other) if each.measured_bytes is not None]
        return replace(
            self,
            start_s=min(self.start_s, other.start_s),
            end_s=max(self.end_s, other.end_s),
            tokens=self.tokens + other.tokens,
            predicted_bytes=max(self.predicted_bytes, other.predicted_bytes),
            measured_bytes=max(measured, default=None),
            budget_bytes=min(self.budget_bytes, other.budget_bytes),
            micro_batches=self.micro_batches + other.micro_batches,
        )


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a moment. kind: of :data:`MARKS`; detail: a few words."""

    device: str
    at_s: float
    kind: str
    detail: str


@dataclass(slots=True)
class Size:
    """Micro-batches of about one size: how many, their tokens and their seconds in forwards."""

    micro_batches: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Timeline:
    """Bars, marks and points of a run. However long it is, no more than `most` of each are kept: neighbours in time are put
    together, of marks of one kind every second one goes. :attr:`counts` and :attr:`sizes` stay exact.

    points: (predicted, measured) bytes of micro-batches that were measured. sizes: by tokens, rounded to an eighth of a doubling.
    """

    most: int = 1000
    bars: dict[str, list[Bar]] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    points: list[tuple[int, int]] = field(default_factory=list)
    sizes: dict[int, Size] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    micro_batches: int = 0
    tokens: int = 0

    def add(self, bar: Bar, *, sized_tokens: int) -> None:
        """One micro-batch more. sized_tokens: what its forward computed, padding included."""
        bars = self.bars.setdefault(bar.device, [])
        bars.append(bar)
        self.micro_batches += 1
        self.tokens += bar.tokens
        size = self.sizes.setdefault(_rounded(sized_tokens), Size())
        size.micro_batches += 1
        size.tokens += sized_tokens
        size.seconds += bar.end_s - bar.start_s
        if bar.measured_bytes is not None:
            self.points.append((bar.predicted_bytes, bar.measured_bytes))
        if len(bars) > self.most:
            bars.sort(key=lambda each: each.end_s)
            pairs = [one.with_next(other) for one, other in zip(bars[::2], bars[1::2], strict=False)]
            self.bars[bar.device] = pairs + bars[len(pairs) * 2 :]
        if len(self.points) > self.most:
            self.points = self.points[::2]

    def mark(self, mark: Mark) -> None:
        self.marks.append(mark)
        self.counts[mark.kind] += 1
        if len(self.marks) > self.most:
            (kind, _), *_ = Counter(each.kind for each in self.marks).most_common(1)
            seen: Counter[str] = Counter()
            kept = []
            for each in self.marks:
                seen[each.kind] += 1
                if each.kind != kind or seen[kind] % 2:
                    kept.append(each)
            self.marks = kept

    @property
    def seconds(self) -> float:
        """From the beginning to the last thing that happened."""
        ends = [bar.end_s for bars in self.bars.values() for bar in bars]
        return max([*ends, *(mark.at_s for mark in self.marks)], default=0.0)

    def peaks(self, device: str, bins: int) -> list[int]:
        """The most bytes that a bar of `device` took in each of `bins` equal parts of the time; 0 where none was."""
        width = self.seconds / bins
        peaks = [0] * bins
        for bar in self.bars.get(device, ()):
            first, last = (min(int(at_s / width), bins - 1) if width else 0 for at_s in (bar.start_s, bar.end_s))
            for place in range(first, last + 1):
                peaks[place] = max(peaks[place], bar.used_bytes)
        return peaks

    def rates(self, bins: int) -> list[float]:
        """Tokens per second in each of `bins` equal parts of the time, a bar's tokens spread evenly over it."""
        width = self.seconds / bins
        if width <= 0:
            return [0.0] * bins
        rates = [0.0] * bins
        for bars in self.bars.values():
            for bar in bars:
                length = max(bar.end_s - bar.start_s, 1e-9)
                first = min(int(bar.start_s / width), bins - 1)
                for place in range(first, min(int(bar.end_s / width), bins - 1) + 1):
                    inside = min(bar.end_s, (place + 1) * width) - max(bar.start_s, place * width)
                    rates[place] += bar.tokens * max(inside, 0.0) / length / width
        return rates


def _rounded(tokens: int) -> int:
    """`tokens` with its three leading bits: sizes that differ by less are one."""
    shift = max(tokens.bit_length() - 3, 0)
    return tokens >> shift << shift
