"""Half precision where the CPU computes it natively: speed against our own float32, and how close the numbers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import texts
from benchmarks.contenders import Contender
from benchmarks.speed import Arena, Task, compare

__all__ = ["dtype"]

CONTENDERS = (
    Contender("memsafe, float32", "memsafe", ours=True),
    Contender("memsafe, dtype='auto'", "memsafe", options={"dtype": "auto"}, ours=True),
    Contender("memsafe, bfloat16", "memsafe", options={"dtype": "bfloat16"}, ours=True),
    Contender("SentenceTransformer.encode, float32", "sentence-transformers", default="batch 32", sweep=(8,)),
    Contender(
        "SentenceTransformer.encode, bfloat16",
        "sentence-transformers",
        options={"model_kwargs": {"dtype": "bfloat16"}},
        default="batch 32",
        sweep=(8, 128),
    ),
    Contender("SentenceTransformer, OpenVINO as it comes", "sentence-transformers", "openvino", {"backend": "openvino"},
              "batch 32", (4,), "openvino"),
)  # fmt: skip


def dtype(*, folder: Path, count: int = 250, rounds: int = 4, budget_s: float = 120.0) -> dict[str, Any]:
    """Ratios are to our float32; cosines to sentence-transformers' float32."""
    task = Task("half precision", "minilm", 256, texts.real(count, seed=6))
    with Arena(CONTENDERS, task.model, folder=folder, max_length=task.max_length) as arena:
        return compare(
            arena,
            task,
            folder=folder,
            rounds=rounds,
            budget_s=budget_s,
            part=max(count // 3, 20),
            dtypes=("float32", "bfloat16"),
            reference="SentenceTransformer.encode, float32",
        )
