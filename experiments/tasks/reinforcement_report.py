"""Results of reinforcement learning: the table, summary.json and the figures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import plots
from experiments.analysis.statistics import (
    METHOD,
    interquartile_mean,
    mean_cell,
    mean_entry,
    probability_of_improvement,
    seeds_label,
)
from experiments.runtime.task import Summary, Table
from experiments.trackers import Row

FINALS = ("final/return", "final/length", "final/training_return")


def summarize(rows: Sequence[Row], names: Sequence[str], title: str) -> Summary:
    """Final returns by agent, in training and without noise, compared with the first agent.

    `values[agent][metric]` holds `mean`, `low`, `high` and `seeds`, the values of all seeds, for
    each of `FINALS`; beside them stand the interquartile mean of the return in training, and the
    probability that a seed exceeds one of the first agent.
    """
    finals = {name: _finals(rows, name) for name in names}
    versus = [f"above {names[0]}"] if len(names) > 1 else []
    first = finals[names[0]]["final/training_return"]
    values: dict[str, Any] = {}
    cells = []
    for name, found in finals.items():
        training = found["final/training_return"]
        better = probability_of_improvement([(training, first)])
        values[name] = {
            **{metric: mean_entry(seeds) for metric, seeds in found.items()},
            "interquartile_mean": interquartile_mean([training])._asdict(),
            f"probability_of_improvement_over_{names[0]}": better._asdict(),
        }
        cells.append([
            name,
            mean_cell(training),
            mean_cell(found["final/return"]),
            *(f"{better.mean:.2f}" if name != names[0] else "" for _ in versus),
            f"{_seconds(rows, name):.0f}",
        ])  # fmt: skip
    heading = f"{title}, mean and {METHOD} over {seeds_label(len(first))}"
    columns = ("agent", "return in training", "return without noise", *versus, "seconds")
    return Summary(values, Table(heading, columns, cells))


def plot(rows: Sequence[Row], names: Sequence[str], env: str, folder: Path) -> None:
    """Writes learning_curves.png (returns) and trust_region.png (the size of iterations)."""

    def panel(metric: str, title: str) -> plots.Panel:
        settings = {"xlabel": "steps", **plots.metric_settings(metric)}
        return plots.Panel(title, plots.curves(rows, names, metric), settings)

    known = {name for row in rows for name in row}  # SAC has no radius
    returns = [panel("episode/return", f"{env}: return in training")]
    if "evaluation/return" in known:
        returns.append(panel("evaluation/return", f"{env}: return without noise"))
    plots.plot_bands(returns, names, folder / "learning_curves.png")
    metrics = [m for m in ("kl/new_old", "trust/used", "entropy") if m in known]
    contents = [panel(metric, plots.metric_title(metric)) for metric in metrics]
    plots.plot_bands(contents, names, folder / "trust_region.png")


def _finals(rows: Sequence[Row], stage: str) -> dict[str, list[float]]:
    """Metrics of the final evaluation by name: the values of all seeds, NaN where undefined."""
    own = [row for row in rows if row["stage"] == stage and "final/return" in row]
    return {name: [float(row.get(name, math.nan)) for row in own] for name in FINALS}


def _seconds(rows: Sequence[Row], stage: str) -> float:
    return max(float(row.get("time/seconds", 0)) for row in rows if row["stage"] == stage)
