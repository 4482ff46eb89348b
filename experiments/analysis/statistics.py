"""Means over seeds and their intervals.

Every interval aims at a coverage of 95 %. docs/report.md has the measured coverage.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

METHOD = "95 % t interval"  # name of `mean_interval` in headers
FEW_SEEDS = 5  # with fewer, tables and reports warn
BOOTSTRAP_SEEDS = 10  # with fewer, the bootstrap covers too little and is not given
_RESAMPLES = 10_000


class Interval(NamedTuple):
    """An estimate and its 95 % interval; `low` and `high` are NaN where there is none."""

    mean: float
    low: float
    high: float


_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def mean_interval(values: ArrayLike) -> Interval:
    r"""The mean of `values` and Student's t interval.

    .. math:: \bar x \pm t_{0.975, n - 1} \, s / \sqrt n

    It is exact for normal values and every n. For a comparison that is paired by seed, pass the
    differences.

    Args:
      values: One value per seed, [n].

    Returns:
      The interval. A single value has a mean but no interval, equal values have an interval of
      width 0, and everything is NaN unless all values are finite.
    """
    return mean_over_tasks([values])


def mean_over_tasks(tasks: Sequence[ArrayLike]) -> Interval:
    r"""The mean over tasks of the mean over seeds, and Welch's t interval.

    .. math:: \frac1T \sum_t \bar x_t \pm t_{0.975, \nu} \, \frac1T \sqrt{\textstyle\sum_t v_t},
              \qquad v_t = s_t^2 / n_t, \quad
              \nu = \frac{(\sum_t v_t)^2}{\sum_t v_t^2 / (n_t - 1)}

    with the degrees of freedom of Welch and Satterthwaite.

    Args:
      tasks: Values of the seeds by task: `tasks[t][i]` is that of seed i in task t.

    Returns:
      The interval, with the special cases of `mean_interval`.
    """
    arrays = [np.asarray(task, np.float64) for task in tasks]
    if not all(np.isfinite(array).all() for array in arrays):
        return _UNKNOWN
    mean = float(np.mean([array.mean() for array in arrays]))
    if min(map(len, arrays)) == 1:
        return Interval(mean, math.nan, math.nan)
    variances = np.array([array.var(ddof=1) / len(array) for array in arrays])
    if not variances.any():
        return Interval(mean, mean, mean)
    share = variances / variances.sum()  # in this form small variances do not underflow
    freedom = 1 / np.sum(share**2 / (np.array([len(array) for array in arrays]) - 1))
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variances.sum()) / len(arrays))
    return Interval(mean, mean - half, mean + half)


def mean_entry(seeds: Sequence[float]) -> dict[str, float | list[float]]:
    """`mean_interval` and the values of all seeds, as an entry of summary.json."""
    return {**mean_interval(seeds)._asdict(), "seeds": list(seeds)}


def mean_cell(seeds: Sequence[float], *, factor: float = 1, digits: int = 1) -> str:
    """`mean_interval` as a cell of a table, in two lines; values are multiplied by `factor`.

    One seed has no interval, and its value stands alone.
    """
    mean, low, high = (f"{factor * value:.{digits}f}" for value in mean_interval(seeds))
    return mean if len(seeds) == 1 else f"{mean}\n{low} to {high}"


def seeds_label(num_seeds: int) -> str:
    """The number of seeds in words for a header, with a warning if it is small."""
    if num_seeds == 1:
        return "1 seed, which gives no interval"
    warning = f" (fewer than {FEW_SEEDS}: read with care)" if num_seeds < FEW_SEEDS else ""
    return f"{num_seeds} seeds{warning}"


def share_interval(share: float, total: int) -> Interval:
    """A share of `total` independent cases and its Wilson score interval."""
    found = stats.binomtest(round(share * total), total).proportion_ci(method="wilson")
    return Interval(share, float(found.low), float(found.high))


# Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice,
# arXiv:2108.13264. The formulas are those of the authors' rliable 1.2.0, whose numbers the tests
# compare with. The package itself needs arch < 8, which does not work with pandas 3.


def interquartile_mean(tasks: Sequence[ArrayLike], *, min_seeds: int = BOOTSTRAP_SEEDS) -> Interval:
    """The mean of the middle half of all values: a quarter, rounded down, is trimmed at each end.

    `tasks[t]` holds the values of the seeds in task t. The interval comes from 10,000 bootstrap
    resamples, drawn within each task with a fixed seed. It is NaN if a task has fewer than
    `min_seeds` seeds, and so is everything unless all values are finite.
    """
    arrays = [np.asarray(task, np.float64) for task in tasks]
    if not all(np.isfinite(array).all() for array in arrays):
        return _UNKNOWN
    middle = float(stats.trim_mean(np.concatenate(arrays), 0.25))
    if min(map(len, arrays)) < min_seeds:
        return Interval(middle, math.nan, math.nan)
    rng = np.random.default_rng(0)
    draws = np.concatenate([rng.choice(a, (_RESAMPLES, len(a))) for a in arrays], axis=1)
    return _bootstrap(middle, stats.trim_mean(draws, 0.25, axis=1))


def probability_of_improvement(
    tasks: Sequence[tuple[ArrayLike, ArrayLike]], *, min_seeds: int = BOOTSTRAP_SEEDS
) -> Interval:
    """The probability that a seed of X exceeds one of Y in the same task, ties counted as half.

    `tasks[t]` holds the values of X and of Y in task t; the result is the mean over tasks. For the
    bootstrap interval X and Y are resampled independently; it is NaN unless every task has
    `min_seeds` seeds of both. Everything is NaN if a value is NaN.
    """
    rng = np.random.default_rng(0)
    means, draws, num_seeds = [], [], []
    for pair in tasks:
        x, y = (np.asarray(values, np.float64) for values in pair)
        if np.isnan(x).any() or np.isnan(y).any():
            return _UNKNOWN
        num_seeds += [len(x), len(y)]
        wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        # Counts of every seed in every resample: with `wins` they give the resampled probability.
        x_draws, y_draws = (
            rng.multinomial(len(a), np.full(len(a), 1 / len(a)), _RESAMPLES) for a in (x, y)
        )
        means.append(wins.mean())
        draws.append(np.einsum("rx,xy,ry->r", x_draws, wins, y_draws, optimize=True) / wins.size)
    if min(num_seeds) < min_seeds:
        return Interval(float(np.mean(means)), math.nan, math.nan)
    return _bootstrap(float(np.mean(means)), np.mean(draws, axis=0))


def _bootstrap(estimate: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(estimate, float(low), float(high))
