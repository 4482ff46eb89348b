"""Results of the adaptation experiment: the table, summary.json and the figures."""

import math
from collections.abc import Sequence
from pathlib import Path

from experiments.analysis import plots
from experiments.analysis.statistics import (
    METHOD,
    Interval,
    mean_cell,
    mean_entry,
    mean_interval,
    seeds_label,
)
from experiments.runtime.task import Summary, Table
from experiments.trackers import Row

# Measure, heading, factor, digits. The sharpness is a percentage already.
COLUMNS = (
    ("final/target", "target, %", 100, 1),
    ("final/unseen", "unseen, %", 100, 1),
    ("final/source", "source, %", 100, 1),
    ("final/sharpness", "sharpness, %", 1, 3),
    ("final/similarity", "CKA", 1, 3),
)


def summarize(rows: Sequence[Row], names: Sequence[str]) -> Summary:
    """Mean and 95 % t interval over seeds, for every method, and for pre-training if there is any.

    `values[method][measure]` holds `mean`, `low`, `high` and `seeds`, the values of all seeds. Keys
    that begin with `difference/` hold each seed's gain in accuracy over the first method. As both
    started from the same network, its interval tells more than the two intervals do.
    """
    stages = [name for name in ("pretrain", *names) if _finals(rows, name)]
    finals = {name: _finals(rows, name) for name in stages}
    values = {
        name: {measure: mean_entry(seeds) for measure, seeds in final.items()}
        for name, final in finals.items()
    }
    for name in names[1:]:
        for measure in ("final/target", "final/unseen"):
            pairs = zip(finals[name][measure], finals[names[0]][measure], strict=True)
            values[name][f"difference/{measure}"] = mean_entry([a - b for a, b in pairs])
    cells = [
        [name, *(mean_cell(finals[name][measure], factor=factor, digits=digits)
                 for measure, _, factor, digits in COLUMNS)]
        for name in stages
    ]  # fmt: skip
    seeds = len(next(iter(finals[names[0]].values())))
    title = f"Mean and {METHOD} over {seeds_label(seeds)}"
    return Summary(values, Table(title, ("method", *(c[1] for c in COLUMNS)), cells))


def plot(rows: Sequence[Row], names: Sequence[str], folder: Path) -> None:
    """Writes learning_curves.png, gains.png, target_and_unseen.png and trust_radius.png.

    Gains are over the first method, and are left out if there is only one. trust_radius.png is left
    out if no method has a trust region.
    """
    domains = ("target", "unseen", "source")
    curves = {domain: plots.curves(rows, names, f"accuracy/{domain}") for domain in domains}
    labels = {"xlabel": "fine-tuning step", "ylabel": "accuracy, %"}
    titles = {domain: f"{domain.capitalize()} accuracy" for domain in domains}
    starts = _finals(rows, "pretrain")
    contents = []
    for domain in domains:
        known = curves[domain]
        if starts:  # the curves begin at the pre-trained network
            known = {n: {0.0: starts[f"final/{domain}"], **c} for n, c in known.items() if c}
        contents.append(plots.Panel(titles[domain], known, labels, scale=100))
    plots.plot_bands(contents, names, folder / "learning_curves.png")
    if len(names) > 1:
        contents = [
            plots.Panel(
                f"{titles[domain]}: gain over\n{names[0]}, paired by seed",
                {
                    name: plots.paired_gain(curves[domain][name], curves[domain][names[0]])
                    for name in names[1:]
                },
                {**labels, "ylabel": "points"},
                scale=100,
            )
            for domain in ("target", "unseen")
        ]
        plots.plot_bands(contents, names, folder / "gains.png")
    draw = _plot_target_and_unseen if len(names) <= plots.MOST_TOGETHER else _plot_final_gains
    draw(rows, names, folder / "target_and_unseen.png")

    radii = {m: plots.curves(rows, names, m) for m in ("trust/radius", "trust/used")}
    if any(radii["trust/radius"].values()):
        contents = [
            plots.Panel(
                plots.metric_title(metric),
                found,
                {"xlabel": "fine-tuning step", **plots.metric_settings(metric)},
            )
            for metric, found in radii.items()
        ]
        plots.plot_bands(contents, names, folder / "trust_radius.png")


def _plot_target_and_unseen(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Accuracy on the target against that on unseen domains, and the gains paired by seed."""
    finals = {name: _finals(rows, name) for name in names}
    style = plots.styles(names)
    figure, axes = plots.panels(min(2, len(names)), width=5.2, height=4.6)
    for axis, is_gain in zip(axes, (False, True), strict=False):
        for name in names[is_gain:]:
            values = [finals[name][f"final/{domain}"] for domain in ("target", "unseen")]
            if is_gain:
                firsts = [finals[names[0]][f"final/{domain}"] for domain in ("target", "unseen")]
                values = [
                    [a - b for a, b in zip(own, first, strict=True)]
                    for own, first in zip(values, firsts, strict=True)
                ]
            target, unseen = map(mean_interval, values)
            plots.cross(axis, target, unseen, name, style[name], scale=100)
    axes[0].set(
        title="Accuracy",
        xlabel="on the target domain, %",
        ylabel="on unseen domains, %",
    )
    if len(axes) > 1:
        for line in (axes[1].axhline, axes[1].axvline):
            line(0, color="black", linewidth=0.8, linestyle=":")
        axes[1].set(
            title=f"Gain over {names[0]}, paired by seed",
            xlabel="on the target domain, points",
            ylabel="on unseen domains, points",
        )
    figure.suptitle(f"Mean and {METHOD}", fontsize="medium")
    plots.legend(figure, axes[0])
    plots.save(figure, path)


def _plot_final_gains(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Gains paired by seed as one bar per method, for more methods than points can show."""
    finals = {name: _finals(rows, name) for name in names}

    def gain(name: str, key: str) -> Interval:
        pairs = zip(finals[name][key], finals[names[0]][key], strict=True)
        return mean_interval([100 * (own - first) for own, first in pairs])

    contents = {
        f"Accuracy, {domain}": {name: gain(name, f"final/{domain}") for name in names[1:]}
        for domain in ("target", "unseen")
    }
    heading = f"Gain over {names[0]}, paired by seed, {METHOD}"
    plots.plot_comparison(
        contents, names, names[0], path, heading=heading, equal=0.0, xlabel="points"
    )


def _finals(rows: Sequence[Row], stage: str) -> dict[str, list[float]]:
    """Every final measure of a stage by name: the values of all seeds, NaN where undefined."""
    own = [row for row in rows if row["stage"] == stage and "final/target" in row]
    found = {key: None for row in own for key in row if key.startswith("final/")}
    measures = [*found, *(key for key, *_ in COLUMNS if key not in found)] if own else []
    return {key: [float(row.get(key, math.nan)) for row in own] for key in measures}
