"""Carries out what was decided after memory ran out, and tells those whom it concerns."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Protocol

from memsafe.config import format_bytes
from memsafe.engine.delivery import tell
from memsafe.errors import InputTooLargeError
from memsafe.events import BudgetChanged, CacheReleased, FallbackUsed, OutOfMemory, Waited
from memsafe.machine.device import Device
from memsafe.planning.batch import BatchShape, MicroBatch, TokenizedInput
from memsafe.planning.instructions import Measured
from memsafe.planning.recovery import Action, Clear, GiveUp, ReleaseCache, ShrinkBudget, Split, Wait, Work, follow

__all__ = ["Rescue", "Site"]

log = logging.getLogger("memsafe")

_LOOK_S = 0.05
"""How often a wait looks whether its inputs are still wanted."""


class Site(Protocol):
    """The scheduler as one micro-batch sees it. Every method takes and leaves the scheduling lock by itself."""

    def checked(self, work: Work) -> Work:
        """`work` with its bound, and refused if that is not free now."""

    def refused(self, work: Work) -> tuple[Action, ...]:
        """What to do after memory ran out for `work`, or was predicted to."""

    def ran(self, batch: MicroBatch, measured: Measured) -> None:
        """`batch` has run as it is."""

    def predict(self, shape: BatchShape) -> tuple[int, int, int]:
        """(expected live bytes, resident bound, what is free now) for a micro-batch of `shape`."""

    def pause(self, paused: bool) -> None:
        """Say that this micro-batch holds no memory for now (it waits), or that it is about to go on."""

    def clear(self, timeout_s: float) -> bool:
        """Let nothing new start and wait until no other runs; False if that took too long."""


class Rescue:
    """Recovery of one device's micro-batches."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def recover(self, work: Work, site: Site) -> list[Work]:
        """What is to run next, last first, after memory ran out for `work` or was predicted to."""
        actions = site.refused(work)
        batch, goes_on = work.batch, follow(work, actions)
        self._announce(work, actions[-1].name, site)
        for action in actions:
            if isinstance(action, Clear):
                if not site.clear(action.seconds):  # the others go on and on: as if it had been alone
                    return self.recover(replace(work, cleared=True), site)
            elif isinstance(action, ReleaseCache):
                released = self._device.release()
                if released:
                    tell(batch, CacheReleased(self._device.name, released, "failure"), released_bytes=released)
            elif isinstance(action, ShrinkBudget):
                if action.cap_bytes is not None:
                    tell(batch, BudgetChanged(self._device.name, action.cap_bytes, "shrink"), shrinks=1)
            elif isinstance(action, Wait):
                self._wait(action.seconds, batch, site)
            elif isinstance(action, Split):
                tell(batch, None, splits=1)
            elif isinstance(action, GiveUp) and not goes_on:
                self._give_up(action.reason, work, site)
        return list(reversed(goes_on))

    def begin(self, work: Work) -> Work:
        """`work` starts after all, as recovery decided: tell it."""
        if work.via == "retry":
            tell(work.batch, None, retries=1)
        elif work.via:
            self._tell_fallback(work.via, work.batch.items[0])
            work = replace(work, used=(*work.used, work.via))
        return replace(work, via="")

    def _wait(self, seconds: float, batch: MicroBatch, site: Site) -> None:
        started = time.perf_counter()
        site.pause(True)
        try:
            while (left := seconds - (time.perf_counter() - started)) > 0:
                if all(item.job.done for item in batch.items):
                    return
                time.sleep(min(left, _LOOK_S))
        finally:
            site.pause(False)
        tell(batch, Waited(self._device.name, seconds), waited_s=seconds)

    def _announce(self, work: Work, action: str, site: Site) -> None:
        """Memory ran out, and what happens next. Of what was only predicted nothing is told but the outcome."""
        if work.refused:
            return
        predicted = site.predict(work.batch.shape)[0]
        event = OutOfMemory(self._device.name, len(work.batch), work.batch.num_tokens, predicted, action)
        tell(work.batch, event, out_of_memory=1)

    def _tell_fallback(self, rung: str, item: TokenizedInput) -> None:
        index = item.job.position(item.index)
        what = {
            "chunk": "feed-forward layers run over slices of its tokens (same numbers)",
            "half": "it is computed in half precision (numbers differ slightly)",
            "cpu": "it is computed on the CPU (slow)",
        }[rung]
        log.warning("input %d of %d tokens does not fit on %s; %s", index, item.num_tokens, self._device.name, what)
        item.job.report.fall_back(rung)
        if item.job.emit is not None:
            item.job.emit(FallbackUsed(self._device.name, rung, index, item.num_tokens))

    def _give_up(self, reason: str, work: Work, site: Site) -> None:
        _, need, free = site.predict(work.batch.shape)
        if work.refused:  # what is free may have changed since: the error tells what decided
            free = work.budget_bytes
        else:  # it was tried, and took more than was free
            need = max(need, free + 1)
        for item in work.batch.items:
            index = item.job.position(item.index)
            error = InputTooLargeError(
                f"input {index} needs {format_bytes(need)} alone ({item.num_tokens:,} tokens), "
                f"{format_bytes(free)} are free for it on {self._device.name}; {reason}",
                index=index,
                num_tokens=item.num_tokens,
                need_bytes=need,
                free_bytes=free,
            )
            item.job.give_up(item, error)
