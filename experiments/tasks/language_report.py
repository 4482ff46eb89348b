"""What experiments on text report beside `adaptation_report`: genres, and time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis import plots
from experiments.analysis.statistics import mean_entry
from experiments.runtime.task import Summary
from experiments.tasks.adaptation_report import finals_of, plot_gains
from experiments.trackers import Row

Finals = Mapping[str, Mapping[str, Sequence[float]]]  # stage -> measure -> values of all seeds
_NO_GENRES = {"target", "unseen", "source", "sharpness", "similarity"}


def with_genres_and_time(summary: Summary, rows: Sequence[Row], names: Sequence[str]) -> Summary:
    """The summary with the seconds of a step, and each unseen genre's correlation with the target.

    `values[method]["seconds_per_step"]` is the median time of a step of all seeds together.

    `values["correlation"][genre]` is Pearson's correlation of the two perplexities over methods,
    within a seed. As in Table 9 of arXiv:2310.03646, where the model before fine-tuning is one of
    the points, `with_pretrain` has it and `methods` does not. A genre whose correlation with it is
    below 0 beyond its interval is anticorrelated: what helps on the target harms there. For every
    method, `final/correlated` and `final/anticorrelated` are the mean perplexities over the genres
    of both kinds, and `difference/...` compares them with the first method.
    """
    stages = [name for name in ("pretrain", *names) if finals_of(rows, name)]
    finals = {name: finals_of(rows, name) for name in stages}
    genres = genres_of(finals[names[0]])
    values: dict[str, Any] = {name: dict(found) for name, found in summary.values.items()}
    for name in names:
        if np.isfinite(second := seconds_per_step(rows, name)):
            values[name]["seconds_per_step"] = second
    if len(stages) < 3 or not genres:
        return summary._replace(values=values)
    correlation = {}
    kinds: dict[str, list[str]] = {"correlated": [], "anticorrelated": []}
    for genre in genres:
        points = {"with_pretrain": stages, "methods": names}
        correlation[genre] = {
            kind: mean_entry(_correlations(finals, own, genre))
            for kind, own in points.items()
            if len(own) > 2
        }
        high = correlation[genre]["with_pretrain"]["high"]
        kind = "anticorrelated" if isinstance(high, float) and high < 0 else "correlated"
        kinds[kind].append(genre)
    values = with_groups(values, finals, names, kinds)
    return summary._replace(values={**values, "correlation": correlation, "genres": kinds})


def with_groups(
    values: Mapping[str, Any],
    finals: Finals,
    names: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The values of a summary with those of groups of domains.

    `final/GROUP` of a stage is the mean of its final measures over the domains of the group, and
    `difference/final/GROUP` that minus the mean of the first of `names`, paired by seed.
    """
    found = {name: dict(entries) for name, entries in values.items()}
    for group, domains in groups.items():
        if not domains:
            continue
        means = {
            name: np.mean([own[f"final/{domain}"] for domain in domains], axis=0)
            for name, own in finals.items()
        }
        for name in finals:
            found[name][f"final/{group}"] = mean_entry(means[name].tolist())
        for name in names[1:]:
            difference = (means[name] - means[names[0]]).tolist()
            found[name][f"difference/final/{group}"] = mean_entry(difference)
    return found


def genres_of(finals: Mapping[str, Sequence[float]]) -> list[str]:
    """The unseen genres among the final measures."""
    found = [name.removeprefix("final/") for name in finals]
    return [name for name in found if name not in _NO_GENRES]


def _correlations(finals: Finals, stages: Sequence[str], genre: str) -> list[float]:
    """Pearson's correlation over stages of target and genre, by seed."""
    target, other = (
        np.array([finals[stage][f"final/{domain}"] for stage in stages])
        for domain in ("target", genre)
    )
    return [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(target.T, other.T, strict=True)]


def plot(rows: Sequence[Row], names: Sequence[str], folder: Path) -> None:
    """Writes time.png, and genres.png if there are unseen ones.

    The seconds are those that all seeds of a method take together: the steps times the median time
    of one, without compilation and evaluation of the first chunk.
    """
    by_step = plots.curves(rows, names, "perplexity/target")
    labels = {"ylabel": "perplexity", "yscale": "log"}
    contents = [
        plots.Panel("Perplexity by step", by_step, {**labels, "xlabel": "step"}),
        plots.Panel(
            "Perplexity by seconds, all seeds together",
            {name: _by_seconds(rows, name, found) for name, found in by_step.items()},
            {**labels, "xlabel": "seconds"},
        ),
    ]
    plots.plot_bands(contents, names, folder / "time.png")
    genres = genres_of(finals_of(rows, names[0]))
    if genres and len(names) > 1:
        plot_gains(rows, names, folder / "genres.png", "perplexity", genres)


def seconds_per_step(rows: Sequence[Row], name: str) -> float:
    """Median seconds of a step of all seeds of a method; NaN if no chunk was timed."""
    rates = plots.curve(rows, name, "time/steps_per_second")
    return 1 / float(np.median([rate for each in rates.values() for rate in each] or [np.nan]))


def _by_seconds(rows: Sequence[Row], name: str, curve: plots.Curve) -> plots.Curve:
    second = seconds_per_step(rows, name)
    return {step * second: seeds for step, seeds in curve.items()} if second > 0 else {}
