"""What happened, as data: events for a live hook, and the report of a finished run.

Sizes are bytes, times are seconds. No event and no report ever holds a user's text.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

from memsafe.config import format_bytes

__all__ = [
    "BudgetChanged",
    "CacheReleased",
    "Event",
    "EventHook",
    "FallbackUsed",
    "InputsTruncated",
    "MicroBatchDone",
    "ModelReloaded",
    "ModelUnloaded",
    "NonFiniteRedone",
    "OutOfMemory",
    "ReportBuilder",
    "RunReport",
    "Waited",
]


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. ``device`` is torch's name of it, such as ``"cuda:0"``."""

    device: str


@dataclass(frozen=True, slots=True)
class MicroBatchDone(Event):
    """A micro-batch finished. Byte figures are beyond the weights; ``measured_bytes`` is None where not measured."""

    sequences: int
    tokens: int
    computed_tokens: int
    predicted_bytes: int
    measured_bytes: int | None
    budget_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class OutOfMemory(Event):
    """The device refused memory. ``action``: what was decided, such as ``"retry"`` or ``"split"``."""

    sequences: int
    tokens: int
    predicted_bytes: int
    action: str


@dataclass(frozen=True, slots=True)
class BudgetChanged(Event):
    """The cap on a micro-batch moved. ``reason``: ``"shrink"`` or ``"grow"``."""

    cap_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class CacheReleased(Event):
    """Cached memory was given back to the device. ``reason``: ``"pressure"``, ``"failure"`` or ``"run"``."""

    released_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class FallbackUsed(Event):
    """A rung of the ladder was used for one input; ``rung`` is one of :data:`memsafe.config.FALLBACKS`."""

    rung: str
    index: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Waited(Event):
    """Neighbours held the memory; the worker waited."""

    seconds: float


@dataclass(frozen=True, slots=True)
class NonFiniteRedone(Event):
    """Rows came out of half precision as NaN or infinity and were computed again in float32."""

    rows: int


@dataclass(frozen=True, slots=True)
class InputsTruncated(Event):
    """Inputs were longer than the model takes and were cut to ``max_length`` tokens."""

    count: int
    max_length: int


@dataclass(frozen=True, slots=True)
class ModelUnloaded(Event):
    """Nobody had called for ``MemoryPolicy.unload_after_s``: the weights have left the device, which got ``released_bytes`` back."""

    released_bytes: int


@dataclass(frozen=True, slots=True)
class ModelReloaded(Event):
    """A call has come and the weights are back. ``seconds``: what the call waited for them, all devices together."""

    weights_bytes: int
    seconds: float


@runtime_checkable
class EventHook(Protocol):
    """Anything callable with an event. Called with one after another, in a thread that nothing else waits for: it may take its
    time, or call the model again. All events of a call have been told when it returns, unless one takes seconds. An
    exception in it is logged, once."""

    def __call__(self, event: Event, /) -> None: ...


@dataclass(frozen=True)
class RunReport:
    """What one run took and what happened in it. ``print(report)``, or rich's ``print`` for bars and colours; a table in a notebook."""

    device: str = ""
    path: str = ""
    """Which path ran and why: ``"packed"``, or ``"padded (why)"``."""
    dtype: str = ""
    texts: int = 0
    distinct_texts: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    micro_batches: int = 0
    largest_micro_batch_tokens: int = 0
    predicted_peak_bytes: int = 0
    """Largest prediction of an admitted micro-batch, beyond the weights."""
    measured_peak_bytes: int | None = None
    """Largest measured peak of tensors beyond the weights; None where nothing was measured."""
    process_peak_bytes: int | None = None
    """Largest size of the process (CPU: resident set; CUDA: reserved) seen during the run."""
    weights_bytes: int = 0
    budget_min_bytes: int | None = None
    budget_max_bytes: int | None = None
    out_of_memory: int = 0
    retries: int = 0
    splits: int = 0
    shrinks: int = 0
    grows: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    non_finite_rows: int = 0
    truncated: int = 0
    windowed: int = 0
    """Distinct texts that were cut into several windows (``long_documents``)."""
    windows: int = 0
    """Windows computed for them: what reading them whole cost, in inputs."""
    waited_s: float = 0.0
    released_bytes: int = 0
    tokenize_s: float = 0.0
    compute_s: float = 0.0
    """Seconds inside forwards, summed over lanes that ran side by side."""
    total_s: float = 0.0
    reload_s: float = 0.0
    """Seconds, before all others, that the call waited for weights which had left the device (``unload_after_s``)."""
    lanes: int = 1
    """How many micro-batches were on a device at most when one of this call began, that one and other calls' included."""
    notes: tuple[str, ...] = ()
    """What a user should know once: allocator settings in force, a path that could not be used, and why."""

    @property
    def padding_ratio(self) -> float:
        """Padding as a fraction of all computed tokens."""
        return 1 - self.tokens / self.computed_tokens if self.computed_tokens else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total_s if self.total_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, the derived ones included, ready for JSON."""
        return {**asdict(self), "padding_ratio": self.padding_ratio, "tokens_per_s": self.tokens_per_s}

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) in words, as they are printed."""

        def size(value: int | None) -> str:
            return "not measured" if value is None else format_bytes(value)

        measured = "" if self.measured_peak_bytes is None else "measured "
        rows = [
            ("device, path", f"{self.device} {self.dtype}, {self.path}"),
            ("texts", f"{self.texts:,} ({self.distinct_texts:,} distinct, {self.truncated:,} truncated)"),
            ("tokens", f"{self.tokens:,} at {self.tokens_per_s:,.0f} tokens/s; padding {self.padding_ratio:.1%}"),
            (
                "micro-batches",
                f"{self.micro_batches:,}, largest {self.largest_micro_batch_tokens:,} tokens, {self.lanes} at a time",
            ),
            (
                "memory beyond weights",
                f"predicted {size(self.predicted_peak_bytes)}, {measured}{size(self.measured_peak_bytes)}; "
                f"weights {size(self.weights_bytes)}",
            ),
            ("process peak", size(self.process_peak_bytes)),
            ("budget", f"{size(self.budget_min_bytes)} to {size(self.budget_max_bytes)}"),
            ("time", f"{self.total_s:.2f} s: tokenise {self.tokenize_s:.2f}, compute {self.compute_s:.2f}"),
        ]
        if self.reload_s:
            rows.append(("weights came back", f"in {self.reload_s:.2f} s"))
        if self.windowed:
            rows.insert(2, ("long texts", f"{self.windowed:,} in {self.windows:,} windows"))
        trouble = [
            (self.out_of_memory, f"{self.out_of_memory} out of memory"),
            (self.retries, f"{self.retries} retries"),
            (self.splits, f"{self.splits} splits"),
            (self.waited_s, f"waited {self.waited_s:.1f} s"),
            (self.non_finite_rows, f"{self.non_finite_rows} rows redone in float32"),
            *((count, f"{count} x {rung}") for rung, count in self.fallbacks.items()),
        ]
        rows.append(("recovered from", ", ".join(text for count, text in trouble if count) or "nothing"))
        rows.extend(("note", note) for note in self.notes)
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name:<22} {value}" for name, value in self.rows())

    def plot(self) -> Any:
        """Memory against budget, and where the time went, as a matplotlib Figure; over time: :meth:`memsafe.Recording.plot`.

        Raises :class:`MissingExtraError` without the extra ``plot``.
        """
        from memsafe.pictures.figure import summary_figure

        return summary_figure(self.to_dict())

    def __rich__(self) -> Any:
        from memsafe.pictures.terminal import report_view

        measured = self.measured_peak_bytes
        return report_view(
            self.rows(),
            title=f"{self.texts:,} texts in {self.total_s:.2f} s",
            used_bytes=self.predicted_peak_bytes if measured is None else measured,
            budget_bytes=self.budget_min_bytes,
        )

    def _repr_html_(self) -> str:
        from html import escape

        cells = "".join(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in self.rows())
        return f"<table>{cells}</table>"


class ReportBuilder:
    """Counts what happens to one call. Thread-safe; :meth:`build` freezes it into a :class:`RunReport`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {}
        self._fallbacks: Counter[str] = Counter()
        self._notes: list[str] = []

    def set(self, **values: Any) -> None:
        with self._lock:
            self._values.update(values)

    def add(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                self._values[name] = self._values.get(name, 0) + value

    def peak(self, **values: int | None) -> None:
        """Keep the largest value seen."""
        self._extreme(max, values)

    def least(self, **values: int | None) -> None:
        """Keep the smallest value seen."""
        self._extreme(min, values)

    def _extreme(self, choose: Any, values: dict[str, int | None]) -> None:
        with self._lock:
            for name, value in values.items():
                if value is not None:
                    known = self._values.get(name)
                    self._values[name] = value if known is None else choose(known, value)

    def fall_back(self, rung: str) -> None:
        with self._lock:
            self._fallbacks[rung] += 1

    def note(self, text: str) -> None:
        with self._lock:
            if text not in self._notes:
                self._notes.append(text)

    def build(self) -> RunReport:
        with self._lock:
            return RunReport(**self._values, fallbacks=dict(self._fallbacks), notes=tuple(self._notes))
