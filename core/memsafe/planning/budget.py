"""Byte arithmetic: what is free, what may be used, what was seen to fail."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MemoryBudget", "MemorySnapshot"]


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """A device's memory at one moment, in bytes, in torch's words.

    free_bytes: what this process could still take from the device (driver free; on the CPU the smallest of cgroup,
        available memory and rlimits), without what it holds in caches itself.
    total_bytes: the device's size as this process may see it (a container's limit on the CPU).
    allocated_bytes: what tensors of this process hold now.
    reserved_bytes: what the process holds in all, caches included (its resident size on the CPU).
    """

    free_bytes: int
    total_bytes: int
    allocated_bytes: int
    reserved_bytes: int

    @property
    def reusable_bytes(self) -> int:
        """What the process holds but no tensor uses: an allocation may come from here without asking the device."""
        return max(self.reserved_bytes - self.allocated_bytes, 0)


class MemoryBudget:
    """How many bytes the next micro-batch may take on one device.

    After a failure the budget is a cap below what failed; after `patience` successes near the cap it grows by
    `growth`, but stays below the failed size as long as no more memory is free than when it failed.
    Not thread-safe: its owner holds a lock.
    """

    def __init__(
        self,
        *,
        limit_bytes: int | None,
        reserve_bytes: int,
        baseline_bytes: int = 0,
        patience: int = 4,
        growth: float = 1.25,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.reserve_bytes = reserve_bytes
        self.baseline_bytes = baseline_bytes
        """``allocated_bytes`` of this process before the model was loaded; the limit counts from here."""
        self._patience = patience
        self._growth = growth
        self._cap_bytes: int | None = None
        self._failed_bytes: int | None = None
        self._failed_free_bytes = 0
        self._successes = 0

    @property
    def cap_bytes(self) -> int | None:
        """The cap that failures have left, or None."""
        return self._cap_bytes

    def headroom_bytes(self, snapshot: MemorySnapshot, in_flight_bytes: int = 0) -> int:
        """``min(limit, free) - reserve``, less what micro-batches in flight may still take. May be negative."""
        free = snapshot.free_bytes + snapshot.reusable_bytes - self.reserve_bytes
        if self.limit_bytes is not None:
            used = snapshot.allocated_bytes - self.baseline_bytes
            free = min(free, self.limit_bytes - max(used, 0))
        return free - in_flight_bytes

    def admissible_bytes(self, snapshot: MemorySnapshot, in_flight_bytes: int = 0) -> int:
        """The headroom under the cap. At least 0."""
        headroom = self.headroom_bytes(snapshot, in_flight_bytes)
        if self._cap_bytes is not None:
            if snapshot.free_bytes + snapshot.reusable_bytes > 1.5 * self._failed_free_bytes:
                self._cap_bytes = self._failed_bytes = None  # a neighbour left: what failed says nothing any more
            else:
                headroom = min(headroom, self._cap_bytes - in_flight_bytes)
        return max(headroom, 0)

    def shrink(self, failed_bytes: int, snapshot: MemorySnapshot) -> int:
        """Record that `failed_bytes` did not fit; return the new cap, half of it."""
        self._failed_bytes = failed_bytes if self._failed_bytes is None else min(failed_bytes, self._failed_bytes)
        self._failed_free_bytes = snapshot.free_bytes + snapshot.reusable_bytes
        self._cap_bytes = max(self._failed_bytes // 2, 1)
        self._successes = 0
        return self._cap_bytes

    def succeed(self, used_bytes: int) -> bool:
        """Record a success; return True if the cap grew."""
        if self._cap_bytes is None or self._failed_bytes is None or used_bytes < self._cap_bytes // 4:
            return False
        self._successes += 1
        ceiling = int(self._failed_bytes * 0.95)
        if self._successes < self._patience or self._cap_bytes >= ceiling:
            return False
        self._successes = 0
        self._cap_bytes = min(int(self._cap_bytes * self._growth) + 1, ceiling)
        return True
