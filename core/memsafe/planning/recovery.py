"""What to do when a device refuses memory. Decides, never acts.

For a micro-batch of several inputs::

    1st failure   release the cache, retry the same        (allocators refuse spuriously; neighbours come and go)
    2nd failure   shrink the budget, split                 (each half starts again at its own 1st failure)

For one input alone::

    1st failure   release the cache, retry the same
    then          wait, release, retry                     (only while neighbours hold memory, `wait_s` in all)
    then          fall back: chunk, half, cpu              (those that the policy allows, each once)
    then          give up

Every path ends: splits halve, waits add up to at most `wait_s`, rungs are used once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memsafe.config import FALLBACKS, MemoryPolicy
from memsafe.planning.batch import BatchShape

__all__ = [
    "Action",
    "Failure",
    "FallBack",
    "GiveUp",
    "RecoveryPolicy",
    "ReleaseCache",
    "Retry",
    "ShrinkBudget",
    "Split",
    "Wait",
]

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 2.0
_LEAST_WAIT_S = 0.001


@dataclass(frozen=True, slots=True)
class Action:
    """Base of all actions. `name` is what events and reports call it."""

    name: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class ReleaseCache(Action):
    """Give cached memory back to the device."""

    name: ClassVar[str] = "release"


@dataclass(frozen=True, slots=True)
class Retry(Action):
    """Run the same inputs again, the same way."""

    name: ClassVar[str] = "retry"


@dataclass(frozen=True, slots=True)
class Split(Action):
    """Run the two halves of the micro-batch instead; finished rows stay."""

    name: ClassVar[str] = "split"


@dataclass(frozen=True, slots=True)
class ShrinkBudget(Action):
    """Cap the budget below what failed."""

    name: ClassVar[str] = "shrink"


@dataclass(frozen=True, slots=True)
class Wait(Action):
    """Do nothing for so many seconds: neighbours may give memory back."""

    seconds: float
    name: ClassVar[str] = "wait"


@dataclass(frozen=True, slots=True)
class FallBack(Action):
    """Run the one input by another strategy; `rung` is one of :data:`memsafe.config.FALLBACKS`."""

    rung: str
    name: ClassVar[str] = "fallback"


@dataclass(frozen=True, slots=True)
class GiveUp(Action):
    """Nothing is left to try. `reason`: what was tried and what would help, ready for an error message."""

    reason: str
    name: ClassVar[str] = "give up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One refusal of memory.

    shape: of the micro-batch that failed.
    attempt: how often these very inputs have failed, by any strategy, this time included; 1 for the first.
    alone: one input only.
    tokens: of the inputs themselves.
    rungs_used: fallbacks already used for this input.
    rungs_refused: those of them that were predicted not to fit, and so were not started.
    rungs_impossible: fallbacks that this model or device cannot do.
    waited_s: seconds waited for this input so far.
    has_neighbours: whether other processes, or micro-batches in flight, hold memory that may come free.
    device_kind: ``"cuda"``, ``"cpu"``, ...
    half: the model already runs in half precision.
    started: False if it was only predicted not to fit.
    """

    shape: BatchShape
    attempt: int
    alone: bool
    tokens: int
    rungs_used: tuple[str, ...] = ()
    rungs_refused: tuple[str, ...] = ()
    rungs_impossible: tuple[str, ...] = ()
    waited_s: float = 0.0
    has_neighbours: bool = False
    device_kind: str = "cpu"
    half: bool = False
    started: bool = True


class RecoveryPolicy:
    """Turns failures into actions, to be carried out in order. Pure: the same failure always gives the same actions."""

    def __init__(self, policy: MemoryPolicy) -> None:
        self._wait_s = float(policy.wait_s)
        self._fallback = policy.fallback

    def decide(self, failure: Failure) -> tuple[Action, ...]:
        """The actions for `failure`; the last one says how the inputs go on: retry, split, fall back or give up."""
        if failure.attempt <= 1:
            return ReleaseCache(), Retry()
        if not failure.alone:
            return ShrinkBudget(), Split()
        wait_s = self._next_wait_s(failure.waited_s)
        if failure.has_neighbours and wait_s:
            return Wait(wait_s), ReleaseCache(), Retry()
        possible = self._possible(failure)
        for rung in possible:
            if rung in self._fallback and rung not in failure.rungs_used:
                return ReleaseCache(), FallBack(rung)
        return (GiveUp(self._reason(failure, possible)),)

    def _next_wait_s(self, waited_s: float) -> float:
        """0.05 s, then as long as all waits so far and 0.05 s more (which doubles), at most 2 s; 0.0 when used up."""
        left = self._wait_s - waited_s
        return min(waited_s + FIRST_WAIT_S, LONGEST_WAIT_S, left) if left >= _LEAST_WAIT_S else 0.0

    def _possible(self, failure: Failure) -> list[str]:
        pointless = set(failure.rungs_impossible)
        if failure.half:
            pointless.add("half")
        if failure.device_kind == "cpu":
            pointless.add("cpu")
        return [rung for rung in FALLBACKS if rung not in pointless]

    def _reason(self, failure: Failure, possible: list[str]) -> str:
        tried = ["released the cache and retried" if failure.started else "released the cache"]
        if failure.waited_s:
            tried.append(f"waited {failure.waited_s:.1f} s")
        refused = failure.rungs_refused
        tried += [f"fell back to {rung!r}" for rung in failure.rungs_used if rung not in refused]
        tried += [f"saw that {rung!r} would not fit either" for rung in refused]
        untried = [rung for rung in possible if rung not in self._fallback]
        remedy = "lower max_length"
        if untried:
            allowed = tuple(rung for rung in FALLBACKS if rung in self._fallback or rung in untried)
            remedy += f", or allow more fallbacks: MemoryPolicy(fallback={allowed})"
        return f"one input of {failure.tokens:,} tokens: {', '.join(tried)}; {remedy}"
