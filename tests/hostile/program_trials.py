"""Run inside a box: many random jobs, each under a memory limit of its own; one JSON line a trial.

Arguments: first seed, number of trials, folder with `embedder`, `reranker`, `texts.json`, `rows.npy`, `scores.npy`,
and the box's cgroup folder. The limit is set from inside to what is used now and a random margin: larger or smaller than the one before, while the
library is at work in the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import random
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from memsafe import Embedder, InputTooLargeError, MemoryPolicy, ModelTooLargeError, Reranker
from memsafe.config import MiB
from memsafe.machine.heap import heap
from memsafe.machine.linux import LinuxHost


def usage_bytes(box: Path) -> int:
    for name in ("memory.usage_in_bytes", "memory.current"):
        with contextlib.suppress(OSError):
            return int((box / name).read_text())
    raise RuntimeError("no memory cgroup")


def set_limit(box: Path, num_bytes: int) -> None:
    """With swap accounting the second limit may never be the smaller one: hence in both orders."""
    value = str(num_bytes)
    names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.limit_in_bytes", "memory.max"]
    for name in names:
        with contextlib.suppress(OSError):
            if (box / name).exists():
                (box / name).write_text(value)


class Trial:
    """One random job and what must come out of it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        random_ = random.Random(seed)
        self.rerank = random_.random() < 0.3
        self.margin_bytes = int(random_.choice([40, 60, 80, 100, 130, 160, 200, 300]) * random_.uniform(0.8, 1.2)) * MiB
        options: dict[str, Any] = {
            "reserve": random_.choice([8 * MiB, 16 * MiB, 32 * MiB, None]),
            "fallback": random_.choice([(), ("chunk",), ("chunk", "half", "cpu")]),
            "release": random_.choice(["pressure", "pressure", "run", "never"]),
            "wait_s": random_.choice([0, 0.1]),
        }
        if random_.random() < 0.3:
            options["limit"] = int(self.margin_bytes * random_.uniform(0.5, 0.9))
        if random_.random() < 0.2:
            options["max_tokens"] = random_.choice([256, 1024, 4096])
        self.options = options
        self.count = random_.choice([1, 2, 4, 10, 25, 50])
        self.callers = random_.choice([1, 1, 1, 2, 3])
        self.max_rows = random_.choice([None, None, None, 1, 7])
        self.random = random_
        self.folder = folder

    def run(self, inputs: list[Any], wanted: Any) -> dict[str, Any]:
        policy = MemoryPolicy(learn=False, **self.options)
        kind = Reranker if self.rerank else Embedder
        try:
            model = kind(str(self.folder / ("reranker" if self.rerank else "embedder")), device="cpu", memory=policy)
        except ModelTooLargeError as error:
            return {"outcome": "model too large", "need": error.need_bytes, "free": error.free_bytes}
        outcomes: list[str] = []
        places = [[self.random.randrange(len(inputs)) for _ in range(self.count)] for _ in range(self.callers)]

        def call(mine: list[int]) -> None:
            try:
                outcomes.append(self.call(model, [inputs[i] for i in mine], wanted[mine]))
            except BaseException as error:
                outcomes.append(f"WRONG {type(error).__name__}: {error}")

        threads = [threading.Thread(target=call, args=(mine,)) for mine in places[1:]]
        for thread in threads:
            thread.start()
        call(places[0])
        for thread in threads:
            thread.join()
        model.close()
        worst = next((o for o in outcomes if o.startswith("WRONG")), None)
        return {"outcome": worst or ("input too large" if "input too large" in outcomes else "done")}

    def call(self, model: Any, inputs: list[Any], wanted: Any) -> str:
        try:
            run = model.run(inputs, max_rows=self.max_rows)
        except InputTooLargeError as error:
            if not error.need_bytes > error.free_bytes:
                return f"WRONG: need {error.need_bytes}, free {error.free_bytes}"
            got, ok = error.partial, [i for i in range(len(inputs)) if i not in error.failed]
            if error.index not in error.failed:
                return "WRONG: index"
            if got is None or not ok:
                return "input too large" if not ok else "WRONG: nothing finished"
            return self.compare(got[ok], wanted[ok], "input too large", half=True)
        got = run.scores if self.rerank else run.embeddings
        return self.compare(got, wanted, "done", half="half" in run.report.fallbacks)

    @staticmethod
    def compare(got: Any, wanted: Any, outcome: str, *, half: bool) -> str:
        if got.shape != wanted.shape:
            return f"WRONG shape {got.shape}"
        largest = float(np.max(np.abs(got - wanted))) if len(got) else 0.0
        return outcome if largest <= (5e-2 if half else 1e-4) else f"WRONG rows by {largest}"


def main() -> None:
    faulthandler.dump_traceback_later(120, exit=True)  # whatever hangs shall say where
    first, count, folder, box = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    warnings.simplefilter("ignore")
    logging.getLogger("memsafe").setLevel(logging.ERROR)
    texts, pairs = json.loads((folder / "texts.json").read_text())
    rows, scores = np.load(folder / "rows.npy"), np.load(folder / "scores.npy")
    host = LinuxHost()
    for kind, name in ((Embedder, "embedder"), (Reranker, "reranker")):  # what libraries load lazily is there before
        kind(str(folder / name), device="cpu").close()
    for seed in range(first, first + count):
        faulthandler.dump_traceback_later(120, exit=True)
        heap.loosen()
        trial = Trial(seed, folder)
        inputs = [(query, document) for query, document in pairs] if trial.rerank else texts
        gc.collect()
        before = host.resident_bytes()
        limit = usage_bytes(box) + trial.margin_bytes
        set_limit(box, limit)
        print(json.dumps({"seed": seed, "begins": True}), flush=True)
        result = trial.run(inputs, scores if trial.rerank else rows)
        figures = {"margin": trial.margin_bytes, "resident": before, "count": trial.count, **trial.options}
        print(json.dumps({"seed": seed, **result, **figures}), flush=True)


if __name__ == "__main__":
    main()
