"""Means over seeds and how sure they are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """Mean of `values` and the percentile interval of 10,000 resamples, drawn with a fixed seed.

    A single value, or equal ones, are their own interval.
    """
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if np.ptp(array) == 0:
        return Interval(mean, mean, mean)
    result = stats.bootstrap(
        (array,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    )
    low, high = result.confidence_interval
    return Interval(mean, float(low), float(high))
