"""Run inside a box: jobs of our own with a neighbour (`neighbour`), or an embedder and a reranker at once (`both`).

Arguments: which, folder of models and texts, folder for files. Rows are saved there; one JSON line at the end.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from memsafe import Embedder, Event, MemoryPolicy, Reranker
from memsafe.events import MicroBatchDone

warnings.simplefilter("ignore")
which, folder, files = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
jobs = json.loads((folder / "jobs.json").read_text())
budgets: list[int] = []


def hook(event: Event) -> None:
    if isinstance(event, MicroBatchDone):
        budgets.append(event.budget_bytes)


def wait_for(name: str) -> None:
    while not (files / name).exists():
        time.sleep(0.01)


def neighbour() -> dict[str, Any]:
    """The neighbour takes memory after a third of the texts, and gives it back after two thirds."""
    texts, done, marks = jobs["many"], 0, []

    def progress(count: int) -> None:
        nonlocal done
        done += count
        for share, word, answer in ((1 / 3, "take", "taken"), (2 / 3, "give", "given")):
            if done >= share * len(texts) and not (files / word).exists():
                asked = len(budgets)
                (files / word).touch()
                wait_for(answer)
                marks.append((asked, len(budgets)))

    policy = MemoryPolicy(learn=False, max_tokens=1024)  # enough micro-batches to see each third
    with Embedder(str(folder / "embedder"), device="cpu", memory=policy, hooks=[hook]) as embedder:
        run = embedder.run(texts, progress=progress)
    np.save(files / "rows.npy", run.embeddings)
    return {"budgets": budgets, "marks": marks, "report": run.report.to_dict()}


def both() -> dict[str, Any]:
    """An embedder and a reranker of one process, at work at the same time in the same limit."""
    policy = MemoryPolicy(learn=False)
    embedder = Embedder(str(folder / "embedder"), device="cpu", memory=policy)
    reranker = Reranker(str(folder / "reranker"), device="cpu", memory=policy)
    thread = threading.Thread(target=lambda: np.save(files / "rows.npy", embedder.embed_documents(jobs["long"])))
    thread.start()
    scores = reranker.score_pairs([(query, document) for query, document in jobs["pairs"]])
    thread.join()
    np.save(files / "scores.npy", scores)
    return {}


print(json.dumps(neighbour() if which == "neighbour" else both()))
