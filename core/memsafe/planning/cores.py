"""How many micro-batches run side by side on a CPU, each on its share of the cores: found by measuring real work."""

from __future__ import annotations

__all__ = ["LaneChoice"]

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


class LaneChoice:
    """How many micro-batches run side by side, each on its share of the cores; found by tokens/s.

    Candidates are (lanes, threads per lane) with ``lanes * threads == num_cores``: N x 1, as during the search for a size and mostly
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
