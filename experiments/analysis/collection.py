"""Run folders, read and arranged by method, task and seed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.runtime.config import flat, read_config
from experiments.runtime.targets import ConfigError, nearest_name
from experiments.trackers import Row, read_rows

# Parts of keys that are no settings of a method: runs of one method may differ in them.
_NOT_SETTINGS = {
    "exp",
    "seed",
    "num_seeds",
    "only",
    "tracker",
    "checkpoint",
    "deterministic",
    "mesh",
}


class Run(NamedTuple):
    """A run folder: its config by full keys, its rows of metrics, and whether it is complete."""

    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    finished: bool


class Seed(NamedTuple):
    """One seed of a method in a task.

    Attributes:
      run: The run that the seed belongs to.
      task: Name of the task; empty if there is only one.
      key: Root seed of the run, and the number of the seed in it; equal keys are paired.
      series: Values by metric and step.
    """

    run: Run
    task: str
    key: tuple[Any, Any]
    series: dict[str, dict[int, float]]

    def last(self, metric: str) -> float:
        """The value at the last step."""
        return self.series[metric][max(self.series[metric])]


@dataclass
class Collection:
    """All seeds of all methods.

    Attributes:
      tasks: Names of the tasks.
      methods: Seeds by method.
      notes: Remarks that the reader of a report must know.
    """

    tasks: list[str] = field(default_factory=list)
    methods: dict[str, list[Seed]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def metrics(self) -> list[str]:
        """Names of all metrics, in the order of the columns of metrics.csv."""
        seeds = (seed for seeds in self.methods.values() for seed in seeds)
        return [*dict.fromkeys(metric for seed in seeds for metric in seed.series)]

    def having(self, metric: str) -> dict[str, list[Seed]]:
        """The methods that have a metric in every task, with their seeds that have it.

        Seeds are in the order of their tasks and keys, whatever the order of the runs.
        """
        found = {}
        for method, seeds in self.methods.items():
            having = [seed for seed in seeds if metric in seed.series]
            having.sort(key=lambda seed: (self.tasks.index(seed.task), seed.key))
            if {seed.task for seed in having} == set(self.tasks):
                found[method] = having
        return found


def read_run(folder: Path) -> Run:
    """Reads config.yaml and metrics.csv. Raises ConfigError if `folder` holds no run."""
    for name in ("config.yaml", "metrics.csv"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: holds no run (no {name})")
    config, metrics = folder / "config.yaml", folder / "metrics.csv"
    try:
        found = flat(read_config(config).config)
        rows = read_rows(metrics)
    except (AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{folder}: cannot be read: {error}") from error
    if not rows or not all("stage" in row and "step" in row for row in rows):
        raise ConfigError(f"{metrics}: has no rows with stage and step yet")
    return Run(folder, found, rows, finished=(folder / "summary.json").is_file())


def collect(runs: Sequence[Run], tasks: str | None = None) -> Collection:
    """Arranges the rows of all runs by method, task and seed.

    A method is a stage. If runs of the same task differ in settings, these are part of the method's
    name, and are the whole name if there is only one stage. A setting of another stage, such as
    task.agents.ppo.discount for the stage trpo, is no part of it. `tasks` is the key of the
    configs, or the column of metrics.csv, that tells tasks apart. Raises ConfigError for runs that
    cannot be compared.
    """
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise ConfigError(f"a run is given twice: {' '.join(str(run.folder) for run in runs)}")
    experiments = {str(run.config.get("exp")): run.folder for run in runs}
    if len(experiments) > 1 and tasks != "exp":
        found = ", ".join(f"{folder} is of {name}" for name, folder in experiments.items())
        raise ConfigError(f"different experiments: {found}; --tasks exp takes them as tasks")
    settings = _settings(runs, tasks)
    stages = {str(row["stage"]) for run in runs for row in run.rows}
    collection = Collection()
    seen: dict[tuple[str, str, Any], Path] = {}
    for run in runs:
        for (stage, task), seeds in _series(run, tasks).items():
            others = stages - {stage}
            own = [text for key, text in settings[run.folder]
                   if not _belongs_beside(key, stage, others, run.config)]  # fmt: skip
            method = ", ".join([stage, *own] if others or not own else own)
            first = seen.setdefault((method, task, run.config.get("seed")), run.folder)
            if first != run.folder:
                collection.notes.append(
                    f"{method} of {run.folder} is left out: the same seeds as in {first}"
                )
                continue
            known = collection.methods.setdefault(method, [])
            known += [
                Seed(run, task, (run.config.get("seed"), seed), series)
                for seed, series in seeds.items()
            ]
            if task not in collection.tasks:
                collection.tasks.append(task)
    return collection


def _settings(runs: Sequence[Run], tasks: str | None) -> dict[Path, list[tuple[str, str]]]:
    """Keys and short `name=value` of what differs between runs of a task; see `collect`."""
    stages = {run.folder: {str(row["stage"]) for row in run.rows} for run in runs}
    everyone = set().union(*stages.values())

    def differs(key: str) -> bool:
        # What belongs to a stage matters only in runs that have it.
        owners = everyone & {*key.split(".")}
        values: dict[str, set[str]] = {}
        for run in runs:
            if not owners or owners & stages[run.folder]:
                task = repr(run.config.get(tasks)) if tasks else ""
                values.setdefault(task, set()).add(repr(run.config.get(key)))
        return any(len(each) > 1 for each in values.values())

    every = dict.fromkeys(key for run in runs for key in run.config)
    keys = [k for k in every if k != tasks and not _NOT_SETTINGS & {*k.split(".")} and differs(k)]
    # A target goes by the key above it and its own last part, such as attack=sam.
    shown = {key: key.removesuffix("._target_") for key in keys}
    return {
        run.folder: [
            (key, f"{_short(shown[key], shown.values())}={_value(key, run.config[key])}")
            for key in keys
            if key in run.config
        ]
        for run in runs
    }


def _belongs_beside(key: str, stage: str, others: set[str], config: Iterable[str]) -> bool:
    """Whether a key is of one of the `others` that stand beside `stage`, as task.agents.NAME do."""
    parts = key.split(".")
    beside = {".".join([*parts[:i], stage, ""]) for i, part in enumerate(parts) if part in others}
    return any(each.startswith(tuple(beside)) for each in config) if beside else False


def _short(key: str, keys: Iterable[str]) -> str:
    parts = key.split(".")
    for count in range(1, len(parts)):
        end = "." + ".".join(parts[-count:])
        if sum(f".{other}".endswith(end) for other in keys) == 1:
            return end[1:]
    return key


def _value(key: str, value: Any) -> str:
    return str(value).rpartition(".")[2] if key.endswith("_target_") else str(value)


def _series(
    run: Run, tasks: str | None
) -> dict[tuple[str, str], dict[Any, dict[str, dict[int, float]]]]:
    """Values of a run by stage and task, by seed, by metric and by step."""
    columns = dict.fromkeys(column for row in run.rows for column in row)
    if tasks is not None and tasks not in run.config and tasks not in columns:
        nearest = nearest_name(tasks, [*run.config, *columns])
        raise ConfigError(f"--tasks: {run.folder} has no {tasks!r}, the nearest is {nearest}")
    found: dict[tuple[str, str], dict[Any, dict[str, dict[int, float]]]] = {}
    for row in run.rows:
        if tasks is not None and tasks not in run.config and tasks not in row:
            continue  # a stage that all tasks start from, such as pre-training
        task = "" if tasks is None else str(run.config.get(tasks, row.get(tasks)))
        seeds = found.setdefault((str(row["stage"]), task), {})
        series = seeds.setdefault(row.get("seed"), {})
        for metric, value in row.items():
            if metric in ("stage", "step", "seed", tasks) or isinstance(value, str):
                continue
            steps = series.setdefault(metric, {})
            if int(row["step"]) in steps:
                raise ConfigError(
                    f"{run.folder}: stage {row['stage']} has {metric} twice for seed "
                    f"{row.get('seed')} at step {row['step']}; --tasks COLUMN tells its rows apart"
                )
            steps[int(row["step"])] = float(value)
    return found
