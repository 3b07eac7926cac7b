"""What a call of the core took, as a custom event of LangChain's callbacks: figures of ``memsafe.RunReport``, never a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager
from langchain_core.runnables.config import ensure_config

if TYPE_CHECKING:
    from langchain_core.callbacks import Callbacks

    from memsafe import RunReport

__all__ = ["EVENT", "Reports"]

EVENT = "memsafe_run"
"""What ``on_custom_event`` of a handler is called with as `name`; `data` is ``RunReport.to_dict()``."""


class Reports:
    """Keeps the reports of a call's runs (``on_report=reports``), and tells them to those who listen.

    callbacks: given with the call; None for those of the run (a chain, a graph) that the call is part of, if any.
    """

    def __init__(self, callbacks: Callbacks | None = None) -> None:
        self._callbacks = callbacks
        self._figures: list[dict[str, Any]] = []

    def __call__(self, report: RunReport) -> None:
        self._figures.append(report.to_dict())

    def tell(self) -> None:
        found = self._found()
        if found is not None:
            manager = CallbackManager.configure(inheritable_callbacks=found)
            for figures in self._figures:
                manager.on_custom_event(EVENT, figures, run_id=manager.parent_run_id)

    async def atell(self) -> None:
        found = self._found()
        if found is not None:
            manager = AsyncCallbackManager.configure(inheritable_callbacks=found)
            for figures in self._figures:
                await manager.on_custom_event(EVENT, figures, run_id=manager.parent_run_id)

    def _found(self) -> Callbacks | None:
        return self._callbacks if self._callbacks is not None else ensure_config().get("callbacks")
