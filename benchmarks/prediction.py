"""How well peaks are predicted: an error table over models and layouts, and budgets that must not be exceeded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import models, stats, texts
from benchmarks.client import Unavailable, Worker, write_inputs

__all__ = ["prediction"]

CASES = (
    ("minilm", "packed"),
    ("minilm", "padded"),
    ("minilm", "padded, full mask"),
    ("xlmr-2x256", "packed"),
    ("xlmr-2x256", "padded"),
    ("xlmr-2x256", "padded, full mask"),
    ("gte-2x256", "packed"),
    ("gte-2x256", "padded"),
)


def prediction(
    *,
    folder: Path,
    shapes: int = 40,
    trials: int = 6,
    cases: tuple[tuple[str, str], ...] = CASES,
    most_tokens: int = 8192,
) -> dict[str, Any]:
    """Per case: median and 95th percentile of the relative error of live peaks, and what of the bounds was exceeded."""
    inputs = write_inputs(folder / "prediction.json", texts.heavy_tail(400, seed=3))
    few = write_inputs(folder / "limits.json", texts.heavy_tail(120, seed=4, longest=1200))
    rows, raw, limits = list[dict[str, Any]](), {}, list[dict[str, Any]]()
    for number, (model, layout) in enumerate(cases):
        case = folder / f"prediction-{number}"
        case.mkdir(exist_ok=True)
        try:
            with Worker("prediction", folder=case) as worker:
                worker.load(models.model_path(model), {"layout": layout})
                found = worker.call(
                    "errors", texts=str(inputs), shapes=shapes, seed=number, most_tokens=most_tokens, limit_s=300
                )
                if layout == "packed" and trials:
                    tried = worker.call("limits", texts=str(few), trials=trials, seed=number, limit_s=300)
                    limits.extend({"model": model, **trial} for trial in tried)
        except Unavailable as reason:
            rows.append({"model": model, "layout": layout, "not_run": str(reason)})
            continue
        rows.append({"model": model, "layout": layout, **summary(found)})
        print(f"  {model}, {layout}: {rows[-1]}", file=sys.stderr, flush=True)
        raw[f"{model}, {layout}"] = found["shapes"]
    exceeded = sum(t["peak_bytes"] is not None and t["peak_bytes"] > t["limit_bytes"] for t in limits)
    return {"rows": rows, "limits": limits, "limits_exceeded": exceeded, "shapes": raw}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Relative errors are |predicted - measured| / measured; `over_*` count bounds that the measurement exceeded."""
    measured = [shape for shape in found["shapes"] if shape["live_bytes"]]
    errors = [abs(shape["predicted_bytes"] - shape["live_bytes"]) / shape["live_bytes"] for shape in measured]
    resident = [shape for shape in found["shapes"] if shape["resident_bytes"] is not None]
    return {
        "path": found["path"],
        "probes": found["probes"],
        "shapes": len(measured),
        "error_median": stats.percentile(errors, 50),
        "error_p95": stats.percentile(errors, 95),
        "error_max": max(errors),
        "over_upper_bound": sum(shape["live_bytes"] > shape["upper_bytes"] for shape in measured),
        "over_resident_bound": sum(shape["resident_bytes"] > shape["resident_bound_bytes"] for shape in resident),
        "resident_shapes": len(resident),
        "largest_tokens": max(shape["tokens"] for shape in measured),
    }
