"""Means over seeds and how sure they are."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

_RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def bootstrap_mean(values: ArrayLike) -> Interval:
    """Mean of `values` and the percentile interval of 10,000 resamples, drawn with a fixed seed.

    A single value, or equal ones, are their own interval. NaN where a value is not finite.
    """
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        return _UNKNOWN
    mean = float(array.mean())
    if np.ptp(array) == 0:
        return Interval(mean, mean, mean)
    result = stats.bootstrap(
        (array,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    low, high = result.confidence_interval
    return Interval(mean, float(low), float(high))


# Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice,
# arXiv:2108.13264. Same formulas as the authors' rliable 1.2.0, whose numbers the tests compare;
# the package itself needs arch < 8, which does not work with pandas 3.


def interquartile_mean(tasks: Sequence[ArrayLike]) -> Interval:
    """The mean of the middle half of all values: a quarter is cut off at either end, rounded down.

    `tasks[t]` holds the values of the seeds in task t. Seeds are resampled within each task.
    NaN where a value is not finite.
    """
    arrays = [np.asarray(task, np.float64) for task in tasks]
    if not all(np.isfinite(array).all() for array in arrays):
        return _UNKNOWN
    rng = np.random.default_rng(0)
    draws = np.concatenate([rng.choice(a, (_RESAMPLES, len(a))) for a in arrays], axis=1)
    return _interval(
        stats.trim_mean(np.concatenate(arrays), 0.25), stats.trim_mean(draws, 0.25, axis=1)
    )


def probability_of_improvement(
    tasks: Sequence[tuple[ArrayLike, ArrayLike]],
) -> Interval:
    """The probability that a seed of X exceeds one of Y in the same task, ties counted as half.

    `tasks[t]` holds the values of X and of Y in task t; the result is the mean over tasks. X and Y
    are resampled independently. NaN where a value is NaN.
    """
    rng = np.random.default_rng(0)
    means, draws = [], []
    for pair in tasks:
        x, y = (np.asarray(values, np.float64) for values in pair)
        if np.isnan(x).any() or np.isnan(y).any():
            return _UNKNOWN
        wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        # How often each seed is drawn.
        x_draws, y_draws = (
            rng.multinomial(len(a), np.full(len(a), 1 / len(a)), _RESAMPLES) for a in (x, y)
        )
        means.append(wins.mean())
        draws.append(np.einsum("rx,xy,ry->r", x_draws, wins, y_draws, optimize=True) / wins.size)
    return _interval(np.mean(means), np.mean(draws, axis=0))


def _interval(mean: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(float(mean), float(low), float(high))
