"""Search for learning rates and other hyperparameters, with the same budget for every method.

All trials of a method are trained side by side in one program, from the same seeds, and ranked by
measures at the end of training, such as the accuracy on validation examples. A trial that diverges
ranks last; the search ends with an error only if every trial of a method diverges.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.optimizers import Method
from experiments.runtime.task import Diverged, Summary, Table
from experiments.tasks.supervised import Lanes
from experiments.trackers import Row
from trustjax._checks import FieldError

Grid = Mapping[str, Mapping[str, Sequence[float]]]


class Measure(NamedTuple):
    """A number by which trials are ranked.

    Attributes:
      name: Its name; rows of metrics have it as "final/NAME".
      column: Heading of its column in the table.
      sign: 1 if the highest number is the best, -1 if the lowest is.
      show: How the table shows a number.
    """

    name: str
    column: str
    sign: int
    show: Callable[[float], str]


# Few validation examples make equal accuracies likely, which the loss tells apart.
VALIDATION = (
    Measure("accuracy", "validation accuracy, %", 1, lambda accuracy: f"{100 * accuracy:.1f}"),
    Measure("loss", "loss", -1, lambda loss: f"{loss:.3f}"),
)
# Of text, for which the loss is all there is.
VALIDATION_LOSS = (Measure("loss", "validation loss, nats", -1, lambda loss: f"{loss:.4f}"),)


@dataclass(frozen=True)
class Search:
    """The trials of several methods, and the best trial of each.

    Attributes:
      configured: Hyperparameters by method and name, as configured, `learning_rate` among them.
      grid: Values to try by method and hyperparameter; every combination is a trial. A
        hyperparameter that is not named keeps its configured value.
      num_seeds: Number of seeds of every trial.
      title: Title of the table of the best trials.
      measures: Measures that rank the trials; later ones decide between equals.
    """

    configured: Mapping[str, Mapping[str, float]]
    grid: Grid
    num_seeds: int
    title: str = "Best on the validation split"
    measures: Sequence[Measure] = VALIDATION

    def validate(self) -> None:
        """Raises ValueError for unknown hyperparameters and for unequal numbers of trials."""
        for name, known in self.configured.items():
            if unknown := set(self.grid.get(name, ())) - {*known}:
                raise FieldError(f"grid.{name}", f"name some of {sorted(known)}", sorted(unknown))
        counts = {name: len(self.trials(name)) for name in self.configured}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise FieldError("grid", "give every method equally many trials", counts)

    def trials(self, name: str) -> list[dict[str, float]]:
        """The hyperparameters of every trial of a method; no trials if the grid lacks it."""
        if name not in self.grid:
            return []
        configured = self.configured[name]
        tried = [self.grid[name].get(key, [value]) for key, value in configured.items()]
        return [dict(zip(configured, values, strict=True)) for values in itertools.product(*tried)]

    def lanes(self, name: str) -> Lanes:
        """One lane for every trial of a method and every seed."""
        trials = self.trials(name)
        columns = {
            key: jnp.repeat(jnp.array([trial[key] for trial in trials]), self.num_seeds)
            for key in trials[0]
        }
        seed_index = jnp.tile(jnp.arange(self.num_seeds), len(trials))
        return Lanes(seed_index, columns.pop("learning_rate"), columns)

    def summarize(self, rows: list[Row]) -> Summary:
        """The best trial of every method, by the means of the measures over seeds.

        A trial of which any seed diverged counts as diverged. Raises Diverged if all trials of a
        method did.
        """
        trials: dict[str, list[dict[str, float]]] = {}
        best: dict[str, dict[str, float]] = {}
        for name in self.configured:
            trials[name] = [
                {**trial, **self._mean_over_seeds(rows, name, trial)} for trial in self.trials(name)
            ]
            whole = [each for each in trials[name] if "diverged" not in each]
            if not whole:
                raise Diverged(f"{name}: of every trial a seed diverged; see metrics.csv")
            best[name] = max(whole, key=self._rank)
        measured = {measure.name for measure in self.measures}
        cells = []
        for name, found in best.items():
            others = found.keys() - measured - {"learning_rate"}
            cells.append([
                name,
                f"{found['learning_rate']:g}",
                ", ".join(f"{key} = {found[key]:g}" for key in found if key in others),
                *(measure.show(found[measure.name]) for measure in self.measures),
            ])  # fmt: skip
        columns = ("method", "learning rate", "others", *(each.column for each in self.measures))
        return Summary({"best": best, "trials": trials}, Table(self.title, columns, cells))

    def _rank(self, trial: Mapping[str, float]) -> list[float]:
        return [measure.sign * trial[measure.name] for measure in self.measures]

    def _mean_over_seeds(
        self, rows: Sequence[Row], name: str, trial: Mapping[str, float]
    ) -> dict[str, float]:
        metrics = {measure.name: f"final/{measure.name}" for measure in self.measures}
        wanted = {"stage": name, **{key: _logged(value) for key, value in trial.items()}}
        finals = [row for row in rows if row.keys() >= {*metrics.values()}]
        own = [row for row in finals if all(row[key] == value for key, value in wanted.items())]
        if len(own) < self.num_seeds:  # a diverged seed has no final measures
            return {"diverged": True}
        return {
            key: float(np.mean([row[metric] for row in own])) for key, metric in metrics.items()
        }


def search_of_methods(
    methods: Mapping[str, Method],
    grid: Grid,
    num_seeds: int,
    measures: Sequence[Measure] = VALIDATION,
) -> Search:
    """The search among the learning rates and hyperparameters of `methods`, by validation."""
    configured = {
        name: {"learning_rate": method.learning_rate, **method.hyperparameters}
        for name, method in methods.items()
    }
    return Search(configured, grid, num_seeds, measures=measures)


def label(lanes: Lanes) -> list[Row]:
    """Leading columns of the rows of each lane: its seed and its hyperparameters."""
    values = {"learning_rate": lanes.learning_rate, **lanes.hyperparameters}
    columns = {key: np.asarray(value) for key, value in values.items()}
    return [
        {"seed": int(index), **{key: _logged(v[lane]) for key, v in columns.items()}}
        for lane, index in enumerate(lanes.seed_index)
    ]


def _logged(number: jax.typing.ArrayLike) -> float:
    """A hyperparameter as metrics.csv has it: six digits of the float32 that was trained with."""
    return float(f"{float(jnp.asarray(number, float)):.6g}")
