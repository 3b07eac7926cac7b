"""The feeding path alone: a call's texts to token ids in the queue, against the way it was done before.

Before: pieces of 64 to 1,024 texts, one after another, each through ``encode_batch`` with offsets, ids copied from a list
for each text. Both ways run in turn in one process, on one core and on two, with and without a thread that computes in
Python without pause, as one that launches kernels does. No forward runs. "Now" is a call after one with other texts of the
same kind: what is remembered of words then serves; the first call has nothing to remember.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import models, texts

__all__ = ["feeding"]

Feed = Callable[[Sequence[Any]], int]


def feeding(*, count: int = 3000, rounds: int = 5) -> dict[str, Any]:
    """Tokens a second, medians and quartiles of `rounds`, each way's, by cores and by what else runs."""
    rows = []
    for cores in (1, 2):
        if cores > len(os.sched_getaffinity(0)):
            rows.append({"cores": cores, "not_run": f"{len(os.sched_getaffinity(0))} cores"})
            continue
        command = [sys.executable, "-m", "benchmarks.feeding", *map(str, (cores, count, rounds))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            rows.append({"cores": cores, "not_run": done.stderr.strip().splitlines()[-1][:200]})
            continue
        rows += json.loads(done.stdout.splitlines()[-1])
    return {"rows": rows}


def before(tokenizer: Any, max_length: int, pairs: bool) -> Feed:
    """As it was done up to commit 96d099d."""
    from memsafe.planning.batch import TokenizedInput

    rust = copy.deepcopy(tokenizer.backend_tokenizer)
    rust.no_padding()
    rust.enable_truncation(max_length, strategy="longest_first")

    def feed(inputs: Sequence[Any]) -> int:
        backlog, job = _queue(len(inputs))
        chars = [len(value) if isinstance(value, str) else sum(map(len, value)) for value in inputs]
        order = sorted(range(len(inputs)), key=chars.__getitem__, reverse=True)
        start, size, total = 0, 64, 0
        while start < len(order):
            stop = start + min(size, max((1 << 18) // max(chars[order[start]], 1), 1))
            chunk = order[start:stop]
            items = []
            for i, encoding in zip(chunk, rust.encode_batch([inputs[i] for i in chunk]), strict=True):
                ids = np.array(encoding.ids, dtype=np.int32)
                types = np.array(encoding.type_ids, dtype=np.int32) if pairs else None
                total += len(ids)
                bool(len(ids) >= max_length and encoding.overflowing)
                items.append(TokenizedInput(i, ids, types, job=job))
            backlog.extend(job, items)
            start, size = stop, min(2 * size, 1024)
        return total

    return feed


def now(way: Any) -> Feed:
    from memsafe.engine.feeding import feed as ours

    def feed(inputs: Sequence[Any]) -> int:
        backlog, job = _queue(len(inputs))
        ours(backlog, job, inputs, way, None)
        return backlog.queues.came_tokens

    return feed


def _queue(num_inputs: int) -> tuple[Any, Any]:
    from memsafe.engine.jobs import Backlog, Job
    from memsafe.events import ReportBuilder
    from memsafe.planning.turns import BULK, QueueKey

    return Backlog(), Job(num_inputs, QueueKey((BULK, None, ())), {}, ReportBuilder())


def measure(cores: int, count: int, rounds: int) -> list[dict[str, Any]]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    from sentence_transformers import CrossEncoder, SentenceTransformer

    from memsafe.models.tokenizing import InputEncoder

    embedder = SentenceTransformer(str(models.model_path("minilm")), device="cpu")
    reranker = CrossEncoder(str(models.model_path("minilm-cross-encoder")), device="cpu")
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    made_up = [
        " ".join("".join(generator.choice(letters, size)) for size in generator.integers(3, 9, 60))
        for _ in range(count // 4)
    ]
    real, pairs = texts.real(2 * count, seed=7), texts.pairs(count, seed=7)
    real, seen = real[::2], real[1::2]
    cases = [
        ("real texts", embedder, real, seen, True),
        ("real texts, not by words", embedder, real, seen, False),
        ("words that never come again", embedder, made_up, seen, True),
        ("one query, real documents", reranker, pairs[::2], pairs[1::2], True),
    ]
    rows = []
    for name, model, inputs, others, by_words in cases:
        pairs = model is reranker

        def fresh(model: Any = model, pairs: bool = pairs, by_words: bool = by_words) -> Feed:
            way: Any = InputEncoder(model, pairs=pairs).way()
            if not by_words:  # as for tokenizers of other kinds
                way._tokenizer._words = None
            return now(way)

        old = before(model.tokenizer, InputEncoder(model, pairs=pairs).max_length or 512, pairs)
        for busy in (False, True):
            rates: dict[str, list[float]] = {"before": [], "now, first call": [], "now": []}
            for _ in range(rounds):
                later = fresh()
                later(others)
                for label, feed in (("before", old), ("now, first call", fresh()), ("now", later)):
                    rates[label].append(_rate(feed, inputs, busy))
            ratios = {
                label: statistics.median(new / base for new, base in zip(rates[label], rates["before"], strict=True))
                for label in ("now, first call", "now")
            }
            rows.append({"cores": cores, "texts": name, "busy": busy, "tokens_per_s": rates, "ratio": ratios})
    return rows


def _rate(feed: Feed, inputs: Sequence[Any], busy: bool) -> float:
    stop = threading.Event()

    def spin() -> None:
        number = 0
        while not stop.is_set():
            number += 1

    thread = threading.Thread(target=spin, daemon=True)
    if busy:
        thread.start()
    started = time.perf_counter()
    tokens = feed(inputs)
    seconds = time.perf_counter() - started
    stop.set()
    if busy:
        thread.join()
    return tokens / seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("cores", "count", "rounds"):
        parser.add_argument(name, type=int)
    print(json.dumps(measure(**vars(parser.parse_args()))))
