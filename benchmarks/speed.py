"""Speed and memory: ours and every peer on the same texts, in turn, repeatedly.

1. Every contender is loaded in a process of its own, and runs part of the texts once (its first run, recorded).
2. Those whose batch size matters run that part once per batch size; the best ones go on, with the default. The others run
   all texts a few times instead, so that nobody's rounds are his first runs.
3. Rounds: everyone (the slowest only twice) runs all texts once a round, in an order that rotates, with the machine's own matrix-product rate measured
   in the same round. A ratio is taken within a round, so that a machine that slows down slows both sides of it.
4. The rows that come out are compared with those of the reference, so that nobody is fast by computing something else.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, stats
from benchmarks.client import Unavailable, Worker, write_inputs
from benchmarks.contenders import Contender, start

__all__ = ["Arena", "Task", "compare", "peaks", "scale"]


@dataclass(frozen=True)
class Task:
    """What is computed: `inputs` are texts (embedding) or (query, document) pairs (reranking)."""

    name: str
    model: str
    max_length: int
    inputs: list[Any] = field(repr=False)

    def lengths(self) -> list[int]:
        """Tokens of every input as the model sees it, special tokens included, cut at `max_length`."""
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        tokenizer = AutoTokenizer.from_pretrained(str(models.model_path(self.model)))
        first = [text if isinstance(text, str) else text[0] for text in self.inputs]
        second = None if isinstance(self.inputs[0], str) else [text[1] for text in self.inputs]
        ids = tokenizer(first, second, truncation=True, max_length=self.max_length, padding=False)["input_ids"]
        return [len(row) for row in ids]


class Arena:
    """The loaded contenders of one model, and the reasons of those that could not be had. A context manager."""

    def __init__(self, contenders: tuple[Contender, ...], model: str, *, folder: Path, max_length: int) -> None:
        self.folder, self.model = folder, model
        self.workers: dict[str, Worker] = {}
        self.loaded: dict[str, dict[str, Any]] = {}
        self.missing: list[dict[str, str]] = []
        self.contenders = []
        for contender in contenders:
            try:
                self.workers[contender.label], self.loaded[contender.label] = start(
                    contender, model, folder=folder, max_length=max_length
                )
                self.contenders.append(contender)
            except Unavailable as reason:
                self.missing.append({"label": contender.label, "reason": str(reason)})
        self.roofline: Worker | None = None

    def open_roofline(self) -> Worker:
        """A worker that measures the matrix-product rate at this model's shapes."""
        if self.roofline is None:
            self.roofline = Worker("roofline", folder=self.folder)
            self.roofline.load("", models.shapes(models.model_path(self.model)))
        return self.roofline

    def drop(self, contender: Contender, reason: str) -> None:
        """`contender` failed on the way; it takes no further part, and the reason is published."""
        self.missing.append({"label": contender.label, "reason": reason})
        self.workers.pop(contender.label).close()
        self.contenders.remove(contender)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self.workers.values(), *([self.roofline] if self.roofline else [])]:
            worker.close()


@dataclass
class _Entry:
    contender: Contender
    setting: dict[str, Any]
    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    saved: Path | None = None


SETTLE_S = 0.5
"""Between two contenders: threads of the one before may still be waiting for work in a loop, on the cores of the next."""
SLOW_S = 8.0
"""Whoever takes longer for a run is in the first two rounds only, so that there is time for more rounds of the others."""
WARM_RUNS = 3
"""Of contenders without a sweep, which runs the others four to ten times. Ours looks for its sizes meanwhile."""


def _explore(
    arena: Arena, part: Path, whole: Path, sweep: tuple[int, ...] | None, keep: int, until: float
) -> tuple[list[_Entry], list[dict[str, Any]], dict[str, list[float]]]:
    """Entries for the rounds; what the sweep saw; and the seconds of first runs: of the part, and of warm-up runs.

    `sweep` restricts the batch sizes; after `until` (of perf_counter) the rest is left out, which the result says.
    """
    entries, seen, first = [], [], {}
    for contender in list(arena.contenders):
        worker = arena.workers[contender.label]
        try:
            first[contender.label] = worker.run(part)["seconds"][:1]
            entries.append(_Entry(contender, {}, contender.default))
            found = []
            for size in contender.sweep:
                if (sweep is None or size in sweep) and time.perf_counter() > until:
                    seen.append({"label": contender.label, "batch_size": size, "seconds": None})
                elif sweep is None or size in sweep:
                    seconds = worker.run(part, {"batch_size": size})["seconds"][0]
                    found.append((seconds, size))
                    seen.append({"label": contender.label, "batch_size": size, "seconds": seconds})
            for _ in range(0 if contender.sweep else WARM_RUNS):
                if time.perf_counter() < until:
                    first[contender.label] += worker.run(whole)["seconds"]
            default = int(contender.default.split()[-1]) if contender.default.startswith("batch ") else None
            # The reference peers keep their two best sizes: one run of a part cannot tell neighbours apart.
            best = [size for _, size in sorted(found)[: keep if len(contender.sweep) > 5 else 1] if size != default]
            entries += [_Entry(contender, {"batch_size": size}, f"batch {size}") for size in best]
        except Unavailable as reason:
            arena.drop(contender, str(reason))
            entries = [entry for entry in entries if entry.contender is not contender]
    return entries, seen, first


def compare(
    arena: Arena,
    task: Task,
    *,
    folder: Path,
    rounds: int = 5,
    budget_s: float = 300.0,
    part: int | None = None,
    sweep: tuple[int, ...] | None = None,
    keep: int = 2,
    dtypes: tuple[str, ...] = ("float32",),
    reference: str = "",
) -> dict[str, Any]:
    """Run `task` in rounds with everyone in `arena`; at least two rounds, no new one after `budget_s` seconds.

    reference: label of the contender whose rows (at its default) the others' are compared with; default: the first peer.
    """
    began = time.perf_counter()
    lengths = task.lengths()
    name = f"{task.model}-{task.name}".replace(" ", "-")
    whole = write_inputs(folder / f"{name}.json", task.inputs)
    some = write_inputs(folder / f"{name}-part.json", task.inputs[:part])
    entries, seen, first = _explore(arena, some, whole, sweep, keep, began + budget_s)
    roofline = arena.open_roofline()
    rates: list[dict[str, Any]] = []
    done = 0
    while done < rounds and (done < 2 or time.perf_counter() - began < budget_s):
        rates.append({dtype: roofline.call("measure", dtype=dtype, seconds=0.6) for dtype in dtypes})
        turn = done % len(entries)
        for entry in entries[turn:] + entries[:turn]:
            if entry.contender not in arena.contenders or (done >= 2 and max(entry.seconds, default=0.0) > SLOW_S):
                continue
            time.sleep(SETTLE_S)
            save = folder / f"{name}-{len(arena.loaded)}-{entries.index(entry)}.npy" if done == 0 else None
            try:
                entry.last = arena.workers[entry.contender.label].run(whole, entry.setting, save=save)
            except Unavailable as reason:
                arena.drop(entry.contender, str(reason))
                continue
            entry.seconds.append(entry.last["seconds"][0])
            entry.cpu_seconds.append(entry.last["cpu_seconds"][0])
            entry.saved = save or entry.saved
        done += 1
        print(f"  {task.name}: round {done}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    entries = [entry for entry in entries if entry.contender in arena.contenders]
    ours = next((entry for entry in entries if entry.contender.ours), None)
    peers = [entry for entry in entries if not entry.contender.ours]
    base = next((e for e in peers if e.contender.label == reference), peers[0] if peers else None)
    linear, attention = models.flops(models.model_path(task.model), lengths)
    rows = [_row(entry, ours, base, sum(lengths), (linear, attention), rates) for entry in entries]
    return {
        "task": task.name,
        "model": task.model,
        "kind": "embed" if isinstance(task.inputs[0], str) else "rerank",
        "inputs": len(task.inputs),
        "tokens": sum(lengths),
        "length": {"median": float(np.median(lengths)), "p95": stats.percentile(lengths, 95), "max": max(lengths)},
        "max_length": task.max_length,
        "rounds": done,
        "linear_flop_per_token": linear / sum(lengths),
        "attention_flop_per_token": attention / sum(lengths),
        "rows": rows,
        "sweep": seen,
        "first_run": {
            "inputs": len(task.inputs[:part]),
            "seconds": {label: seconds[0] for label, seconds in first.items()},
            "warm_up_seconds": {label: seconds[1:] for label, seconds in first.items() if seconds[1:]},
        },
        "loaded": {label: arena.loaded[label] for label in arena.workers},
        "roofline": {
            dtype: {
                way: stats.Spread.of([rate[dtype][way] for rate in rates]).to_dict()
                for way in ("intra_op", "side_by_side", "best")
            }
            for dtype in dtypes
        },
        "not_run": list(arena.missing),
        "seconds": time.perf_counter() - began,
    }


def _row(
    entry: _Entry,
    ours: _Entry | None,
    base: _Entry | None,
    tokens: int,
    work: tuple[float, float],
    rates: list[dict[str, Any]],
) -> dict[str, Any]:
    """One line of the table. ratio: how many times ours is faster, by round; roofline: the reached part of the fp32 rate."""
    best = [rate["float32"]["best"] for rate in rates][: len(entry.seconds)]
    reached = [work[0] / s / rate for s, rate in zip(entry.seconds, best, strict=True)]
    with_attention = [sum(work) / s / rate for s, rate in zip(entry.seconds, best, strict=True)]
    row: dict[str, Any] = {
        "label": entry.contender.label,
        "setting": entry.name,
        "ours": entry.contender.ours,
        "environment": entry.contender.environment,
        "seconds": entry.seconds,
        "cpu_seconds": entry.cpu_seconds,
        "tokens_per_s": stats.Spread.of([tokens / s for s in entry.seconds]).to_dict(),
        "roofline_fraction": stats.Spread.of(reached).to_dict(),
        "roofline_fraction_with_attention": stats.Spread.of(with_attention).to_dict(),
        "report": entry.last.get("report"),
    }
    if ours is not None and len(ours.seconds) >= len(entry.seconds):
        row["ratio"] = stats.ratios(entry.seconds, ours.seconds[: len(entry.seconds)]).to_dict()
    if base is not None and base.saved is not None and entry.saved is not None:
        row["against"] = base.contender.label
        row["check"] = agreement(np.load(entry.saved), np.load(base.saved))
    return row


def agreement(rows: Any, reference: Any) -> dict[str, float]:
    """Largest difference, and for embeddings the least cosine: were the same things computed?"""
    rows, reference = np.asarray(rows, np.float64), np.asarray(reference, np.float64)
    if rows.shape != reference.shape:
        rows = rows.reshape(reference.shape)
    found = {"max_difference": float(np.abs(rows - reference).max())}
    if rows.ndim == 2 and rows.shape[1] > 1:
        norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(reference, axis=1)
        found["min_cosine"] = float(((rows * reference).sum(axis=1) / norms).min())
    return found


def peaks(task: Task, chosen: list[tuple[Contender, dict[str, Any], str]], *, folder: Path) -> list[dict[str, Any]]:
    """Peak resident memory of the task, each in a fresh process that runs it twice: beyond before and after loading."""
    whole = write_inputs(folder / f"{task.model}-{task.name}-memory.json".replace(" ", "-"), task.inputs)
    found = list[dict[str, Any]]()
    for contender, setting, name in chosen:
        try:
            worker, loaded = start(contender, task.model, folder=folder, max_length=task.max_length)
            with worker:
                done = worker.run(whole, setting, repeat=2)
        except Unavailable as reason:
            found.append({"label": contender.label, "setting": name, "not_run": str(reason)})
            continue
        peak = done["peak_bytes"]
        found.append(
            {
                "label": contender.label,
                "setting": name,
                "ours": contender.ours,
                "code_bytes": _minus(loaded["before_load_bytes"], loaded["start_bytes"]),
                "peak_beyond_before_load_bytes": _minus(peak, loaded["before_load_bytes"]),
                "peak_beyond_after_load_bytes": _minus(peak, loaded["after_load_bytes"]),
                "report": done["report"],
            }
        )
    return found


def _minus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a - b


def scale(
    task: Task,
    chosen: list[tuple[Contender, dict[str, Any], str]],
    sizes: tuple[int, ...],
    *,
    folder: Path,
    limit_s: float,
) -> list[dict[str, Any]]:
    """Tokens/s and peak memory as the number of texts grows; a size that would take longer than `limit_s` is left out.

    The texts of `task` are its largest size; smaller sizes are its beginnings. Each contender grows in one process.
    """
    lengths, found = task.lengths(), list[dict[str, Any]]()
    for contender, setting, name in chosen:
        try:
            worker, loaded = start(contender, task.model, folder=folder, max_length=task.max_length)
        except Unavailable as reason:
            found.append({"label": contender.label, "setting": name, "not_run": str(reason)})
            continue
        with worker:
            rate = None
            for size in sizes:
                tokens = sum(lengths[:size])
                if rate is not None and tokens / rate > limit_s:
                    found.append(
                        {"label": contender.label, "inputs": size, "not_run": f"would take over {limit_s:.0f} s"}
                    )
                    continue
                texts = write_inputs(folder / "scale.json", task.inputs[:size])
                repeat = 3 if rate is not None and 3 * tokens / rate < limit_s / 4 else 1
                if rate is None:  # the first run of a process warms it up and is not counted
                    worker.run(texts, setting)
                    repeat = 3
                done = worker.run(texts, setting, repeat=repeat, limit_s=limit_s * 6 + 60)
                rate = tokens / sorted(done["seconds"])[len(done["seconds"]) // 2]
                found.append(
                    {
                        "label": contender.label,
                        "setting": name,
                        "ours": contender.ours,
                        "inputs": size,
                        "tokens": tokens,
                        "tokens_per_s": stats.Spread.of([tokens / s for s in done["seconds"]]).to_dict(),
                        "peak_beyond_before_load_bytes": _minus(done["peak_bytes"], loaded["before_load_bytes"]),
                        "output_bytes": int(np.prod(done["shape"])) * 4,
                    }
                )
    return found
