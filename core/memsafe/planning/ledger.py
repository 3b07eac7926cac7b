"""What one model's micro-batches cost, and what they may take: the cost model and the budget behind one counter."""

from __future__ import annotations

from memsafe.planning.batch import BatchShape
from memsafe.planning.budget import MemoryBudget, MemorySnapshot
from memsafe.planning.cost import CostModel

__all__ = ["Ledger"]


class Ledger:
    """Bytes of one model on one device. Not thread-safe: its owner holds a lock for every call.

    What is in flight belongs to the device, whose owner hands it in: micro-batches of other models take memory as well.
    """

    def __init__(self, cost: CostModel, budget: MemoryBudget) -> None:
        self.cost = cost
        self.budget = budget

    def room(self, snapshot: MemorySnapshot, in_flight_bytes: int) -> int:
        """Bytes that the next micro-batch may take: what is free, under the limit and under what earlier failures have capped."""
        return self.budget.admissible_bytes(snapshot, in_flight_bytes)

    def headroom(self, snapshot: MemorySnapshot, in_flight_bytes: int = 0) -> int:
        """The same whatever failures have capped: for inputs that have failed already. At least 0."""
        return max(self.budget.headroom_bytes(snapshot, in_flight_bytes), 0)

    def room_tokens(self, room_bytes: int, mean_len: float) -> int:
        """How many tokens of texts of about `mean_len` tokens fit into `room_bytes`."""
        return self.cost.max_tokens_for(room_bytes, mean_len)

    def bound(self, shape: BatchShape) -> int:
        """What a micro-batch is charged: bytes by which the process should not grow by more."""
        return self.cost.resident_bound(shape)

    def predict(self, shape: BatchShape) -> int:
        """Live tensor bytes that are expected."""
        return self.cost.predict(shape)

    def settle(
        self, shape: BatchShape, bound_bytes: int, live_bytes: int | None, resident_bytes: int | None
    ) -> int | None:
        """A micro-batch has run; learn from what was measured. Returns the budget's cap if it has grown, else None."""
        if live_bytes is not None or resident_bytes is not None:
            self.cost.observe(shape, live_bytes, resident_bytes)
        return self.budget.cap_bytes if self.budget.succeed(bound_bytes) else None

    def refuse(self, bound_bytes: int, snapshot: MemorySnapshot) -> int:
        """A micro-batch charged `bound_bytes` did not fit. Returns the new cap."""
        return self.budget.shrink(bound_bytes, snapshot)

    def may_wait(self, need_bytes: int, snapshot: MemorySnapshot) -> bool:
        """Whether waiting can help: an idle device would have room for `need_bytes`, but others hold it now."""
        budget = self.budget
        most = snapshot.total_bytes - snapshot.allocated_bytes - budget.reserve_bytes
        if budget.limit_bytes is not None:
            most = min(most, budget.limit_bytes - max(snapshot.allocated_bytes - budget.baseline_bytes, 0))
        return need_bytes <= most and snapshot.free_bytes + snapshot.reusable_bytes < most
