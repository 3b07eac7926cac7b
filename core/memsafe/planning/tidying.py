"""When memory goes back, and how the heap is set: one memory of the process's growth on a device, one table of thresholds."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from memsafe.config import MiB
from memsafe.planning.budget import MemorySnapshot
from memsafe.planning.traits import Traits

__all__ = ["Release", "Seen", "Tidy", "Tidying"]

Release = Literal["pressure", "run", "never"]
"""When a policy gives cached memory back; with ``"never"`` only when something does not fit."""

CREEP = 32 * MiB
"""Growth of a CPU's heap between micro-batches that is let be. Trimmed at this, runs of MiniLM grew the process by 122 to
149 MiB instead of 171 to 215, at the same speed; at 16 MiB they were a tenth slower."""
WORTH_RELEASING = 64 * MiB
"""Growth that is given back at a run's end, or where memory is short; less is not worth the page faults of the next run."""
WORTH_WHILE_BUSY = 256 * MiB
"""Growth of a CPU's process that is given back at a run's end though other calls are at work, and would fetch it back."""
AMPLE = 8
"""Memory is ample where so many times what a micro-batch needs is free."""


class Tidy(enum.Enum):
    """What is to be done to a device's memory before anything else starts on it."""

    RELEASE = "release"
    """Give cached memory back."""
    TIGHTEN = "tighten"
    """Let freed tensors leave the process at once."""
    LOOSEN = "loosen"
    """Keep freed tensors for the next ones again."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A device as it was read before a decision. process_bytes: what the process holds on it, caches included. exact_heap:
    whether freed tensors leave the process at once."""

    snapshot: MemorySnapshot
    process_bytes: int
    exact_heap: bool = False


class Tidying:
    """Memory of one device. release: of the policy of the model at work."""

    def __init__(self, traits: Traits) -> None:
        self._traits = traits
        self._base_bytes: int | None = None  # the process's size when memory last went back, or was first looked at
        self._done: set[Tidy] = set()  # since a micro-batch last started

    def before(
        self,
        seen: Seen,
        release: Release,
        *,
        refused: bool,
        cut: bool,
        busy: int,
        lanes: int,
        bound_bytes: int,
        predicted_bytes: int,
    ) -> Tidy | None:
        """What to do before a micro-batch starts.

        refused: it does not fit even alone. cut: the budget made it smaller than it should be. predicted_bytes: of one
        like it; `lanes` run side by side.
        """
        if self._base_bytes is None:
            self._base_bytes = seen.process_bytes
        heap = self._traits.keeps_freed
        if cut and heap and not seen.exact_heap and Tidy.TIGHTEN not in self._done:
            return Tidy.TIGHTEN
        if Tidy.RELEASE not in self._done:
            if refused and not busy:
                return Tidy.RELEASE
            if heap and release != "never":
                grown = seen.process_bytes - self._base_bytes
                if cut and grown > WORTH_RELEASING:
                    return Tidy.RELEASE
                if not seen.exact_heap and grown > max(CREEP, lanes * predicted_bytes):
                    return Tidy.RELEASE  # what tensors of one size leave is often too small for the next
        room_bytes = seen.snapshot.free_bytes + seen.snapshot.reusable_bytes
        ample = heap and seen.exact_heap and not busy and not cut and AMPLE * bound_bytes < room_bytes
        # In flight is nothing whose bound relies on the heap as it is.
        return Tidy.LOOSEN if ample and Tidy.LOOSEN not in self._done else None

    def after_run(self, release: Release, before_bytes: int, process_bytes: int, *, busy: bool) -> bool:
        """Whether to give memory back at the end of a run that began with the process at `before_bytes`. busy: other calls
        are at work on the device."""
        if release == "never":
            return False
        base = before_bytes if self._base_bytes is None else self._base_bytes
        if busy:
            return self._traits.keeps_freed and process_bytes >= base + WORTH_WHILE_BUSY
        return release == "run" or process_bytes >= min(before_bytes, base) + WORTH_RELEASING

    def after_search(self, release: Release) -> bool:
        """Whether to give back what sizes took that were tried in vain."""
        return self._traits.keeps_freed and release != "never"

    def did(self, tidy: Tidy, process_bytes: int) -> None:
        """It was done; the process has `process_bytes` now."""
        self._done.add(tidy)
        if tidy is Tidy.RELEASE:
            self._base_bytes = process_bytes

    def started(self) -> None:
        """A micro-batch starts: what was done in vain for it may be worth doing for the next one."""
        self._done.clear()
