"""memsafe in a row of the proof: what a run took, and what sizes its micro-batches had and how fast each was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.common import Row, Setting, attempt, behind
from benchmarks.gpu.models import Workload

__all__ = ["Ours", "sizes_of"]

KEPT = (
    "path lanes tokenize_s compute_s total_s largest_micro_batch_tokens measured_peak_bytes predicted_peak_bytes "
    "process_peak_bytes out_of_memory retries splits shrinks grows fallbacks waited_s non_finite_rows truncated"
).split()
"""Of a run's report; `lanes` is how many forwards were queued on the device at a time, at most."""


class Ours:
    """An Embedder, or a Reranker, of a loaded model: nothing learnt before, at its defaults but for `options`."""

    def __init__(self, setting: Setting, st: Any, *, pairs: bool, **options: Any) -> None:
        from memsafe import Embedder, MemoryPolicy, Reranker
        from memsafe.events import Event, MicroBatchDone

        self.setting = setting
        self.pairs = pairs
        self.done: list[MicroBatchDone] = []

        def hook(event: Event) -> None:
            if isinstance(event, MicroBatchDone):
                self.done.append(event)

        policy = MemoryPolicy(**{"learn": False, **options})
        self.model: Any = (Reranker if pairs else Embedder)(st, memory=policy, hooks=(hook,))

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *_error: object) -> None:
        self.model.close()

    def run(self, load: Workload, progress: Callable[[int], None] | None = None) -> tuple[Row, Any]:
        """(the row of one run, its rows or None). A run that was stopped or failed tells its micro-batches until then."""
        import numpy as np

        self.done.clear()
        row, result = attempt(self.setting, lambda: self.model.run(load.inputs, progress=progress), load.tokens)
        done = list(self.done)
        if result is not None:
            rows = result.scores if self.pairs else result.embeddings
            if len(rows) != len(load.documents) or not bool(np.isfinite(rows).all()):
                row["outcome"] = "WRONG: rows are missing or not numbers"
            report = result.report.to_dict()
            row.update({name: report[name] for name in KEPT})
        search = behind(self.model)
        row.update(
            texts=len(load.documents),
            tokens_done=sum(each.tokens for each in done),
            micro_batches=len(done),
            size_reached=search.size,
            sizes_tried=search.tried,
            sizes=sizes_of([(each.tokens, each.seconds) for each in done]),
        )
        return row, None if result is None else rows


def sizes_of(done: Sequence[tuple[int, float]]) -> dict[str, list[float]]:
    """By size: [micro-batches, tokens/s], of (tokens, seconds) of each micro-batch. A size is a power of two: "256" has 256
    to 511 tokens. Seconds are those from launch to rows, the wait behind another one in flight included."""
    found: dict[int, list[tuple[int, float]]] = {}
    for tokens, seconds in done:
        found.setdefault(1 << max(tokens.bit_length() - 1, 0), []).append((tokens, seconds))
    return {
        str(size): [len(some), round(sum(tokens for tokens, _ in some) / max(sum(s for _, s in some), 1e-9))]
        for size, some in sorted(found.items())
    }
