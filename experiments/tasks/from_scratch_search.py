"""Learning rates and other hyperparameters for every method of training from scratch."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.optimizers import Method
from experiments.runtime.task import Summary
from experiments.tasks.from_scratch import FromScratch
from experiments.tasks.search import Grid, Search, label
from experiments.tasks.supervised import Lanes
from experiments.trackers import Row
from trustjax._checks import FieldError


@dataclass(kw_only=True)
class FromScratchSearch(FromScratch):
    """The stages of `FromScratch`, each with all trials of a method, at one noise level.

    Validation examples are taken from the training part.

    Attributes:
      grid: what is tried of each method; see `Search`.
      validation_examples: how many.
    """

    grid: Grid
    validation_examples: int

    held_out_part: ClassVar[str] = "validation"
    lanes_compete: ClassVar[bool] = True

    @property
    def search(self) -> Search:
        """The trials of the methods that are run."""
        methods = {name: self.methods[name] for name in self._names()}
        return Search(methods, self.grid, self.num_seeds)

    def validate(self) -> None:
        """As for the experiment and the search; also there must be one noise level."""
        super().validate()
        self.search.validate()
        if len(self.noise_levels) > 1:
            raise FieldError("noise_levels", "be one in a search", self.noise_levels)
        if self.validation_examples < 1:
            raise FieldError("validation_examples", "be >= 1", self.validation_examples)

    def summarize(self, rows: list[Row]) -> Summary:
        """The best trial of every method; see `Search.summarize`."""
        return self.search.summarize(rows)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Nothing to see: the table says it."""

    def _lanes(self, name: str, method: Method) -> Lanes:
        del method
        return self.search.lanes(name)

    def _label(self, lanes: Lanes) -> list[Row]:
        return label(lanes)

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        rows = super()._rows["train"]
        if self.validation_examples >= len(rows):
            raise FieldError(
                "validation_examples",
                f"be < {len(rows)}, the share of the data kept for training",
                self.validation_examples,
            )
        at = len(rows) - self.validation_examples
        return {"train": rows[:at], "validation": rows[at:]}
