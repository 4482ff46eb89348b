"""Search for learning rates and other hyperparameters, with the same budget for every method.

All trials of a method are trained side by side in one program, from the same seeds, and ranked by
their accuracy on validation examples; test examples are never used. A trial that diverges ranks
last; the search ends with an error only if every trial of a method diverges.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.optimizers import Method
from experiments.runtime.task import Diverged, Summary, Table
from experiments.tasks.supervised import Lanes
from experiments.trackers import Row
from trustjax._checks import FieldError

Grid = Mapping[str, Mapping[str, Sequence[float]]]

MEASURES = ("accuracy", "loss")


@dataclass(frozen=True)
class Search:
    """The trials of several methods, and the best trial of each.

    Attributes:
      methods: Methods to search, by name.
      grid: Values to try by method and hyperparameter, `learning_rate` among them; every
        combination is a trial. A hyperparameter that is not named keeps its configured value.
      num_seeds: Number of seeds of every trial.
    """

    methods: Mapping[str, Method]
    grid: Grid
    num_seeds: int

    def validate(self) -> None:
        """Raises ValueError for unknown hyperparameters and for unequal numbers of trials."""
        for name, method in self.methods.items():
            known = {"learning_rate", *method.hyperparameters}
            if unknown := set(self.grid.get(name, ())) - known:
                raise FieldError(f"grid.{name}", f"name some of {sorted(known)}", sorted(unknown))
        counts = {name: len(self.trials(name)) for name in self.methods}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise FieldError("grid", "give every method equally many trials", counts)

    def trials(self, name: str) -> list[dict[str, float]]:
        """The hyperparameters of every trial of a method; no trials if the grid lacks it."""
        if name not in self.grid:
            return []
        method = self.methods[name]
        configured = {"learning_rate": method.learning_rate, **method.hyperparameters}
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
        """The best trial of every method by mean over seeds: highest accuracy, then lowest loss.

        A trial of which any seed diverged counts as diverged. Raises Diverged if all trials of a
        method did.
        """
        trials: dict[str, list[dict[str, float]]] = {}
        best: dict[str, dict[str, float]] = {}
        for name in self.methods:
            finals = [row for row in rows if row["stage"] == name and "final/accuracy" in row]
            tried = [
                {**trial, **self._mean_over_seeds(finals, trial)} for trial in self.trials(name)
            ]
            whole = [each for each in tried if "diverged" not in each]
            if not whole:
                raise Diverged(f"{name}: of every trial a seed diverged; see metrics.csv")
            trials[name] = tried
            # Few validation examples make equal accuracies likely, which the loss tells apart.
            best[name] = max(whole, key=lambda each: (each["accuracy"], -each["loss"]))
        cells = []
        for name, found in best.items():
            rate, accuracy, loss = (found[key] for key in ("learning_rate", *MEASURES))
            others = ", ".join(
                f"{k} = {v:g}" for k, v in found.items() if k not in ("learning_rate", *MEASURES)
            )
            cells.append((name, f"{rate:g}", others, f"{100 * accuracy:.1f}", f"{loss:.3f}"))
        columns = ("method", "learning rate", "others", "validation accuracy, %", "loss")
        table = Table("Best on the validation split", columns, cells)
        return Summary({"best": best, "trials": trials}, table)

    def _mean_over_seeds(
        self, finals: Sequence[Row], trial: Mapping[str, float]
    ) -> dict[str, float]:
        logged = {key: _logged(jnp.asarray(value, float)) for key, value in trial.items()}
        own = [row for row in finals if all(row[key] == value for key, value in logged.items())]
        if len(own) < self.num_seeds:  # a diverged seed has no final measures
            return {"diverged": True}
        return {name: float(np.mean([row[f"final/{name}"] for row in own])) for name in MEASURES}


def label(lanes: Lanes) -> list[Row]:
    """Leading columns of the rows of each lane: its seed and its hyperparameters."""
    values = {"learning_rate": lanes.learning_rate, **lanes.hyperparameters}
    columns = {key: np.asarray(value) for key, value in values.items()}
    return [
        {"seed": int(index), **{key: _logged(v[lane]) for key, v in columns.items()}}
        for lane, index in enumerate(lanes.seed_index)
    ]


def _logged(number: jax.typing.ArrayLike) -> float:
    """A hyperparameter as metrics.csv has it, with six digits."""
    return float(f"{float(np.asarray(number)):.6g}")
