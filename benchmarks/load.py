"""Mixed traffic on one device for minutes: no error, no thread left behind, flat memory.

python -m benchmarks.load [--seconds 600] [--threads 12] [--seed 0]

Threads and coroutines call an embedder and a reranker at once: single questions, indexing, reranking, calls that are
cancelled or time out, and inputs that are refused. Every row is compared with what the same text gave alone. Prints one
JSON object and ends with status 1 if anything was not as it should be. Local models only; nothing touches a network.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import random
import resource
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from memsafe import Embedder, InputError, MemoryPolicy, MiB, Reranker

TOLERANCE = 1e-4
"""Largest difference of a row from the same text's row alone: float32, other sums in other micro-batches."""
GROWTH = 64 * MiB
"""Resident memory that the last third of the run may have on top of the middle one, in the median: it goes up and down
by 100 MiB as freed memory is given back."""
QUESTION = "How are several sorted inputs merged?"


class Load:
    """The traffic. `errors` holds what should not have happened."""

    def __init__(self, embedder: Embedder, reranker: Reranker, texts: list[str], seconds: float) -> None:
        self.embedder, self.reranker, self.texts = embedder, reranker, texts
        self.rows = embedder.embed_documents(texts)
        self.scores = reranker.score(QUESTION, texts)
        self.calls: Counter[str] = Counter()
        self.errors: list[str] = []
        self.latencies_s: list[float] = []
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._until

    def some(self, rng: random.Random, most: int) -> list[int]:
        return [rng.randrange(len(self.texts)) for _ in range(rng.randint(1, most))]

    def check(self, what: str, got: Any, expected: Any) -> None:
        if got.shape != expected.shape or np.abs(got - expected).max() > TOLERANCE:
            self.errors.append(f"{what}: wrong rows")

    def count(self, what: str) -> None:
        with self._lock:
            self.calls[what] += 1

    # what callers do

    def query(self, rng: random.Random) -> None:
        index = rng.randrange(len(self.texts))
        started = time.perf_counter()
        row = self.embedder.embed_queries([self.texts[index]])
        self.latencies_s.append(time.perf_counter() - started)
        self.check("query", row[0], self.rows[index])

    def index(self, rng: random.Random) -> None:
        wanted = self.some(rng, 40)
        self.check("index", self.embedder.embed_documents([self.texts[i] for i in wanted]), self.rows[wanted])

    def rerank(self, rng: random.Random) -> None:
        wanted = self.some(rng, 12)
        self.check("rerank", self.reranker.score(QUESTION, [self.texts[i] for i in wanted]), self.scores[wanted])

    def refused(self, rng: random.Random) -> None:
        try:
            self.embedder.embed_documents([self.texts[0], None])  # type: ignore[list-item]
        except InputError:
            return
        self.errors.append("refused: a bad input was accepted")

    async def awaited(self, rng: random.Random) -> None:
        wanted = self.some(rng, 20)
        rows, scores = await asyncio.gather(
            self.embedder.aembed_documents([self.texts[i] for i in wanted]),
            self.reranker.ascore(QUESTION, [self.texts[i] for i in wanted[:6]]),
        )
        self.check("awaited rows", rows, self.rows[wanted])
        self.check("awaited scores", scores, self.scores[wanted[:6]])

    async def cancelled(self, rng: random.Random) -> None:
        task = asyncio.create_task(self.embedder.aembed_documents(self.texts))
        await asyncio.sleep(rng.random() * 0.2)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return

    async def timed_out(self, rng: random.Random) -> None:
        try:
            await asyncio.wait_for(self.reranker.ascore(QUESTION, self.texts), rng.random() * 0.2)
        except (TimeoutError, asyncio.TimeoutError):
            return

    # who does it

    def in_a_thread(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds = [self.query, self.index, self.rerank, self.refused]
        while not self.over:
            call = rng.choices(kinds, weights=(8, 3, 3, 1))[0]
            try:
                call(rng)
            except Exception as error:
                self.errors.append(f"{call.__name__}: {error!r}")
            self.count(call.__name__)

    def in_a_loop(self, seed: int) -> None:
        async def caller(number: int) -> None:
            rng = random.Random(1000 * seed + number)
            kinds: list[Callable[[random.Random], Any]] = [self.awaited, self.cancelled, self.timed_out]
            while not self.over:
                call = rng.choices(kinds, weights=(4, 1, 1))[0]
                try:
                    await call(rng)
                except Exception as error:
                    self.errors.append(f"{call.__name__}: {error!r}")
                self.count(call.__name__)

        async def main() -> None:
            await asyncio.gather(*(caller(number) for number in range(4)))

        asyncio.run(main())


def resident_bytes() -> int:
    """Of this process now; its peak where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of the load's own bad inputs are not shown."""
    log = logging.getLogger("memsafe")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def measure(seconds: float, threads: int, seed: int, num_texts: int = 60) -> dict[str, Any]:
    """Run the traffic; returns what was seen. ``ok`` says whether all of it is as it should be."""
    from examples.models import demo_reranker, minilm
    from examples.passages import load_passages

    policy = MemoryPolicy(max_pending=500)
    texts = [passage.text[:400] for passage in load_passages()[:num_texts]]
    with _quiet(), Embedder(minilm(), memory=policy) as embedder, Reranker(demo_reranker(), memory=policy) as reranker:
        threads_before = threading.active_count()  # bars shown while loading may have left one that watches them
        warm = Load(embedder, reranker, texts, min(seconds / 5, 30))
        _traffic(warm, threads, seed)
        sizes = [resident_bytes()]
        load = Load(embedder, reranker, texts, seconds)
        watching = threading.Thread(target=_watch, args=(load, sizes), daemon=True)
        watching.start()
        _traffic(load, threads, seed + 1)
        watching.join()
        waiting = sum(model._engine.backlog.pending for model in (embedder, reranker))
    left = _threads_left(threads_before)
    latencies = sorted(load.latencies_s)
    third = len(sizes) // 3
    growth = statistics.median(sizes[-third:]) - statistics.median(
        sizes[third : 2 * third]
    )  # the first third: micro-batches still grow
    errors = warm.errors + load.errors
    return {
        "ok": not errors and not left and growth < GROWTH and not waiting,
        "seconds": seconds,
        "calls": dict(load.calls),
        "errors": errors[:20],
        "threads_left": left,
        "inputs_left_waiting": waiting,
        "resident_mib": [round(size / MiB) for size in sizes[:: max(len(sizes) // 20, 1)]],
        "growth_mib": round(growth / MiB, 1),
        "query_latency_ms": {
            f"p{p}": round(1000 * latencies[min(len(latencies) * p // 100, len(latencies) - 1)]) for p in (50, 95, 99)
        }
        if latencies
        else {},
    }


def _traffic(load: Load, threads: int, seed: int) -> None:
    callers = [threading.Thread(target=load.in_a_thread, args=(seed * 100 + n,)) for n in range(threads)]
    callers += [threading.Thread(target=load.in_a_loop, args=(seed * 100 + n,)) for n in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def _watch(load: Load, sizes: list[int]) -> None:
    while not load.over:
        time.sleep(0.25)
        sizes.append(resident_bytes())


def _threads_left(before: int) -> int:
    """Threads beyond those `before`, once idle ones have had time to end."""
    gc.collect()
    deadline = time.monotonic() + 15
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.1)
    return max(threading.active_count() - before, 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Mixed traffic: no error, no thread left behind, flat memory.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    result = measure(options.seconds, options.threads, options.seed)
    print(json.dumps(result, indent=2))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
