"""Many callers, one model: ours against sentence-transformers (with and without a lock) and the frameworks' classes.

1. 64 threads embed one query each; the same 64 in one call.
2. One client asks query after query while a large embed_documents runs: its latency, and what that costs the bulk work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import models, stats, texts
from benchmarks.client import Unavailable, Worker, write_inputs

__all__ = ["concurrency"]

CASES: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
    ("memsafe", "memsafe", {}, True),
    ("SentenceTransformer.encode, behind a lock", "sentence-transformers", {"lock": True}, False),
    ("SentenceTransformer.encode, no lock", "sentence-transformers", {}, False),
    ("HuggingFaceEmbedding (LlamaIndex), no lock", "llama-index", {}, False),
    ("HuggingFaceEmbeddings (LangChain), no lock", "langchain", {}, False),
)


def concurrency(
    *, folder: Path, callers: int = 64, rounds: int = 5, bulk: int = 600, cases: int | None = None
) -> dict[str, Any]:
    """Both measurements for every case, rounds of the first one in turn. Query texts are short; bulk texts are real ones."""
    model = models.model_path("minilm")
    queries = write_inputs(folder / "queries.json", texts.short(callers, seed=7))
    warm = write_inputs(folder / "warm.json", texts.real(200, seed=8))
    documents = write_inputs(folder / "bulk.json", texts.real(bulk, seed=9))
    workers: dict[str, Worker] = {}
    found: dict[str, dict[str, Any]] = {}
    missing = []
    try:
        for label, peer, options, ours in CASES[:cases]:
            try:
                case = folder / f"case-{len(workers)}"
                case.mkdir(exist_ok=True)
                workers[label] = Worker(f"concurrency:{peer}", folder=case)
                workers[label].load(model, options)
                workers[label].run(warm)  # ours finds its micro-batch size, everyone's memory is warm
                workers[label].call("threads_each", queries=str(queries))
                found[label] = {"label": label, "ours": ours, "one_call": [], "threads": []}
            except Unavailable as reason:
                workers.pop(label).close()
                missing.append({"label": label, "reason": str(reason)})
        for _ in range(rounds):
            for label, worker in workers.items():
                found[label]["one_call"].append(worker.call("one_call", queries=str(queries)))
                found[label]["threads"].append(worker.call("threads_each", queries=str(queries)))
        for label, worker in workers.items():
            found[label]["beside_bulk"] = worker.call(
                "beside_bulk", bulk=str(documents), queries=str(queries), pause_s=0.1, limit_s=600
            )
    finally:
        for worker in workers.values():
            worker.close()
    reference = next((row for row in found.values() if row["ours"]), None)
    rows = [_row(row, reference, callers) for row in found.values()]
    return {"callers": callers, "rounds": rounds, "bulk_texts": bulk, "rows": rows, "not_run": missing}


def _row(row: dict[str, Any], ours: dict[str, Any] | None, callers: int) -> dict[str, Any]:
    """Throughputs in queries/s; `of_one_call`: the threads' share of the same peer's single call, round by round."""
    threads = [answer["seconds"] for answer in row["threads"]]
    beside = row["beside_bulk"]
    summary = {
        "label": row["label"],
        "ours": row["ours"],
        "one_call_per_s": stats.Spread.of([callers / s for s in row["one_call"]]).to_dict(),
        "threads_per_s": stats.Spread.of([callers / s for s in threads]).to_dict(),
        "of_one_call": stats.ratios(row["one_call"], threads).to_dict(),
        "threads_p99_s": stats.Spread.of([answer["p99_s"] for answer in row["threads"]]).to_dict(),
        "beside_bulk": beside,
        "bulk_loss": 1 - beside["bulk_alone_s"] / beside["bulk_with_queries_s"],
    }
    if ours is not None:
        summary["ratio"] = stats.ratios(threads, [answer["seconds"] for answer in ours["threads"]]).to_dict()
    return summary
