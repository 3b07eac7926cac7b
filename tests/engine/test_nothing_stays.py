"""What a call leaves behind: its results with the caller, nothing with us."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from memsafe.testing import SimulatedDevice, SimulatedEmbedder, SimulatedReranker

TEXTS = [f"text {number} " * (1 + number % 7) for number in range(60)]
ROWS_BYTES = len(TEXTS) * 512 * 4


def _calls(embedder: SimulatedEmbedder, reranker: SimulatedReranker, round_: int) -> None:
    """One of each kind; texts differ from round to round, so that whatever is kept by text is kept."""
    texts = [f"{round_} {text}" for text in TEXTS]
    embedder.embed_documents(texts)
    embedder.run(texts)
    embedder.embed_queries(texts[:2])
    reranker.rerank(texts[0], texts[1:], top_n=3)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_calls_leave_no_memory_behind(kind: str) -> None:
    """Forty rounds take what ten take: no rows, no texts, no micro-batches, no reports stay."""
    with (
        SimulatedEmbedder(SimulatedDevice("1GiB", kind=kind), dimension=512, memory={"max_tokens": 256}) as embedder,
        SimulatedReranker(SimulatedDevice("1GiB", kind=kind), memory={"max_tokens": 256}) as reranker,
    ):
        assert _growth(lambda round_: _calls(embedder, reranker, round_)) < 2 * ROWS_BYTES


def _growth(work: Callable[[int], Any]) -> int:
    """Bytes that are held after forty rounds and were not after ten."""
    tracemalloc.start()
    try:
        for round_ in range(10):
            work(round_)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for round_ in range(10, 40):
            work(round_)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
