"""Results of training from scratch: the table, summary.json and the figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import plots
from experiments.analysis.statistics import METHOD, mean_cell, mean_entry, seeds_label
from experiments.runtime.task import Summary, Table
from experiments.trackers import Row


def summarize(rows: Sequence[Row], names: Sequence[str], levels: Sequence[float]) -> Summary:
    """Mean and 95 % t interval of the test accuracy over seeds, by method and noise level.

    `values[method][level]` has three entries: `test`, `train` (the accuracy on the training labels
    as given) and `gain` (in test accuracy over the first method, paired by seed). Each holds
    `mean`, `low`, `high` and `seeds`, the values of all seeds.
    """
    tests = plots.curves(rows, names, "final/accuracy", x="noise")
    trained = plots.curves(rows, names, "final/train", x="noise")
    gains = {name: plots.paired_gain(tests[name], tests[names[0]]) for name in names}
    values: dict[str, Any] = {
        name: {
            f"{level:g}": {
                "test": mean_entry(seeds),
                "train": mean_entry(trained[name][level]),
                "gain": mean_entry(gains[name][level]),
            }
            for level, seeds in tests[name].items()
        }
        for name in names
    }
    highest = max(levels)
    cells = [
        [
            name,
            *(mean_cell(seeds, factor=100) for seeds in tests[name].values()),
            *([mean_cell(gains[name][highest], factor=100)] if name != names[0] else [""]),
        ]
        for name in names
    ]
    headings = [f"noise {100 * level:g} %" for level in levels] if len(levels) > 1 else ["test"]
    at_highest = f" at {100 * highest:g} %" if highest else ""
    columns = ("method", *headings, f"gain over {names[0]}{at_highest}, paired")
    num_seeds = len(next(iter(tests[names[0]].values())))
    title = f"Test accuracy in %, mean and {METHOD} over {seeds_label(num_seeds)}"
    return Summary(values, Table(title, columns, cells))


def plot(rows: Sequence[Row], names: Sequence[str], levels: Sequence[float], folder: Path) -> None:
    """Writes learning_curves.png, at the highest noise, and accuracy_by_noise.png.

    The second figure is left out if there is only one noise level.
    """
    highest = max(levels)
    noisy = [row for row in rows if row["noise"] == highest]
    at_highest = f", noise {100 * highest:g} %" if highest else ""
    test, train = (plots.curves(noisy, names, f"accuracy/{part}") for part in ("test", "train"))
    settings = {"xlabel": "step", "ylabel": "accuracy, %"}
    contents = [
        plots.Panel(f"Test accuracy{at_highest}", test, settings, scale=100),
        plots.Panel(f"Training accuracy{at_highest}", train, settings, scale=100),
        *_gains(test, names, "step"),
    ]
    plots.plot_bands(contents, names, folder / "learning_curves.png")
    if len(levels) == 1:
        return

    test, train = (
        plots.curves(rows, names, metric, x="noise") for metric in ("final/accuracy", "final/train")
    )
    settings["xlabel"] = "share of labels drawn again"
    contents = [
        plots.Panel("Test accuracy, right labels", test, settings, scale=100),
        plots.Panel("Training accuracy, labels as given", train, settings, scale=100),
        *_gains(test, names, settings["xlabel"]),
    ]
    plots.plot_bands(contents, names, folder / "accuracy_by_noise.png")


def _gains(
    curves: Mapping[str, plots.Curve], names: Sequence[str], xlabel: str
) -> list[plots.Panel]:
    """A panel of the gains over the first method, paired by seed; none for a single method."""
    gains = {name: plots.paired_gain(curves[name], curves[names[0]]) for name in names[1:]}
    title = f"Test accuracy: gain over {names[0]},\npaired by seed"
    settings = {"xlabel": xlabel, "ylabel": "points"}
    return [plots.Panel(title, gains, settings, scale=100)] if gains else []
