"""The figures of a report: learning curves, scores, paired gains, probabilities of improvement."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.analysis import plots
from experiments.analysis.collection import Collection
from experiments.analysis.scores import Score
from experiments.analysis.statistics import BOOTSTRAP_SEEDS, METHOD

MOST_POINTS = 60  # in a curve

# Name of the intervals of interquartile means and of probabilities.
BOOTSTRAP = f"95 % bootstrap interval (from {BOOTSTRAP_SEEDS} seeds up)"


def plot_curves(collection: Collection, metrics: Sequence[str], path: Path) -> None:
    """Draws mean and interval over seeds at the steps that all seeds of a method have reached."""

    def curve(method: str, metric: str, task: str) -> dict[float, list[float]]:
        seeds = collection.methods[method]
        series = [s.series[metric] for s in seeds if s.task == task and metric in s.series]
        shared = sorted(set.intersection(*map(set, series))) if series else []
        if not shared:
            return {}
        some = np.unique(np.linspace(0, len(shared) - 1, MOST_POINTS).astype(int))
        return {float(shared[i]): [each[shared[i]] for each in series] for i in some}

    contents = [
        plots.Panel(
            f"{plots.metric_title(metric)}\n{task}" if task else plots.metric_title(metric),
            {method: curve(method, metric, task) for method in collection.methods},
            {"xlabel": "step", **plots.metric_settings(metric)},
        )
        for metric in metrics
        for task in collection.tasks
    ]
    plots.plot_bands(contents, list(collection.methods), path)


def plot_scores(
    collection: Collection, scores: Mapping[str, Mapping[str, Score]], path: Path
) -> None:
    """Draws a bar per method and metric: the interval, the mean, and the single seeds."""
    style = plots.styles(collection.methods)
    figure, axes = plots.bar_panels(len(scores), len(style))
    for axis, (metric, of_methods) in zip(axes, scores.items(), strict=True):
        plots.plot_bars(axis, style, {method: each.mean for method, each in of_methods.items()})
        for y, method in enumerate(style):
            if method in of_methods:
                seeds = np.concatenate(of_methods[method].values)
                axis.plot(seeds, np.full(len(seeds), y), "|", color="black", alpha=0.5)
        title = plots.metric_title(metric)
        axis.set_title(f"{title}, scaled" if len(collection.tasks) > 1 else title)
    figure.suptitle(f"Mean, {METHOD}, single seeds", fontsize="medium")
    plots.save(figure, path)


def plot_gains(
    collection: Collection, scores: Mapping[str, Mapping[str, Score]], baseline: str, path: Path
) -> None:
    """Draws a bar per method and metric: the gain over the baseline, paired by seed."""
    contents = {
        plots.metric_title(metric): {
            method: each.gain for method, each in of_methods.items() if each.gain
        }
        for metric, of_methods in scores.items()
    }
    heading = f"Gain over {baseline}, paired by seed, {METHOD}"
    plots.plot_comparison(contents, collection.methods, baseline, path, heading=heading, equal=0.0)


def plot_improvement(
    collection: Collection,
    scores: Mapping[str, Mapping[str, Score]],
    baseline: str,
    lower: Sequence[str],
    path: Path,
) -> None:
    """Draws a bar per method and metric: the probability of improvement over the baseline."""
    contents = {
        plots.metric_title(metric) + (", less is better" if metric in lower else ""): {
            method: each.better for method, each in of_methods.items() if each.better
        }
        for metric, of_methods in scores.items()
    }
    heading = f"Probability of improvement over {baseline}, {BOOTSTRAP}"
    plots.plot_comparison(
        contents, collection.methods, baseline, path,
        heading=heading, equal=0.5, xlim=(-0.02, 1.02),
    )  # fmt: skip
