"""Learning curves and tables from any set of run folders, finished or still running.

python -m experiments.report RUN ... [--out FOLDER]      learning curves, scores, report.md
    --metric NAME     metric to report; may be repeated. By default scores are of final/*, or of
                      the first metric if there are none, and curves are of all metrics
    --baseline NAME   method that the others are compared with; by default the first
    --method NAME     method to report; may be repeated; by default all
    --lower NAME      metric of which less is better; may be repeated
    --tasks KEY       key of the configs, or column of metrics.csv, that tells tasks apart, such as
                      task.target, exp or noise
    --correlation A B two metrics whose rank correlation over methods is reported; may be repeated
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from experiments.analysis import report_figures
from experiments.analysis.collection import Collection, Run, collect, read_run
from experiments.analysis.scores import Score, rank_correlation, score
from experiments.analysis.statistics import (
    BOOTSTRAP_SEEDS,
    FEW_SEEDS,
    METHOD,
    Interval,
)
from experiments.runtime.files import write_text
from experiments.runtime.targets import ConfigError, nearest_name


def markdown(
    collection: Collection,
    runs: Sequence[Run],
    scores: Mapping[str, Mapping[str, Score]],
    baseline: str,
    lower: Sequence[str],
    correlations: Mapping[str, Interval],
) -> str:
    """The report as one page: tables, and links to the figures."""
    names = dict.fromkeys(str(run.config.get("exp")) for run in runs)
    scaled = (
        f" Values of each task ({', '.join(collection.tasks)}) are scaled to [0, 1], "
        "from the lowest of all to the highest."
        if len(collection.tasks) > 1
        else ""
    )
    lines = [
        f"# {', '.join(names)}",
        "",
        f"Means over seeds; gains over {baseline}, paired by seed; interquartile means; and the "
        f"probability that a seed is above one of {baseline} (below, where less is better). Means "
        f"and gains have t intervals, the others bootstrap intervals from {BOOTSTRAP_SEEDS} seeds "
        f"up.{scaled}",
        "",
        *(f"- {note}\n" for note in collection.notes),
        "![Learning curves](learning_curves.png)",
        "",
        "![Scores](scores.png)",
        "",
        f"![Gains over {baseline}](gains.png)",
        "",
        f"![Probability of improvement over {baseline}](improvement.png)",
    ]
    for metric, of_methods in scores.items():
        beats = f"{'below' if metric in lower else 'above'} {baseline}"
        lines += ["", f"## {metric}", ""]
        cells = [
            [method, str(sum(map(len, each.values))), *_cells(each.mean),
             *_optional_cells(each.gain), *_cells(each.middle), *_optional_cells(each.better)]
            for method, each in of_methods.items()
        ]  # fmt: skip
        header = ["method", "seeds", "mean", METHOD, f"gain over {baseline}", METHOD,
                  "interquartile mean", "95 % bootstrap interval",
                  beats, "95 % bootstrap interval"]  # fmt: skip
        lines += _table(header, cells)
    if correlations:
        lines += ["", "## Rank correlation over methods, in each seed", ""]
        cells = [[name, *_cells(found)] for name, found in correlations.items()]
        lines += _table(["metrics", "mean over seeds", METHOD], cells)
    lines += ["", "## Runs", ""]
    cells = [
        [str(run.folder), str(run.config.get("seed")), "yes" if run.finished else "no",
         ", ".join(f"{stage} {step}" for stage, step in _last_steps(run).items())]
        for run in runs
    ]  # fmt: skip
    lines += _table(["folder", "seed", "finished", "last step"], cells)
    return "\n".join(lines) + "\n"


def _last_steps(run: Run) -> dict[str, int]:
    return {str(row["stage"]): int(row["step"]) for row in run.rows}


def _cells(interval: Interval) -> tuple[str, str]:
    if math.isfinite(interval.mean) and math.isnan(interval.low):
        return f"{interval.mean:.4g}", "-"
    return f"{interval.mean:.4g}", f"{interval.low:.4g} to {interval.high:.4g}"


def _optional_cells(interval: Interval | None) -> tuple[str, str]:
    return _cells(interval) if interval else ("", "")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


# Command line


def report(
    folders: Sequence[Path],
    out: Path,
    *,
    metrics: Sequence[str] = (),
    methods: Sequence[str] = (),
    baseline: str | None = None,
    lower: Sequence[str] = (),
    tasks: str | None = None,
    correlation: Sequence[Sequence[str]] = (),
) -> list[str]:
    """Writes learning_curves.png, scores.png, gains.png, improvement.png and report.md to `out`.

    Arguments are those of the command line.

    Returns:
      The notes of the report.

    Raises:
      ConfigError: If an argument or a run folder is wrong.
      OSError: If `out` cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    collection = collect(runs, tasks)
    for method in methods:
        _check_name("--method", method, collection.methods)
    if methods:
        collection.methods = {method: collection.methods[method] for method in methods}
    baseline = baseline or next(iter(collection.methods))
    _check_name("--baseline", baseline, collection.methods)
    known = [name for name in collection.metrics() if collection.having(name)]
    logged = [name for name in known if not name.startswith("time/")]
    if not logged:
        raise ConfigError("there is no metric that a method has in every task")
    for metric in metrics:
        _check_name("--metric", metric, known)
    finals = [name for name in logged if name.startswith("final/")]
    chosen = list(metrics or finals or logged[:1])
    for metric in lower:
        _check_name("--lower", metric, chosen)
    scores = {m: score(collection, m, baseline, lower=m in lower) for m in chosen}
    correlations = {}
    for pair in correlation:
        for metric in pair:
            _check_name("--correlation", metric, known)
        correlations[" and ".join(pair)] = rank_correlation(collection, *pair)
    collection.notes += _notes(collection, runs, scores, several=tasks is not None)
    seeds = [seed for seeds in collection.methods.values() for seed in seeds]
    curves = [
        name
        for name in metrics or logged
        if any(len(seed.series.get(name, ())) > 1 for seed in seeds)
    ]
    out.mkdir(parents=True, exist_ok=True)
    report_figures.plot_curves(collection, curves or logged[:1], out / "learning_curves.png")
    report_figures.plot_scores(collection, scores, out / "scores.png")
    report_figures.plot_gains(collection, scores, baseline, out / "gains.png")
    report_figures.plot_improvement(collection, scores, baseline, lower, out / "improvement.png")
    write_text(out / "report.md", markdown(collection, runs, scores, baseline, lower, correlations))
    return collection.notes


def _notes(
    collection: Collection,
    runs: Sequence[Run],
    scores: Mapping[str, Mapping[str, Score]],
    *,
    several: bool,
) -> list[str]:
    """Notes on missing metrics, small numbers of seeds and unfinished runs.

    `several` says whether tasks are told apart.
    """
    lacking: dict[str, list[str]] = {}
    for metric, of_methods in scores.items():
        without = [method for method in collection.methods if method not in of_methods]
        if without:
            lacking.setdefault(", ".join(without), []).append(metric)
    where = "in every task" if several else "yet"
    notes = [f"{names}: no {', '.join(metrics)} {where}" for names, metrics in lacking.items()]
    few = [
        method
        for method, seeds in collection.methods.items()
        # A task that a method does not have is named above already.
        if min(sum(s.task == task for s in seeds) or FEW_SEEDS for task in collection.tasks)
        < FEW_SEEDS
    ]
    if few:
        notes.append(
            f"fewer than {FEW_SEEDS} seeds, read the intervals with care: {', '.join(few)}"
        )
    unfinished = [str(run.folder) for run in runs if not run.finished]
    if unfinished:
        notes.append(f"not finished: {', '.join(unfinished)}")
    return notes


def _check_name(option: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        nearest = nearest_name(name, names)
        raise ConfigError(f"{option}: got {name!r}, the nearest is {nearest}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Runs the command line; wrong arguments end the process with exit code 2."""
    parser = _Parser(prog="python -m experiments.report", allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder to write to; default: report"
    )
    parser.add_argument("--metric", action="append", default=[], help="default: those of final/*")
    parser.add_argument("--baseline", help="method to compare with; default: the first")
    parser.add_argument("--method", action="append", default=[], help="default: all")
    parser.add_argument("--lower", action="append", default=[], help="metric: less is better")
    parser.add_argument("--tasks", metavar="KEY", help="key or column that names tasks")
    parser.add_argument(
        "--correlation", nargs=2, action="append", default=[], metavar="METRIC",
        help="two metrics: their rank correlation over methods",
    )  # fmt: skip
    given = parser.parse_args()
    try:
        notes = report(
            given.runs, given.out, metrics=given.metric, methods=given.method,
            baseline=given.baseline, lower=given.lower, tasks=given.tasks,
            correlation=given.correlation,
        )  # fmt: skip
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    print("\n".join([*notes, str(given.out / "report.md")]))


if __name__ == "__main__":
    main()
