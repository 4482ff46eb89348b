"""The result of the experiment on noisy bandits: tables and figure."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.analysis import plots
from experiments.analysis.statistics import (
    Interval,
    mean_cell,
    mean_entry,
    mean_interval,
    seeds_label,
)
from experiments.runtime.task import Summary, Table
from experiments.trackers import Row

METRICS = ("win_mass", "win_mass/matched", "accuracy", "entropy", "trust/distance")
COMPARED = ("win_mass", "win_mass/matched")  # metrics of which gains are shown
_TITLES = {
    "win_mass": "Mass on the best item, over DPO in points",
    "win_mass/matched": "The same at equal sharpness, in points",
}


class Found:
    """Values [seeds, scenarios] of all methods and metrics."""

    def __init__(self, rows: Sequence[Row], names: Sequence[str], scenarios: Sequence[str]) -> None:
        """Reads the rows of the methods that are named."""
        self.names, self.scenarios = names, scenarios
        place = {scenario: index for index, scenario in enumerate(scenarios)}
        num_seeds = 1 + max(int(row["seed"]) for row in rows)
        self.values = {
            (name, metric): np.full((num_seeds, len(scenarios)), np.nan)
            for name, metric in itertools.product(names, METRICS)
        }
        for row, metric in itertools.product(rows, METRICS):
            values = self.values[str(row["stage"]), metric]
            values[int(row["seed"]), place[str(row["scenario"])]] = float(row[metric])

    def gain(self, name: str, metric: str) -> np.ndarray:
        """Differences [seeds, scenarios] of a method and the first one, paired by seed."""
        gain: np.ndarray = self.values[name, metric] - self.values[self.names[0], metric]
        return gain


def summary(rows: Sequence[Row], names: Sequence[str], scenarios: Sequence[str]) -> Summary:
    """Means over seeds, and gains over the first method, by method and scenario.

    `all` are the means over scenarios, whose seeds are the independent values.
    """
    found = Found(rows, names, scenarios)
    values: dict[str, Any] = {}
    for name in names:
        values[name] = {
            "all": {
                metric: mean_entry(found.values[name, metric].mean(1).tolist())
                for metric in METRICS
            },
            "gains": {
                metric: mean_entry(found.gain(name, metric).mean(1).tolist()) for metric in COMPARED
            },
            "scenarios": {
                scenario: {
                    metric: mean_interval(found.values[name, metric][:, index])._asdict()
                    for metric in METRICS
                }
                | {
                    f"gain/{metric}": mean_interval(found.gain(name, metric)[:, index])._asdict()
                    for metric in COMPARED
                }
                for index, scenario in enumerate(scenarios)
            },
        }
    cells = [
        [
            name,
            *(mean_cell(found.values[name, m].mean(1).tolist(), factor=100) for m in METRICS[:3]),
            *(mean_cell(found.values[name, m].mean(1).tolist(), digits=2) for m in METRICS[3:]),
        ]
        for name in names
    ]
    columns = ("method", "mass on best, %", "at equal sharpness, %", "best first, %",
               "entropy, nats", "KL to reference")  # fmt: skip
    seeds = seeds_label(len(found.values[names[0], METRICS[0]]))
    title = f"Means over {len(scenarios)} scenarios, {seeds}"
    return Summary(values, Table(title, columns, cells))


def plot(rows: Sequence[Row], names: Sequence[str], scenarios: Sequence[str], path: Path) -> None:
    """Writes the figure: gains over the first method, by method and scenario."""
    found = Found(rows, names, scenarios)
    others = list(names[1:]) or list(names)
    height = 2.6 + 0.34 * len(others)
    width = 2.0 + 0.62 * len(scenarios)
    figure, axes = plots.panels(2, width=width, height=height)
    for axis, metric in zip(axes, COMPARED, strict=True):
        gains = [
            [mean_interval(100 * found.gain(name, metric)[:, i]) for i in range(len(scenarios))]
            for name in others
        ]
        base = 100 * found.values[names[0], metric].mean(0)
        labels = [f"{s}\n({names[0]}: {b:.0f})" for s, b in zip(scenarios, base, strict=True)]
        _heat_map(axis, gains, others, labels)
        axis.set(title=_TITLES[metric])
    figure.suptitle(
        "Grey: the 95 % t interval of the difference, paired by seed, includes 0", fontsize="medium"
    )
    plots.save(figure, path)


def _heat_map(
    axis: Axes, gains: Sequence[Sequence[Interval]], names: Sequence[str], labels: Sequence[str]
) -> None:
    """Draws gains by method and scenario; the numbers of unclear ones are grey."""
    means = np.array([[gain.mean for gain in row] for row in gains])
    most = max(float(np.abs(means).max()), 1e-6)
    axis.imshow(means, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for (row, column), mean in np.ndenumerate(means):
        gain = gains[row][column]
        is_clear = gain.low > 0 or gain.high < 0
        ink = "white" if abs(mean) > 0.6 * most else "black"
        axis.text(
            column, row, f"{mean:+.1f}", ha="center", va="center", fontsize=8,
            color=ink if is_clear else "grey",
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=8)
    axis.grid(visible=False)
