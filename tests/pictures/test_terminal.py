"""Reports and recordings as rich draws them: narrow enough, true to their figures, in ASCII where blocks cannot be shown."""

from __future__ import annotations

import io
from typing import Any

import pytest

from memsafe import Recording, RunReport
from memsafe.config import GiB, MiB
from memsafe.events import FallbackUsed, MicroBatchDone, OutOfMemory
from memsafe.pictures.terminal import Line
from memsafe.pictures.timeline import Bar, Timeline
from memsafe.stores.reports import CorpusReport

console = pytest.importorskip("rich.console", reason="the terminal's view needs rich (the extra cli)")

REPORT = RunReport(
    device="cpu", path="padded (it [red]differs[/])", texts=7, total_s=2.5, measured_peak_bytes=256 * MiB,
    predicted_peak_bytes=300 * MiB, budget_min_bytes=GiB, out_of_memory=2, notes=("[bold]a note[/bold]",),
)  # fmt: skip


def drawn(what: Any, *, width: int = 80, encoding: str = "utf-8", colors: str | None = None) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    shown = console.Console(file=file, width=width, force_terminal=colors is not None, color_system=colors)
    shown.print(what)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def test_a_report_shows_its_rows_and_its_share_of_the_budget() -> None:
    """Every figure of the printed report, a quarter of the budget as a quarter of the bar, and nothing read as markup."""
    text = drawn(REPORT)
    flat = " ".join(text.replace("│", " ").split())
    assert "7 texts in 2.50 s" in text and "25.0% of 1.0 GiB" in text
    assert text.count("█") == 6 and text.count("░") == 18
    for name, value in REPORT.rows():
        assert name in text and " ".join(value.split()) in flat
    assert "[red]differs[/]" in text and "[bold]a note[/bold]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_trouble_is_coloured() -> None:
    """What had to be recovered from stands out; a run without trouble is green."""
    assert "\x1b[1;33m2 out of memory" in drawn(REPORT, colors="standard")
    assert "\x1b[32mnothing" in drawn(RunReport(), colors="standard")


def test_more_than_the_budget_is_red_and_nothing_measured_has_the_prediction() -> None:
    """A bar cannot be longer than whole; without a measurement it shows what was predicted."""
    over = drawn(RunReport(predicted_peak_bytes=2 * GiB, budget_min_bytes=GiB), colors="standard")
    assert "200.0% of 1.0 GiB" in over and "\x1b[31m" + "█" * 24 in over
    assert "memory used" not in drawn(RunReport())


def test_a_recording_shows_memory_speed_and_trouble() -> None:
    """A line over time for each device, tokens a second, and every kind of mark with its count."""
    recording = Recording()
    for event in (
        MicroBatchDone("cpu", 4, 100, 100, 300 * MiB, 256 * MiB, GiB, 0.001),
        MicroBatchDone("cuda:0", 4, 100, 100, 3 * MiB, None, 2 * GiB, 0.001),
        OutOfMemory("cpu", 3, 500, 1000 * MiB, "split"),
        FallbackUsed("cpu", "chunk", 1, 5),
        FallbackUsed("cpu", "chunk", 2, 6),
    ):
        recording(event)
    text = drawn(recording)
    assert "memory, cpu" in text and "at most 256.0 MiB of 1.0 GiB" in text
    assert "memory, cuda:0" in text and "at most 3.0 MiB of 2.0 GiB" in text
    assert "1 x out of memory, then split" in text and "2 x fallback" in text
    assert "none has run" in drawn(Recording())


def test_lines_have_the_heights_of_their_values() -> None:
    """Zero is blank, the largest is full, the order is kept; ASCII where the encoding has no blocks."""
    assert drawn(Line([0, 1, 4, 8])).rstrip("\n") == " ▂▅█  "
    assert drawn(Line([0, 1, 4, 8]), encoding="ascii").rstrip("\n") == " .=#  "
    assert drawn(Line([])).strip() == ""


@pytest.mark.parametrize("what", [REPORT, Recording()], ids=["report", "recording"])
def test_a_narrow_ascii_terminal_is_enough(what: Any) -> None:
    """Forty columns, no Unicode: no error, no line too long."""
    text = drawn(what, width=40, encoding="ascii")
    assert max(map(len, text.splitlines())) <= 40


def test_peaks_over_time() -> None:
    """Each part of the time has the most that ran in it; where nothing ran there is 0."""
    line = Timeline()
    for start_s, end_s, size in ((0.0, 1.0, 5), (1.0, 2.0, 9), (6.0, 8.0, 3)):
        line.add(Bar("cpu", start_s, end_s, 1, size, None, 10), sized_tokens=1)
    assert line.peaks("cpu", 4) == [9, 9, 0, 3]
    assert line.peaks("other", 2) == [0, 0]


def test_a_corpus_report_has_both_views() -> None:
    """A frame in the terminal, a table in a notebook; a path with markup in it is text in both."""
    report = CorpusReport("<b>[red]x", True, 3, 0, 0, 3, 0, 1, 30, 0, 1, 0, 0, {}, None, None, 1.5)
    assert "3 texts in 1.50 s" in drawn(report) and "<b>[red]x" in drawn(report)
    assert "&lt;b&gt;[red]x" in report._repr_html_() and "<b>" not in report._repr_html_()
