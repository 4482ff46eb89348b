"""Results of experiments on transfer: the table, summary.json and the figures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


class Scale(NamedTuple):
    """How a score is shown.

    Attributes:
      factor: Factor of all values.
      digits: Digits behind the point in tables.
      unit: Unit behind headings, with its comma.
      versus: What stands before the name of the method that another one is compared with.
      difference: Unit of differences.
    """

    factor: float
    digits: int
    unit: str
    versus: str
    difference: str


SCALES = {
    "accuracy": Scale(100, 1, ", %", "gain over", "points"),
    "perplexity": Scale(1, 2, "", "difference from", "perplexity, less is better"),
}
DOMAINS = ("target", "unseen", "source")


def summarize(rows: Sequence[Row], names: Sequence[str], metric: str) -> Summary:
    """Mean and 95 % t interval over seeds, for every method, and for pre-training if there is any.

    `values[method][measure]` holds `mean`, `low`, `high` and `seeds`, the values of all seeds. Keys
    that begin with `difference/` hold each seed's difference in score from the first method. As
    both started from the same network, its interval tells more than the two intervals do.
    """
    scale = SCALES[metric]
    stages = [name for name in ("pretrain", *names) if finals_of(rows, name)]
    finals = {name: finals_of(rows, name) for name in stages}
    values = {
        name: {measure: mean_entry(seeds) for measure, seeds in final.items()}
        for name, final in finals.items()
    }
    known = finals[names[0]]
    for name in names[1:]:
        for measure in ("final/target", "final/unseen"):
            if measure not in known:
                continue
            pairs = zip(finals[name][measure], finals[names[0]][measure], strict=True)
            values[name][f"difference/{measure}"] = mean_entry([a - b for a, b in pairs])
    # Measure, heading, factor, digits. The sharpness is a percentage already.
    columns = [
        *((f"final/{domain}", f"{domain}{scale.unit}", scale.factor, scale.digits)
          for domain in DOMAINS),
        ("final/sharpness", "sharpness, %", 1, 3),
        ("final/similarity", "CKA", 1, 3),
    ]  # fmt: skip
    columns = [column for column in columns if column[0] in known]
    cells = [
        [name, *(mean_cell(finals[name][measure], factor=factor, digits=digits)
                 for measure, _, factor, digits in columns)]
        for name in stages
    ]  # fmt: skip
    seeds = len(next(iter(finals[names[0]].values())))
    title = f"Mean and {METHOD} over {seeds_label(seeds)}"
    return Summary(values, Table(title, ("method", *(c[1] for c in columns)), cells))


def plot(rows: Sequence[Row], names: Sequence[str], folder: Path, metric: str) -> None:
    """Writes learning_curves.png, gains.png, target_and_unseen.png and trust_radius.png.

    Gains are over the first method, and are left out if there is only one. target_and_unseen.png is
    left out without unseen domains, and trust_radius.png if no method has a trust region.
    """
    scale = SCALES[metric]
    known = finals_of(rows, names[0])
    domains = [domain for domain in DOMAINS if f"final/{domain}" in known]
    curves = {domain: plots.curves(rows, names, f"{metric}/{domain}") for domain in domains}
    labels = {"xlabel": "fine-tuning step", "ylabel": f"{metric}{scale.unit}"}
    titles = {domain: f"{domain.capitalize()} {metric}" for domain in domains}
    starts = finals_of(rows, "pretrain")
    contents = []
    for domain in domains:
        shown = curves[domain]
        if starts:  # the curves begin at the pre-trained network
            shown = {n: {0.0: starts[f"final/{domain}"], **c} for n, c in shown.items() if c}
        contents.append(plots.Panel(titles[domain], shown, labels, scale=scale.factor))
    plots.plot_bands(contents, names, folder / "learning_curves.png")
    if len(names) > 1:
        contents = [
            plots.Panel(
                f"{titles[domain]}: {scale.versus}\n{names[0]}, paired by seed",
                {
                    name: plots.paired_gain(curves[domain][name], curves[domain][names[0]])
                    for name in names[1:]
                },
                {**labels, "ylabel": scale.difference},
                scale=scale.factor,
            )
            for domain in domains
            if domain != "source"
        ]
        plots.plot_bands(contents, names, folder / "gains.png")
    if "unseen" in domains:
        draw = _plot_target_and_unseen if len(names) <= plots.MOST_TOGETHER else _plot_final_gains
        draw(rows, names, folder / "target_and_unseen.png", metric)

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


def _plot_target_and_unseen(
    rows: Sequence[Row], names: Sequence[str], path: Path, metric: str
) -> None:
    """The score on the target against that on unseen domains, and the gains paired by seed."""
    scale = SCALES[metric]
    finals = {name: finals_of(rows, name) for name in names}
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
            plots.cross(axis, target, unseen, name, style[name], scale=scale.factor)
    axes[0].set(
        title=metric.capitalize(),
        xlabel=f"on the target domain{scale.unit}",
        ylabel=f"on unseen domains{scale.unit}",
    )
    if len(axes) > 1:
        for line in (axes[1].axhline, axes[1].axvline):
            line(0, color="black", linewidth=0.8, linestyle=":")
        axes[1].set(
            title=f"{scale.versus.capitalize()} {names[0]}, paired by seed",
            xlabel=f"on the target domain, {scale.difference}",
            ylabel=f"on unseen domains, {scale.difference}",
        )
    figure.suptitle(f"Mean and {METHOD}", fontsize="medium")
    plots.legend(figure, axes[0])
    plots.save(figure, path)


def _plot_final_gains(rows: Sequence[Row], names: Sequence[str], path: Path, metric: str) -> None:
    """Gains paired by seed as one bar per method, for more methods than points can show."""
    plot_gains(rows, names, path, metric, ("target", "unseen"))


def plot_gains(
    rows: Sequence[Row], names: Sequence[str], path: Path, metric: str, domains: Sequence[str]
) -> None:
    """Writes a figure with a panel for each domain, and in it the gain of every method."""
    scale = SCALES[metric]
    finals = {name: finals_of(rows, name) for name in names}

    def gain(name: str, key: str) -> Interval:
        pairs = zip(finals[name][key], finals[names[0]][key], strict=True)
        return mean_interval([scale.factor * (own - first) for own, first in pairs])

    contents = {
        f"{metric.capitalize()}, {domain}": {
            name: gain(name, f"final/{domain}") for name in names[1:]
        }
        for domain in domains
    }
    heading = f"{scale.versus.capitalize()} {names[0]}, paired by seed, {METHOD}"
    plots.plot_comparison(
        contents, names, names[0], path, heading=heading, equal=0.0, xlabel=scale.difference
    )


def finals_of(rows: Sequence[Row], stage: str) -> dict[str, list[float]]:
    """Every final measure of a stage by name: the values of all seeds, in the order of seeds."""
    own = [row for row in rows if row["stage"] == stage and "final/target" in row]
    measures = {key: None for row in own for key in row if key.startswith("final/")}
    return {key: [float(row.get(key, math.nan)) for row in own] for key in measures}
