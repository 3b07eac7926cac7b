"""3. Predicted against measured peaks over random shapes; measured peaks against random limits."""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.gpu import inside
from benchmarks.gpu.common import GiB, Row, Setting, free_memory, isolated, lengths, load, reserved, texts

__all__ = ["run"]

CASES = (("bge-m3", "bfloat16"), ("bge-m3", "float32"), ("minilm", "float32"))


def run(setting: Setting) -> Iterator[Row]:
    """A row of figures per model and dtype, and one of limits."""
    for model, dtype in setting.pick(CASES, CASES[1:2]):
        yield from isolated(setting, "prediction:case", model=model, dtype=dtype)


def case(setting: Setting, model: str, dtype: str) -> Iterator[Row]:
    """Learn from one ordinary run, then 200 shapes, then 20 runs under a limit."""
    from memsafe import Embedder, MemoryPolicy
    from memsafe.events import Event, MicroBatchDone

    head: Row = {"what": model, "dtype": dtype}
    try:
        st = load(setting, model, dtype)
    except LookupError as error:
        yield {**head, "outcome": f"skipped: {error}"}
        return
    most = setting.pick(256 if model == "minilm" else 8192, 80)
    inputs = texts(lengths(setting.pick(1500, 40), 11, longest=most, median=setting.pick(200, 20)), 12)
    embedder = Embedder(st, memory=MemoryPolicy(learn=False))
    embedder.run(inputs)
    rows = list(inside.measure_shapes(embedder, setting.pick(200, 8), setting.pick(65536, 256), 13))
    embedder.close()
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
    yield {"what": model, "dtype": dtype, "detail": rows}

    done: list[MicroBatchDone] = []

    def hook(event: Event) -> None:
        if isinstance(event, MicroBatchDone):
            done.append(event)

    pick, over, failures, worst = random.Random(14), 0, 0, 0.0
    trials = setting.pick(20, 2)
    for _ in range(trials):
        if setting.left() < 20 and not setting.dry:
            trials = _ + 1
            break
        free_memory(setting)
        start = reserved(setting)
        limit = int((0.5 + 5 * pick.random()) * GiB)
        if not setting.dry:
            import torch

            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
        embedder = Embedder(st, memory=MemoryPolicy(learn=False, limit=limit, knee=0.0), hooks=(hook,))
        failures += embedder.run(pick.sample(inputs, len(inputs) // 2)).report.out_of_memory
        embedder.close()
        if not setting.dry and start is not None:  # the weights were there before: the limit counts from there
            share = (torch.cuda.max_memory_allocated() - allocated) / limit
            worst, over = max(worst, share), over + (share > 1)
    budget = sum(event.measured_bytes is not None and event.measured_bytes > event.budget_bytes for event in done)
    yield {
        **head,
        "outcome": "ok" if not budget and not over else "VIOLATED",
        "limits": trials,
        "micro_batches": len(done),
        "measured_above_budget": budget,
        "runs_above_limit": over,
        "largest_share_of_limit": worst,
        "out_of_memory_caught": failures,
    }
