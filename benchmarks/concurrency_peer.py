"""Many callers on one model, measured inside the worker: threads with one query each, and queries beside bulk work."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import Any

from benchmarks import stats
from benchmarks.peers import Peer

__all__ = ["Concurrent"]


def _read(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        texts: list[str] = json.load(file)
    return texts


class Concurrent(Peer):
    """Drives another peer from several threads. Option ``lock``: one call at a time, as users guard a model that has no queue."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.modules, self.distributions = peer.modules, peer.distributions
        self.lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def load(self, model: str, options: dict[str, Any]) -> None:
        options = dict(options)
        if options.pop("lock", False):
            self.lock = threading.Lock()
        self.peer.load(model, options)

    def run(self, inputs: list[Any], setting: dict[str, Any]) -> Any:
        with self.lock:
            return self.peer.run(inputs, setting)

    def report(self) -> dict[str, Any] | None:
        return self.peer.report()

    def _query(self, text: str) -> None:
        with self.lock:
            self.peer.query(text)

    def one_call(self, queries: str, setting: dict[str, Any] | None = None) -> float:
        """Seconds for all queries in one call."""
        texts = _read(queries)
        started = time.perf_counter()
        self.run(texts, setting or {})
        return time.perf_counter() - started

    def threads_each(self, queries: str) -> dict[str, Any]:
        """One thread per query, all released at once: seconds until the last has its answer, and every one's latency."""
        texts = _read(queries)
        barrier = threading.Barrier(len(texts) + 1)
        latencies, errors = [0.0] * len(texts), []

        def ask(number: int) -> None:
            barrier.wait()
            started = time.perf_counter()
            try:
                self._query(texts[number])
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}"[:200])
            latencies[number] = time.perf_counter() - started

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
        for thread in threads:
            thread.start()
        barrier.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        if errors:
            raise RuntimeError(f"{len(errors)} of {len(texts)} threads failed: {errors[0]}")
        return {"seconds": seconds, **_percentiles(latencies)}

    def beside_bulk(
        self, bulk: str, queries: str, pause_s: float, setting: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Latencies of one client that asks, waits for the answer, pauses and asks again: first alone, then during bulk work.

        The bulk work is timed before without queries, and then with them. At least one query is counted in any case:
        behind a lock it may wait for the whole bulk call.
        """
        texts, asked, setting = _read(bulk), _read(queries), setting or {}
        alone = [self._timed(asked[number % len(asked)], pause_s) for number in range(20)]
        started = time.perf_counter()
        self.run(texts, setting)
        bulk_alone_s = time.perf_counter() - started
        finished: list[float] = []

        def work() -> None:
            self.run(texts, setting)
            finished.append(time.perf_counter())

        thread = threading.Thread(target=work)
        started = time.perf_counter()
        thread.start()
        time.sleep(min(0.2, bulk_alone_s / 10))
        during: list[float] = []
        while thread.is_alive():
            latency = self._timed(asked[len(during) % len(asked)], pause_s)
            during.append(latency)
        thread.join()
        report = self.peer.report()
        micro_batch = None
        if report is not None and report["micro_batches"]:
            micro_batch = report["compute_s"] / report["micro_batches"]
        return {
            "bulk_alone_s": bulk_alone_s,
            "bulk_with_queries_s": finished[0] - started,
            "alone": _percentiles(alone),
            "during": _percentiles(during),
            "micro_batch_s": micro_batch,
        }

    def _timed(self, text: str, pause_s: float) -> float:
        started = time.perf_counter()
        self._query(text)
        seconds = time.perf_counter() - started
        time.sleep(pause_s)
        return seconds


def _percentiles(latencies: list[float]) -> dict[str, Any]:
    found: dict[str, Any] = {f"p{p}_s": stats.percentile(latencies, p) for p in (50, 95, 99)}
    return {**found, "max_s": max(latencies), "count": len(latencies)}
