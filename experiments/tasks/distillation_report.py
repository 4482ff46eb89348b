"""Results of the distillation of policies: the table, summary.json and the figures."""

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
    "final/return",
    "final/noisy_return",
    "kl/teacher_student",
    "kl/student_teacher",
    "ndcg",
    "std/ratio",
)
_TITLES = {
    "final/return": "Return without noise",
    "kl/teacher_student": "KL(teacher || student), nats",
    "ndcg": "NDCG of the candidates",
    "std/ratio": "Standard deviation, student / teacher",
}
_DIGITS = {"final/return": 1, "final/noisy_return": 1}


def _finals(rows: Sequence[Row], name: str) -> dict[str, list[float]]:
    found = {metric: plots.curve(rows, name, metric) for metric in METRICS}
    return {metric: list(plots.last(curve)) for metric, curve in found.items() if curve}


def summarize(rows: Sequence[Row], names: Sequence[str], env: str) -> Summary:
    """Final measures by student, with intervals over seeds.

    `values[student][metric]` holds `mean`, `low`, `high` and `seeds`, the values of all seeds, for
    each of `METRICS`; `loss_of_return` is the return of the seed's own teacher minus the student's.
    `values["teacher"]` has the return alone.
    """
    teacher = _finals(rows, "teacher")["final/return"]
    values: dict[str, Any] = {"teacher": {"final/return": mean_entry(teacher)}}
    cells = [["teacher", mean_cell(teacher), "", "", "", "", "", ""]]
    for name in names:
        found = _finals(rows, name)
        lost = np.subtract(teacher, found["final/return"]).tolist()
        values[name] = {metric: mean_entry(seeds) for metric, seeds in found.items()}
        values[name]["loss_of_return"] = mean_entry(lost)
        digits = {metric: _DIGITS.get(metric, 3) for metric in METRICS}
        each = [mean_cell(found[metric], digits=digits[metric]) for metric in METRICS]
        cells.append([name, each[0], mean_cell(lost), *each[1:]])
    columns = (
        "student", "return", "teacher's minus it", "with noise", "KL(teacher || student)",
        "KL(student || teacher)", "NDCG", "deviation / teacher's",
    )  # fmt: skip
    heading = f"Distillation on {env}, mean and {METHOD} over {seeds_label(len(teacher))}"
    return Summary(values, Table(heading, columns, cells))


def plot(rows: Sequence[Row], names: Sequence[str], env: str, folder: Path) -> None:
    """Writes students.png (final measures as bars) and learning_curves.png."""
    finals = {name: _finals(rows, name) for name in names}
    style = plots.styles(names)
    figure, axes = plots.panels(4, columns=2, width=4.6, height=1.2 + 0.3 * len(names))
    for axis, (metric, title) in zip(axes, _TITLES.items(), strict=True):
        found = {name: mean_interval(finals[name][metric]) for name in names}
        plots.plot_bars(axis, style, found)
        axis.set(title=title, **({"xscale": "log"} if metric.startswith("kl/") else {}))
    teacher = mean_interval(_finals(rows, "teacher")["final/return"])
    axes[0].axvline(teacher.mean, color="black", linewidth=0.8, linestyle=":")
    axes[3].axvline(1, color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(f"{env}: students, and the teacher (dotted)", fontsize="medium")
    plots.save(figure, folder / "students.png")
    contents = [
        plots.Panel(title, plots.curves(rows, names, metric), {"xlabel": "gradient step", **scale})
        for metric, title, scale in (
            ("kl/teacher_student", _TITLES["kl/teacher_student"], {"yscale": "log"}),
            ("std/ratio", _TITLES["std/ratio"], {}),
        )
    ]
    plots.plot_bands(contents, names, folder / "learning_curves.png")
