"""What the memory of a micro-batch will be: a prior from the architecture, corrected by measured peaks.

Live tensor bytes of one forward beyond the weights are ``c0 + c1*tokens + c2*sequences + c3*squares``, all c >= 0.
The coefficients are the most probable ones given the observations and the prior (a normal density around the
architecture's formula, cut off at zero), which is a non-negative least squares problem in four unknowns: where
observations say nothing, for example because all had the same shape, the prior decides; where they speak, they win.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from memsafe.planning.batch import BatchShape
from memsafe.planning.fit import FloatArray, fit
from memsafe.planning.prior import CostPrior
from memsafe.planning.speed import SpeedCurve

__all__ = ["SCHEMA", "CostKey", "CostModel", "CostPrior"]

SCHEMA = 3
"""Version of the JSON form; other versions are not read."""

PROBES = 5
"""Measured shapes, well apart in tokens, after which a model's cost counts as known."""
ENOUGH_PROBES = 4
"""Fewer than this are worth measurements for their own sake."""

UNCALIBRATED_MARGIN = 0.5
"""The first bound is 1.5 times the prior: its formula was within 1 % of BERT and GTE, but kernels and heads differ."""
LEAST_MARGIN = 0.01
"""Bounds are at least 1 % above predictions: live bytes of random shapes scattered by 0.3 % around a fit."""
ROUNDING_BYTES = 4096
"""Allocators round each tensor up (512 bytes on CUDA, a few tensors of constant number live at the peak)."""
RESIDENT_FACTOR = 1.25
"""Resident over live bytes until it was observed; rounding to whole segments is covered by the policy's reserve."""
RESIDENT_MARGIN = 0.02
EXACT_BYTES = 16 << 20
"""Resident beyond live bytes where freed tensors leave the process at once, until it was observed: threads, and the
workspaces of kernels, that the first forward makes and keeps. 15 MB were seen."""

_APART = 1.6
"""Sizes count as well apart from this factor on: a doubled micro-batch is seldom filled to the last token."""
_MAX_OBSERVATIONS = 64
_DOUBT = 0.05
"""When residuals stay above this, the prior is wrong for the model; its deviations are then widened a hundredfold."""
_PROCESS_SCATTER = 0.15
"""Of measurements of a whole process, with :attr:`CostModel.noise_bytes` added to what is measured and what is predicted."""
_REFUTED = 1.6
"""A newer measurement of about the same shape refutes an older one that was larger per token by more than this: other
work in the process was counted in, and would inflate the margin for long. Alignment explains up to 1.5."""
_LEAST_DEVIATION = 1e-9
"""Bytes; half of the least number that is not 0 would be 0."""
_SETTLED = 16
_REFIT_EVERY = 8
_LARGEST = 1 << 62
"""No bytes, tokens or margins that are read back reach this."""
_FORGET = 0.98
"""Per observation: how slowly a margin decays whose observation was replaced by a newer one of its shape."""


@dataclass(frozen=True)
class CostKey:
    """What a learnt cost is valid for. All strings; `layout` is ``"packed"`` or ``"padded"``, `versions` those of the software
    whose kernels were measured."""

    model: str
    revision: str
    dtype: str
    attention: str
    layout: str
    device: str
    versions: str

    def digest(self) -> str:
        """A short file name: 32 hexadecimal digits of SHA-256."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Observation:
    shape: BatchShape
    live_bytes: int | None
    resident_bytes: int | None


class CostModel:
    """Predicts the peak bytes of a micro-batch, learns from measured peaks. Not thread-safe: its owner holds a lock."""

    def __init__(self, key: CostKey, prior: CostPrior) -> None:
        self.key = key
        self.prior = prior
        self.speed = SpeedCurve()
        """How long micro-batches take. Kept with the costs; learnt from and asked elsewhere."""
        self.lanes: int | None = None
        """How many micro-batches side by side were fastest; None until found."""
        self.exact_heap = False
        """Whether freed tensors leave the process at once, so that resident bytes follow live bytes. Not kept."""
        self.least_share = 0.0
        """Resident slack, as a share of live bytes, that is expected at least where the heap is not exact: measurements
        see little of it while the heap still has room from before. Not kept."""
        self.workspace_bytes = 0
        """What a kernel may hold at its own peak beside all that grows with tokens. Not kept."""
        self.noise_bytes = 0
        """By about how much measurements are off whatever their size, where they are of a whole process: a deviation of so many
        bytes is none worth a margin for large micro-batches. Not kept."""
        self._exact_bytes = EXACT_BYTES
        self._observations: list[_Observation] = []
        self._rungs: list[int] = []
        self._worst = 0.0  # largest relative residual seen, slowly forgotten once its observation is replaced
        self._stale = True
        self._unread = 0  # measurements since the last fit
        self._c = (0.0, 0.0, 0.0, 0.0)
        self._covariance: list[float] = []
        self._slack = (RESIDENT_FACTOR - 1, 0.0)

    # ---------------------------------------------------------------- asking

    @property
    def num_observations(self) -> int:
        """Measurements kept (at most 64); of a shape seen again only the newest is."""
        return len(self._observations)

    @property
    def calibrated(self) -> bool:
        """Whether measured live peaks, three over a factor of four in tokens or five of any, back the prediction."""
        tokens = [o.shape.tokens for o in self._observations if o.live_bytes is not None]
        return len(tokens) >= PROBES or (len(tokens) >= 3 and max(tokens) >= 4 * min(tokens))

    @property
    def relative_error(self) -> float:
        """The largest relative residual seen; the prior's margin, 0.5, before any measurement."""
        self._refresh()
        return self._worst if any(o.live_bytes is not None for o in self._observations) else UNCALIBRATED_MARGIN

    def predict(self, shape: BatchShape) -> int:
        """Live tensor bytes beyond the weights: the expectation."""
        self._refresh()
        return int(self._predict(shape))

    def upper_bound(self, shape: BatchShape) -> int:
        """Live tensor bytes beyond the weights: what a micro-batch should not pass."""
        self._refresh()
        return int(self._upper(shape))

    def resident_bound(self, shape: BatchShape) -> int:
        """Bytes by which the process may grow: :meth:`upper_bound` and the slack of heap or caching allocator."""
        self._refresh()
        upper = self._upper(shape)
        if self.exact_heap:
            return int(upper * (1 + RESIDENT_MARGIN)) + self._exact_bytes
        share, fixed = self._slack
        return int(upper * (1 + max(share, self.least_share)) + fixed) + 1

    def max_tokens_for(self, budget_bytes: int, mean_len: float, *, ceiling: int = 1 << 24) -> int:
        """The most tokens, in sequences of `mean_len` tokens, whose resident bound is within the budget; 0 if none."""
        length = max(mean_len, 1.0)

        def fits(tokens: int) -> bool:
            sequences = max(round(tokens / length), 1)
            shape = BatchShape(tokens, sequences, round(tokens * min(length, tokens)), math.ceil(length))
            return self.resident_bound(shape) <= budget_bytes

        low, high = 0, ceiling + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def token_ceiling(self, budget_bytes: int) -> int:
        """No micro-batch with more tokens than this has a resident bound within the budget; quick, not tight."""
        self._refresh()
        slack = RESIDENT_MARGIN if self.exact_heap else max(self._slack[0], self.least_share)
        per_token = self._c[1] * (1 + LEAST_MARGIN) * (1 + slack)
        return int(budget_bytes / per_token) + 1 if per_token > 0 else 1 << 62

    def needs_probe(self, tokens: int) -> bool:
        """Whether so many tokens are worth measuring: fewer than five sizes were, and none near it."""
        return len(self._rungs) < PROBES and all(
            _APART * tokens <= rung or tokens >= _APART * rung for rung in self._rungs
        )

    def wanted_probe(self, least_tokens: int) -> int | None:
        """A size worth a measurement of its own: `least_tokens`, or else twice the largest measured; None once
        measurements are enough to tell a law of two features from chance."""
        if len(self._rungs) >= ENOUGH_PROBES:
            return None
        sizes = (least_tokens, 2 * max(self._rungs, default=least_tokens))
        return next((size for size in sizes if self.needs_probe(size)), None)

    # -------------------------------------------------------------- learning

    def expect(self, prior: CostPrior) -> None:
        """Take `prior` for the formula from now on: one that was kept with measurements may be older than today's. The
        measurements stay, the margins that they left under the old formula do not."""
        if prior != self.prior:
            self.prior, self._worst, self._stale = prior, 0.0, True

    def observe(self, shape: BatchShape, live_bytes: int | None, resident_bytes: int | None = None) -> None:
        """Learn one measured peak beyond the weights; None for what was not measured.

        live_bytes: peak of tensors. resident_bytes: by how much the process (resident set, or bytes reserved by the
        caching allocator) grew at most; less than `live_bytes` where memory was reused.
        """
        # Nothing seen to be allocated is no measurement; plain ints, since what callers measure with may be numpy's.
        live_bytes = int(live_bytes) if live_bytes and live_bytes > 0 else None
        resident_bytes = None if resident_bytes is None else max(int(resident_bytes), 0)
        if self.exact_heap and resident_bytes is not None:
            excess = resident_bytes - int(self._upper(shape) * (1 + RESIDENT_MARGIN))
            self._exact_bytes = max(excess, int(self._exact_bytes * _FORGET), EXACT_BYTES // 4)
            resident_bytes = None  # says nothing about the other heap
        if (live_bytes is None and resident_bytes is None) or shape.tokens < 1 or shape.sequences < 1:
            return
        shape = BatchShape(int(shape.tokens), int(shape.sequences), int(shape.squares), int(shape.longest))
        if live_bytes is not None and self.needs_probe(shape.tokens):
            self._rungs.append(shape.tokens)
        self._keep(_Observation(shape, live_bytes, resident_bytes))
        self._unread += 1
        if self._stale:
            return
        # The margin must follow a surprise at once, but never what was merely unknown before the first measurements.
        predicted = max(self._predict(shape), 1.0)
        noise = self.noise_bytes
        error = 0.0 if live_bytes is None else (live_bytes + noise) / (predicted + noise) - 1
        if self.calibrated:
            self._worst = max(self._worst * _FORGET, error)
        resident_limit = predicted * (1 + self._slack[0]) + self._slack[1]
        expected = abs(error) <= max(self._worst, LEAST_MARGIN) and (resident_bytes or 0) <= resident_limit
        # Once much is known, fitting again (half a millisecond) for each measurement as expected would be waste.
        self._stale = not (expected and self.num_observations >= _SETTLED and self._unread < _REFIT_EVERY)

    def _keep(self, new: _Observation) -> None:
        """Store `new`; drop what it refutes, or when full the observation of the nearest shape."""
        if new.live_bytes is not None:
            bound = new.live_bytes / new.shape.tokens * _REFUTED
            kept = [
                o
                for o in self._observations
                if o.live_bytes is None or o.live_bytes <= bound * o.shape.tokens or _distance(o.shape, new.shape) > 0.5
            ]
            if len(kept) < len(self._observations):
                self._observations, self._worst, self._stale = kept, 0.0, True
        if len(self._observations) < _MAX_OBSERVATIONS:
            self._observations.append(new)
        else:
            distances = [_distance(o.shape, new.shape) for o in self._observations]
            self._observations[distances.index(min(distances))] = new

    # --------------------------------------------------------------- fitting

    def _predict(self, shape: BatchShape) -> float:
        c = self._c
        known = self.prior.per_position_bytes * shape.longest
        learnt = known + c[0] + c[1] * shape.tokens + c[2] * shape.sequences + c[3] * shape.squares
        return max(learnt, self.prior.attention_bytes(shape), self.prior.head_bytes(shape))

    def _upper(self, shape: BatchShape) -> float:
        predicted = self._predict(shape)
        t, n, q = shape.tokens, shape.sequences, shape.squares
        (v00, v01, v02, v03, v11, v12, v13, v22, v23, v33) = self._covariance  # unrolled: asked for every candidate
        variance = v00 + t * (v01 + v11 * t) + n * (v02 + v12 * t + v22 * n) + q * (v03 + v13 * t + v23 * n + v33 * q)
        # Two standard deviations of what the observations leave open; large for shapes unlike any observed.
        doubt = min(2 * math.sqrt(max(variance, 0.0)), UNCALIBRATED_MARGIN * predicted)
        margin = (predicted + self.noise_bytes) * max(self._worst, LEAST_MARGIN)
        return predicted + margin + doubt + ROUNDING_BYTES + self.workspace_bytes

    def _refresh(self) -> None:
        if not self._stale:
            return
        self._stale, self._unread = False, 0
        measured = [(o.shape, o.live_bytes) for o in self._observations if o.live_bytes is not None]
        # What masks or scores explain says nothing about the steps that coefficients are learnt for.
        measured = [(shape, live) for shape, live in measured if not self.prior.explains(shape, live)]
        x = np.array([[1.0, s.tokens, s.sequences, s.squares] for s, _ in measured], dtype=np.float64).reshape(-1, 4)
        known = self.prior.per_position_bytes
        y = np.array([max(live - known * s.longest, 0.1 * live) for s, live in measured], dtype=np.float64)
        mean, deviation = self._prior_density(x, y)
        y, mean[0] = y + self.noise_bytes, mean[0] + self.noise_bytes  # relative errors are of both together
        least_noise = _PROCESS_SCATTER if self.noise_bytes else 0.0
        coefficients, covariance, residuals = fit(x, y, mean, deviation, least_noise=least_noise)
        if len(y) > 4 and float(np.sqrt(np.mean(residuals**2))) > _DOUBT and not least_noise:
            coefficients, covariance, residuals = fit(x, y, mean, 100 * deviation)
        coefficients[0] = max(coefficients[0] - self.noise_bytes, 0.0)
        self._c = (float(coefficients[0]), float(coefficients[1]), float(coefficients[2]), float(coefficients[3]))
        # The ten distinct terms of the quadratic form x'Vx, those off the diagonal doubled.
        self._covariance = [float(covariance[i, j]) * (1 + (i != j)) for i in range(4) for j in range(i, 4)]
        if len(y):
            self._worst = max(self._worst, float(np.max(np.abs(residuals))))
        self._slack = self._fit_slack()

    def _prior_density(self, x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Means and standard deviations of the coefficients before any observation, shape (4,) each."""
        prior = self.prior
        mean = np.array([prior.fixed_bytes, prior.per_token_bytes, prior.per_sequence_bytes, prior.per_square_bytes])
        # The scale of the doubt about one token: half of the formula, or without one what the observations show.
        token = prior.per_token_bytes or (float(np.max(y / x[:, 1])) if len(y) else 1.0)
        deviation = np.array(
            [
                prior.fixed_bytes + 256 * token,  # workspaces: about as much as a small micro-batch
                0.5 * token,
                prior.per_sequence_bytes + token,
                # A few hundredths of a whole mask where none is expected, for a kernel that makes one after all.
                0.25 * prior.per_square_bytes + 3e-6 * token,
            ]
        )
        return mean, np.maximum(deviation, _LEAST_DEVIATION)

    def _fit_slack(self) -> tuple[float, float]:
        """The tightest (share, fixed) with ``resident <= predicted*(1 + share) + fixed`` for all observations."""
        seen = [(self._predict(o.shape), o.resident_bytes) for o in self._observations if o.resident_bytes is not None]
        if not seen:
            return RESIDENT_FACTOR - 1, 0.0
        predicted = np.maximum(np.array([p for p, _ in seen]), 1.0)
        slack = np.array([r for _, r in seen], dtype=np.float64) - predicted
        share = slack / predicted
        if len(seen) >= 8 and np.max(share) > 1 + 2 * max(np.partition(share, -2)[-2], 0.0):
            # One measurement far off all others: something else in the process grew meanwhile.
            predicted, slack = np.delete(predicted, np.argmax(share)), np.delete(slack, np.argmax(share))
        shares = np.linspace(0.0, max(float(np.max(slack / predicted)), 0.0), 33)
        fixed = np.maximum(np.max(slack[None, :] - shares[:, None] * predicted[None, :], axis=1), 0.0)
        best = int(np.argmin(shares * len(slack) + fixed * np.sum(1 / predicted)))  # least total relative slack
        return float(shares[best]) + RESIDENT_MARGIN, float(fixed[best])

    # ------------------------------------------------------------- persisting

    def to_json(self) -> str:
        """Everything learnt, with its key, as JSON of version :data:`SCHEMA`."""
        observations = [
            [o.shape.tokens, o.shape.sequences, o.shape.squares, o.shape.longest, o.live_bytes, o.resident_bytes]
            for o in self._observations
        ]
        state = {
            "schema": SCHEMA,
            "key": asdict(self.key),
            "prior": asdict(self.prior),
            "observations": observations,
            "probes": self._rungs,
            "worst": self._worst,
            "speed": self.speed.to_json(),
            "lanes": self.lanes,
        }
        return json.dumps(state, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """The model that :meth:`to_json` wrote. Raises ``ValueError`` for anything else."""
        try:
            return cls.from_state(json.loads(text))
        except RecursionError as error:
            raise ValueError("not a cost model: too deeply nested") from error

    @classmethod
    def from_state(cls, state: Any) -> CostModel:
        """The same from the parsed text."""
        try:
            if not isinstance(state, dict) or state.get("schema") != SCHEMA:
                raise ValueError("not a cost model of this version")
            if not all(isinstance(value, str) for value in state["key"].values()):
                raise ValueError("a key that is not text")
            model = cls(CostKey(**state["key"]), CostPrior(**state["prior"]))
            if max(asdict(model.prior).values()) > _LARGEST:
                raise ValueError("a prior out of range")
            for row in state["observations"]:
                *numbers, live, resident = row
                shape = BatchShape(*(_whole(value, least=0 if i == 2 else 1) for i, value in enumerate(numbers)))
                live = None if live is None else _whole(live, least=1)
                resident = None if resident is None else _whole(resident)
                model._observations.append(_Observation(shape, live, resident))
            if len(model._observations) > _MAX_OBSERVATIONS:
                raise ValueError("more observations than are ever kept")
            model._rungs = [_whole(value, least=1) for value in state["probes"]][:PROBES]
            model._worst = float(state["worst"])
            if not 0 <= model._worst < _LARGEST:
                raise ValueError("a margin out of range")
            model.speed = SpeedCurve.from_json(state["speed"])
            lanes = state["lanes"]
            model.lanes = None if lanes is None else _whole(lanes, least=1)
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a cost model: {type(error).__name__}") from error
        return model


def _distance(a: BatchShape, b: BatchShape) -> float:
    """How unlike two shapes are: the sum of the absolute log ratios of tokens, sequences and squares."""
    ratios = ((a.tokens, b.tokens), (a.sequences, b.sequences), (a.squares, b.squares))
    return sum(abs(math.log(max(p, 1) / max(q, 1))) for p, q in ratios)


def _whole(value: Any, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST:
        raise ValueError("a number out of range")
    return value
