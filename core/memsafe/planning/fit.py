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
_EXACT = 1e-4
"""Relative residuals below this are rounding: the observations have no noise."""
_SPARE = 2
"""Observations that an exact law of more than one coefficient must meet beyond their number, where others were left out;
else one is enough: that it agrees to :data:`_EXACT` is no chance."""
_LEAST_SIZE = 1e-13
"""Singular values of columns of length 1 are not known below this."""
_APART = 2
"""So many measurements may lie above an exact law: another step of the forward needed more there."""
_SEARCHED = 6
"""Up to so many measurements every choice is tried: the CPU takes no more than five of live bytes."""


def fit(
    x: FloatArray, y: FloatArray, mean: FloatArray, deviation: FloatArray, *, least_noise: float = 0.0
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Most probable coefficients >= 0, shape (k,), their covariance, (k, k), and the relative residuals, (n,).

    x: features, shape (n, k); y: measurements > 0, shape (n,). mean, deviation: normal prior of the coefficients,
    shape (k,), deviations > 0. A residual is ``measured / predicted - 1``: 1 % counts the same at every size. Tensors
    obey exact laws, often of fewer features than there are: where one smallest set of features meets the measurements
    exactly, with one to spare, it is taken as it is, and the prior has no influence. A minority may lie above such a law
    and shows in the residuals only. least_noise: the relative scatter that measurements are known to have; above 0 no law is
    looked for that they meet exactly.
    """
    rows = x / y[:, None] * deviation  # columns scaled by the prior's deviations: well-conditioned, unit-free
    start = mean / deviation

    def residuals_of(z: FloatArray) -> FloatArray:
        return 1 / np.maximum(rows @ z, 1e-9) - 1

    exact, certain = _law(rows) if not least_noise else (None, True)
    for few in range(1, min(_APART, (len(y) - 1) // 2) + 1):
        if not certain:
            exact, certain = _law_below(rows, few)
    if exact is not None:
        z, noise = exact, _EXACT
    else:
        z = _solve(rows, start, _EXACT)
        residuals, active = residuals_of(z), int(np.count_nonzero(z))
        noise = max(_EXACT, least_noise)
        if len(y) <= active or float(np.max(np.abs(residuals))) > _EXACT:
            freedom = max(len(y) - active, 0)
            scatter = math.sqrt((_NOISE_WEIGHT * _NOISE**2 + float(residuals @ residuals)) / (_NOISE_WEIGHT + freedom))
            noise = max(scatter, least_noise)
            z = _solve(rows, start, noise)
    half = _inverse_root(np.vstack([rows / noise, np.eye(len(mean))])) * deviation
    return z * deviation, half.T @ half, residuals_of(z)


def _solve(rows: FloatArray, start: FloatArray, noise: float) -> FloatArray:
    """The most probable z >= 0 given ``rows @ z == 1`` up to `noise`, and a prior of unit deviation around `start`."""
    matrix = np.vstack([rows / noise, np.eye(len(start))])
    return non_negative_least_squares(matrix, np.concatenate([np.full(len(rows), 1 / noise), start]))


def _inverse_root(matrix: FloatArray) -> FloatArray:
    """A root of the inverse of ``matrix.T @ matrix``, whose product has rounding errors as large as what the prior's rows in
    `matrix` say, or larger. Since it holds those rows, no variance is above 1."""
    norms = np.linalg.norm(matrix, axis=0)
    _, sizes, vectors = np.linalg.svd(matrix / norms, full_matrices=False)
    half = vectors / np.maximum(sizes, _LEAST_SIZE)[:, None] / norms
    bounded: FloatArray = half / np.maximum(np.linalg.norm(half, axis=0), 1.0)
    return bounded


def _law(rows: FloatArray, spare: int = 1) -> tuple[FloatArray | None, bool]:
    """Coefficients z >= 0, shape (k,), with ``rows @ z == 1`` but for rounding, of the smallest set of features that has
    such, and whether there is such a set at all. No coefficients if several sets of that size do about as well."""
    count, k = rows.shape
    for size in range(1, k + 1):
        if count - size < min(size, spare):
            break
        found = list[tuple[float, list[float]]]()
        for active in combinations(range(k), size):
            z = np.zeros(k)
            z[list(active)] = np.linalg.lstsq(rows[:, active], np.ones(count), rcond=None)[0]
            error = float(np.max(np.abs(rows @ z - 1)))
            if np.all(z >= 0) and error <= _EXACT:
                found.append((error, list(z)))
        if found:
            found.sort()
            clear = len(found) == 1 or 10 * max(found[0][0], 1e-9) < found[1][0]
            return np.array(found[0][1]) if clear else None, True
    return None, False


def _law_below(rows: FloatArray, few: int) -> tuple[FloatArray | None, bool]:
    """As :func:`_law`, but `few` measurements may lie above it: where there are few they are searched for, among many
    those that need most per the first features' sum are left out."""
    count = len(rows)
    most = [tuple(np.argsort(rows.sum(axis=1))[:few])]
    for above in combinations(range(count), few) if count <= _SEARCHED else most:
        z, certain = _law(np.delete(rows, above, axis=0), _SPARE)
        if z is not None and float(np.max(rows @ z)) <= 1 + 2 * _EXACT:
            return z, certain
    return None, False


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
