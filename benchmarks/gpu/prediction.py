"""3. Predicted against measured peaks over random shapes; measured peaks against random limits."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu import inside
from benchmarks.gpu.common import NOT_RUN, GiB, Row, Setting, free_memory
from benchmarks.gpu.models import Workload, lengths, load, workload
from benchmarks.gpu.ours import Ours
from benchmarks.gpu.processes import isolated

__all__ = ["run"]

CASES = (("bge-m3", "bfloat16"), ("bge-m3", "float32"), ("minilm", "float32"))
RESERVE_BYTES = GiB // 16
"""Of the runs under a limit: named, so that a limit cannot lie below it on any card."""
ROOM_BYTES = 4 * GiB
"""Beyond what the longest text needs, the largest limit leaves this much."""


def run(setting: Setting) -> Iterator[Row]:
    """A row of figures per model and dtype, and one of limits."""
    for model, dtype in setting.pick(CASES, CASES[1:2]):
        yield from isolated(setting, "prediction:case", model=model, dtype=dtype)


def case(setting: Setting, model: str, dtype: str) -> Iterator[Row]:
    """Learn from one ordinary run, then 200 shapes, then 20 runs under a limit."""
    head: Row = {"what": model, "dtype": dtype}
    try:
        st = load(setting, model, dtype)
    except LookupError as error:
        yield {**head, "outcome": f"skipped: {error}"}
        return
    most = setting.pick(256 if model == "minilm" else 8192, 80)
    counts = lengths(setting.pick(1500, 40), 11, longest=most, median=setting.pick(200, 20))
    work = workload(model, counts, 12)
    with Ours(setting, st, pairs=False) as ours:
        ours.model.run(work.inputs)
        rows = list(inside.measure_shapes(ours.model, setting.pick(200, 8), setting.pick(65536, 256), 13))
        weights_bytes = inside.weights_bytes(ours.model)
        longest = inside.bound_of(ours.model, [max(counts)])
    errors = sorted(abs(row["predicted_bytes"] / row["live_bytes"] - 1) for row in rows if row["live_bytes"])
    yield {
        **head,
        "shapes": len(rows),
        "outcome": "ok" if all(row["finite"] for row in rows) else "WRONG: not numbers",
        "median_error": errors[len(errors) // 2] if errors else None,
        "p95_error": errors[int(len(errors) * 0.95)] if errors else None,
        "above_the_bound": sum((row["live_bytes"] or 0) > row["upper_bytes"] for row in rows),
        "worst_above_bound": max(((row["live_bytes"] or 0) / row["upper_bytes"] - 1 for row in rows), default=None),
    }
    yield {**head, "detail": rows}
    limits = drawn_limits(setting.pick(20, 2), weights_bytes, longest, 14)
    yield {**head, **_under_limits(setting, st, work, limits, weights_bytes)}


def drawn_limits(count: int, weights_bytes: int, longest_bytes: int, seed: int) -> list[int]:
    """Random limits, each at least what the weights, the reserve and twice the longest text take, which must do.

    A limit counts the weights ("beyond what this process used before the model was loaded"), so one below them leaves
    nothing. Small rooms, which bind, are as likely as large ones: log-uniform.
    """
    pick = random.Random(seed)
    least = 2 * longest_bytes
    rooms = [least * ((least + ROOM_BYTES) / least) ** pick.random() for _ in range(count)]
    return [int(weights_bytes + RESERVE_BYTES + room) for room in rooms]


def _under_limits(setting: Setting, st: Any, work: Workload, limits: Sequence[int], weights_bytes: int) -> Row:
    """A run under each limit, its micro-batches as large as it admits; an error in one does not end the others."""
    pick = random.Random(15)
    shares: list[float] = []
    errors: list[str] = []
    over_budget = micro_batches = caught = 0
    for limit in limits:
        if setting.left() < 20 and not setting.dry:
            break
        free_memory(setting)
        some = work.some(sorted(pick.sample(range(len(work.counts)), len(work.counts) // 2)))
        baseline = _allocated(setting) - weights_bytes
        try:
            with Ours(setting, st, pairs=False, limit=limit, reserve=RESERVE_BYTES) as ours:
                inside.greedy(ours.model)
                row, _ = ours.run(some)
                done = list(ours.done)
        except Exception as error:  # refused at once: as wrong as later, and the next limit is still to be tried
            row, done = {"outcome": f"error: {type(error).__name__}: {str(error)[:200]}"}, []
        if row["outcome"] != "finished":
            errors.append(f"limit {limit / GiB:.2f} GiB: {row['outcome']}")
        shares.append((_allocated(setting, peak=True) - baseline) / limit)
        micro_batches += len(done)
        over_budget += sum(each.measured_bytes is not None and each.measured_bytes > each.budget_bytes for each in done)
        caught += row.get("out_of_memory", 0)
    over = sum(share > 1 for share in shares)
    outcome = "VIOLATED" if over_budget or over else "WRONG: runs ended with an error" if errors else "ok"
    return {
        "outcome": outcome if shares else NOT_RUN,
        "limits": len(shares),
        "of": len(limits),
        "smallest_limit_bytes": min(limits),
        "weights_bytes": weights_bytes,
        "micro_batches": micro_batches,
        "measured_above_budget": over_budget,
        "runs_above_limit": over,
        "largest_share_of_limit": max(shares, default=None),
        "median_share_of_limit": statistics.median(shares) if shares else None,
        "out_of_memory_caught": caught,
        "errors": errors,
    }


def _allocated(setting: Setting, *, peak: bool = False) -> int:
    """Bytes of this process's tensors, the peak since the last run began or now; 0 in a dry run."""
    if setting.dry:
        return 0
    import torch

    return int(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
