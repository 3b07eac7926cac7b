"""A device with a virtual clock: the real scheduling code runs against a recorded curve, without torch and without sleeping.

What is real: queues, order of tokenising, sizes, admission, turns, recovery (memsafe.planning). What is simulated, from one
JSON file per device, model and dtype (see :class:`Curve`): how long a forward takes the device and the launching
thread, what it allocates, noise, the first use of kernels, how fast texts are tokenised, a neighbour on the device.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from memsafe.config import FALLBACKS, MemoryPolicy
from memsafe.planning.batch import BatchShape, MicroBatch, TokenizedInput
from memsafe.planning.budget import MemoryBudget, MemorySnapshot
from memsafe.planning.cost import CostKey, CostModel, CostPrior
from memsafe.planning.instructions import Measured, Start, Ticket
from memsafe.planning.order import pieces
from memsafe.planning.recovery import Clear, GiveUp, Wait, Work, follow
from memsafe.planning.scheduler import Scheduler
from memsafe.planning.sizing import Pending, Size, Sizing
from memsafe.planning.speed import Sample
from memsafe.planning.tenant import Tenant
from memsafe.planning.tidying import Seen
from memsafe.planning.traits import Traits
from memsafe.planning.turns import BULK, QUERY, QueueKey, Queues

__all__ = ["MIXES", "Curve", "Outcome", "learnt_from", "load_curve", "mix", "simulate", "texts_for"]

CURVES = Path(__file__).resolve().parents[1] / "tests" / "planning" / "curves"


@dataclass(frozen=True)
class Curve:
    """One model on one device, as JSON has it. Times in seconds, sizes in bytes.

    kind, cores: of the device (``"cuda"``, ``"cpu"``). measured: False for figures that are made up. source: where they are from.
    seconds: [tokens, seconds] of a packed forward of short texts on the device (on a CPU: of one lane on one core),
    smallest first; straight lines between, and on beyond the last two. seconds_per_square: more, for each pair of
    tokens of one text. host_seconds: of a launch, whatever is in it. bytes: beyond the weights, ``fixed``, ``per_token``,
    ``per_sequence``, ``per_square``. free_bytes: what the device has for them. flops_per_token, flops_per_square: arithmetic.
    noise: slowest host, slowest device, as fractions on top; mostly much less. first_use_seconds: of the first forward.
    feed_tokens_per_s: tokenising; null for at once. thread_gain: of each further core to one lane. max_length: tokens.
    """

    name: str
    kind: str
    source: str
    measured: bool
    seconds: list[list[float]]
    bytes: dict[str, float]
    free_bytes: float
    flops_per_token: float
    flops_per_square: float
    cores: int = 1
    host_seconds: float = 0.0
    seconds_per_square: float = 0.0
    noise: list[float] = field(default_factory=lambda: [0.5, 0.02])
    first_use_seconds: float = 0.0
    feed_tokens_per_s: float | None = None
    thread_gain: float = 0.6
    max_length: int = 8192

    def device_seconds(self, shape: BatchShape) -> float:
        """Of a forward, without noise."""
        points = self.seconds
        place = bisect.bisect_left([point[0] for point in points], shape.tokens)
        if place == 0:
            linear = points[0][1]
        else:
            (x0, y0), (x1, y1) = points[min(place, len(points) - 1) - 1], points[min(place, len(points) - 1)]
            linear = y0 + (y1 - y0) * (shape.tokens - x0) / (x1 - x0)
        return linear + self.seconds_per_square * shape.squares

    def num_bytes(self, shape: BatchShape) -> int:
        """What a forward allocates at its peak."""
        costs = self.bytes
        return int(
            costs.get("fixed", 0)
            + costs["per_token"] * shape.tokens
            + costs.get("per_sequence", 0) * shape.sequences
            + costs.get("per_square", 0) * shape.squares
        )


def load_curve(path: str | Path) -> Curve:
    """The curve in a JSON file. Raises ``ValueError`` that names the file and the field."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        curve = Curve(**values)
        tokens = [point[0] for point in curve.seconds]
        if len(tokens) < 2 or tokens != sorted(set(tokens)) or min(point[1] for point in curve.seconds) <= 0:
            raise ValueError("seconds: give two points or more, [tokens, seconds], smallest first")
        if curve.bytes["per_token"] <= 0 or curve.free_bytes <= 0 or curve.flops_per_token <= 0:
            raise ValueError("bytes.per_token, free_bytes and flops_per_token must be above 0")
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a curve: {error}") from error
    return curve


@dataclass(eq=False)
class _Job:
    started: float
    left: int
    then: Callable[[], None]


class _Model:
    """What planning asks of a model; its arithmetic is the curve's."""

    packed, pad_multiple, workspace_bytes, dtype_name = True, 1, 0, "float32"
    one_core_each: bool = False
    counts_process: bool = False
    most_padding: float | None = None

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    def cost_shape(self, batch: MicroBatch) -> BatchShape:
        return batch.shape

    def flops(self, shape: BatchShape) -> float:
        return self.curve.flops_per_token * shape.tokens + self.curve.flops_per_square * shape.squares

    def can(self, rung: str) -> bool:
        return rung in FALLBACKS

    def rung_bound(self, rung: str, shape: BatchShape, bound_bytes: int) -> int:
        return 0 if rung == "cpu" else bound_bytes // 2


class _Fixed(Sizing):
    """A size that somebody has picked: what is compared with."""

    fixed_tokens = 256

    def propose(self, pending: Pending, *, capped: bool = False) -> Size:
        return Size(self.fixed_tokens)

    def observe(self, sample: Sample, lengths: object = None) -> bool:
        return False


@dataclass
class Outcome:
    """total_s: from the first text to the last row, in virtual seconds. sizes: computed tokens of each micro-batch, in order.
    refused: forwards that the device had no memory for. lost: inputs given up. curve: what sizing knows at the end.
    """

    total_s: float
    device_s: float
    peak_bytes: int
    sizes: list[int]
    trials: list[int]
    refused: int
    lost: int
    tenant: Tenant


def simulate(
    curve: Curve,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    fixed_tokens: int | None = None,
    learnt: CostModel | None = None,
    clients: int = 0,
    neighbour: bool = False,
    policy: MemoryPolicy | None = None,
) -> Outcome:
    """Run texts of `lengths` tokens. fixed_tokens: with micro-batches of this size, longest first. learnt: of an earlier
    run. clients: so many callers who ask one text after another, instead of one call. neighbour: takes and gives memory."""
    return _Simulation(curve, lengths, seed, fixed_tokens, learnt, clients, neighbour, policy).run()


class _Simulation:
    def __init__(
        self,
        curve: Curve,
        lengths: Sequence[int],
        seed: int,
        fixed_tokens: int | None,
        learnt: CostModel | None,
        clients: int,
        neighbour: bool,
        policy: MemoryPolicy | None,
    ) -> None:
        self.curve = curve
        self.lengths = list(lengths)
        self.random = random.Random(seed)
        self.clients = clients
        traits = Traits.of(curve.kind, curve.cores)
        self.scheduler = Scheduler(traits)
        self.queues = Queues()
        policy = policy or MemoryPolicy(reserve=0, learn=False, wait_s=1.0, fallback=FALLBACKS)
        cost = learnt or _new_cost(curve)
        total = int(curve.free_bytes)
        budget = MemoryBudget(
            limit_bytes=policy.limit_bytes(total), reserve_bytes=policy.reserve_bytes(total), baseline_bytes=0
        )
        self.tenant = Tenant(_Model(curve), traits, policy, cost, budget, self.queues)
        self.fixed = fixed_tokens is not None
        if fixed_tokens is not None:
            sizing = _Fixed(traits, lanes=traits.cores if traits.side_by_side else None)
            sizing.fixed_tokens, sizing._settled = fixed_tokens, True
            self.tenant.sizing, self.tenant.extra_probes = sizing, 0
        self.scheduler.attach(self.tenant)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.idle: list[Iterator[float | None]] = []
        self.host_free = self.device_free = 0.0
        self.used_before = False
        self.allocated = self.neighbour_bytes = self.peak = 0
        self.outcome = Outcome(0.0, 0.0, 0, [], [], 0, 0, self.tenant)
        if neighbour:
            self.at(0.05, self.neighbour_moves)

    # time

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what))

    def run(self) -> Outcome:
        if self.clients:
            waiting = iter(self.lengths)
            for _ in range(self.clients):
                self.ask(waiting)
        else:
            self.feed()
        self.idle = [self.lane() for _ in range(max(self.scheduler.most_lanes, 2))]
        self.wake()
        while self.events and (self.queues.pending or self.queues.coming or self.scheduler.in_flight):
            self.now, _, what = heapq.heappop(self.events)
            what()
            self.wake()
        if self.queues.pending or self.queues.coming or self.scheduler.in_flight:
            raise RuntimeError("the simulation stands still with work left")
        self.outcome.peak_bytes = self.peak
        return self.outcome

    def wake(self) -> None:
        """Let idle lanes look for work, until none finds any."""
        moved = True
        while moved:
            moved = False
            for lane in list(self.idle):
                until = next(lane)
                if until is not None:
                    self.idle.remove(lane)
                    self.resume(lane, until)
                    moved = True

    def resume(self, lane: Iterator[float | None], until: float) -> None:
        def go() -> None:
            then = next(lane)
            if then is None:
                self.idle.append(lane)
            else:
                self.resume(lane, then)

        self.at(until, go)

    # texts

    def feed(self) -> None:
        """One call: its texts reach the queue piece by piece, in the order that planning chooses."""
        job = _Job(0.0, len(self.lengths), lambda: None)
        key = QueueKey((BULK, None, ()))
        self.queues.announce(job, len(self.lengths))
        learning = (lambda: False) if self.fixed else (lambda: not self.tenant.sizing.settled)
        parts = pieces([4 * length for length in self.lengths], learning)

        def more() -> None:
            part = next(parts, None)
            while part is not None:
                items = [TokenizedInput(i, None, num_tokens=self.lengths[i], job=job) for i in part]
                self.queues.add(key, sorted(items, key=lambda item: -item.num_tokens))
                self.queues.arrived(job, len(items))
                if self.curve.feed_tokens_per_s:
                    tokens = sum(item.num_tokens for item in items)
                    self.at(self.now + tokens / self.curve.feed_tokens_per_s, more)
                    return
                part = next(parts, None)

        more()

    def ask(self, waiting: Iterator[int]) -> None:
        """One caller: the next text when the last one is answered."""
        length = next(waiting, None)
        if length is None:
            return
        job = _Job(self.now, 1, lambda: self.ask(waiting))
        self.queues.add(QueueKey((QUERY, None, ())), [TokenizedInput(0, None, num_tokens=length, job=job)])

    # memory

    def snapshot(self) -> MemorySnapshot:
        total = int(self.curve.free_bytes)
        return MemorySnapshot(
            max(total - self.neighbour_bytes - self.allocated, 0), total, self.allocated, self.allocated
        )

    def seen(self) -> Seen:
        return Seen(self.snapshot(), self.allocated)

    def neighbour_moves(self) -> None:
        free = int(self.curve.free_bytes) - self.allocated
        self.neighbour_bytes = int(free * self.random.choice((0.0, 0.3, 0.6, 0.9)))
        self.at(self.now + self.random.uniform(0.02, 0.2), self.neighbour_moves)

    # lanes

    def lane(self) -> Iterator[float | None]:
        """What a thread does: yields until when it is busy, or None where it found nothing to do."""
        while True:
            action = self.scheduler.next(self.now, self.seen())
            if action is None:
                yield None
            elif isinstance(action, Start):
                yield from self.perform(action.ticket)
            else:
                self.scheduler.did(action, 0, self.allocated)

    def perform(self, ticket: Ticket) -> Iterator[float | None]:
        todo = [Work(ticket.batch, ticket.bound_bytes, ticket.budget_bytes, refused=not ticket.fits)]
        first = True
        while todo:
            work = todo.pop()
            if not first:
                work = self.scheduler.checked(ticket, work, self.seen())
            first = False
            if not work.refused:
                need = 0 if work.rung == "cpu" else self.curve.num_bytes(work.batch.shape)
                if need <= self.snapshot().free_bytes:
                    yield from self.forward(ticket, work, need)
                    continue
                self.outcome.refused += 1
                work = replace(work, failures=work.failures + 1)
            for action in (actions := self.scheduler.refused(ticket, work, self.seen())):
                if isinstance(action, Clear):
                    self.scheduler.alone.add(ticket)
                    while self.scheduler.running(besides=ticket):
                        yield self.now + 0.01
                elif isinstance(action, Wait):
                    self.scheduler.paused.add(ticket)
                    yield self.now + action.seconds
                    self.scheduler.paused.discard(ticket)
                elif isinstance(action, GiveUp) and not follow(work, actions):
                    self.outcome.lost += len(work.batch)
                    self.finish(work.batch)
            todo.extend(reversed(follow(work, actions)))
        self.scheduler.done(ticket, self.now)

    def forward(self, ticket: Ticket, work: Work, need: int) -> Iterator[float | None]:
        curve, batch = self.curve, work.batch
        noise = self.random.random()
        seconds = curve.device_seconds(batch.shape) * (1 + curve.noise[1] * noise)
        host = curve.host_seconds * (1 + curve.noise[0] * self.random.random() ** 4)
        if not self.used_before:
            self.used_before = True
            host, seconds = host + curve.first_use_seconds, seconds + curve.first_use_seconds
        if self.scheduler.traits.side_by_side:
            threads = ticket.threads or 1
            end = self.now + seconds / (1 + (threads - 1) * curve.thread_gain)
            measured = Measured(need, need, seconds if threads == 1 else None)
            self.take(need)
            yield end
        else:
            launch = max(self.host_free, self.now)  # launches never overlap
            self.host_free = launch + host
            if launch > self.now:
                yield launch
            begun = max(self.device_free, self.now)
            end = self.device_free = max(begun + seconds, self.host_free)
            measured = Measured(need, need, end - begun, host)
            self.take(need)
            yield end
        self.allocated -= need
        self.outcome.device_s += seconds
        self.outcome.total_s = max(self.outcome.total_s, self.now)
        self.outcome.sizes.append(batch.shape.tokens)
        if ticket.size.trial:
            self.outcome.trials.append(ticket.size.tokens)
        if work.rung is None:
            self.scheduler.ran(ticket, batch, measured)
        self.finish(batch)

    def take(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)

    def finish(self, batch: MicroBatch) -> None:
        for item in batch.items:
            item.job.left -= 1
            if not item.job.left:
                item.job.then()


def _new_cost(curve: Curve) -> CostModel:
    costs = curve.bytes
    prior = CostPrior(
        costs.get("fixed", 0.0), costs["per_token"], costs.get("per_sequence", 0.0), costs.get("per_square", 0.0)
    )
    return CostModel(CostKey(curve.name, "", "", "", "packed", curve.kind, ""), prior)


def learnt_from(outcome: Outcome, curve: Curve) -> CostModel:
    """What another process would find of an earlier run: costs and speed through their JSON form."""
    cost = outcome.tenant.ledger.cost
    cost.lanes = outcome.tenant.sizing.lanes[0] if curve.kind == "cpu" else None
    return CostModel.from_json(cost.to_json())


def mix(name: str, count: int, max_length: int, seed: int) -> list[int]:
    """Lengths in tokens of `count` texts: of documents with a heavy tail (median 300, 1 % at 8,192 and more), of about one
    size, of the model's full length, as in a real manual's sections, of questions."""
    numbers = random.Random(f"{name} {seed}")
    if name == "heavy":
        drawn = (numbers.lognormvariate(math.log(300), 1.42) for _ in range(count))
    elif name == "uniform":
        drawn = (numbers.uniform(16, 512) for _ in range(count))
    elif name == "giant":
        drawn = (numbers.uniform(max_length / 2, max_length) for _ in range(count))
    elif name == "real":  # the sections of perl's manual: quantiles in tokens
        drawn = (_quantile(numbers.random()) for _ in range(count))
    elif name == "queries":
        drawn = (numbers.uniform(5, 40) for _ in range(count))
    else:
        raise ValueError(f"mix: got {name!r}; choose from {', '.join(MIXES)}")
    return [min(max(round(length), 3), max_length) for length in drawn]


MIXES = ("heavy", "uniform", "giant", "real", "queries")
_QUANTILES: list[tuple[float, float]] = [(0, 12), (0.05, 30), (0.5, 140), (0.95, 1410), (0.999, 12_000), (1, 142_835)]


def _quantile(share: float) -> float:
    place = bisect.bisect_right([point[0] for point in _QUANTILES], share) - 1
    (x0, y0), (x1, y1) = _QUANTILES[place], _QUANTILES[place + 1]
    return math.exp(math.log(y0) + (math.log(y1) - math.log(y0)) * (share - x0) / (x1 - x0))


def texts_for(curve: Curve, name: str, device_s: float, seed: int) -> list[int]:
    """Lengths of as many texts as take about `device_s` seconds at the curve's best."""
    best = max(point[0] / max(point[1], curve.host_seconds) for point in curve.seconds)
    probe = mix(name, 500, curve.max_length, seed)
    lanes = curve.cores if curve.kind == "cpu" else 1
    each = sum(n / best + n * n * curve.seconds_per_square for n in probe) / len(probe) / lanes
    return mix(name, max(round(device_s / each), lanes), curve.max_length, seed)
