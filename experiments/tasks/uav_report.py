"""The result of the experiments with vehicles: table, differences by seed, and figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis import plots
from experiments.analysis.statistics import (
    METHOD,
    mean_cell,
    mean_entry,
    mean_interval,
    seeds_label,
)
from experiments.runtime.task import Summary, Table
from experiments.tasks.uav_play import MEASURES
from experiments.trackers import Row

_TITLES = {
    "return": "Return",
    "sum_rate": "Sum rate, Mbit/s",
    "jain": "Jain index of the rates",
    "energy": "Energy, kJ per vehicle",
    "collisions": "Collisions per episode",
}


def finals(rows: Sequence[Row], name: str) -> dict[str, list[float]]:
    """The measures of a method, one value per seed, and "modes" of one that learns."""
    own = _rows_by_seed(rows, name, "final/return")
    learns = all(row.get("final/modes", "") != "" for row in own)
    measures = [*MEASURES, "modes"] if learns else [*MEASURES]
    return {measure: [float(row[f"final/{measure}"]) for row in own] for measure in measures}


def summarize(rows: Sequence[Row], names: Sequence[str], title: str) -> Summary:
    """Means with intervals, and the differences from the first method, paired by seed.

    `values[name][measure]` has `mean`, `low`, `high` and `seeds`, and `difference` with the
    interval of the difference from the first method.
    """
    found = {name: finals(rows, name) for name in names}
    first = found[names[0]]
    values: dict[str, Any] = {}
    cells = []
    for name, own in found.items():
        values[name] = {
            measure: {**mean_entry(seeds), "difference": _difference(seeds, first[measure])}
            for measure, seeds in own.items()
            if measure in first
        }
        less = np.subtract(own["return"], first["return"])
        cells.append(
            [
                name,
                mean_cell(own["return"], digits=2),
                mean_cell(less.tolist(), digits=2) if name != names[0] else "",
                mean_cell(own["modes"], digits=2) if "modes" in own else "",
                mean_cell(own["sum_rate"], digits=3),
                mean_cell(own["jain"], digits=3),
                mean_cell(own["energy"], digits=1),
            ]
        )
    number = len(first["return"])
    heading = f"{title}, mean and {METHOD} over {seeds_label(number)}"
    columns = (
        "method",
        "return",
        f"less {names[0]}",
        "of modes",
        "Mbit/s",
        "Jain",
        "kJ per vehicle",
    )
    return Summary(values, Table(heading, columns, cells))


def _difference(seeds: Sequence[float], first: Sequence[float]) -> dict[str, float]:
    return mean_interval(np.subtract(seeds, first))._asdict()


def plot(rows: Sequence[Row], agents: Sequence[str], planners: Sequence[str], folder: Path) -> None:
    """Writes the figures; see `Vehicles.plot`."""
    names = [*agents, *planners]
    learning = plots.curves(rows, agents, "episode/return")
    # The last step of all, as a short run may end before its first episode does.
    end = max(float(row["step"]) for row in rows if row["stage"] in agents)
    for name in planners:  # flat lines, as nothing is learned
        seeds = finals(rows, name)["return"]
        learning[name] = {0.0: seeds, end: seeds}
    settings = {"xlabel": "steps"}
    contents = [plots.Panel("Return in training", learning, settings)]
    for metric in ("trust/used", "entropy", "value/explained"):
        curves = plots.curves(rows, agents, metric)
        contents.append(
            plots.Panel(
                plots.metric_title(metric), curves, settings | plots.metric_settings(metric)
            )
        )
    plots.plot_bands(contents, names, folder / "learning.png")
    intervals = {
        _TITLES[measure]: {name: mean_interval(finals(rows, name)[measure]) for name in names}
        for measure in ("return", "sum_rate", "jain", "energy")
    }
    style = plots.styles(names)
    figure, axes = plots.bar_panels(len(intervals), len(style))
    for axis, (title, found) in zip(axes, intervals.items(), strict=True):
        plots.plot_bars(axis, style, found)
        axis.set(title=title)
    plots.save(figure, folder / "measures.png")
    _plot_attention(rows, agents, folder / "attention.png")


def _plot_attention(rows: Sequence[Row], agents: Sequence[str], path: Path) -> None:
    """Writes the mean weights of attention in the last tenth of training, by method."""
    found = {name: weights for name in agents if (weights := attention(rows, name)) is not None}
    if not found:
        return
    figure, axes = plots.panels(len(found))
    for axis, (name, weights) in zip(axes, found.items(), strict=True):
        axis.grid(visible=False)
        axis.imshow(weights, vmin=0, vmax=1, cmap="Blues")
        for (i, j), weight in np.ndenumerate(weights):
            color = "white" if weight > 0.6 else "black"
            axis.text(j, i, f"{weight:.2f}", ha="center", va="center", color=color)
        ticks = range(len(weights))
        axis.set(
            title=f"{name}: weights of attention", xlabel="heard", ylabel="listening",
            xticks=ticks, yticks=ticks,
        )  # fmt: skip
    plots.save(figure, path)


def attention(rows: Sequence[Row], name: str) -> np.ndarray | None:
    """Weights [n, n] of the last tenth of training, or None for a method without attention."""
    own = [row for row in rows if row["stage"] == name and row.get("attention/0_0", "") != ""]
    if not own:
        return None
    steps = sorted({float(row["step"]) for row in own})
    late = [row for row in own if float(row["step"]) >= steps[-max(1, len(steps) // 10)]]
    number = 1
    while f"attention/{number}_0" in late[0]:
        number += 1
    return np.array(
        [
            [np.mean([float(row[f"attention/{i}_{j}"]) for row in late]) for j in range(number)]
            for i in range(number)
        ]
    )


def gains(rows: Sequence[Row], name: str) -> dict[str, list[float]]:
    """The mean return of the vehicles, their largest gain and NashConv, one value per seed."""
    own = _rows_by_seed(rows, name, "nash/conv")

    def of(row: Row, measure: str) -> list[float]:
        number = 0
        values = []
        while row.get(f"nash/{measure}_{number}", "") != "":
            values.append(float(row[f"nash/{measure}_{number}"]))
            number += 1
        return values

    return {
        "return": [float(np.mean(of(row, "return"))) for row in own],
        "largest_gain": [max(of(row, "gain")) for row in own],
        "nash_conv": [float(row["nash/conv"]) for row in own],
    }


def summarize_gains(rows: Sequence[Row], names: Sequence[str], title: str) -> Summary:
    """Returns, the largest gain of a vehicle, and NashConv, with intervals over seeds."""
    found = {name: gains(rows, name) for name in names}
    values = {
        name: {measure: mean_entry(seeds) for measure, seeds in own.items()}
        for name, own in found.items()
    }
    cells = [
        [name, *(mean_cell(seeds, digits=2) for seeds in own.values())]
        for name, own in found.items()
    ]
    number = len(next(iter(found.values()))["return"])
    heading = f"{title}, mean and {METHOD} over {seeds_label(number)}"
    columns = ("method", "return", "largest gain of a vehicle", "NashConv")
    return Summary(values, Table(heading, columns, cells))


def _rows_by_seed(rows: Sequence[Row], stage: str, metric: str) -> list[Row]:
    """The rows of a stage that have the metric, in the order of the seeds."""
    own = [row for row in rows if row["stage"] == stage and row.get(metric, "") != ""]
    return sorted(own, key=lambda row: int(row["seed"]))
