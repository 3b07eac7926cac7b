"""Reports and recordings for a terminal, through rich (the extra ``cli``), which asks an object for them by ``__rich__``.

A few lines each: bars of blocks where the terminal can show them, ASCII where it cannot. Texts are never read as rich's markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memsafe.config import format_bytes
from memsafe.pictures.charts import TROUBLE
from memsafe.pictures.timeline import MARKS, Timeline

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

__all__ = ["Line", "Meter", "report_view", "timeline_view"]

_WIDTH = 24
"""Characters of a bar or a line: with words beside it fits 80."""


@dataclass(frozen=True)
class Line:
    """A sparkline: `values` as heights, the largest one full, 0 a blank; and what there is to say beside it."""

    values: Sequence[float]
    said: str = ""
    style: str = "blue"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        signs = "_.:-=+*#" if options.ascii_only else "▁▂▃▄▅▆▇█"
        top = max(self.values, default=0)
        heights = [min(int(len(signs) * value / top), len(signs) - 1) if value > 0 else None for value in self.values]
        line = "".join(" " if height is None else signs[height] for height in heights)
        yield Text.assemble((line, self.style), "  ", self.said)


@dataclass(frozen=True)
class Meter:
    """A bar of which `share` is full, red beyond 1; and what there is to say beside it."""

    share: float
    said: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        full, empty = ("#", ".") if options.ascii_only else ("█", "░")
        used = min(round(_WIDTH * self.share), _WIDTH)
        style = "red" if self.share > 1 else "blue"
        yield Text.assemble((full * used, style), (empty * (_WIDTH - used), "bright_black"), "  ", self.said)


def report_view(
    rows: Sequence[tuple[str, str]], *, title: str, used_bytes: int | None = None, budget_bytes: int | None = None
) -> Any:
    """`rows` of a report in a frame; how much of the budget was used as a bar above them, where both are known."""
    from rich.text import Text

    grid = _grid()
    if used_bytes is not None and budget_bytes:
        share = used_bytes / budget_bytes
        grid.add_row(Text("memory used"), Meter(share, f"{share:.1%} of {format_bytes(budget_bytes)}"))
    for name, value in rows:
        grid.add_row(Text(name), Text(value, style=_style(name, value)))
    return _framed(grid, title)


def timeline_view(timeline: Timeline, *, title: str = "memsafe run") -> Any:
    """Memory of each device and tokens a second over time, and what happened."""
    from rich.text import Text

    grid = _grid()
    if not timeline.micro_batches:
        grid.add_row(Text("micro-batches"), Text("none has run with this hook"))
    for device, bars in timeline.bars.items():
        peak, budget = max(bar.used_bytes for bar in bars), min(bar.budget_bytes for bar in bars)
        said = f"at most {format_bytes(peak)} of {format_bytes(budget)}"
        grid.add_row(Text(f"memory, {device}"), Line(timeline.peaks(device, _WIDTH), said))
    if timeline.micro_batches:
        rate = timeline.tokens / timeline.seconds if timeline.seconds else 0.0
        said = f"{rate:,.0f} in {timeline.seconds:,.1f} s"
        grid.add_row(Text("tokens/s"), Line(timeline.rates(_WIDTH), said, "green"))
    for kind, (_, meaning) in MARKS.items():
        if count := timeline.counts[kind]:
            grid.add_row(Text("happened"), Text(f"{count:,} x {meaning}", style="red" if kind in TROUBLE else ""))
    return _framed(grid, title)


def _framed(grid: Table, title: str) -> Any:
    from rich.panel import Panel
    from rich.text import Text

    return Panel(grid, title=Text(title), title_align="left", expand=False, border_style="bright_black")


def _grid() -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bright_black", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _style(name: str, value: str) -> str:
    if name == "recovered from":
        return "green" if value == "nothing" else "bold yellow"
    return "yellow" if name == "note" else ""
