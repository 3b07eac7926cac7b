"""What a scheduler says, and what it is told: data, performed and measured by others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memsafe.planning.batch import MicroBatch
from memsafe.planning.sizing import Size
from memsafe.planning.tenant import Tenant
from memsafe.planning.tidying import Tidy

__all__ = ["Grew", "Measured", "Remember", "Start", "Ticket", "TidyFirst"]


@dataclass(frozen=True, eq=False)
class Ticket:
    """Leave to run one micro-batch.

    bound_bytes: what it is charged. budget_bytes: what was free for it. probe: alone on the device, so that its peak can be
    measured. fits: False if one input exceeds what is admissible even alone. size: what it was cut to. threads: cores it
    uses, None where micro-batches take turns. released_bytes: cache that was given back to make room for it. exact_heap: its
    growth of the process tells what it holds.
    """

    batch: MicroBatch
    bound_bytes: int
    budget_bytes: int
    probe: bool
    fits: bool = True
    size: Size = Size(1)  # noqa: RUF009 - frozen
    threads: int | None = None
    released_bytes: int = 0
    exact_heap: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Run the ticket. busy: micro-batches in flight on the device, this one included."""

    tenant: Tenant
    ticket: Ticket
    busy: int


@dataclass(frozen=True, slots=True)
class TidyFirst:
    """Do this to the device's memory, tell :meth:`Scheduler.did`, and ask again."""

    tenant: Tenant
    tidy: Tidy


@dataclass(frozen=True, slots=True)
class Measured:
    """What one forward took; None for what was not measured. seconds, host_seconds: see :class:`Sample`."""

    live_bytes: int | None = None
    resident_bytes: int | None = None
    seconds: float | None = None
    host_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Remember:
    """What was learnt of a model is worth keeping for another day: `text` under `key`."""

    key: Any
    text: str


@dataclass(frozen=True, slots=True)
class Grew:
    """The budget's cap after failures has grown to `cap_bytes`."""

    cap_bytes: int
