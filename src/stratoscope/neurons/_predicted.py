"""What the units of one network tell of those of another: all of them (ridge), or a few (lasso).

Both are fitted on the first half of the samples and judged on the second.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

Samples = Float[np.ndarray, "sample unit"]


def standardised(x: Samples) -> Samples:
    """Mean 0 and deviation 1 along samples; a unit that never changes becomes 0."""
    x = np.asarray(x, dtype=np.float64)
    moved, spread = x - x.mean(axis=0), x.std(axis=0)
    steady = spread <= 1e-9 * np.abs(x).max(axis=0, initial=0.0)
    return np.where(steady, 0.0, moved / np.where(steady, 1.0, spread))


def halves(
    x: Samples,
) -> tuple[Float[np.ndarray, "first unit"], Float[np.ndarray, "second unit"]]:
    """The first and the second half of the samples, both in units of the first one's mean and
    deviation."""
    half = len(x) // 2
    own = np.asarray(x[:half], dtype=np.float64)
    spread = np.where(standardised(own).any(axis=0), own.std(axis=0), 1.0)
    return standardised(own), (x[half:] - own.mean(axis=0)) / spread


def lasso(
    one: Samples, two: Float[np.ndarray, "sample other"], *, penalty: float = 0.1
) -> Float[np.ndarray, "unit other"]:
    """Weights W of the standardised min |one - two W^T|^2 / (2 samples) + penalty |W|_1: mostly
    0."""
    from sklearn.linear_model import Lasso

    # without a seed it would draw from numpy's global generator, though it needs no number of it
    fitted = Lasso(alpha=penalty, fit_intercept=False, max_iter=5000, random_state=0)
    return np.atleast_2d(fitted.fit(standardised(two), standardised(one)).coef_)


def few(
    one: Samples, two: Float[np.ndarray, "sample other"], *, penalty: float = 0.1
) -> tuple[Float[np.ndarray, " unit"], Int[np.ndarray, " unit"]]:
    """Correlation of each unit with its lasso prediction, on the half that was not fitted, and how
    many of the other's units the prediction uses; 0 and 0 where it uses none."""
    (x, later), (y, own) = halves(two), halves(one)
    weights = lasso(y, x, penalty=penalty)
    return _alike(later @ weights.T, own), (weights != 0).sum(axis=1)


def subspace(
    one: Samples, two: Float[np.ndarray, "sample other"], *, ridge: float = 1e-3
) -> Float[np.ndarray, " unit"]:
    """Correlation of each unit with its linear prediction from all of the other's, on the half that
    was not fitted.

    The first half of the samples is fitted, the second judged. ridge: beside unit variance. 0 for a
    constant unit.
    """
    (x, later), (y, own) = halves(two), halves(one)
    gram = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
    return _alike(later @ np.linalg.solve(gram, x.T @ y / len(x)), own)


def _alike(predicted: Samples, own: Samples) -> Float[np.ndarray, " unit"]:
    return (standardised(predicted) * standardised(own)).mean(axis=0)
