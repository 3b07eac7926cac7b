"""How large micro-batches should be, and how many should run side by side: found by measuring real work.

Past a knee larger micro-batches are not faster; on a CPU they get slower, because activations leave the cache. Both
searches here keep the best measurement of each candidate: noise on a shared machine only ever slows.
"""

from __future__ import annotations

import math

__all__ = ["LaneChoice", "Ramp"]

_FILLED = 0.5
"""A micro-batch counts for a size if it holds at least this fraction; inputs that fit into it always fill as much."""


_CLEAR = 1.1
"""Lanes that are so many times as fast as any other need no second measurement: two lanes on two cores were 1.25 to 1.8
times as fast as one."""
_HOPELESS = 0.7
"""A candidate below this share of the best rate is given up after a few micro-batches: its whole window would be lost time."""
_STARVED = 0.1
"""The share of its time that a lane may have waited for a core: 0.01 to 0.02 on a quiet machine with two, 0.54 to 0.58
with two busy processes beside."""
_WINDOWS = 4
"""While others compute, the first candidate is measured so many times at most."""


class Ramp:
    """The size of the next micro-batch while the best one is unknown: doubling, until doubling no longer pays.

    policy_knee: a size counts as better only if it is faster than the best so far by more than this fraction for each
    doubling between the two.
    start_tokens: the first size. ceiling: never beyond this; None for no ceiling (see also :meth:`bound`). Below one and
    a half times the first size it leaves nothing to search: :attr:`done` from the start.
    target_tokens: the result of an earlier ramp, which is then used and not searched again.
    further_until: up to this size, one size further is looked at once two measurements of one were not better, since
    measurements on shared machines are noisy; beyond it the first size that is not better ends the ramp.

    The first micro-batch of all only warms up and does not count.
    """

    def __init__(
        self,
        policy_knee: float,
        start_tokens: int = 256,
        ceiling: int | None = None,
        *,
        target_tokens: int | None = None,
        further_until: float = math.inf,
    ) -> None:
        if not 0 <= policy_knee < math.inf:
            raise ValueError(f"policy_knee: got {policy_knee}; give a finite fraction of at least 0")
        if start_tokens < 1 or (ceiling is not None and ceiling < 1):
            raise ValueError("start_tokens and ceiling must be at least 1")
        self._knee = policy_knee
        self._ceiling = ceiling
        self._further_until = further_until
        self._sizes = [start_tokens if ceiling is None else min(start_tokens, ceiling)]
        self._rates: dict[int, float] = {}  # size -> best rate seen, in tokens (or cost units) per second
        self._samples = 0  # of the current size
        self._warm = False
        self._best: int | None = None
        self._target = target_tokens if target_tokens is None or ceiling is None else min(target_tokens, ceiling)
        self._at_knee = target_tokens is not None
        if self._larger() is None:  # nothing to compare with, so nothing needs to run alone for it
            self.bound()

    @property
    def max_tokens(self) -> int:
        """How many tokens the next micro-batch should hold at most."""
        return self._sizes[-1] if self._target is None else self._target

    @property
    def done(self) -> bool:
        return self._target is not None

    @property
    def target_tokens(self) -> int | None:
        """The best size; None until :attr:`done`."""
        return self._target

    @property
    def best_tokens(self) -> int:
        """The best size so far; the first one if none has been measured."""
        return self._sizes[0] if self._best is None else self._best

    @property
    def at_knee(self) -> bool:
        """Whether larger sizes were seen not to pay, or an earlier ramp saw it; not if a ceiling or :meth:`bound` ended
        the ramp. Only such a target is worth keeping for another day, when more memory may be free."""
        return self._at_knee

    def bound(self) -> None:
        """Nothing larger can be had, for example because the budget cut the last micro-batch: settle for the best."""
        if self._target is None:
            self._target = self._sizes[-1] if self._best is None else self._best

    def record(self, tokens: int, seconds: float, cost_units: float | None = None) -> bool:
        """Tell what a micro-batch took. Returns whether it counts: False if it held less than half of :attr:`max_tokens`
        as asked for, or the ramp is done.

        cost_units: its arithmetic, in any unit, so that micro-batches of different sequence lengths can be
        compared; None: its tokens. Give it always or never.
        """
        if self.done or seconds <= 0 or tokens < _FILLED * self.max_tokens:
            return False
        if not self._warm:
            self._warm = True
            return True
        size = self.max_tokens
        rate = (tokens if cost_units is None else cost_units) / seconds
        self._rates[size] = max(rate, self._rates.get(size, 0.0))
        self._samples += 1
        if self._best is None or rate > self._worthwhile(size):
            self._best = size
            self._grow()
        elif self._samples >= 2:
            # The second size in a row that is not better than the best: enough. (Or the first.)
            if size > self._further_until or (len(self._sizes) > 1 and self._sizes[-2] != self._best):
                self._target, self._at_knee = self._best, True
            else:
                self._grow()
        return True

    def _worthwhile(self, size: int) -> float:
        """The rate from which `size` is better than the best so far: the knee's gain for each doubling in between."""
        best = self._best or size
        return self._rates[best] * math.pow(1 + self._knee, math.log2(size / best))

    def _grow(self) -> None:
        larger = self._larger()
        if larger is None:
            self._target = self._best
        else:
            self._sizes.append(larger)
            self._samples = 0

    def _larger(self) -> int | None:
        """The next size; None where the ceiling is so near that hardly anything new is to be learnt."""
        size = self._sizes[-1]
        larger = 2 * size if self._ceiling is None else min(2 * size, self._ceiling)
        return None if larger < 1.5 * size else larger


class LaneChoice:
    """How many micro-batches run side by side, each on its share of the cores; found by tokens/s.

    Candidates are (lanes, threads per lane) with ``lanes * threads == num_cores``: N x 1, as during the ramp and mostly
    the fastest, ..., 4 x N/4, 2 x N/2, 1 x N. Each is tried for `window_s` seconds of wall clock; the search stops
    early once two in a row are worse, and a candidate that is far behind is given up before its time.
    If the best two are within 10 %, both are measured once more, and the better of each one's two rates counts: noise
    only slows. N x 1, the usual choice, is measured again while other processes take its cores.
    Of candidates within `knee` of the fastest the one with the fewest lanes wins: lanes multiply memory.
    max_lanes: never more lanes than this, for example for memory's sake.
    chosen: the lanes that an earlier search chose; used, and not searched again, if they are a candidate here.
    """

    def __init__(
        self,
        num_cores: int,
        *,
        window_s: float = 0.4,
        knee: float = 0.02,
        max_lanes: int | None = None,
        chosen: int | None = None,
    ) -> None:
        if num_cores < 1:
            raise ValueError(f"num_cores: got {num_cores}; give at least 1")
        most = num_cores if max_lanes is None else max(min(num_cores, max_lanes), 1)
        lanes = [1 << power for power in range(num_cores.bit_length()) if num_cores % (1 << power) == 0]
        if lanes[-1] != num_cores:
            lanes.append(num_cores)
        self.candidates = [(count, num_cores // count) for count in reversed(lanes) if count <= most]
        self._window_s = window_s
        self._knee = knee
        self._position = 0
        self._rates: list[float] = []
        self._again: list[int] | None = None  # positions still to be measured a second time
        self._tokens = 0.0
        self._seconds = 0.0
        self._starved_seconds = 0.0
        self._records = 0
        self._windows = 0
        self._fastest = 0.0  # of this candidate's windows
        self._warm = False
        self.steady = True
        """Whether the choice is worth keeping for another day: not if others were computing all the time."""
        known = [candidate for candidate in self.candidates if candidate[0] == chosen or len(self.candidates) == 1]
        self._choice = known[0] if known else None

    @property
    def done(self) -> bool:
        return self._choice is not None

    @property
    def rates(self) -> dict[tuple[int, int], float]:
        """Tokens (or cost units) per second of the candidates measured so far."""
        return dict(zip(self.candidates, self._rates, strict=False))

    def current(self) -> tuple[int, int]:
        """(lanes, threads per lane) to run with now: the candidate being measured, or the choice once done."""
        return self.candidates[self._position] if self._choice is None else self._choice

    def record(self, tokens: float, seconds: float, starved_seconds: float = 0.0) -> None:
        """Tell that all lanes together finished `tokens` (or cost units) in `seconds` of wall clock, and that the lane which
        did was ready to run and had no core for `starved_seconds`.

        The first record of each candidate only warms up (new threads, memory touched for the first time).
        """
        if self.done or seconds <= 0:
            return
        if not self._warm:
            self._warm = True
            return
        self._tokens += tokens
        self._seconds += seconds
        self._starved_seconds += starved_seconds
        self._records += 1
        lanes, threads = self.candidates[self._position]
        rate = self._tokens / self._seconds
        # As many records as lanes and one: lanes that end together make single intervals meaningless.
        hopeless = self._records > lanes and rate < _HOPELESS * max(self._rates, default=0.0)
        if self._seconds < self._window_s and not hopeless:
            return
        starved = self._starved_seconds / (self._seconds * lanes)
        self._tokens = self._seconds = self._starved_seconds = 0.0
        self._records = 0
        self._fastest = max(rate, self._fastest)
        if threads == 1 and self._again is None:
            self._windows += 1
            self.steady = starved <= _STARVED
            if not self.steady and self._windows < _WINDOWS:
                return
        rate, self._fastest, self._warm = self._fastest, 0.0, False
        if self._again is None:
            self._rates.append(rate)
            ranked = sorted(range(len(self._rates)), key=self._rates.__getitem__, reverse=True)
            if self._position + 1 < len(self.candidates) and self._position - ranked[0] < 2:
                self._position += 1
                return
            first, second = (self._rates[place] for place in ranked[:2])
            self._again = ranked[:2] if second * _CLEAR > first else []
        else:
            self._rates[self._position] = max(rate, self._rates[self._position])
        if self._again:
            self._position = self._again.pop(0)
            return
        enough = max(self._rates) / (1 + self._knee)
        self._choice = min(c for c, rate in zip(self.candidates, self._rates, strict=False) if rate >= enough)
