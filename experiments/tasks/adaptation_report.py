"""What the adaptation experiment shows: the table, summary.json and the figures."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from experiments import plots
from experiments.loop import Row, Summary, Table
from experiments.statistics import Interval, bootstrap_mean

# Measure, heading, factor, digits. Sharpness is already in percent.
COLUMNS = (
    ("final/target", "target, %", 100, 1),
    ("final/unseen", "unseen, %", 100, 1),
    ("final/source", "source, %", 100, 1),
    ("final/sharpness", "sharpness, %", 1, 3),
    ("final/similarity", "CKA", 1, 3),
)


def summarize(rows: Sequence[Row], names: Sequence[str]) -> Summary:
    """Mean and 95 % bootstrap interval over seeds, for every method and the pre-training if any.

    `values[method][measure]` holds `mean`, `low`, `high` and `seeds`, the single values. Under
    `difference` stands each seed's gain in target and unseen accuracy over the first method, which
    started from the same network: a narrower comparison than that of two intervals.
    """
    stages = [name for name in ("pretrain", *names) if _finals(rows, name)]
    finals = {name: _finals(rows, name) for name in stages}
    values = {
        name: {measure: _entry(seeds) for measure, seeds in final.items()}
        for name, final in finals.items()
    }
    for name in names[1:]:
        for measure in ("final/target", "final/unseen"):
            pairs = zip(finals[name][measure], finals[names[0]][measure], strict=True)
            values[name][f"difference/{measure}"] = _entry([a - b for a, b in pairs])
    cells = [
        [name, *(_cell(finals[name][m], factor, digits) for m, _, factor, digits in COLUMNS)]
        for name in stages
    ]
    seeds = len(next(iter(finals[names[0]].values())))
    title = f"Mean and 95 % bootstrap interval over seeds, {seeds} of them"
    return Summary(values, Table(title, ("method", *(c[1] for c in COLUMNS)), cells))


def plot(rows: Sequence[Row], names: Sequence[str], folder: Path) -> None:
    """Writes learning_curves.png, target_and_unseen.png and, with attacks, trust_radius.png."""
    style = plots.styles(names)

    figure, axes = plots.panels(3)
    for axis, domain in zip(axes, ("target", "unseen", "source"), strict=True):
        for name in names:
            curves = _curves(rows, name, f"accuracy/{domain}")
            plots.band(axis, curves, name, style[name], scale=100)
        if starts := _finals(rows, "pretrain"):
            start = bootstrap_mean(starts[f"final/{domain}"]).mean
            axis.axhline(100 * start, color="grey", linestyle=":", label="pretrained")
        axis.set(title=f"{domain} accuracy", xlabel="fine-tuning step", ylabel="accuracy, %")
    plots.legend(figure, axes[0])
    plots.save(figure, folder / "learning_curves.png")

    figure, (axis,) = plots.panels(1, width=7.4, height=4.6)
    for name in names:
        target, unseen = (bootstrap_mean(_finals(rows, name)[f"final/{d}"])
                          for d in ("target", "unseen"))  # fmt: skip
        axis.errorbar(
            100 * target.mean,
            100 * unseen.mean,
            xerr=_arms(target),
            yerr=_arms(unseen),
            label=name,
            markersize=7,
            capsize=2,
            **{**style[name], "linestyle": "none"},
        )
    axis.set(
        title="Adapted and kept (95 % intervals over seeds)",
        xlabel="accuracy on the target domain, %",
        ylabel="mean accuracy on unseen domains, %",
    )
    plots.legend(figure, axis)
    plots.save(figure, folder / "target_and_unseen.png")

    attacking = [name for name in names if _curves(rows, name, "trust/radius")]
    if not attacking:
        return
    figure, axes = plots.panels(2)
    for axis, metric in zip(axes, ("trust/radius", "trust/used"), strict=True):
        for name in attacking:
            plots.band(axis, _curves(rows, name, metric), name, style[name])
        axis.set(title=metric, xlabel="fine-tuning step")
    axes[0].set(yscale="log", ylabel="radius of the last attacks")
    axes[1].set(ylim=(0, 1.1), ylabel="distance / radius")
    plots.legend(figure, axes[0])
    plots.save(figure, folder / "trust_radius.png")


def _finals(rows: Sequence[Row], stage: str) -> dict[str, list[float]]:
    """Every final measure of a stage: its value for each seed."""
    finals: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] == stage:
            for key, value in row.items():
                if key.startswith("final/") and value != "":
                    finals[key].append(float(value))
    return dict(finals)


def _curves(rows: Sequence[Row], stage: str, metric: str) -> dict[float, list[float]]:
    """A metric of a stage by step: its value for each seed."""
    curves: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] == stage and row.get(metric, "") != "":
            curves[float(row["step"])].append(float(row[metric]))
    return dict(curves)


def _entry(seeds: Sequence[float]) -> dict[str, float | list[float]]:
    return {**bootstrap_mean(seeds)._asdict(), "seeds": list(seeds)}


def _cell(seeds: Sequence[float], factor: float, digits: int) -> str:
    mean, low, high = (f"{factor * value:.{digits}f}" for value in bootstrap_mean(seeds))
    return f"{mean}\n{low}-{high}"


def _arms(interval: Interval) -> list[list[float]]:
    """Lengths of the error bars below and above, in percent."""
    mean, low, high = (100 * value for value in interval)
    return [[mean - low], [high - mean]]
