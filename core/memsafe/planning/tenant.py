"""One model on one device, as planning sees it: what waits for it, what it costs, how large its micro-batches are."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from memsafe.config import MemoryPolicy, MiB
from memsafe.planning.batch import BatchShape, MicroBatch
from memsafe.planning.budget import MemoryBudget
from memsafe.planning.cost import CostModel
from memsafe.planning.ledger import Ledger
from memsafe.planning.planner import BatchPlanner
from memsafe.planning.recovery import RecoveryPolicy
from memsafe.planning.sizing import Sizing
from memsafe.planning.traits import Traits
from memsafe.planning.turns import Queues

__all__ = ["Modelled", "Tenant"]

_PROCESS_NOISE = 32 * MiB
"""What else a process takes or gives back while it is measured. The first forwards of an OpenVINO model in a process grew it by
up to 28 MiB where 6 were due."""


class Modelled(Protocol):
    """What planning asks of a model: arithmetic on shapes, nothing that runs."""

    @property
    def packed(self) -> bool: ...
    @property
    def pad_multiple(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def counts_process(self) -> bool: ...
    @property
    def one_core_each(self) -> bool: ...
    @property
    def most_padding(self) -> float | None: ...
    @property
    def dtype_name(self) -> str: ...
    def cost_shape(self, batch: MicroBatch) -> BatchShape: ...
    def flops(self, shape: BatchShape) -> float: ...
    def can(self, rung: str) -> bool: ...
    def rung_bound(self, rung: str, shape: BatchShape, bound_bytes: int) -> int: ...


class Tenant:
    """One model on one device, as the device's scheduler sees it.

    queues: what waits for the model, shared with its copies on other devices. cost: may hold what was learnt earlier.
    broken: the error that ended the device for this model.
    """

    def __init__(
        self,
        model: Modelled,
        traits: Traits,
        policy: MemoryPolicy,
        cost: CostModel,
        budget: MemoryBudget,
        queues: Queues,
    ) -> None:
        self.model = model
        self.policy = policy
        self.queues = queues
        self.ledger = Ledger(cost, budget)
        # What is measured at the process has the heap's part in it.
        cost.least_share = 0.0 if model.counts_process else traits.heap_share
        cost.noise_bytes = _PROCESS_NOISE if model.counts_process else 0
        cost.workspace_bytes = model.workspace_bytes
        one = BatchShape(1, 1, 0, 1)
        pair = model.flops(replace(one, squares=1)) - model.flops(one)
        cost.speed.square_tokens = pair / max(model.flops(one), 1.0)
        self.sizing = Sizing(
            traits,
            knee=policy.knee,
            max_tokens=policy.max_tokens,
            token_flops=model.flops(one),
            curve=cost.speed,
            lanes=traits.cores if model.one_core_each else cost.lanes,
        )
        self.recovery = RecoveryPolicy(policy)
        self.broken: BaseException | None = None
        self.released_bytes = 0  # to make room for it; told with its next micro-batch
        self.extra_probes = traits.extra_probes
        self._most_rows = traits.most_rows
        self._run = (
            0  # of the queues, of which the next three tell: when it was first looked at, and what had come by then
        )
        self._since, self._tokens_then, self._tokens_now = 0.0, 0, 0
        self._inflow = 0.0
        self._planners: dict[tuple[int | None, bool], BatchPlanner] = {}

    def inflow(self, now: float) -> float:
        """Tokens per second of a run whose texts are still being tokenised; 0 if none are, or it is too early to tell."""
        queues = self.queues
        if not queues.coming:
            return 0.0
        if queues.runs != self._run:
            self._run, self._since, self._inflow = queues.runs, now, 0.0
            self._tokens_then = self._tokens_now = queues.came_tokens
        elif queues.came_tokens > self._tokens_now and now > self._since:
            self._tokens_now = queues.came_tokens
            self._inflow = (self._tokens_now - self._tokens_then) / (now - self._since)
        return self._inflow

    def planner(self, max_rows: int | None, raw: bool = False) -> BatchPlanner:
        """The planner for inputs of which at most `max_rows` may run together; None for no cap. raw: the model's own
        preprocessing sees them, and pads."""
        packed = self.model.packed and not raw
        if (max_rows, packed) not in self._planners:
            caps = [cap for cap in (max_rows, self._most_rows) if cap is not None]
            self._planners[max_rows, packed] = BatchPlanner(
                packed, self.model.pad_multiple, min(caps, default=None), self.model.most_padding
            )
        return self._planners[max_rows, packed]
