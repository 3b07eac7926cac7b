"""What the memory machinery costs, inside a worker: the same micro-batches through memsafe's engine and run bare."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import stats
from benchmarks.peers import Peer

__all__ = ["Overhead"]


class Overhead(Peer):
    """Inputs are tokenised once; both sides start from there, use the same lanes and threads, and give the same rows."""

    modules = ("torch", "sentence_transformers", "memsafe")

    def load(self, model: str, options: dict[str, Any]) -> None:
        from memsafe import Embedder

        self.events = 0

        def count(_event: object) -> None:
            self.events += 1

        self.embedder = Embedder(model, device="cpu", hooks=[count])
        self.engine = self.embedder._engine
        self.runner = self.engine.runners[0]
        self.sizing = self.runner.tenant.sizing

    def measure(self, texts: str, rounds: int) -> dict[str, Any]:
        """Both ways in turn, `rounds` times, and the machinery's own share of the processor time by adding up its calls."""
        with open(texts, encoding="utf-8") as file:
            inputs = json.load(file)
        for _ in range(10):  # until nothing is searched any more
            self.embedder.run(inputs)
            if self.sizing.settled and self.sizing.lane_choice.done:
                break
        batches, rows, _ = self._engine_run(inputs, record=True)
        bare_rows, _ = self._bare_run(batches, len(inputs))
        if not np.allclose(rows, bare_rows, atol=1e-5):
            raise RuntimeError("the bare run computed something else")
        engine_s, bare_s = [], []
        for number in range(rounds):
            for side in ("engine", "bare") if number % 2 else ("bare", "engine"):
                if side == "engine":
                    engine_s.append(self._engine_run(inputs, record=False)[2])
                else:
                    bare_s.append(self._bare_run(batches, len(inputs))[1])
        return {
            "micro_batches": len(batches),
            "tokens": sum(batch.num_tokens for batch in batches),
            "lanes": self.sizing.lanes[0],
            "settled": self.sizing.settled,
            "engine_s": engine_s,
            "bare_s": bare_s,
            "ratio": stats.ratios(engine_s, bare_s).to_dict(),
            **self._shares(inputs, max(rounds // 2, 2)),
        }

    def _job(self, inputs: list[str]) -> tuple[Any, list[Any]]:
        from memsafe.planning.batch import TokenizedInput

        way = self.engine.way(None, {})
        job = self.engine.open(len(inputs), way=way, urgent=False, max_rows=None)
        self.engine.announce(job)
        encoded = way.encode(inputs)
        items = [TokenizedInput(i, e.input_ids, e.token_type_ids, job=job) for i, e in enumerate(encoded)]
        return job, items

    def _engine_run(self, inputs: list[str], *, record: bool) -> tuple[list[Any], Any, float]:
        """(micro-batches if recorded, rows, seconds from queueing to the last row)."""
        job, items = self._job(inputs)
        batches: list[Any] = []
        run = self.runner.run
        if record:

            def recording(start: Any, *args: Any, **kwargs: Any) -> Any:
                batches.append(start.ticket.batch)
                return run(start, *args, **kwargs)

            vars(self.runner)["run"] = recording
        try:
            started = time.perf_counter()
            self.engine.backlog.extend(job, items, None)
            rows = job.result()
            seconds = time.perf_counter() - started
        finally:
            vars(self.runner).pop("run", None)
        return batches, rows, seconds

    def _bare_run(self, batches: list[Any], count: int) -> tuple[Any, float]:
        """The same micro-batches in the same order: forward, copy the rows to their places, nothing else."""
        import torch

        from memsafe.engine.sinks import to_host

        model = self.engine.model
        lanes, threads = self.sizing.lanes
        out = np.empty((count, self.embedder.dimension), dtype=np.float32)
        todo = iter(batches)
        lock = threading.Lock()

        def lane() -> None:
            torch.set_num_threads(threads or self.threads()["cores"])
            while True:
                with lock:
                    batch = next(todo, None)
                if batch is None:
                    return
                rows = to_host(model.forward(batch, batch.items[0].job.extras))
                out[[item.index for item in batch.items]] = rows

        workers = [threading.Thread(target=lane) for _ in range(lanes)]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return out, time.perf_counter() - started

    def _shares(self, inputs: list[str], rounds: int) -> dict[str, Any]:
        """Processor time of the calls that a bare run does not make, over the process's, summed over `rounds` runs."""
        from memsafe.engine import runner
        from memsafe.engine.lanes import lanes_of

        spent: Counter[str] = Counter()
        calls: Counter[str] = Counter()

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                started = time.thread_time_ns()
                try:
                    return function(*args, **kwargs)
                finally:
                    spent[name] += time.thread_time_ns() - started
                    calls[name] += 1

            return wrapper

        lanes = lanes_of(self.runner.device)
        places: list[tuple[Any, str, str]] = [
            (lanes, "choose", "choose and admit"),
            (self.runner.device, "snapshot", "of which: read memory"),
            (lanes.scheduler, "ran", "learn"),
            (runner, "deliver", "deliver rows and events"),
            (lanes.scheduler, "done", "finish"),
        ]
        before = [vars(owner).get(attribute) for owner, attribute, _ in places]
        for owner, attribute, name in places:
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))
        try:
            events, total = self.events, 0.0
            for _ in range(rounds):
                job, items = self._job(inputs)
                started = time.process_time()
                self.engine.backlog.extend(job, items, None)
                job.result()
                total += time.process_time() - started
        finally:
            for (owner, attribute, _), was in zip(places, before, strict=True):
                if was is None:
                    delattr(owner, attribute)
                else:
                    setattr(owner, attribute, was)
        top = [name for _, _, name in places if not name.startswith("of which")]
        return {
            "share": sum(spent[name] for name in top) / 1e9 / total,
            "parts": {name: {"share": spent[name] / 1e9 / total, "calls": calls[name]} for _, _, name in places},
            "events": self.events - events,
            "microseconds_per_micro_batch": sum(spent[name] for name in top)
            / 1e3
            / max(calls["deliver rows and events"], 1),
        }
