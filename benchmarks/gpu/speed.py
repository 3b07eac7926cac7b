"""5. Tokens/s, ours first, then the peers at their best batch size; against the matrix rate; where the time goes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu import inside, launches
from benchmarks.gpu.common import NOT_RUN, Row, Setting, matmul_rate
from benchmarks.gpu.models import Workload, lengths, load, weights_of, workload
from benchmarks.gpu.ours import Ours
from benchmarks.gpu.peers import DEFAULT, Peer, next_size, peers, run_peer
from benchmarks.gpu.processes import Steps, boxes, isolated

__all__ = ["run"]

CASES = (
    ("bge-m3", "bfloat16", 2000),
    ("gte-reranker", "float16", 2000),
    ("minilm", "float16", 20000),
    ("minilm", "float32", 20000),
    ("bge-m3", "float32", 600),
)
STEPS = {
    "first run": 2,
    "cold": 3,
    "learnt": 2,
    "queued forwards": 1,
    "waits in a forward": 0.5,
    "default": 2,
    "sweep": 4,
    "rounds": 8,
    "waits in a run": 1,
    "profile": 1,
}
"""Of a case, with the weight of each one's time box; "compared", which only counts, comes last of all."""
ROUNDS = 3


@dataclass
class Found:
    """What one case has found so far: seconds of whole runs, and of each peer its best batch size and the rate there."""

    work: Workload
    cold_s: list[float] = field(default_factory=list)
    learnt_s: list[float] = field(default_factory=list)
    flops: float = 0.0
    chosen: dict[str, tuple[Peer, int | None, float]] = field(default_factory=dict)
    theirs_s: dict[str, list[float]] = field(default_factory=dict)


def run(setting: Setting) -> Iterator[Row]:
    """A process per model and dtype."""
    cases = setting.pick(CASES, (("bge-m3", "float32", 24), ("gte-reranker", "float32", 8)))
    for box, (model, dtype, count) in zip(boxes(setting, [1] * len(cases)), cases, strict=True):
        plan = [{"what": model, "dtype": dtype, "step": step} for step in STEPS]
        yield from isolated(box, "speed:case", plan=plan, model=model, dtype=dtype, count=count)


def case(setting: Setting, model: str, dtype: str, count: int) -> Iterator[Row]:
    """Ours, the peers, then rounds of both in turns; last what takes long and only explains."""
    pairs = model == "gte-reranker"
    most = setting.pick(256 if model == "minilm" else 8192, 80)
    counts = lengths(count, 31, longest=most, median=setting.pick(100 if model == "minilm" else 300, 20))
    found = Found(workload(model, counts, 32))
    head: Row = {"what": model, "dtype": dtype, "weights": weights_of(model)}
    try:
        st = load(setting, model, dtype)
    except LookupError as error:
        yield {**head, "outcome": f"skipped: {error}"}
        return
    rate = matmul_rate(setting, dtype)
    steps = Steps(setting, head, STEPS)
    yield from _ours(setting, steps, st, pairs, found)
    yield from _search(steps, peers(setting, st, pairs), found)
    for number in range(setting.pick(ROUNDS, 1)):
        yield from _round(setting, steps, st, pairs, found, number + 1)
    yield {**head, "step": "compared", **compared(found, rate)}
    with Ours(setting, st, pairs=pairs) as ours:
        some = found.work.every(setting.pick(4, 1))
        yield steps.row("waits in a run", lambda: launches.waits_in_a_run(setting, ours.model, some))
        yield steps.row("profile", lambda: launches.profile(setting, ours.model, some))


def _ours(setting: Setting, steps: Steps, st: Any, pairs: bool, found: Found) -> Iterator[Row]:
    """The first run of all, in which kernels are loaded; a cold one (nothing learnt); the same again; single forwards."""
    with Ours(setting, st, pairs=pairs) as ours:
        row = steps.row("first run", lambda: ours.run(found.work)[0], who="memsafe")
        yield row
    if not setting.dry and row.get("seconds"):
        # a card on which a run would not end in time gets every n-th text
        needs_s = row["seconds"] * found.work.tokens / max(row["tokens_done"], 1)
        every = 1
        while needs_s / every > 0.7 * steps.left_s("cold") and every < 64:
            every *= 2
        found.work = found.work.every(every)
    with Ours(setting, st, pairs=pairs) as ours:
        found.flops = inside.flops_of(ours.model, found.work.counts)
        for step, seconds in (("cold", found.cold_s), ("learnt", found.learnt_s)):
            row = steps.row(step, lambda: ours.run(found.work)[0], who="memsafe")
            yield row
            seconds += [row["seconds"]] if row["outcome"] == "finished" else []
        yield steps.row("queued forwards", lambda: launches.queued(setting, ours.model))
        yield steps.row("waits in a forward", lambda: launches.waits_in_a_forward(setting, ours.model))


def _search(steps: Steps, contenders: dict[str, Peer | str], found: Found) -> Iterator[Row]:
    """A row for each peer's default and for each batch size tried, on every fourth text; the best one is chosen.

    The first peer is the library itself, whose best size is searched; those that call it get its best one.
    """
    some = found.work.every(steps.setting.pick(4, 1))
    usable: dict[str, Peer] = {}
    for who, peer in contenders.items():
        if isinstance(peer, str):
            yield {**steps.head, "step": "default", "who": who, "outcome": peer}
        else:
            usable[who] = peer
    rates: dict[str, dict[int | None, float | None]] = {}
    for place, (who, peer) in enumerate(usable.items()):
        run_it = lambda peer=peer: run_peer(steps.setting, peer, some, None)  # type: ignore[misc] # noqa: E731
        row = steps.row("default", run_it, parts=len(usable) - place, who=who)
        yield row
        rates[who] = {None: row.get("tokens_per_s")}
    best: int | None = None
    for place, (who, peer) in enumerate(usable.items()):
        tried = {DEFAULT: rates[who][None]}
        size = next_size(tried) if not place else best
        while size is not None and not (steps.setting.dry and size > 2 * DEFAULT):
            run_it = lambda peer=peer, size=size: run_peer(steps.setting, peer, some, size)  # type: ignore[misc] # noqa: E731
            fastest = max((rate for rate in rates[who].values() if rate), default=0.0)
            needs_s = some.tokens / fastest if fastest else 1.0
            try:
                row = steps.row("sweep", run_it, needs_s=needs_s, who=who, batch_size=size)
            except LookupError:  # it has no batch size
                break
            yield row
            if row["outcome"] == NOT_RUN:
                break
            tried[size] = rates[who][size] = row.get("tokens_per_s")
            size = None if place else next_size(tried)
        alive = {size: rate for size, rate in rates[who].items() if rate}
        if alive:
            size = max(alive, key=alive.__getitem__)
            found.chosen[who] = (peer, size, alive[size])
            found.theirs_s[who] = []
            best = best or size or DEFAULT


def _round(setting: Setting, steps: Steps, st: Any, pairs: bool, found: Found, number: int) -> Iterator[Row]:
    """Ours cold, ours again and each peer at its best size: what slows the machine slows all. A later round that would not
    end in time is not begun; of the first, what there is time for."""
    columns: Row = {"round": number}
    ours_s = max(found.cold_s, default=1.0)
    theirs = {who: found.work.tokens / rate for who, (_, _, rate) in found.chosen.items()}
    left_s = steps.left_s("rounds")
    if not setting.dry and left_s < (2 * ours_s + sum(theirs.values()) if number > 1 else ours_s):
        yield {**steps.head, "step": "rounds", **columns, "outcome": NOT_RUN, "box_s": left_s}
        return
    with Ours(setting, st, pairs=pairs) as ours:
        for name, seconds in (("cold", found.cold_s), ("learnt", found.learnt_s)):
            row = steps.row(
                "rounds", lambda: ours.run(found.work)[0], needs_s=ours_s, **columns, who="memsafe", state=name
            )
            yield row
            seconds += [row["seconds"]] if row["outcome"] == "finished" else []
    for who, (peer, size, _) in found.chosen.items():
        run_it = lambda peer=peer, size=size: run_peer(setting, peer, found.work, size)  # type: ignore[misc] # noqa: E731
        row = steps.row("rounds", run_it, needs_s=theirs[who], **columns, who=who, batch_size=size or "default")
        yield row
        found.theirs_s[who] += [row["seconds"]] if row["outcome"] == "finished" else []


def compared(found: Found, matmul_flops: float) -> Row:
    """Medians of whole runs: ours over the best peer, and its share of the matrix rate, cold and learnt."""
    tokens = found.work.tokens
    peer_s = {who: statistics.median(times) for who, times in found.theirs_s.items() if times}
    best = min(peer_s, key=peer_s.__getitem__, default=None)
    row: Row = {
        "who": "memsafe",
        "outcome": "compared" if found.cold_s and best else "not compared: see the rows above",
    }
    row.update(texts=len(found.work.counts), tokens=tokens, matmul_flops=matmul_flops)
    row["best_peer"] = None if best is None else f"{best}, batch {found.chosen[best][1] or 'default'}"
    row["best_peer_tokens_per_s"] = None if best is None else tokens / peer_s[best]
    for name, times in (("cold", found.cold_s), ("learnt", found.learnt_s)):
        seconds = statistics.median(times) if times else None
        row[f"{name}_runs"] = len(times)
        row[f"{name}_tokens_per_s"] = tokens / seconds if seconds else None
        row[f"{name}_times_the_best_peer"] = peer_s[best] / seconds if seconds and best else None
        row[f"{name}_share_of_matmul"] = found.flops / seconds / matmul_flops if seconds else None
    return row
