"""A run as one HTML page that works offline: no script, no font and no picture from elsewhere; light and dark; wide and narrow."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from memsafe.config import format_bytes
from memsafe.pictures.charts import memory_chart, prediction_chart, rate_chart, short, size_chart
from memsafe.pictures.timeline import MARKS, Timeline

__all__ = ["page"]

_MOST_ROWS = 200
"""Events that the page lists one by one."""

_STYLE = """
.memsafe{--ground:#fcfcfb;--panel:#fff;--ink:#14181d;--soft:#59636e;--rule:#dfe3e7;--used:#2a78d6;--guess:#a9cbf2;
 --predicted:#14181d;--budget:#0a7d5c;--bad:#c92f2f;--warn:#a85d00;--mild:#59636e;color-scheme:light dark;
 font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:var(--ink)}
@media (prefers-color-scheme:dark){.memsafe{--ground:#12161b;--panel:#1a2027;--ink:#e8ebee;--soft:#a3adb8;--rule:#323b45;
 --used:#4d95ea;--guess:#2b4f7c;--predicted:#e8ebee;--budget:#3cc79b;--bad:#ff7b72;--warn:#e8a33d;--mild:#a3adb8}}
body.memsafe{margin:0;background:var(--ground)}
.memsafe *{box-sizing:border-box}
.memsafe main{max-width:68rem;margin:0 auto;padding:1.5rem 1rem 3rem}
.memsafe h1{font-size:1.5rem;line-height:1.2;margin:0 0 .25rem;overflow-wrap:anywhere}
.memsafe h2{font-size:1.05rem;margin:1.75rem 0 .5rem}
.memsafe .sub{color:var(--soft);margin:0 0 1rem}
.memsafe .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:0 0 1rem;padding:0;list-style:none}
.memsafe .tiles li,.memsafe .chart{background:var(--panel);border:1px solid var(--rule);border-radius:.5rem}
.memsafe .tiles li{padding:.6rem .8rem}
.memsafe .tiles b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
.memsafe .tiles span{color:var(--soft);font-size:.85rem}
.memsafe .tiles .bad b{color:var(--bad)}
.memsafe .charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:.8rem}
.memsafe .chart{margin:0;padding:.8rem .9rem .7rem;min-width:0}
.memsafe .wide{grid-column:1/-1}
.memsafe figcaption{margin:0 0 .7rem}
.memsafe figcaption span,.memsafe .none{color:var(--soft);font-size:.85rem}
.memsafe .plot{display:grid;grid-template-columns:4.4rem minmax(0,1fr);column-gap:.5rem}
.memsafe .area{position:relative;height:13rem;margin-bottom:.5rem;border-left:1px solid var(--rule);border-bottom:1px solid var(--rule)}
.memsafe .wide .area{height:16rem}
.memsafe svg{display:block;width:100%;height:100%;overflow:hidden}
.memsafe .ys{position:relative;margin-bottom:.5rem}
.memsafe .ys span,.memsafe .xs span{position:absolute;font-size:.75rem;color:var(--soft);white-space:nowrap;font-variant-numeric:tabular-nums}
.memsafe .ys span{right:0;transform:translateY(50%)}
.memsafe .xs{grid-column:2;position:relative;height:1.4rem;overflow:hidden}
.memsafe .xs span{transform:translateX(-50%)}.memsafe .xs .first{transform:none}.memsafe .xs .last{transform:translateX(-100%)}
.memsafe .grid{stroke:var(--rule);stroke-width:1;vector-effect:non-scaling-stroke}
.memsafe .line{fill:none;stroke:var(--mild);stroke-width:2;vector-effect:non-scaling-stroke}
.memsafe .line.predicted{stroke:var(--predicted);stroke-width:1.5}
.memsafe .line.budget{stroke:var(--budget)}.memsafe .line.far{stroke-dasharray:6 4}
.memsafe span.far{position:absolute;top:.6rem;right:.4rem;font-size:.8rem;color:var(--budget);background:var(--panel);padding:0 .3rem}
.memsafe .used{fill:var(--used)}.memsafe .guess{fill:var(--guess)}
.memsafe .dot{fill:none;stroke:var(--used);stroke-linecap:round;stroke-opacity:.8;vector-effect:non-scaling-stroke}
.memsafe .sign{text-align:right;font-size:.85rem;line-height:1.2rem;color:var(--mild)}
.memsafe .lane{height:1.2rem;padding:.2rem 0;border-left:1px solid var(--rule);border-bottom:1px dotted var(--rule)}
.memsafe .k-oom,.memsafe .k-split{color:var(--bad)}.memsafe .k-fallback,.memsafe .k-non_finite,.memsafe .k-shrink,.memsafe .k-wait{color:var(--warn)}
.memsafe .k-oom .line,.memsafe .k-split .line,.memsafe .line.k-oom,.memsafe .line.k-split{stroke:var(--bad)}
.memsafe .k-fallback .line,.memsafe .line.k-fallback,.memsafe .k-non_finite .line,.memsafe .line.k-non_finite,.memsafe .k-shrink .line,.memsafe .k-wait .line{stroke:var(--warn)}
.memsafe .area .line.k-oom,.memsafe .area .line.k-split,.memsafe .area .line.k-fallback,.memsafe .area .line.k-non_finite{stroke-dasharray:3 3;stroke-width:1.5}
.memsafe .legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.5rem 0 0;padding:0;list-style:none;font-size:.82rem;color:var(--soft)}
.memsafe .legend b{color:var(--ink);font-variant-numeric:tabular-nums}
.memsafe .key{display:inline-block;width:.9rem;height:.7rem;margin-right:.4rem;border-radius:2px}
.memsafe .key.used{background:var(--used)}.memsafe .key.guess{background:var(--guess)}
.memsafe .key.predicted,.memsafe .key.budget{height:0;border-top:2px solid var(--predicted);vertical-align:middle;border-radius:0}
.memsafe .key.budget{border-color:var(--budget)}
.memsafe table{border-collapse:collapse;width:100%;font-size:.9rem}
.memsafe th,.memsafe td{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--rule);overflow-wrap:anywhere}
.memsafe th{font-weight:600;width:11rem}.memsafe .events th{width:auto}.memsafe .events td:first-child{white-space:nowrap;font-variant-numeric:tabular-nums}
.memsafe summary{cursor:pointer;margin:.4rem 0}
@media (max-width:44rem){.memsafe .charts{grid-template-columns:minmax(0,1fr)}.memsafe .area,.memsafe .wide .area{height:11rem}
 .memsafe th{width:7rem}.memsafe main{padding:1rem .75rem 2rem}.memsafe .plot{grid-template-columns:4rem minmax(0,1fr)}}
"""


def page(timeline: Timeline, rows: Mapping[str, str], *, title: str, whole: bool = True) -> str:
    """The page; `whole` False leaves out the document around it, for a notebook. rows: of the table at its end, by name."""
    devices = list(dict.fromkeys([*timeline.bars, *(mark.device for mark in timeline.marks)]))
    memory = "".join(f'<div class="wide">{memory_chart(timeline, device)}</div>' for device in devices)
    charts = f'<div class="wide">{rate_chart(timeline)}</div>{size_chart(timeline)}{prediction_chart(timeline)}'
    nothing = '<p class="none">Nothing has been recorded: no micro-batch has run with this hook.</p>'
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    body = (
        f"<main><h1>{escape(title)}</h1>"
        f'<p class="sub">{timeline.micro_batches:,} micro-batches, {timeline.tokens:,} tokens in {timeline.seconds:,.1f} s'
        f"{' on ' + escape(', '.join(devices)) if devices else ''}</p>"
        + (f'{_tiles(timeline)}<div class="charts">{memory}{charts}</div>{_events(timeline)}' if devices else nothing)
        + (f"<h2>Report</h2><table>{table}</table>" if table else "")
        + "</main>"
    )
    if not whole:
        return f'<div class="memsafe"><style>{_STYLE}</style>{body}</div>'
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<meta name="color-scheme" content="light dark"/><title>{escape(title)}</title><link rel="icon" href="data:,"/>'
        f'<style>{_STYLE}</style></head><body class="memsafe">{body}</body></html>\n'
    )


def _tiles(timeline: Timeline) -> str:
    bars = [bar for each in timeline.bars.values() for bar in each]
    measured = [bar.measured_bytes for bar in bars if bar.measured_bytes is not None]
    peak = max(measured) if measured else max((bar.predicted_bytes for bar in bars), default=0)
    refused = timeline.counts["oom"] + timeline.counts["split"]
    rate = timeline.tokens / timeline.seconds if timeline.seconds else 0.0
    tiles = [
        (short(rate), "tokens/s"),
        (format_bytes(peak), f"largest {'measured' if measured else 'predicted'} peak"),
        (format_bytes(min((bar.budget_bytes for bar in bars), default=0)), "least budget"),
        (f"{refused:,}", "times out of memory"),
        (f"{timeline.counts['fallback']:,}", "inputs by a fallback"),
    ]
    cells = "".join(
        f"<li{' class=bad' if place >= 3 and value != '0' else ''}><b>{escape(value)}</b><span>{escape(name)}</span></li>"
        for place, (value, name) in enumerate(tiles)
    ).replace("class=bad", 'class="bad"')
    return f'<ul class="tiles">{cells}</ul>'


def _events(timeline: Timeline) -> str:
    if not timeline.marks:
        return "<h2>Events</h2><p class='none'>None: nothing had to be recovered from.</p>"
    legend = "".join(
        f'<li><span class="k-{kind}">{MARKS[kind][0]}</span> {escape(MARKS[kind][1])} <b>{count:,}</b></li>'
        for kind, count in sorted(timeline.counts.items(), key=lambda item: list(MARKS).index(item[0]))
    )
    shown = sorted(timeline.marks, key=lambda mark: mark.at_s)[:_MOST_ROWS]
    rows = "".join(
        f'<tr><td>{mark.at_s:.2f} s</td><td class="k-{mark.kind}">{MARKS[mark.kind][0]}</td><td>{escape(MARKS[mark.kind][1])}</td>'
        f"<td>{escape(mark.device)}</td><td>{escape(mark.detail)}</td></tr>"
        for mark in shown
    )
    total = sum(timeline.counts.values())
    what = f"the first {len(shown):,} of {total:,}" if len(shown) < total else f"all {total:,}"
    return (
        f'<h2>Events</h2><ul class="legend">{legend}</ul><details><summary>One by one ({what})</summary>'
        f'<table class="events">{rows}</table></details>'
    )
