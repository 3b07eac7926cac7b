"""2. The two articles' cases under a T4's memory, ours and the peers, alone and beside a neighbour."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import inside, launches
from benchmarks.gpu.common import CONTEXT_BYTES, NOT_RUN, STOPPED, T4_BYTES, GiB, Row, Setting, cap_to, free_memory
from benchmarks.gpu.models import Workload, lengths, load, weights_of, workload
from benchmarks.gpu.neighbour import Neighbour
from benchmarks.gpu.ours import Ours
from benchmarks.gpu.peers import DEFAULT, NAMES, Peer, next_that_may_survive, peers, run_peer
from benchmarks.gpu.processes import Steps, boxes, isolated

__all__ = ["run"]

CASES = (
    ("gte-reranker", 1500, "float32", 2),
    ("bge-m3", 6000, "float16", 2),
    ("gte-reranker", 10000, "float16", 2),
    ("gte-reranker", 1500, "float16", 1),
    ("bge-m3", 6000, "float32", 3),
    ("gte-reranker", 10000, "float32", 3),
)
"""Model, texts, dtype, and the weight of the case's time box. An H200 has 0.06 of its bfloat16 rate in float32."""
NEIGHBOUR_BYTES = 9 * GiB
"""What other processes held in michaelfeil/infinity#370, from the figures in its error message."""
OURS = {"ours, alone": 4.0, "queued forwards": 0.3, "ours, beside": 5.0}
"""Steps of a case, with the weight of each one's time box; then every peer alone, and every peer beside."""
START_S = 6.0
"""What a neighbour takes to start."""


def steps_of(model: str) -> dict[str, float]:
    """The steps of a case of `model`, with their weights."""
    names = NAMES[model == "gte-reranker"]
    return OURS | {f"{who}, {where}": 1.5 for where in ("alone", "beside") for who in names}


def run(setting: Setting) -> Iterator[Row]:
    """A process per model and dtype: ours alone and beside the neighbour first, then the peers."""
    cases = setting.pick(CASES, (("bge-m3", 12, "float32", 1), ("gte-reranker", 8, "float32", 1)))
    for box, (model, count, dtype, _) in zip(boxes(setting, [case[-1] for case in cases]), cases, strict=True):
        plan = [{"what": f"{count} x {model}", "dtype": dtype, "step": step} for step in steps_of(model)]
        yield from isolated(box, "articles:case", plan=plan, model=model, count=count, dtype=dtype)


def case(setting: Setting, model: str, count: int, dtype: str) -> Iterator[Row]:
    """Every situation of one model and dtype, as time allows."""
    pairs = model == "gte-reranker"
    work = workload(model, lengths(count, 7, longest=setting.pick(8192, 80), median=setting.pick(200, 20)), 8)
    head: Row = {"what": f"{count} x {model}", "dtype": dtype, "weights": weights_of(model), "tokens": work.tokens}
    try:
        st = load(setting, model, dtype)
    except LookupError as error:
        yield {**head, "outcome": f"skipped: {error}"}
        return
    free_memory(setting)
    with inside.t4_kernels(setting.dry):
        head.update(cap_to(setting, T4_BYTES))
        steps = Steps(setting, head, steps_of(model))
        yield from _ours(setting, steps, st, pairs, work)
        for beside in (False, True):
            yield from _peers(setting, steps, st, pairs, work, beside)


def _neighbour(setting: Setting, beside: bool) -> Neighbour:
    """A neighbour that leaves a T4's memory, less 9 GB, of this card; then a whole T4's while it gives them back."""
    if setting.dry or not beside:
        return Neighbour(True, 0, 0)
    import torch

    free_memory(setting)
    free, _ = torch.cuda.mem_get_info()
    ours = torch.cuda.memory_reserved() + CONTEXT_BYTES
    # What we hold and the two contexts belong to the T4's memory as well; the rest of a larger card is filled.
    return Neighbour(False, free + ours - T4_BYTES, NEIGHBOUR_BYTES - CONTEXT_BYTES)


def _ours(setting: Setting, steps: Steps, st: Any, pairs: bool, work: Workload) -> Iterator[Row]:
    """One cold run alone, one beside the neighbour, which gives its memory back half-way."""
    alone_s = 1.0
    for beside in (False, True):

        def measure(beside: bool = beside) -> Row:
            with _neighbour(setting, beside) as neighbour, Ours(setting, st, pairs=pairs) as ours:
                return {
                    "neighbour_said": neighbour.said,
                    **ours.run(work, _half_way(len(work.documents), neighbour))[0],
                }

        step = "ours, beside" if beside else "ours, alone"
        needs_s = alone_s + START_S * beside
        row = steps.row(step, measure, needs_s=needs_s, who="memsafe", neighbour=beside)
        yield row
        alone_s = row.get("seconds") or alone_s
        if not beside:
            with Ours(setting, st, pairs=pairs) as ours:
                yield steps.row("queued forwards", lambda: launches.queued(setting, ours.model, (256, 4096, 16384)))


def _half_way(count: int, neighbour: Neighbour) -> Any:
    """A progress hook: the neighbour gives its memory back once half of `count` texts are done."""
    done = 0

    def progress(finished: int) -> None:
        nonlocal done
        before, done = done, done + finished
        if before < count // 2 <= done:
            neighbour.release()

    return progress


def _peers(setting: Setting, steps: Steps, st: Any, pairs: bool, work: Workload, beside: bool) -> Iterator[Row]:
    """Every peer at its default and at the largest batch size that survives the longest texts."""
    where = "beside" if beside else "alone"
    usable: dict[str, Peer] = {}
    for who, peer in peers(setting, st, pairs).items():
        if isinstance(peer, str):
            yield {**steps.head, "step": f"{who}, {where}", "who": who, "neighbour": beside, "outcome": peer}
        else:
            usable[who] = peer
    if usable and not setting.dry and steps.left_s(f"{next(iter(usable))}, {where}") < START_S:
        for who in usable:
            yield {**steps.head, "step": f"{who}, {where}", "who": who, "neighbour": beside, "outcome": NOT_RUN}
        return
    with _neighbour(setting, beside) as neighbour:
        for who, peer in usable.items():
            yield from _one_peer(setting, steps, f"{who}, {where}", peer, work, neighbour, who=who, neighbour_is=beside)


def _one_peer(
    setting: Setting, steps: Steps, step: str, peer: Peer, work: Workload, other: Neighbour, **columns: Any
) -> Iterator[Row]:
    """The default on the longest texts; the search for the largest size, a row each; that size on as many texts as there is
    time for, half of them while the neighbour has given its memory back."""
    columns["neighbour"] = columns.pop("neighbour_is")
    default = work.longest_first(setting.pick(DEFAULT, 8))
    yield steps.row(step, lambda: run_peer(setting, peer, default, None), parts=2, **columns, part="longest texts")
    survived: dict[int, bool] = {}
    rates: list[float] = []
    start = setting.pick(DEFAULT, 4)
    while (size := next_that_may_survive(survived, start)) is not None and (not setting.dry or size <= 8):
        longest = work.longest_first(size)
        needs_s = longest.tokens / min(rates) if rates else 1.0
        run_it = lambda size=size, longest=longest: run_peer(setting, peer, longest, size)  # type: ignore[misc] # noqa: E731
        try:
            row = steps.row(step, run_it, needs_s=needs_s, **columns, part="does it survive", batch_size=size)
        except LookupError:  # it has no batch size
            return
        yield row
        if row["outcome"] in (NOT_RUN, STOPPED):
            break
        survived[size] = row["outcome"] == "finished"
        rates += [row["tokens_per_s"]] if survived[size] else []
    best = max((size for size, alive in survived.items() if alive), default=None)
    if best is None:
        return
    # A peer that would not end in time gets every n-th text; whether it survives its longest is known by then.
    every, rate = 1, statistics.median(rates)
    while not setting.dry and work.tokens / every / rate > 0.7 * steps.left_s(step) and every < len(work.counts):
        every *= 2
    some = work.every(every)
    timer = threading.Timer(some.tokens / rate / 2, other.release)  # about half-way
    timer.start()
    part = "all" if every == 1 else f"every {every}th text"
    run_it = lambda: run_peer(setting, peer, some, best)  # noqa: E731
    try:
        yield steps.row(step, run_it, needs_s=some.tokens / rate, **columns, part=part, batch_size=best)
    finally:
        timer.cancel()
        free_memory(setting)
        other.hold()
