"""What the sizing of micro-batches is to reach on a card, beside what it has reached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.common import Row

__all__ = ["rows"]

TIMES = (
    ("bge-m3", "bfloat16", "cold_times_the_best_peer", 3.0),
    ("bge-m3", "bfloat16", "cold_share_of_matmul", 0.45),
    ("gte-reranker", "float16", "cold_times_the_best_peer", 4.0),
    ("minilm", "float16", "cold_times_the_best_peer", 4.0),
    ("minilm", "float32", "cold_times_the_best_peer", 1.3),
    ("bge-m3", "float32", "cold_times_the_best_peer", 1.3),
)
"""Model, dtype, column of the row "compared" of section `speed`, at least. At defaults, nothing learnt before, end to end; the
peer at its best batch size, in turns with ours. Set from an H200's first run, where sizes set by hand reached 3.3 and 4.3."""


def rows(sections: dict[str, Any], dry: bool = False) -> Iterator[Row]:
    """A row per target: reached, MISSED or not measured, with the figures; then one for the cases of `articles`.

    dry: on the CPU with tiny shapes, whose figures are not judged.
    """
    for row in _judged(sections):
        yield {**row, "outcome": "not judged (dry run)"} if dry and row["outcome"] != "not measured" else row


def _judged(sections: dict[str, Any]) -> Iterator[Row]:
    if "speed" in sections:
        found = [row for row in sections["speed"]["rows"] if row.get("step") == "compared"]
        for what, dtype, column, wanted in TIMES:
            row = next((row for row in found if row.get("what") == what and row.get("dtype") == dtype), {})
            reached = row.get(column)
            outcome = "not measured" if reached is None else "reached" if reached >= wanted else "MISSED"
            yield {
                "target": f"{what} {dtype}: {column.replace('_', ' ')}",
                "at_least": wanted,
                "reached": reached,
                "learnt": row.get(column.replace("cold", "learnt")),
                "outcome": outcome,
            }
    cases = sections.get("articles", {"rows": []})["rows"]
    ours = [row for row in cases if str(row.get("step")).startswith("ours, ")]
    finished = [row for row in ours if row["outcome"] == "finished"]
    late = [row for row in ours if "(time)" in row["outcome"]]
    if ours:
        bad = len(ours) - len(finished) - len(late)
        yield {
            "target": "articles: cases finished within a T4's memory",
            "at_least": len(ours),
            "reached": len(finished),
            "learnt": None,
            "outcome": "MISSED" if bad else "not measured" if late else "reached",
        }
