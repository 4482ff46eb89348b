"""Scores of methods over seeds and tasks: means, paired gains, interquartile means, ranks."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.analysis.collection import Collection
from experiments.analysis.statistics import (
    Interval,
    interquartile_mean,
    mean_interval,
    mean_over_tasks,
    probability_of_improvement,
)
from experiments.runtime.targets import ConfigError


class Score(NamedTuple):
    """Results of a method in one metric.

    Attributes:
      values: Values of all seeds by task, scaled to [0, 1] if there are several tasks.
      mean: Mean over seeds, then over tasks.
      gain: The same mean of the differences from the baseline, paired by seed; None for the
        baseline itself, and if the two have different seeds.
      middle: Interquartile mean over seeds and tasks.
      better: Probability that a seed is above one of the baseline (below, if less is better); None
        for the baseline itself, and if the baseline lacks the metric.
    """

    values: list[list[float]]
    mean: Interval
    gain: Interval | None
    middle: Interval
    better: Interval | None


def score(collection: Collection, metric: str, baseline: str, *, lower: bool) -> dict[str, Score]:
    """The scores of all methods that have the metric in every task.

    With several tasks the values of each task are scaled to [0, 1], from the lowest of all methods
    and seeds to the highest. `lower` says that less is better.
    """
    having = collection.having(metric)
    keys = {
        method: [[s.key for s in seeds if s.task == task] for task in collection.tasks]
        for method, seeds in having.items()
    }
    values = {
        method: [
            np.array([s.last(metric) for s in seeds if s.task == task]) for task in collection.tasks
        ]
        for method, seeds in having.items()
    }
    if len(collection.tasks) > 1:
        for index in range(len(collection.tasks)):
            every = np.concatenate([of_tasks[index] for of_tasks in values.values()])
            low, extent = every.min(), np.ptp(every)
            for of_tasks in values.values():
                of_tasks[index] = (of_tasks[index] - low) / (extent or 1.0)
    sign = -1 if lower else 1
    scores = {}
    for method, of_tasks in values.items():
        better = gain = None
        if method != baseline and baseline in values:
            pairs = list(zip(of_tasks, values[baseline], strict=True))
            better = probability_of_improvement([(sign * x, sign * y) for x, y in pairs])
            if keys[method] == keys[baseline]:
                gain = mean_over_tasks([x - y for x, y in pairs])
        scores[method] = Score(
            [x.tolist() for x in of_tasks], mean_over_tasks(of_tasks), gain,
            interquartile_mean(of_tasks), better,
        )  # fmt: skip
    return scores


def rank_correlation(collection: Collection, first: str, second: str) -> Interval:
    """Spearman's rank correlation of two metrics over methods, averaged over seeds.

    A seed of one method is compared with the same seed of every other. Raises ConfigError unless at
    least three methods have both metrics, all with the same seeds.
    """
    both = collection.having(second)
    seeds = [both[method] for method in collection.having(first) if method in both]
    keys = [[(s.task, s.key) for s in each] for each in seeds]
    if len(keys) < 3 or any(each != keys[0] for each in keys):
        raise ConfigError(
            f"--correlation: {first} and {second} must be there for three methods or more, each "
            f"with the same seeds; found {[len(each) for each in seeds]}"
        )
    x, y = (
        np.array([[s.last(metric) for s in each] for each in seeds]) for metric in (first, second)
    )
    return mean_interval([stats.spearmanr(a, b).statistic for a, b in zip(x.T, y.T, strict=True)])
