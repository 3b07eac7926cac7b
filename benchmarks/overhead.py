"""The cost of the memory machinery: reading memory, admission, learning and events, against the same plan run bare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import models, texts
from benchmarks.client import Unavailable, Worker, write_inputs

__all__ = ["overhead"]


def overhead(*, folder: Path, count: int = 300, rounds: int = 10) -> dict[str, Any]:
    """Whole runs of MiniLM on real texts, and on short ones (where micro-batches are many for their work)."""
    rows = []
    for name, inputs in (("real", texts.real(count, seed=5)), ("short", texts.short(2 * count, seed=5))):
        case = folder / f"overhead-{name}"
        case.mkdir(exist_ok=True)
        try:
            with Worker("overhead", folder=case) as worker:
                worker.load(models.model_path("minilm"))
                path = write_inputs(folder / f"overhead-{name}.json", inputs)
                rows.append({"texts": name, **worker.call("measure", texts=str(path), rounds=rounds, limit_s=400)})
        except Unavailable as reason:
            rows.append({"texts": name, "not_run": str(reason)})
    return {"rows": rows}
