"""Sparse rows, a vector for every token and BGE-M3's three outputs, against the libraries that give them: speed and peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import texts
from benchmarks.contenders import Contender
from benchmarks.speed import Arena, Task, compare, peaks

__all__ = ["KINDS", "outputs"]

KINDS: dict[str, tuple[Contender, ...]] = {
    "sparse": (
        Contender("memsafe.SparseEmbedder", "outputs:memsafe-sparse", ours=True),
        Contender("SparseEncoder.encode_document", "outputs:sparse-encoder", default="batch 1", sweep=(2, 4)),
    ),
    "multi_vector": (
        Contender("memsafe.MultiVectorEmbedder", "outputs:memsafe-multi-vector", ours=True),
        Contender("MultiVectorEncoder", "outputs:multi-vector-encoder", default="batch 32", sweep=(1, 4, 8)),
        Contender("PyLate", "outputs:pylate", "pylate", default="batch 32", sweep=(1, 4, 8)),
    ),
    "hybrid": (
        Contender("memsafe.HybridEmbedder", "outputs:memsafe-hybrid", ours=True),
        Contender(
            "BGEM3FlagModel (FlagEmbedding)",
            "outputs:flag-m3",
            "flag",
            {"batch_size": 4},
            "batch 4",
            (1, 8),
            takes_max_length=True,
        ),
    ),
}


def outputs(
    *, folder: Path, sparse: int = 60, count: int = 200, tail: int = 60, rounds: int = 5, budget_s: float = 150.0
) -> dict[str, Any]:
    """Every kind on a heavy tail, and token vectors on real texts; the rows are compared with the first peer's."""
    tasks = {
        "sparse": [Task("heavy tail to 1,024 tokens", "splade-2x384", 1024, texts.heavy_tail(sparse, 19, 700))],
        "multi_vector": [
            Task("real texts", "colbert-minilm", 256, texts.real(count, seed=19)),
        ],
        "hybrid": [Task("heavy tail to 4,000 tokens", "m3-2x256", 8192, texts.heavy_tail(tail, 19))],
    }
    found, memory = [], {}
    for kind, among in KINDS.items():
        for task in tasks[kind]:
            with Arena(among, task.model, folder=folder, max_length=task.max_length) as arena:
                part = max(len(task.inputs) // 3, 8)
                found.append(compare(arena, task, folder=folder, rounds=rounds, budget_s=budget_s, part=part, keep=1))
            rows = sorted(found[-1]["rows"], key=lambda row: row["tokens_per_s"]["median"])
            best = {row["label"]: row["setting"] for row in rows}
            chosen: list[tuple[Contender, dict[str, Any], str]] = [(each, {}, each.default) for each in among]
            for each in among:
                setting = best.get(each.label, each.default)
                if setting != each.default:
                    chosen.append((each, {"batch_size": int(setting.split()[-1])}, setting))
            memory[f"{task.name}, {task.model}"] = peaks(task, chosen, folder=folder)
    return {"tasks": found, "memory": {"tasks": memory}}
