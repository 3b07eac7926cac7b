"""`python -m benchmarks`: run the sections, write benchmarks/results/NAME.json and NAME.md. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import contenders, machine, report, texts
from benchmarks.concurrency import concurrency
from benchmarks.contenders import EMBED, RERANK, Contender
from benchmarks.corpus import corpus
from benchmarks.dtype import dtype
from benchmarks.feeding import feeding
from benchmarks.int8 import int8
from benchmarks.outputs import outputs
from benchmarks.overhead import overhead
from benchmarks.prediction import CASES, prediction
from benchmarks.quality import quality
from benchmarks.speed import Arena, Task, compare, peaks, scale

Results = dict[str, Any]
MAIN_SIX = (
    "memsafe",
    "memsafe in LlamaIndex",
    "memsafe in LangChain",
    "SentenceTransformer.encode",
    "HuggingFaceEmbedding (LlamaIndex)",
    "HuggingFaceEmbeddings (LangChain)",
)


class Suite:
    """The sections, at one of two sizes. Every section returns what goes under its name in the JSON."""

    def __init__(self, folder: Path, *, quick: bool, only: str | None = None) -> None:
        self.folder, self.quick, self.only = folder, quick, only
        self.done: Results = {}

    def _pick(self, among: tuple[Contender, ...], labels: tuple[str, ...] | None = None) -> tuple[Contender, ...]:
        wanted = among if labels is None else tuple(c for c in among if c.label in labels)
        return tuple(c for c in wanted if c.ours or self.only is None or self.only.lower() in c.label.lower())

    def _compare(
        self, among: tuple[Contender, ...], task: Task, rounds: int, budget_s: float, **options: Any
    ) -> Results:
        with Arena(among, task.model, folder=self.folder, max_length=task.max_length) as arena:
            part = max(len(task.inputs) // (2 if self.quick else 3), 16)
            return compare(arena, task, folder=self.folder, rounds=rounds, budget_s=budget_s, part=part, **options)

    def speed(self) -> Results:
        """Everyone on real texts."""
        if self.quick:
            task = Task("real texts", "minilm", 256, texts.real(80))
            found = self._compare(self._pick(EMBED, MAIN_SIX), task, 2, 25, sweep=(4, 16))
        else:
            task = Task("real texts", "minilm", 256, texts.real(300))
            found = self._compare(self._pick(EMBED), task, 7, 450)
        return {"tasks": [found], "not_compared": contenders.NOT_COMPARED}

    def rerank(self) -> Results:
        """Everyone on real pairs; the head is random, so only speed and agreement mean something."""
        count, rounds, budget = (40, 2, 15) if self.quick else (150, 5, 180)
        task = Task("one query, real documents", "minilm-cross-encoder", 512, texts.pairs(count, seed=1))
        among = self._pick(RERANK, ("memsafe", "CrossEncoder.predict") if self.quick else None)
        return {"tasks": [self._compare(among, task, rounds, budget, sweep=(4, 16) if self.quick else None)]}

    def mixes(self) -> Results:
        """Other distributions of lengths, against the main peers."""
        tasks = [
            Task("uniform short texts", "minilm", 256, texts.short(80 if self.quick else 1000, seed=2)),
            Task("heavy tail to 4,000 tokens", "xlmr-2x256", 8192, texts.heavy_tail(30 if self.quick else 150, seed=2)),
        ]
        if not self.quick:
            tasks.append(Task("one giant among many small", "xlmr-2x256", 8192, texts.giant(200, seed=2)))
            if (papers := texts.cranfield()) is not None:
                tasks.append(Task("Cranfield abstracts", "minilm", 256, papers[:200]))
        labels = ("memsafe", *MAIN_SIX[3:], *(() if self.quick else ("SentenceTransformer, ONNX",)))
        rounds, budget = (2, 8) if self.quick else (4, 60)
        found = []
        for task in tasks:
            among = tuple(c for c in self._pick(EMBED, labels) if not c.export or task.model == "minilm")
            # A padded batch of 64 with one text of 4,000 tokens would take 5 GB for its mask alone.
            sweep = (1, 4, 8, 16, 64) if task.model == "minilm" else (1, 4, 8)
            found.append(self._compare(among, task, rounds, budget, sweep=(8,) if self.quick else sweep))
        return {"tasks": found}

    def _fastest(self, section: str, label: str, fallback: Results) -> tuple[Results, str]:
        """The setting at which the contender was fastest in the first task of an earlier section, and its name."""
        rows = [row for found in self.done.get(section, {}).get("tasks", [])[:1] for row in found["rows"]]
        rows = [row for row in rows if row["label"] == label]
        if not rows:
            return fallback, f"batch {fallback['batch_size']}"
        best = max(rows, key=lambda row: row["tokens_per_s"]["median"])
        by_default = next(c.default for c in EMBED if c.label == label)
        if best["setting"] == by_default:
            return {}, by_default
        return {"batch_size": int(best["setting"].split()[-1])}, best["setting"]

    def memory(self) -> Results:
        """Peak resident memory: ours, the peers at their defaults and sentence-transformers at its fastest."""
        labels = ("memsafe", *MAIN_SIX[3:5]) if self.quick else tuple(c.label for c in EMBED)
        among: list[tuple[Contender, Results, str]] = [(c, {}, c.default) for c in self._pick(EMBED, labels)]
        by_label = {c.label: c for c in EMBED}
        label = "SentenceTransformer.encode"
        setting, name = self._fastest("speed", label, {"batch_size": 4})
        chosen = [*among, *([(by_label[label], setting, name)] if setting else [])]
        count = 60 if self.quick else 250
        tasks = {
            "real texts, minilm": peaks(Task("real", "minilm", 256, texts.real(count, 11)), chosen, folder=self.folder)
        }
        if not self.quick:
            long = Task("heavy tail", "xlmr-2x256", 8192, texts.heavy_tail(150, 11))
            few = [
                entry for entry in chosen if entry[0].label in MAIN_SIX and not entry[0].label.startswith("memsafe in")
            ]
            tasks["heavy tail to 4,000 tokens, xlmr-2x256"] = peaks(long, few, folder=self.folder)
        return {"tasks": tasks}

    def scale(self) -> Results:
        """From a hundred to a hundred thousand short texts."""
        sizes = (100, 1000) if self.quick else (100, 1_000, 10_000, 100_000)
        task = Task("short", "minilm", 256, texts.short(sizes[-1], seed=12))
        by_label = {c.label: c for c in EMBED}
        label = "SentenceTransformer.encode"
        setting, name = self._fastest("mixes", label, {"batch_size": 8})
        chosen: list[tuple[Contender, Results, str]] = [
            (by_label["memsafe"], {}, "default"),
            (by_label[label], setting, name),
        ]
        return {"rows": scale(task, chosen, sizes, folder=self.folder, limit_s=10 if self.quick else 200)}

    def concurrency(self) -> Results:
        """Many callers."""
        if self.quick:
            return concurrency(folder=self.folder, callers=32, rounds=2, bulk=100, cases=2)
        return concurrency(folder=self.folder, rounds=5, bulk=600)

    def prediction(self) -> Results:
        """The cost model's error."""
        if self.quick:
            return prediction(folder=self.folder, shapes=12, trials=2, cases=CASES[:1], most_tokens=2048)
        return prediction(folder=self.folder)

    def overhead(self) -> Results:
        """The machinery's own cost."""
        return overhead(folder=self.folder, **({"count": 60, "rounds": 2} if self.quick else {}))

    def feeding(self) -> Results:
        """Tokenising alone, against the way it was done before."""
        return feeding(**({"count": 400, "rounds": 2} if self.quick else {}))

    def corpus(self) -> Results:
        """Reading, comparing and writing, beyond embedding."""
        return corpus(folder=self.folder, **({"count": 150, "rounds": 2} if self.quick else {}))

    def dtype(self) -> Results:
        """Half precision."""
        return dtype(folder=self.folder, **({"count": 60, "rounds": 2, "budget_s": 10} if self.quick else {}))

    def quality(self) -> Results:
        """Ranking quality on labelled sets."""
        return quality(**({"documents": 200, "queries": 10} if self.quick else {}))

    def int8(self) -> Results:
        """Other runtimes and int8."""
        few = {"count": 60, "pairs": 30, "tail": 20, "rounds": 2, "budget_s": 20.0} if self.quick else {}
        return int8(folder=self.folder, **few)

    def outputs(self) -> Results:
        """Sparse rows, token vectors, three outputs of one pass."""
        few = {"sparse": 10, "count": 60, "tail": 20, "rounds": 2, "budget_s": 20.0} if self.quick else {}
        return outputs(folder=self.folder, **few)


SECTIONS = (
    *(
        "speed",
        "rerank",
        "memory",
        "concurrency",
        "prediction",
        "overhead",
        "feeding",
        "corpus",
        "dtype",
        "quality",
        "int8",
        "outputs",
        "mixes",
        "scale",
    ),
)
QUICK = ("speed", "rerank", "memory", "concurrency", "prediction", "overhead")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, main peers only: under three minutes")
    parser.add_argument("--sections", help=f"comma-separated, of: {', '.join(SECTIONS)}")
    parser.add_argument("--only", metavar="TEXT", help="peers whose label contains TEXT, beside ours")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="default: benchmarks/results/")
    parser.add_argument(
        "--minutes", type=float, default=40, help="start no section after that (40); those left out are listed"
    )
    parser.add_argument("--keep", action="store_true", help="keep the workers' logs and rows (prints where)")
    parser.add_argument(
        "--update", type=Path, metavar="JSON", help="run --sections again and put them into this result"
    )
    chosen = parser.parse_args(arguments)
    names = tuple(chosen.sections.split(",")) if chosen.sections else QUICK if chosen.quick else SECTIONS
    for name in names:
        if name not in SECTIONS:
            parser.error(f"no section is called {name!r}; choose from {', '.join(SECTIONS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # for the workers
    folder = Path(tempfile.mkdtemp(prefix="memsafe-bench-"))
    suite = Suite(folder, quick=chosen.quick, only=chosen.only)
    result: Results = {"schema": 1, "mode": "quick" if chosen.quick else "full", "machine": machine.describe()}
    if not chosen.quick and set(names) != set(SECTIONS):
        result["mode"] = "part"
    result |= {"sections": {}, "failed": {}, "seconds": {}}
    file_name = f"{machine.kind()}-{result['machine']['date'][:10]}"
    file_name += "" if result["mode"] == "full" else f"-{result['mode']}"
    if chosen.update:
        import json

        result = json.loads(chosen.update.read_text(encoding="utf-8"))
        chosen.output, file_name = chosen.update.parent, chosen.update.stem
        suite.done = result["sections"]
    began = time.perf_counter()
    paths: tuple[Path, ...] = ()
    for name in names:
        if time.perf_counter() - began > 60 * chosen.minutes:
            result["failed"][name] = f"not started: {chosen.minutes:g} minutes were over (--minutes)"
            continue
        _run(suite, name, result)
        paths = report.write(result, chosen.output, file_name)  # after each section: a crash later loses nothing
    paths = report.write(result, chosen.output, file_name)
    print(report.render(result))
    print(f"{time.perf_counter() - began:.0f} s; written: {', '.join(map(str, paths))}", file=sys.stderr)
    if chosen.keep:
        print(f"logs and rows: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if result["failed"] else 0


def _run(suite: Suite, name: str, result: Results) -> None:
    """Run one section into `result`; its failure is recorded there and does not end the others."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    started, section = time.perf_counter(), getattr(suite, name)
    run: Callable[[], Results] = section
    try:
        result["sections"][name] = suite.done[name] = run()
        result["failed"].pop(name, None)
    except Exception as error:
        result["failed"][name] = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{name} failed: {result['failed'][name]}", file=sys.stderr)
    result["seconds"][name] = round(time.perf_counter() - started, 1)
    print(f"{name}: {result['seconds'][name]:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
