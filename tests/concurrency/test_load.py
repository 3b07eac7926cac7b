"""The load test of benchmarks/load.py, for seconds rather than minutes."""

from __future__ import annotations

import pytest

pytest.importorskip("resource", reason="benchmarks/load.py reads memory the POSIX way")


@pytest.mark.slow
def test_mixed_traffic_for_seconds(minilm: str, demo_reranker: str) -> None:
    """Threads and coroutines, embedding and reranking, cancelling and failing: no error, no wrong row, nothing left
    waiting, no thread left behind, flat memory."""
    from benchmarks.load import measure

    seen = measure(seconds=8, threads=6, seed=1, num_texts=40)
    assert not seen["errors"]
    assert seen["threads_left"] == seen["inputs_left_waiting"] == 0
    assert sum(seen["calls"].values()) > 20, seen
    assert seen["ok"], seen
