"""The same pictures as a matplotlib Figure. Needs the extra ``plot``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from memsafe.config import GiB, MiB
from memsafe.errors import MissingExtraError
from memsafe.pictures.timeline import MARKS, Timeline

__all__ = ["summary_figure", "timeline_figure"]

_USED, _BUDGET, _BAD, _INK = "#2a78d6", "#0a7d5c", "#c92f2f", "#59636e"


def timeline_figure(timeline: Timeline) -> Any:
    """Memory over time for each device, throughput, sizes tried, predicted against measured."""
    devices = list(timeline.bars)
    figure = _figure(11, 3.2 * len(devices) + 6)
    grid = figure.add_gridspec(len(devices) + 2, 2)
    unit, name = _unit(max([1, *(bar.predicted_bytes for bars in timeline.bars.values() for bar in bars)]))
    for row, device in enumerate(devices):
        axes = figure.add_subplot(grid[row, :])
        bars = timeline.bars[device]
        starts, widths = [bar.start_s for bar in bars], [bar.end_s - bar.start_s for bar in bars]
        heights = [bar.used_bytes / unit for bar in bars]
        axes.bar(starts, heights, widths, align="edge", color=_USED, label="measured, or else predicted")
        axes.hlines(
            [bar.predicted_bytes / unit for bar in bars], starts, [bar.end_s for bar in bars], color="black", lw=1, label="predicted"
        )  # fmt: skip
        top = max([bar.predicted_bytes for bar in bars] + [bar.used_bytes for bar in bars])
        budgets = [bar.budget_bytes for bar in bars]
        if max(budgets) <= 4 * top:
            axes.step([bar.end_s for bar in bars], [each / unit for each in budgets], color=_BUDGET, label="budget")
        for kind in dict.fromkeys(mark.kind for mark in timeline.marks if mark.device == device):
            at = [mark.at_s for mark in timeline.marks if mark.kind == kind and mark.device == device]
            axes.plot(at, [0] * len(at), marker="^", ls="", clip_on=False, label=f"{MARKS[kind][1]} ({len(at)})")
        far = "" if max(budgets) <= 4 * top else f"; budget {min(budgets) / unit:,.0f} {name}, far above"
        axes.set(title=f"Memory on {device}, beyond the weights{far}", xlabel="seconds", ylabel=name)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes = figure.add_subplot(grid[-2, :])
    rates = timeline.rates(80)
    axes.stairs(rates, [timeline.seconds * edge / 80 for edge in range(81)], fill=True, color=_USED)
    axes.set(title="Throughput", xlabel="seconds", ylabel="tokens/s")
    axes = figure.add_subplot(grid[-1, 0])
    sizes = sorted((tokens, size) for tokens, size in timeline.sizes.items() if size.seconds > 0)
    axes.plot([tokens for tokens, _ in sizes], [size.tokens / size.seconds for _, size in sizes], "o", color=_USED)
    axes.set(title="Sizes tried", xlabel="tokens of a micro-batch", ylabel="tokens/s of one")
    if sizes:
        axes.set_xscale("log", base=2)
    axes = figure.add_subplot(grid[-1, 1])
    axes.plot(
        [each / unit for each, _ in timeline.points], [each / unit for _, each in timeline.points], "o", color=_USED
    )
    if timeline.points:
        axes.axline((0, 0), slope=1, color=_BUDGET)
    axes.set(title="Predicted and measured", xlabel=f"predicted, {name}", ylabel=f"measured, {name}")
    return figure


def summary_figure(report: Mapping[str, Any]) -> Any:
    """The figures of a report that has no timeline: memory against budget, and where the time went."""
    names = {
        "weights_bytes": "weights",
        "predicted_peak_bytes": "predicted peak",
        "measured_peak_bytes": "measured peak",
        "process_peak_bytes": "process peak",
        "budget_min_bytes": "least budget",
        "budget_max_bytes": "largest budget",
    }
    known = {label: report[name] for name, label in names.items() if report.get(name) is not None}
    unit, name = _unit(max([1, *known.values()]))
    figure = _figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    colors = [_BUDGET if "budget" in label else _USED for label in known]
    left.barh(list(known), [each / unit for each in known.values()], color=colors)
    left.invert_yaxis()
    left.set(title=f"Memory on {report['device']}", xlabel=name)
    times = {"tokenise": report["tokenize_s"], "compute, all lanes": report["compute_s"], "total": report["total_s"]}
    right.barh(list(times), list(times.values()), color=_INK)
    right.invert_yaxis()
    refused = report["out_of_memory"]
    right.set_title(
        f"{report['tokens_per_s']:,.0f} tokens/s, {refused:,} times out of memory", color=_BAD if refused else "black"
    )
    right.set_xlabel("seconds")
    return figure


def _figure(width: float, height: float) -> Any:
    try:
        module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError('matplotlib is not installed; run: pip install "memsafe[plot]"') from error
    return module.Figure(figsize=(width, height), layout="constrained")


def _unit(top_bytes: int) -> tuple[int, str]:
    return (GiB, "GiB") if top_bytes >= 2 * GiB else (MiB, "MiB")
