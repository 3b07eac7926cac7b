"""Fitting a handful of coefficients that cannot be negative to noisy measurements and a prior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

__all__ = ["FloatArray", "fit", "non_negative_least_squares"]

FloatArray = NDArray[np.float64]

_NOISE = 0.005
"""Expected relative scatter of a measurement, worth `_NOISE_WEIGHT` observations when the scatter is estimated."""
_NOISE_WEIGHT = 4
_EXACT = 2e-5
"""Relative residuals below this are rounding: the observations have no noise."""


def fit(
    x: FloatArray, y: FloatArray, mean: FloatArray, deviation: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Most probable coefficients >= 0, shape (k,), their covariance, (k, k), and the relative residuals, (n,).

    x: features, shape (n, k); y: measurements > 0, shape (n,). mean, deviation: normal prior of the coefficients,
    shape (k,), deviations > 0. A residual is ``measured / predicted - 1``: 1 % counts the same at every size. Where
    more is measured than there are coefficients and all of it is met exactly, the prior has no influence.
    """
    rows = x / y[:, None] * deviation  # columns scaled by the prior's deviations: well-conditioned, unit-free
    start = mean / deviation

    def solve(noise: float) -> tuple[FloatArray, FloatArray, FloatArray, int]:
        matrix = np.vstack([rows / noise, np.eye(len(mean))])
        z = non_negative_least_squares(matrix, np.concatenate([np.full(len(y), 1 / noise), start]))
        return z, matrix, 1 / np.maximum(rows @ z, 1e-9) - 1, int(np.count_nonzero(z))

    noise = _NOISE
    z, matrix, residuals, active = solve(1e-6)
    if len(y) <= active or float(np.max(np.abs(residuals))) > _EXACT:
        freedom = max(len(y) - active, 0)
        noise = math.sqrt((_NOISE_WEIGHT * _NOISE**2 + float(residuals @ residuals)) / (_NOISE_WEIGHT + freedom))
        z, matrix, residuals, active = solve(noise)
    covariance: FloatArray = np.linalg.inv(matrix.T @ matrix) * deviation[:, None] * deviation[None, :]
    return z * deviation, covariance, residuals


def non_negative_least_squares(a: FloatArray, b: FloatArray) -> FloatArray:
    """Minimise ``|a @ z - b|`` over z >= 0, shape (k,), k small: the best of all active sets, largest first."""
    q, r = np.linalg.qr(a)
    d = q.T @ b
    best, best_loss = np.zeros(a.shape[1]), math.inf
    for active in _subsets(a.shape[1]):
        z = np.zeros(a.shape[1])
        if active:
            z[active] = np.linalg.lstsq(r[:, active], d, rcond=None)[0]
        if np.all(z >= 0):
            loss = float(np.sum((r @ z - d) ** 2))
            if loss < best_loss:
                best, best_loss = z, loss
            if len(active) == a.shape[1]:
                break  # the unconstrained optimum is allowed
    return best


def _subsets(count: int) -> Iterator[list[int]]:
    for size in range(count, -1, -1):
        for active in combinations(range(count), size):
            yield list(active)
