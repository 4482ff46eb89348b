"""The result of the experiment on people's choices: table and figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis import plots
from experiments.analysis.statistics import mean_cell, mean_interval, seeds_label
from experiments.runtime.task import Summary, Table
from experiments.trackers import Row

METRICS = ("log_likelihood", "accuracy", "calibration_error")
_TITLES = {
    "log_likelihood": "log-likelihood per choice, nats",
    "calibration_error": "calibration error",
}


def curves(rows: Sequence[Row], data: str, metric: str) -> dict[str, dict[float, list[float]]]:
    """The values of all seeds by method and share of wrong labels."""
    own = [row for row in rows if row["stage"] == data]
    methods = dict.fromkeys(str(row["method"]) for row in own)  # in their order
    return {
        name: plots.curve([row for row in own if row["method"] == name], data, metric, x="noise")
        for name in methods
    }


def summary(
    rows: Sequence[Row], data: Sequence[str], methods: Sequence[str], levels: Sequence[float]
) -> Summary:
    """Means over seeds by data set, method and level, and gains over the first, paired by seed."""
    values: dict[str, Any] = {}
    for name in data:
        of_data: dict[str, Any] = {}
        for metric in METRICS:
            found = curves(rows, name, metric)
            for method, curve in found.items():
                gains = plots.paired_gain(curve, found[methods[0]])
                for level in levels:
                    entry = of_data.setdefault(method, {}).setdefault(f"{level:g}", {})
                    entry[metric] = mean_interval(curve[level])._asdict()
                    entry[f"gain/{metric}"] = mean_interval(gains[level])._asdict()
        values[name] = of_data
    ends = (min(levels), max(levels))
    cells = []
    num_seeds = 0
    for name in data:
        by_metric = [curves(rows, name, metric) for metric in METRICS]
        for method in by_metric[0]:
            cell = [name, method]
            for level in ends:
                seeds = [found[method][level] for found in by_metric]
                num_seeds = len(seeds[0])
                cell += [
                    mean_cell(seeds[0], digits=3),
                    mean_cell(seeds[1], factor=100),
                    mean_cell(seeds[2], factor=100),
                ]
            cells.append(cell)
    columns = ["data", "method"]
    for level in ends:
        wrong = f"{100 * level:.0f} % wrong"
        columns += [f"log-lik., {wrong}", "right, %", "calibration error, %"]
    return Summary(values, Table(f"Held-out choices, {seeds_label(num_seeds)}", columns, cells))


def plot(rows: Sequence[Row], data: Sequence[str], methods: Sequence[str], path: Path) -> None:
    """Writes the figure: a row of panels for each metric, with a panel for each data set."""
    contents = []
    for metric, title in _TITLES.items():
        for name in data:
            found = {m: c for m, c in curves(rows, name, metric).items() if m in methods}
            settings: dict[str, Any] = {"xlabel": "share of wrong labels"}
            lows = [np.mean(values) for curve in found.values() for values in curve.values()]
            if metric == "log_likelihood":
                # A sharp policy that is wrong may be far below all others.
                settings |= {"ylim": (float(np.quantile(lows, 0.2)) - 0.3, max(lows) + 0.05)}
            contents.append(plots.Panel(f"{name}:\n{title}", found, settings))
    plots.plot_bands(contents, methods, path)
