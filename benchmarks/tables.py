"""Sections of a result as Markdown lines. Every figure is a median; brackets hold the least and the largest of the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS", "headline"]

Section = Any
MiB = 1 << 20


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def spread(value: dict[str, float] | None, form: str = "{:.2f}") -> str:
    """``1.52 [1.48-1.60]``; a dash for what was not measured."""
    if value is None:
        return "-"
    if value["count"] == 1:
        return form.format(value["median"])
    return f"{form.format(value['median'])} [{form.format(value['low'])}-{form.format(value['high'])}]"


def mib(value: int | None) -> str:
    return "-" if value is None else f"{value / MiB:,.0f} MiB"


def _label(row: dict[str, Any]) -> str:
    text = f"{row['label']}, {row['setting']}" if row.get("setting", "default") != "default" else row["label"]
    return f"**{text}**" if row.get("ours") else text


def _check(row: dict[str, Any]) -> str:
    check = row.get("check")
    if check is None:
        return "-"
    return f"{check['max_difference']:.0e}" + (f", {check['min_cosine']:.6f}" if "min_cosine" in check else "")


def _faster(row: dict[str, Any]) -> str:
    """How many times faster ours is; marked where ours lost."""
    ratio = row.get("ratio")
    if ratio is None:
        return "-"
    if row["ours"] and ratio["low"] == ratio["high"] == 1:
        return "1"
    lost = " (ours is slower)" if ratio["median"] < 1 and not row["ours"] else ""
    return spread(ratio) + lost


def _speed_of(row: dict[str, Any]) -> str:
    """How many times the speed of our first row this one has."""
    ratio = row.get("ratio")
    if ratio is None:
        return "-"
    turned = {
        "median": 1 / ratio["median"],
        "low": 1 / ratio["high"],
        "high": 1 / ratio["low"],
        "count": ratio["count"],
    }
    return spread(turned)


def _task(
    found: dict[str, Any], title: str = "our speed over it", figure: Callable[[dict[str, Any]], str] = _faster
) -> list[str]:
    """One comparison: its texts, its table, its roofline, its sweep and who could not run."""
    length, what = found["length"], "pairs" if found["kind"] == "rerank" else "texts"
    lines = [
        f"### {found['task']}: {found['model']}",
        "",
        f"{found['inputs']:,} {what}, {found['tokens']:,} tokens (median {length['median']:.0f}, 95 % {length['p95']}, "
        f"longest {length['max']:,}), {found['rounds']} rounds.",
        "",
    ]
    head = ["", "tokens/s", title, "of the fp32 matrix rate", "largest difference" + (
        "" if found["kind"] == "rerank" else ", least cosine")]  # fmt: skip
    lines += table(
        head,
        [
            [
                _label(row),
                spread(row["tokens_per_s"], "{:,.0f}"),
                figure(row),
                spread(row["roofline_fraction"]),
                _check(row),
            ]
            for row in found["rows"]
        ],
    )
    lines += [""]
    for dtype, rates in found["roofline"].items():
        lines.append(
            f"Matrix-product rate at the model's shapes, {dtype}: {spread(_giga(rates['best']), '{:,.0f}')} GFLOP/s "
            f"(side by side {_giga(rates['side_by_side'])['median']:,.0f}, all threads on one product "
            f"{_giga(rates['intra_op'])['median']:,.0f})."
        )
    share = found["attention_flop_per_token"] / found["linear_flop_per_token"]
    lines.append(
        f"Work per token: {found['linear_flop_per_token'] / 1e6:.1f} MFLOP of matrix products, and {share:.1%} of that in attention, "
        "which the fraction above does not count."
    )
    if found["sweep"]:
        by: dict[str, list[str]] = {}
        for one in found["sweep"]:
            by.setdefault(one["label"], []).append(f"{one['batch_size']}: " + _seconds(one["seconds"]))
        count = found["first_run"]["inputs"]
        lines += ["", f"Seconds for {count} of them by batch size, one run each:", ""]
        lines += [f"- {label}: {', '.join(sizes)}" for label, sizes in by.items()]
    first = ", ".join(f"{label} {seconds:.2f}" for label, seconds in found["first_run"]["seconds"].items())
    lines += ["", f"First run after loading, seconds (ours measures its memory there): {first}."]
    lines += [f"- Not run: {gone['label']}: {gone['reason']}" for gone in found["not_run"]]
    return lines


def _giga(value: dict[str, float]) -> dict[str, float]:
    return {key: number if key == "count" else number / 1e9 for key, number in value.items()}


def _speed(section: Section, title: str) -> list[str]:
    lines = [f"## {title}", ""]
    for found in section["tasks"]:
        lines += [*_task(found), ""]
    if section.get("not_compared"):
        lines += ["Not compared:", "", *[f"- {label}: {reason}." for label, reason in section["not_compared"]]]
    return lines


def memory(section: Section) -> list[str]:
    lines = [
        "## Peak memory of the process",
        "",
        "Each in a fresh process, the same texts twice; code is not counted.",
        "",
    ]
    for task, rows in section["tasks"].items():
        lines += [f"### {task}", ""]
        lines += table(
            ["", "beyond before loading", "beyond after loading", "code alone"],
            [
                [
                    _label(row),
                    mib(row.get("peak_beyond_before_load_bytes")),
                    mib(row.get("peak_beyond_after_load_bytes")),
                    mib(row.get("code_bytes")),
                ]
                if "not_run" not in row
                else [_label(row), row["not_run"], "", ""]
                for row in rows
            ],
        )
        lines += [""]
    return lines


def scale(section: Section) -> list[str]:
    rows = [
        [_label(row), f"{row['inputs']:,}", spread(row["tokens_per_s"], "{:,.0f}"),
         mib(row["peak_beyond_before_load_bytes"]), mib(row["output_bytes"])]
        if "not_run" not in row
        else [_label(row), f"{row.get('inputs', 0):,}", row["not_run"], "-", "-"]
        for row in section["rows"]
    ]  # fmt: skip
    return [
        "## Scale: short texts",
        "",
        *table(["", "texts", "tokens/s", "peak beyond before loading", "result"], rows),
    ]


def _seconds(seconds: float | None) -> str:
    return "not tried, for lack of time" if seconds is None else f"{seconds:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.0f} ms"


def concurrency(section: Section) -> list[str]:
    lines = [
        "## Many callers",
        "",
        f"{section['callers']} threads with one query each, against one call with all of them:",
        "",
    ]
    lines += table(
        ["", "queries/s, one call", "queries/s, threads", "threads / one call", "our threads over its"],
        [
            [
                _label(row),
                spread(row["one_call_per_s"], "{:,.0f}"),
                spread(row["threads_per_s"], "{:,.0f}"),
                spread(row["of_one_call"]),
                spread(row.get("ratio")),
            ]
            for row in section["rows"]
        ],
    )
    lines += ["", f"One client asking while {section['bulk_texts']:,} documents are embedded:", ""]
    lines += table(
        ["", "p50", "p95", "p99", "queries", "p50 without bulk", "bulk loses", "one micro-batch"],
        [
            [
                _label(row),
                *(_milliseconds(row["beside_bulk"]["during"][f"p{p}_s"]) for p in (50, 95, 99)),
                str(row["beside_bulk"]["during"]["count"]),
                _milliseconds(row["beside_bulk"]["alone"]["p50_s"]),
                f"{row['bulk_loss']:.0%}",
                _milliseconds(row["beside_bulk"]["micro_batch_s"]),
            ]
            for row in section["rows"]
        ],
    )
    return lines + [f"- Not run: {gone['label']}: {gone['reason']}" for gone in section["not_run"]]


def prediction(section: Section) -> list[str]:
    lines = ["## Prediction of peaks", "", "Live (tensor) bytes of random micro-batches that were not learnt from:", ""]
    lines += table(
        ["", "probes", "shapes", "median error", "95 %", "largest", "over the bound", "resident over its bound"],
        [
            [
                f"{row['model']}, {row['layout']}",
                str(row["probes"]),
                str(row["shapes"]),
                f"{row['error_median']:.2%}",
                f"{row['error_p95']:.2%}",
                f"{row['error_max']:.2%}",
                str(row["over_upper_bound"]),
                f"{row['over_resident_bound']} of {row['resident_shapes']}",
            ]
            if "not_run" not in row
            else [f"{row['model']}, {row['layout']}", row["not_run"], *[""] * 6]
            for row in section["rows"]
        ],
    )
    limits = [trial for trial in section["limits"] if trial["peak_bytes"] is not None]
    if limits:
        nearest = max(trial["peak_bytes"] / trial["limit_bytes"] for trial in limits)
        lines += [
            "",
            f"Whole runs, weights included, under random limits: {section['limits_exceeded']} of {len(limits)} exceeded; the "
            f"nearest came to {nearest:.0%} of its limit.",
        ]
    return lines


def overhead(section: Section) -> list[str]:
    lines = ["## Cost of the memory machinery", ""]
    return lines + table(
        ["", "micro-batches", "whole run over bare run", "own processor time", "per micro-batch"],
        [
            [
                row["texts"],
                str(row["micro_batches"]),
                spread(row["ratio"], "{:.3f}"),
                f"{row['share']:.2%}",
                f"{row['microseconds_per_micro_batch']:.0f} microseconds",
            ]
            if "not_run" not in row
            else [row["texts"], row["not_run"], "", "", ""]
            for row in section["rows"]
        ],
    )


def feeding(section: Section) -> list[str]:
    """Medians; ratios are to the way before, round by round."""
    lines = [
        "## Tokenising alone",
        "",
        "Texts to token ids in the queue, thousands of tokens a second; no forward runs.",
        "",
    ]
    rows = []
    for row in section["rows"]:
        if "not_run" in row:
            rows.append([str(row["cores"]), row["not_run"], "", "", "", ""])
            continue
        rate = {label: statistics.median(values) / 1e3 for label, values in row["tokens_per_s"].items()}
        shown = [f"{rate[label]:,.0f} ({row['ratio'][label]:.1f}x)" for label in ("now, first call", "now")]
        rows.append([str(row["cores"]), row["texts"], "yes" if row["busy"] else "", f"{rate['before']:,.0f}", *shown])
    return lines + table(["cores", "texts", "a busy Python thread beside", "before", "now, first call", "now"], rows)


def corpus(section: Section) -> list[str]:
    lines = [
        "## A corpus on the disk",
        "",
        "JSON lines to a store, over `embed_documents` on the same texts in memory; and an update that computes nothing.",
        "",
    ]
    return lines + table(
        [
            "texts",
            "tokens/s in memory",
            "tokens/s to a store",
            "wall time over it",
            "processor time over it",
            "update, texts/s",
        ],
        [
            [
                f"{row['texts']:,}",
                *(
                    f"{statistics.median(row['tokens_per_s'][name]):,.0f}"
                    for name in ("embed_documents", "embed_corpus")
                ),
                spread(row["wall_ratio"], "{:.3f}"),
                spread(row["cpu_ratio"], "{:.3f}"),
                f"{row['reused_texts_per_s']:,.0f}",
            ]
            if "not_run" not in row
            else [f"{row['texts']:,}", row["not_run"], *[""] * 4]
            for row in section["rows"]
        ],
    )


def dtype(section: Section) -> list[str]:
    return ["## Half precision", "", *_task(section, "times our float32", _speed_of)[2:]]


def quality(section: Section) -> list[str]:
    """A table for each set; changes are to the first row of the same stage. Seconds are in the JSON: nothing is repeated for them here."""
    lines = ["## Ranking quality", ""]
    for found in section["sets"]:
        lines += [
            f"### {found['name']}: {found['documents']:,} documents, {found['queries']:,} questions"
            + (f", {found['reranked_queries']:,} of them reranked" if found["reranked_queries"] else ""),
            "",
            *table(
                ["", "what", "nDCG@10", "change", "of the first ten"],
                [
                    [
                        f"{row['stage']}: {row['who']}",
                        f"`{row['change']}`",
                        f"{row['ndcg_10']:.4f}",
                        f"{row['change_of_ndcg']:+.4f}",
                        "-" if row["kept"] is None else f"{row['kept']:.1%}",
                    ]
                    for row in found["rows"]
                ],
            ),
            "",
        ]
    return lines + [f"- Not run: {why}" for why in section["not_run"]]


def int8(section: Section) -> list[str]:
    lines = ["## int8 on a CPU", ""]
    for found in section["tasks"]:
        lines += [*_task(found, "times our float32", _speed_of), ""]
        lines += ["By processor seconds, which suffer less from neighbours:", ""]
        base = statistics.median(found["rows"][0]["cpu_seconds"])
        lines += table(
            ["", "tokens per processor second", "times our float32"],
            [
                [_label(row), f"{found['tokens'] / seconds:,.0f}", f"{base / seconds:.2f}"]
                for row in found["rows"]
                for seconds in (statistics.median(row["cpu_seconds"]),)
            ],
        )
        peaks = section["memory"].get(f"{found['task']}, {found['model']}", [])
        lines += ["", *table(["peak memory beyond before loading", ""], [[_label(row), row.get("not_run") or mib(row["peak_beyond_before_load_bytes"])] for row in peaks]), ""]  # fmt: skip
    rows = section["quality"]
    if rows:
        lines += ["### Ranking: nDCG@10 on Cranfield", ""]
        lines += table(
            ["", "computed in", "nDCG@10", "cosine to float32, median (least)"],
            [
                [
                    f"{row['what']}, {row['way']}",
                    f"{row['dtype']}: {row['path']}",
                    f"{row['ndcg_10']:.4f}",
                    f"{row['median_cosine']:.5f} ({row['least_cosine']:.4f})" if "median_cosine" in row else "-",
                ]
                for row in rows
            ],
        )
    return lines


def outputs(section: Section) -> list[str]:
    lines = _speed(section, "Sparse rows, token vectors, three outputs of one pass")
    return [*lines, *[line.replace("## Peak", "### Peak", 1) for line in memory(section["memory"])]]


SECTIONS: dict[str, Callable[[Section], list[str]]] = {
    "speed": lambda section: _speed(section, "Embedding"),
    "rerank": lambda section: _speed(section, "Reranking"),
    "mixes": lambda section: _speed(section, "Other mixes of lengths"),
    "memory": memory,
    "scale": scale,
    "concurrency": concurrency,
    "prediction": prediction,
    "overhead": overhead,
    "feeding": feeding,
    "corpus": corpus,
    "dtype": dtype,
    "quality": quality,
    "int8": int8,
    "outputs": outputs,
}


def headline(sections: dict[str, Any]) -> list[str]:
    """What README shows: who is how fast on real text, embedding and reranking, and peak memory where it was measured."""
    lines: list[str] = []
    memory = sections.get("memory", {}).get("tasks", {})
    for name in ("speed", "rerank"):
        for found in sections.get(name, {}).get("tasks", [])[:1]:
            measured = memory.get(f"{found['task']}, {found['model']}", [])  # of the same texts and model only
            peak = {(row["label"], row["setting"]): row.get("peak_beyond_before_load_bytes") for row in measured}
            what = "pairs" if found["kind"] == "rerank" else "texts"
            title = "Reranking" if found["kind"] == "rerank" else "Embedding"
            lines += ["" if lines else f"{title}, {found['inputs']} real {what}, {found['model']}, fp32:"]
            if lines[-1] == "":
                lines.append(f"{title}, {found['inputs']} real {what}, {found['model']}, fp32:")
            lines.append("")
            lines += table(
                ["", "tokens/s", "our speed over it", "peak memory beyond before loading"],
                [
                    [
                        _label(row),
                        f"{row['tokens_per_s']['median']:,.0f}",
                        _faster(row),
                        mib(peak.get((row["label"], row["setting"]))),
                    ]
                    for row in found["rows"]
                ],
            )
            reached = next((row for row in found["rows"] if row["ours"]), None)
            if reached is not None:
                lines += [
                    "",
                    f"Ours reaches {reached['roofline_fraction']['median']:.0%} of the machine's own fp32 matrix-product rate.",
                ]
    return lines
