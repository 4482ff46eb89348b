"""Results of language policies that learned from rewards: the table, summary.json, the figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import plots
from experiments.analysis.statistics import METHOD, mean_cell, mean_entry, seeds_label
from experiments.runtime.task import Summary, Table
from experiments.tasks.knights_training import WARM_START
from experiments.trackers import Row

_FURTHER = "final/accuracy_"  # Of a number of people, or of another test than the unseen puzzles.


def summarize(rows: Sequence[Row], names: Sequence[str], num_seeds: int) -> Summary:
    """Final measures by stage, and what each method gained over the model that it began with."""
    values: dict[str, Any] = {}
    cells = []
    before = _finals(rows, WARM_START)
    others = [name for name in before if name.startswith(_FURTHER) and not name[-1].isdigit()]
    for name in (WARM_START, *names):
        found = _finals(rows, name)
        gains = {
            metric: [a - b for a, b in zip(found[metric], before[metric], strict=True)]
            for metric in ("final/accuracy", "final/greedy")
        }
        values[name] = {metric: mean_entry(seeds) for metric, seeds in found.items()}
        values[name] |= {f"{metric}_gain": mean_entry(each) for metric, each in gains.items()}
        cells.append([
            name,
            mean_cell(found["final/accuracy"], factor=100),
            mean_cell(gains["final/accuracy"], factor=100) if name != WARM_START else "",
            mean_cell(found["final/greedy"], factor=100),
            mean_cell(found["final/thinking"], factor=100),
            *(mean_cell(found[name], factor=100) for name in others),
        ])  # fmt: skip
    heading = f"Unseen puzzles in percent, mean and {METHOD} over {seeds_label(num_seeds)}"
    columns = ["method", "accuracy", "gain", "greedy", "right steps of the reasoning"]
    columns += [name.removeprefix(_FURTHER).replace("_", " people, ") for name in others]
    return Summary(values, Table(heading, columns, cells))


def plot(rows: Sequence[Row], names: Sequence[str], folder: Path) -> None:
    """Writes learning_curves.png, reasoning.png and trust_region.png."""

    def panel(metric: str, title: str | None = None) -> plots.Panel:
        settings = {"xlabel": "iterations", **plots.metric_settings(metric)}
        curves = plots.curves(rows, names, metric)
        return plots.Panel(title or plots.metric_title(metric), curves, settings)

    learning = [panel("accuracy", "Accuracy in training"), panel("reward/mean", "Reward")]
    plots.plot_bands(learning, names, folder / "learning_curves.png")
    reasoning = [
        panel("thinking/mean", "Reasoning, as it is judged"),
        panel("length/mean", "Tokens of an answer"),
    ]
    plots.plot_bands(reasoning, names, folder / "reasoning.png")
    trust = [panel(metric) for metric in ("trust/distance", "trust/used", "entropy")]
    plots.plot_bands(trust, names, folder / "trust_region.png")


def _finals(rows: Sequence[Row], stage: str) -> dict[str, list[float]]:
    """Metrics of the final evaluation by name: the values of all seeds."""
    own = [row for row in rows if row["stage"] == stage and row.get("final/accuracy", "") != ""]
    names = [name for name in own[0] if name.startswith("final/") and own[0][name] != ""]
    return {name: [float(row[name]) for row in own] for name in names}
