"""Charts as HTML with inline SVG: shapes stretch with the page, their labels are text beside them and keep their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from memsafe.config import format_bytes
from memsafe.pictures.timeline import MARKS, Bar, Mark, Timeline

__all__ = ["TROUBLE", "memory_chart", "prediction_chart", "rate_chart", "short", "size_chart"]

TROUBLE = ("oom", "split", "fallback", "non_finite")
"""Kinds of marks that are drawn through the picture."""
_MOST_TITLES = 300
"""Bars with a tooltip each; more are one path."""
_BINS = 80


def memory_chart(timeline: Timeline, device: str) -> str:
    """Memory of micro-batches on `device` over time: measured as bars, predicted as a line on each, the budget above."""
    bars = timeline.bars.get(device, [])
    marks = [mark for mark in timeline.marks if mark.device == device]
    top = max([1, *(max(bar.used_bytes, bar.predicted_bytes) for bar in bars)])
    budgets = sorted(bar.budget_bytes for bar in bars)
    near = bool(budgets) and budgets[-1] <= 4 * top
    height = 1.12 * (max(top, budgets[-1]) if near else top)
    x, y = _scale(timeline.seconds), _scale(height)
    shapes = []
    if len(bars) <= _MOST_TITLES:
        for bar in bars:
            kind = "guess" if bar.measured_bytes is None else "used"
            left, width, tall = x(bar.start_s), max(x(bar.end_s) - x(bar.start_s), 0.6), y(bar.used_bytes)
            shapes.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{1000 - tall:.1f}" width="{width:.1f}" height="{tall:.1f}">'
                f"<title>{escape(_about(bar))}</title></rect>"
            )
    else:
        for kind, known in (("guess", False), ("used", True)):
            path = "".join(
                f"M{x(bar.start_s):.1f} 1000V{1000 - y(bar.used_bytes):.1f}H{max(x(bar.end_s), x(bar.start_s) + 0.6):.1f}V1000Z"
                for bar in bars
                if (bar.measured_bytes is not None) is known
            )
            shapes.append(f'<path class="{kind}" d="{path}"/>')
    line = "".join(
        f"M{x(bar.start_s):.1f} {1000 - y(bar.predicted_bytes):.1f}H{max(x(bar.end_s), x(bar.start_s) + 0.6):.1f}"
        for bar in bars
    )
    shapes.append(f'<path class="line predicted" d="{line}"/>')
    shapes += [
        f'<path class="line k-{mark.kind}" d="M{x(mark.at_s):.1f} 0V1000"><title>{escape(_said(mark))}</title></path>'
        for mark in marks
        if mark.kind in TROUBLE
    ]
    over = ""
    if near:
        path = "".join(
            f"M{x(bar.start_s):.1f} {1000 - y(bar.budget_bytes):.1f}H{max(x(bar.end_s), x(bar.start_s) + 2):.1f}"
            for bar in bars
        )
        shapes.append(f'<path class="line budget" d="{path}"/>')
    elif budgets:
        shapes.append('<path class="line budget far" d="M0 22H1000"/>')
        low, high = format_bytes(budgets[0]), format_bytes(budgets[-1])
        text = low if low == high else f"{low} to {high}"
        over = f'<span class="far">budget {text}, far above</span>'
    lanes = "".join(
        f'<span class="sign k-{kind}" title="{meaning}">{sign}</span><svg class="lane k-{kind}" viewBox="0 0 1000 10" '
        f'preserveAspectRatio="none" aria-hidden="true"><path class="line" d="{_ticks_at(marks, kind, x)}"/></svg>'
        for kind, (sign, meaning) in MARKS.items()
        if any(mark.kind == kind for mark in marks)
    )
    keys = [
        ("used", "measured"),
        ("guess", "not measured: as predicted"),
        ("predicted", "predicted"),
        ("budget", "budget"),
    ]
    return _figure(
        f"Memory on {device}",
        "of each micro-batch, beyond the weights",
        "".join(shapes),
        [(value / height, format_bytes(value)) for value in _byte_ticks(height)],
        _seconds_ticks(timeline.seconds),
        over=over,
        lanes=lanes,
        keys=keys,
    )


def rate_chart(timeline: Timeline) -> str:
    """Tokens per second over time."""
    rates = timeline.rates(_BINS)
    height = 1.1 * max([1.0, *rates])
    y, width = _scale(height), 1000 / _BINS
    steps = "".join(f"V{1000 - y(rate):.1f}h{width:.2f}" for rate in rates)
    return _figure(
        "Throughput",
        "tokens per second, all devices together",
        f'<path class="used" d="M0 1000{steps}V1000Z"/>',
        [(value / height, short(value)) for value in _ticks(height)],
        _seconds_ticks(timeline.seconds),
    )


def size_chart(timeline: Timeline) -> str:
    """How fast micro-batches of each size were: one dot a size, larger where there were more."""
    sizes = sorted((tokens, size) for tokens, size in timeline.sizes.items() if tokens and size.seconds > 0)
    if not sizes:
        return _nothing("Sizes tried", "No micro-batch was timed.")
    low, high = math.log2(sizes[0][0]) - 0.3, math.log2(sizes[-1][0]) + 0.3
    rates = [size.tokens / size.seconds for _, size in sizes]
    height = 1.15 * max(rates)
    most = max(size.micro_batches for _, size in sizes)
    dots = "".join(
        f'<path class="dot" stroke-width="{5 + 9 * math.sqrt(size.micro_batches / most):.1f}" '
        f'd="M{1000 * (math.log2(tokens) - low) / (high - low):.1f} {1000 - 1000 * rate / height:.1f}h0">'
        f"<title>about {tokens:,} tokens: {size.micro_batches:,} micro-batches, {rate:,.0f} tokens/s each</title></path>"
        for (tokens, size), rate in zip(sizes, rates, strict=True)
    )
    powers = range(math.ceil(low), math.floor(high) + 1)
    step = max(len(powers) // 4, 1)
    marks = [((power - low) / (high - low), f"{2**power:,}") for power in powers[::step]]
    return _figure(
        "Sizes tried",
        "tokens per second of one micro-batch, by its tokens",
        dots,
        [(value / height, short(value)) for value in _ticks(height)],
        marks,
    )


def prediction_chart(timeline: Timeline) -> str:
    """Predicted against measured peaks: on the diagonal they are equal, below it there was room left."""
    if not timeline.points:
        return _nothing("Predicted and measured", "No peak was measured: on a CPU only some micro-batches are.")
    top = 1.1 * max(max(point) for point in timeline.points)
    scale = _scale(top)
    dots = "".join(f"M{scale(predicted):.1f} {1000 - scale(measured):.1f}h0" for predicted, measured in timeline.points)
    return _figure(
        "Predicted and measured",
        "peaks of micro-batches; below the line there was room left",
        f'<path class="line budget" d="M0 1000L1000 0"/><path class="dot" stroke-width="7" d="{dots}"/>',
        [(value / top, format_bytes(value)) for value in _byte_ticks(top)],
        [(value / top, format_bytes(value)) for value in _byte_ticks(top)],
    )


def short(value: float) -> str:
    """``12000 -> "12k"``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _figure(
    title: str,
    note: str,
    shapes: str,
    ys: Sequence[tuple[float, str]],
    xs: Sequence[tuple[float, str]],
    *,
    over: str = "",
    lanes: str = "",
    keys: Sequence[tuple[str, str]] = (),
) -> str:
    """ys, xs: (place from 0 to 1, label) of ticks. over: HTML upon the shapes. lanes: below them. keys: (class, meaning)."""
    grid = "".join(f'<path class="grid" d="M0 {1000 - 1000 * place:.1f}H1000"/>' for place, _ in ys)
    left = "".join(f'<span style="bottom:{100 * place:.1f}%">{escape(label)}</span>' for place, label in ys)
    below = "".join(
        f'<span class="{"first" if place < 0.04 else "last" if place > 0.9 else ""}" style="left:{100 * place:.1f}%">{escape(label)}</span>'
        for place, label in xs
    )
    legend = "".join(f'<li><i class="key {kind}"></i>{escape(meaning)}</li>' for kind, meaning in keys)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>'
        f'<div class="plot"><div class="ys">{left}</div><div class="area"><svg viewBox="0 0 1000 1000" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(title)}: {escape(note)}">{grid}{shapes}</svg>{over}</div>'
        f'{lanes}<div class="xs">{below}</div></div>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + "</figure>"
    )


def _nothing(title: str, why: str) -> str:
    return f'<figure class="chart"><figcaption><b>{escape(title)}</b></figcaption><p class="none">{escape(why)}</p></figure>'


def _scale(top: float) -> Callable[[float], float]:
    return lambda value: 1000 * value / top if top else 0.0


def _ticks(top: float, *, base: float = 10.0, wanted: int = 4) -> list[float]:
    """Round values from 0 to below `top`, about `wanted` of them: 1, 2 or 5 times a power of `base`."""
    if top <= 0:
        return [0.0]
    power = base ** math.floor(math.log(top / wanted, base))
    steps = [power * factor for factor in ((1, 2, 5, 10) if base == 10 else (2**n for n in range(11)))]
    step = next((each for each in steps if top / each <= wanted + 0.5), steps[-1])
    return [step * number for number in range(int(top / step) + 1)]


def _byte_ticks(top: float) -> list[float]:
    return _ticks(top, base=1024.0)


def _seconds_ticks(seconds: float) -> list[tuple[float, str]]:
    if seconds <= 0:
        return [(0.0, "0 s")]
    unit, name = (3600, "h") if seconds > 7200 else (60, "min") if seconds > 180 else (1, "s")
    return [(value * unit / seconds, f"{value:.3g} {name}") for value in _ticks(seconds / unit)]


def _ticks_at(marks: Sequence[Mark], kind: str, x: Callable[[float], float]) -> str:
    return "".join(f"M{min(max(x(mark.at_s), 2), 998):.1f} 0V10" for mark in marks if mark.kind == kind)


def _about(bar: Bar) -> str:
    measured = "not measured" if bar.measured_bytes is None else format_bytes(bar.measured_bytes)
    several = "" if bar.micro_batches == 1 else f"{bar.micro_batches:,} micro-batches, "
    return (
        f"{bar.start_s:.2f} to {bar.end_s:.2f} s: {several}{bar.tokens:,} tokens, predicted {format_bytes(bar.predicted_bytes)}, "
        f"{measured}, budget {format_bytes(bar.budget_bytes)}"
    )


def _said(mark: Mark) -> str:
    return f"{mark.at_s:.2f} s: {MARKS.get(mark.kind, MARKS['other'])[1]}: {mark.detail}"
