"""What a run over a corpus says of itself: while it goes on, and at its end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from memsafe.config import format_bytes
from memsafe.events import RunReport

__all__ = ["CorpusProgress", "CorpusReport", "Totals"]


@dataclass(frozen=True)
class CorpusProgress:
    """How far a run is. texts: done, earlier runs' included. total: of the source, None if it does not say. computed, tokens:
    by this run. seconds: since it began. blocks: finished."""

    texts: int
    total: int | None
    computed: int
    tokens: int
    seconds: float
    blocks: int

    @property
    def texts_per_s(self) -> float:
        return self.computed / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest takes if it goes on like this; None if nobody knows how much that is."""
        return (self.total - self.texts) / self.texts_per_s if self.total and self.computed else None


@dataclass(frozen=True)
class CorpusReport:
    """What a run over a corpus did. ``texts = skipped + reused + computed`` if it is complete.

    skipped: that an earlier run had finished. reused: rows taken from the store that was updated. computed: by this run, equal
    texts of a block once. dropped: rows of the old store whose text is gone. tokens, truncated: of this run. blocks: of the store.
    """

    path: str
    complete: bool
    texts: int
    skipped: int
    reused: int
    computed: int
    dropped: int
    blocks: int
    tokens: int
    truncated: int
    micro_batches: int
    out_of_memory: int
    splits: int
    fallbacks: dict[str, int]
    measured_peak_bytes: int | None
    process_peak_bytes: int | None
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) in words, as they are printed."""
        parts = [(self.computed, "computed"), (self.reused, "reused"), (self.skipped, "finished before")]
        return [
            ("store", f"{self.path}{'' if self.complete else ' (not complete: run the same again to go on)'}"),
            (
                "texts",
                f"{self.texts:,}: {', '.join(f'{count:,} {what}' for count, what in parts)}; {self.dropped:,} dropped",
            ),
            ("tokens", f"{self.tokens:,} at {self.tokens_per_s:,.0f} tokens/s; {self.truncated:,} texts truncated"),
            ("blocks", f"{self.blocks:,}; {self.micro_batches:,} micro-batches"),
            (
                "process peak",
                "not measured" if self.process_peak_bytes is None else format_bytes(self.process_peak_bytes),
            ),
            ("time", f"{self.seconds:.2f} s"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:<22} {value}" for name, value in self.rows())

    def __rich__(self) -> Any:
        from memsafe.pictures.terminal import report_view

        return report_view(self.rows(), title=f"{self.texts:,} texts in {self.seconds:.2f} s")

    def _repr_html_(self) -> str:
        from html import escape

        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self.rows())
        return f"<table>{cells}</table>"


class Totals:
    """Sums of the reports of blocks."""

    def __init__(self) -> None:
        self.skipped = self.reused = self.computed = self.tokens = self.truncated = 0
        self.micro_batches = self.out_of_memory = self.splits = 0
        self.fallbacks: dict[str, int] = {}
        self.peaks: dict[str, int | None] = {"measured_peak_bytes": None, "process_peak_bytes": None}

    def add(self, report: RunReport) -> None:
        for name in ("tokens", "truncated", "micro_batches", "out_of_memory", "splits"):
            setattr(self, name, getattr(self, name) + getattr(report, name))
        for rung, count in report.fallbacks.items():
            self.fallbacks[rung] = self.fallbacks.get(rung, 0) + count
        for name, known in self.peaks.items():
            now = getattr(report, name)
            self.peaks[name] = known if now is None else max(now, known or 0)
