"""How often the intervals of the reports contain the truth, by distribution and number of seeds.

python -m benchmarks.interval_coverage [--out FILE]     two minutes on two cores

The t interval is compared with those of `scipy.stats.bootstrap`, by percentiles and bias-corrected
(BCa), on the same values. All aim at a coverage of 0.95.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from experiments.analysis.statistics import Interval, interquartile_mean, mean_interval

SEEDS = (2, 3, 5, 10, 20)
SAMPLES = 1000
# "capped normal" resembles a return with a highest value, such as CartPole's, which half of the
# seeds reach.
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    "capped normal": lambda rng, shape: np.minimum(rng.normal(size=shape), 0.0),
}


def scipy_bootstrap(method: str) -> Callable[[np.ndarray], Interval]:
    def interval(values: np.ndarray) -> Interval:
        rng = np.random.default_rng(0)
        with warnings.catch_warnings():  # BCa is undefined for equal values, and warns
            warnings.simplefilter("ignore")
            found = stats.bootstrap((values,), np.mean, n_resamples=500, method=method, rng=rng)
        return Interval(values.mean(), *found.confidence_interval)

    return interval


METHODS: dict[str, tuple[Callable[[np.ndarray], Interval], int]] = {
    "t": (mean_interval, SAMPLES),
    "percentile bootstrap": (scipy_bootstrap("percentile"), SAMPLES),
    "BCa bootstrap": (scipy_bootstrap("BCa"), 300),
}


def coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([low <= truth <= high for _, low, high in intervals]))


def of_means() -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, draw in DISTRIBUTIONS.items():
        rng = np.random.default_rng(0)
        truth = draw(rng, (10_000_000,)).mean()  # its standard error is about 0.0003
        for num_seeds in SEEDS:
            values = draw(rng, (SAMPLES, num_seeds))
            for method, (interval, count) in METHODS.items():
                covered = coverage([interval(each) for each in values[:count]], truth)
                found.setdefault(method, {}).setdefault(name, {})[str(num_seeds)] = covered
    return found


def of_interquartile_means(num_tasks: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    return {
        str(n): coverage(
            [interquartile_mean(x, min_seeds=1) for x in rng.normal(size=(300, num_tasks, n))], 0.0
        )
        for n in SEEDS
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("interval_coverage.json"))
    out = parser.parse_args().out
    found = {
        "mean": of_means(),
        "interquartile mean, bootstrap": {
            f"{tasks} tasks": of_interquartile_means(tasks) for tasks in (1, 2, 4)
        },
    }
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
