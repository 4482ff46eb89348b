"""Results of preference training: the table, summary.json and the figures."""

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
from experiments.trackers import Row

METRICS = (
    "accuracy",
    "accuracy/log_ratio",
    "accuracy/mean_log_prob",
    "accuracy/reference",
    "log_ratio/chosen",
    "log_ratio/rejected",
    "train/accuracy",
)


def _finals(rows: Sequence[Row], names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """The values of all seeds at the end of training, by loss and metric."""
    return {
        name: {metric: list(plots.last(plots.curve(rows, name, metric))) for metric in METRICS}
        for name in names
    }


def summarize(rows: Sequence[Row], names: Sequence[str]) -> Summary:
    """Final measures by loss, with intervals over seeds.

    `values[loss][metric]` holds `mean`, `low`, `high` and `seeds`, the values of all seeds, for
    each of `METRICS`, and `gain`, the accuracy minus that of the first loss, paired by seed.
    """
    finals = _finals(rows, names)
    values: dict[str, Any] = {}
    cells = []
    for name, found in finals.items():
        gain = np.subtract(found["accuracy"], finals[names[0]]["accuracy"]).tolist()
        values[name] = {metric: mean_entry(seeds) for metric, seeds in found.items()}
        values[name]["gain"] = mean_entry(gain)
        cells.append([
            name,
            mean_cell(found["accuracy"], factor=100),
            mean_cell(gain, factor=100) if name != names[0] else "",
            mean_cell(found["accuracy/log_ratio"], factor=100),
            mean_cell(found["accuracy/mean_log_prob"], factor=100),
            mean_cell(found["log_ratio/chosen"]),
            mean_cell(found["log_ratio/rejected"]),
        ])  # fmt: skip
    columns = (
        "loss", "own reward", f"gain over {names[0]}", "by log-ratio", "by log-prob. per token",
        "chosen: log-ratio", "rejected: log-ratio",
    )  # fmt: skip
    before = mean_interval(finals[names[0]]["accuracy/reference"]).mean
    heading = (
        f"Accuracy on held-out pairs in %, mean and {METHOD} over "
        f"{seeds_label(len(finals[names[0]]['accuracy']))}; the reference has {100 * before:.1f}"
    )
    return Summary(values, Table(heading, columns, cells))


def plot(rows: Sequence[Row], names: Sequence[str], folder: Path) -> None:
    """Writes accuracy.png (bars, and where both answers went) and learning_curves.png."""
    finals = _finals(rows, names)
    style = plots.styles(names)
    figure, (left, right) = plots.panels(2, columns=2, width=5, height=1.6 + 0.2 * len(names))
    accuracies = {name: mean_interval(found["accuracy"]) for name, found in finals.items()}
    scaled = {name: type(i)(*(100 * x for x in i)) for name, i in accuracies.items()}
    plots.plot_bars(left, style, scaled)
    left.axvline(50, color="black", linewidth=0.8, linestyle=":")
    left.set(title="Accuracy of the implied reward\non held-out pairs, %")
    for name, found in finals.items():
        chosen, rejected = (
            mean_interval(found[f"log_ratio/{answer}"]) for answer in ("chosen", "rejected")
        )
        plots.cross(right, chosen, rejected, name, style[name])
    right.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle=":")
    right.set(title="Mean log-ratio to the reference\non held-out pairs, nats",
              xlabel="chosen answers", ylabel="rejected answers")  # fmt: skip
    plots.legend(figure, right)
    plots.save(figure, folder / "accuracy.png")
    settings = {"xlabel": "step", "ylabel": "accuracy, %"}
    contents = [
        plots.Panel(title, plots.curves(rows, names, metric), settings, scale=100)
        for metric, title in (("accuracy", "Held-out pairs"), ("train/accuracy", "Training pairs"))
    ]
    plots.plot_bands(contents, names, folder / "learning_curves.png")
