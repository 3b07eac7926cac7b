"""How large the next micro-batch should be, and how many run side by side: from what ran, not from what was wished.

Sizes double from small ones on while the speed curve says that more tokens would still pay; then the smallest size is
used whose rate is within a few per cent of the best. Nothing is remembered of the search but the curve: a size is tried
because the curve does not know it, so whatever the curve learns, in the middle of a run too, changes the next size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from memsafe.planning.cores import LaneChoice
from memsafe.planning.speed import Sample, SpeedCurve, size_class
from memsafe.planning.traits import Traits

__all__ = ["Pending", "Size", "Sizing", "usual_block"]

_TRIES = 4
"""So many micro-batches are asked to fill a size; if none does, texts are such that none will."""
_SURE = 2
"""Measurements before a size is believed to be no better: one may have met a kernel's first use, or a busy host."""
_FULL = 0.75
"""A size counts as tried if a micro-batch holds this fraction of it."""
_STEEP = 1.3
"""Where the last step was so many times as fast, launching is the limit, and the next step is a doubling; otherwise half of one."""
_HORIZON = 4
"""How far beyond the largest size measured something better is looked for, as a factor."""
_MODEST, _MODEST_LOSS = 2.0, 0.05
"""No size is used or tried that is more than twice the smallest one with which a run loses at most 5 %, as measured so far."""
_SMALL = 4
"""Up to so many times the first size costs too little memory to be cut in two."""
_AHEAD = 1.2
"""A device so many times as fast as texts come is fast enough: it stands idle for a sixth of the time."""
_FAR = 4
"""A smaller size so many times smaller tells nothing of those between."""
_AGAIN = 0.1
"""The gain for which a search is opened again."""
_NONE: Mapping[int, int] = MappingProxyType({})
_LEAST_SHARE = 128
"""Tokens below which the end of a run is not shared out among lanes."""


@dataclass(frozen=True, slots=True)
class Pending:
    """What waits in the queue that the next micro-batch is cut from.

    tokens: of all its inputs. lengths: how many texts of each :func:`size_class` this run has had so far. coming: whether more of
    the same calls is still being tokenised. room_tokens: what the budget allows one micro-batch now. trying: one in flight has a
    size that is on trial. inflow: tokens per second that come from tokenising; 0 if no more are to come, or nothing is known.
    """

    tokens: int
    lengths: Mapping[int, int] = field(default_factory=dict)
    coming: bool = False
    room_tokens: int = 1 << 62
    trying: bool = False
    inflow: float = 0.0


@dataclass(frozen=True, slots=True)
class Size:
    """The most tokens of the next micro-batch. trial: they are to be filled with texts that stand for all, to be measured."""

    tokens: int
    trial: bool = False


def usual_block(traits: Traits, *, token_flops: float, room_tokens: int, max_tokens: int | None) -> tuple[int, int]:
    """(texts of a block, tokens of a micro-batch) for work whose cuts are decided beforehand and must not be learnt.

    Where launching is the limit, a few times what the device computes while one forward is launched; never more than half of
    what there is room for, as two are in flight. A block is some tens of micro-batches of texts of a hundred tokens, so that
    little is lost with it.
    """
    if traits.side_by_side:
        return 1024, min(traits.searched_tokens or traits.start_tokens, max_tokens or 1 << 62)
    tokens = min(max(int(2 * traits.launch_flops / token_flops), 4096), 1 << 16)
    while tokens > max(room_tokens // 2, traits.start_tokens):
        tokens //= 2
    return 8192, min(tokens, max_tokens or tokens)


class Sizing:
    """Sizes of one model's micro-batches on one device.

    knee: the rate that may be lost for the sake of memory, as a fraction. max_tokens: never more than this. token_flops: a
    token's arithmetic, attention apart.
    curve: what an earlier process learnt. lanes: how many side by side an earlier process chose.
    """

    def __init__(
        self,
        traits: Traits,
        *,
        knee: float | None = None,
        max_tokens: int | None = None,
        token_flops: float = 1.0,
        curve: SpeedCurve | None = None,
        lanes: int | None = None,
    ) -> None:
        self._traits = traits
        self._token_flops = token_flops
        self._knee = traits.knee if knee is None else knee
        self._most = max_tokens
        self.curve = SpeedCurve() if curve is None else curve
        self.lane_choice = LaneChoice(traits.cores if traits.side_by_side else 1, chosen=lanes)
        self._tries: Counter[int] = Counter()
        self._settled = False
        self._settled = not self._next(_NONE)[1]

    # how large

    @property
    def settled(self) -> bool:
        """Whether a size was found that is worth keeping for another day."""
        return self._settled

    def observe(self, sample: Sample, lengths: Mapping[int, int] = _NONE) -> bool:
        """Learn from a micro-batch that ran, in a run of texts of these `lengths`; returns whether the search has just ended."""
        self.curve.observe(sample)
        if not self.curve.points:  # what an earlier process had learnt was wrong: from the beginning
            self._settled = False
            self._tries.clear()
        before, self._settled = self._settled, self._settled or not self._next(lengths)[1]
        return self._settled and not before

    def propose(self, pending: Pending, *, capped: bool = False) -> Size | None:
        """The size of the next micro-batch, given what waits; None if it is better to see first what a trial in flight took.
        capped: by rows, so that it says nothing of sizes in tokens."""
        if not self.curve.points and not pending.coming and pending.tokens <= self._traits.short_run_tokens:
            # Where launching is the limit, two micro-batches take twice as long as one.
            return self._capped(min(pending.tokens, max(int(self._traits.launch_flops / self._token_flops), 1)))
        tokens, trial = self._next(pending.lengths)
        if trial and (capped or self._too_many(tokens, pending)):
            tokens, trial = min(tokens, self._known()), False
        enough = self._keeps_up(pending)
        if enough is not None and enough < tokens:
            tokens, trial = enough, False
        if not trial:  # smaller ones were only ever measured because no more was waiting
            tokens = max(tokens, self._traits.start_tokens)
        if trial and pending.room_tokens < tokens <= pending.tokens:
            self._tries[size_class(tokens)] += 1  # the budget does not let it happen
        # What takes about all that waits stands for nothing else, and would only be cut in two.
        trial = trial and tokens <= min(pending.tokens // 2, pending.room_tokens)
        if trial and pending.trying and not self._traits.side_by_side and self._steep():
            return None  # launching is the limit: another one as small would only take its time
        return self._capped(tokens if trial else self._shared(tokens, pending), trial)

    def _keeps_up(self, pending: Pending) -> int | None:
        """The smallest size measured with which the device is well ahead of the texts that come: with a larger one it would
        only wait for longer. None if there is none, or nothing more comes."""
        if not pending.inflow:
            return None
        return self.curve.smallest_at(_AHEAD * pending.inflow, pending.lengths)

    def took(self, size: Size) -> None:
        """A micro-batch of a size that was proposed starts."""
        if size.trial:
            self._tries[size_class(size.tokens)] += 1

    def _next(self, lengths: Mapping[int, int]) -> tuple[int, bool]:
        """(tokens, whether the curve should know more of this size), in a run of texts of these `lengths`."""
        points = self.curve.points
        if not points:
            return self._traits.start_tokens, True
        last = points[-1]
        most = int(_MODEST * self.curve.smallest(_MODEST_LOSS, lengths)) if self._knee else 1 << 62
        wanted = min(self.curve.smallest(self._knee, lengths, beyond=_HORIZON), most)
        if last.tokens < _FULL * self._traits.searched_tokens and not self._settled:
            wanted = most = self._traits.searched_tokens
        if self._settled and (self._traits.side_by_side or not self._much_better(wanted, lengths)):
            return min(wanted, last.tokens), False  # lanes on several cores say nothing about sizes
        if wanted > last.tokens:
            if last.samples < _SURE and not self._steep() and self._may(last.tokens):
                return last.tokens, True
            tokens = min(round(last.tokens * (2 if self._steep() else math.sqrt(2))), most)
            return (tokens, True) if self._may(tokens) else (last.tokens, False)
        if last.samples < _SURE and self._may(last.tokens):
            return last.tokens, True
        half = max(wanted // 2, self._traits.start_tokens)
        below = max((point.tokens for point in points if size_class(point.tokens) < size_class(wanted)), default=0)
        if below < wanted // _FAR and half < wanted and self._may(half):  # what is between was never looked at
            return half, True
        return wanted, False

    def _much_better(self, tokens: int, lengths: Mapping[int, int]) -> bool:
        """Whether more tokens than were ever measured promise so much that a search that had ended is worth opening again."""
        last = self.curve.points[-1].tokens
        if tokens <= last:
            return False
        return self.curve.run_seconds(last, lengths) > (1 + _AGAIN) * self.curve.run_seconds(tokens, lengths)

    def _steep(self) -> bool:
        """Whether launching, or whatever else each micro-batch costs, is clearly the limit at the largest size measured."""
        points = self.curve.points
        if not points:
            return True
        if len(points) < 2:
            return points[-1].seconds < _STEEP * self.curve.host_seconds or not self.curve.host_seconds
        step = math.log(points[-1].tokens / points[-2].tokens) / math.log(2)
        return points[-1].rate / points[-2].rate > math.pow(_STEEP, step)

    def _may(self, tokens: int) -> bool:
        """False if it was tried in vain: texts that are longer, or a cap on rows, do not fill it."""
        return self._tries[size_class(tokens)] < _TRIES and tokens <= (self._most or tokens)

    def _known(self) -> int:
        points = self.curve.points
        return points[-1].tokens if points else self._traits.start_tokens

    def _too_many(self, tokens: int, pending: Pending) -> bool:
        lone = self._traits.lone_trials
        return pending.trying and lone is not None and tokens > lone

    def _shared(self, size: int, pending: Pending) -> int:
        """The end of a run in equal parts: side by side no lane shall stand idle, in turns no small rest be launched alone."""
        if self._traits.side_by_side:
            return min(size, max(-(-pending.tokens // self.lanes[0]), _LEAST_SHARE))
        if pending.coming or pending.tokens >= 4 * size:
            return size
        if pending.tokens <= _SMALL * self._traits.start_tokens:
            return pending.tokens  # questions: two launches take twice as long as one
        return -(-pending.tokens // max(-(-pending.tokens // size), 1))

    def _capped(self, tokens: int, trial: bool = False) -> Size:
        return Size(max(tokens if self._most is None else min(tokens, self._most), 1), trial)

    # how many side by side

    @property
    def lanes(self) -> tuple[int, int | None]:
        """(micro-batches in flight, cores of each). Taking turns: two, None. Side by side: one core each during the search,
        whose own processor time tells their speed whatever else is running; then what :class:`LaneChoice` says."""
        if not self._traits.side_by_side:
            return 2, None
        return self.lane_choice.current() if self._settled else (self._traits.cores, 1)

    def observe_lanes(self, work: float, seconds: float, starved_seconds: float) -> bool:
        """Tell what all lanes together did; see :meth:`LaneChoice.record`. Returns whether a choice worth keeping was made."""
        if self.lane_choice.done or not self._settled:
            return False
        self.lane_choice.record(work, seconds, starved_seconds)
        return self.lane_choice.done and self.lane_choice.steady
