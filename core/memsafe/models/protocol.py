"""What an engine may ask of a model: the one seam between threads and whatever computes rows, simulated models included."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from memsafe.planning.batch import MicroBatch
from memsafe.planning.cost import CostKey, CostPrior
from memsafe.planning.tenant import Modelled

if TYPE_CHECKING:
    from memsafe.machine.device import Device, Peak

__all__ = ["Runnable"]


class Runnable(Modelled, Protocol):
    """A model on one device. LoadedModel is one; memsafe.testing has a simulated one.

    device: where it is. encoder: texts to token ids. st: what a user may ask about it. path: how it runs, and why.
    """

    device: Device
    encoder: Any
    st: Any
    weights_bytes: int

    @property
    def path(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def survives_fork(self) -> bool: ...
    def cost_key(self) -> CostKey: ...
    def cost_prior(self) -> CostPrior: ...

    def forward(self, batch: MicroBatch, extras: Mapping[str, Any], rung: str | None = None) -> Any:
        """Rows of `batch`, a tensor or an array of shape (len(batch), ...). rung: of :data:`memsafe.config.FALLBACKS`."""
        ...

    def redo_in_float32(self, batch: MicroBatch, extras: Mapping[str, Any]) -> Any:
        """The same rows computed on the CPU in float32."""
        ...

    def measure(self, live: bool) -> AbstractContextManager[Peak]:
        """Measure a forward's peak: see :meth:`memsafe.machine.device.Device.measure`."""
        ...

    def release(self) -> int:
        """Give back what forwards keep for later ones, where the device knows nothing of it; returns how many bytes."""
        ...

    def after_fork(self) -> None: ...
    def drop_host_copy(self) -> None: ...
    def close(self) -> None: ...
