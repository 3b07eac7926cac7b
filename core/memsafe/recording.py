"""A hook that keeps what happens, for pictures: :class:`Recording`, for ``Embedder(..., hooks=[recording])``."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memsafe.config import format_bytes
from memsafe.events import (
    BudgetChanged,
    CacheReleased,
    Event,
    FallbackUsed,
    InputsTruncated,
    MicroBatchDone,
    ModelReloaded,
    ModelUnloaded,
    NonFiniteRedone,
    OutOfMemory,
    RunReport,
    Waited,
)
from memsafe.pictures.page import page
from memsafe.pictures.timeline import Bar, Mark, Timeline

__all__ = ["Recording"]

_REMEMBERED = 64


class Recording:
    """Keeps timed events of one run or many, on one device or several, and draws them. Thread-safe, in bounded memory.

    The clock starts with the first event; of each the time is noted at which the hook is told, moments after it happened.

    Example:
        >>> recording = Recording()
        >>> embedder = Embedder("BAAI/bge-m3", hooks=[recording])  # doctest: +SKIP
        >>> run = embedder.run(texts)  # doctest: +SKIP
        >>> recording.save("run.html", run.report)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.timeline = Timeline()
        self._lock = threading.Lock()
        self._began: float | None = None
        self._seen: deque[Event] = deque(maxlen=_REMEMBERED)

    def __call__(self, event: Event, /) -> None:
        now = time.perf_counter()
        with self._lock:
            if any(event is known for known in self._seen):  # calls that share a micro-batch are each told of it
                return
            self._seen.append(event)
            lasted = event.seconds if isinstance(event, (MicroBatchDone, Waited, ModelReloaded)) else 0.0
            if self._began is None:
                self._began = now - lasted
            at_s = now - self._began
            if isinstance(event, MicroBatchDone):
                bar = Bar(
                    event.device,
                    max(at_s - lasted, 0.0),
                    at_s,
                    event.tokens,
                    event.predicted_bytes,
                    event.measured_bytes,
                    event.budget_bytes,
                )
                self.timeline.add(bar, sized_tokens=event.computed_tokens)
            else:
                kind, detail = _told(event)
                self.timeline.mark(Mark(event.device, at_s, kind, detail))

    def page(self, report: RunReport | Mapping[str, str] | None = None, *, title: str = "memsafe run") -> str:
        """One self-contained HTML page. report: of the run, or rows of a table by their names."""
        rows = dict(report.rows()) if isinstance(report, RunReport) else dict(report or {})
        with self._lock:
            return page(self.timeline, rows, title=title)

    def save(
        self,
        path: str | os.PathLike[str],
        report: RunReport | Mapping[str, str] | None = None,
        *,
        title: str = "memsafe run",
    ) -> None:
        """Write :meth:`page` to `path`. Raises what the file system raises."""
        Path(path).write_text(self.page(report, title=title), encoding="utf-8")

    def plot(self) -> Any:
        """A matplotlib Figure of the same. Raises :class:`MissingExtraError` without the extra ``plot``."""
        from memsafe.pictures.figure import timeline_figure

        with self._lock:
            return timeline_figure(self.timeline)

    def __rich__(self) -> Any:
        from memsafe.pictures.terminal import timeline_view

        with self._lock:
            return timeline_view(self.timeline)

    def _repr_html_(self) -> str:
        with self._lock:
            return page(self.timeline, {}, title="memsafe run", whole=False)


def _told(event: Event) -> tuple[str, str]:
    """Kind and detail of the mark for an event that is no micro-batch."""
    if isinstance(event, OutOfMemory):
        kind = "split" if event.action == "split" else "oom"
        what = f"{event.sequences:,} inputs, {event.tokens:,} tokens, predicted {format_bytes(event.predicted_bytes)}"
        return kind, f"{what}; then {event.action}"
    if isinstance(event, BudgetChanged):
        return ("grow" if event.reason == "grow" else "shrink"), f"cap on a micro-batch {format_bytes(event.cap_bytes)}"
    if isinstance(event, CacheReleased):
        return "release", f"{format_bytes(event.released_bytes)} ({event.reason})"
    if isinstance(event, FallbackUsed):
        return "fallback", f"{event.rung} for input {event.index:,} of {event.tokens:,} tokens"
    if isinstance(event, Waited):
        return "wait", f"{event.seconds:.2f} s"
    if isinstance(event, NonFiniteRedone):
        return "non_finite", f"{event.rows:,} rows"
    if isinstance(event, InputsTruncated):
        return "cut", f"{event.count:,} at {event.max_length:,} tokens"
    if isinstance(event, ModelUnloaded):
        return "unload", f"{format_bytes(event.released_bytes)} given back"
    if isinstance(event, ModelReloaded):
        return "reload", f"{format_bytes(event.weights_bytes)} in {event.seconds:.2f} s"
    return "other", type(event).__name__
