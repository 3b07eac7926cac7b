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

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from memsafe.config import FALLBACKS, MemoryPolicy
from memsafe.planning.batch import BatchShape, MicroBatch

__all__ = [
    "Action",
    "Clear",
    "Failure",
    "FallBack",
    "GiveUp",
    "RecoveryPolicy",
    "ReleaseCache",
    "Retry",
    "ShrinkBudget",
    "Split",
    "Wait",
    "Work",
    "follow",
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
    """Cap the budget below what failed. cap_bytes: the new cap, once it is known."""

    cap_bytes: int | None = None
    name: ClassVar[str] = "shrink"


@dataclass(frozen=True, slots=True)
class Clear(Action):
    """Let nothing new start, and wait for others to end, at most so many seconds: it is tried once more by itself."""

    seconds: float
    name: ClassVar[str] = "retry"


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


@dataclass(frozen=True, eq=False)
class Work:
    """Inputs on their way through recovery.

    bound_bytes: what they are predicted to need at most. budget_bytes: what was free for them then. failures: how often
    memory ran out on them. refused: their bound is above the budget, so they were not started. rung: the fallback they are
    to run by. rungs: fallbacks tried or predicted not to fit; used: those that really ran. cleared: they had the device for
    themselves. reprieved: they were looked at once more before they were given up. via: what is to be told when they start.
    """

    batch: MicroBatch
    bound_bytes: int = 0
    budget_bytes: int = 0
    failures: int = 0
    refused: bool = False
    rung: str | None = None
    rungs: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    waited_s: float = 0.0
    cleared: bool = False
    reprieved: bool = False
    via: str = ""


def follow(work: Work, actions: Iterable[Action]) -> tuple[Work, ...]:
    """What is to run after `actions` were decided for `work`, in this order; nothing if it is given up.

    Memory may come free between a refusal and the end: what was never started is looked at once more before it is given up.
    """
    for action in actions:
        if isinstance(action, Wait):
            work = replace(work, waited_s=work.waited_s + action.seconds)
        elif isinstance(action, Clear):
            return (replace(work, cleared=True),)
        elif isinstance(action, Retry):
            return (replace(work, via="retry"),)
        elif isinstance(action, Split):
            return tuple(Work(half) for half in work.batch.split())
        elif isinstance(action, FallBack):
            return (replace(work, rung=action.rung, rungs=(*work.rungs, action.rung), via=action.rung),)
        elif isinstance(action, GiveUp) and work.refused and not work.reprieved:
            return (replace(work, rung=None, reprieved=True),)
    return ()
