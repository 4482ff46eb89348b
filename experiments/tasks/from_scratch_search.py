"""Learning rates and other hyperparameters for every method of training from scratch."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.tasks.from_scratch import FromScratch
from experiments.tasks.search import Search


@dataclass(kw_only=True)
class FromScratchSearch(Search, FromScratch):
    """The stages of `FromScratch` with the trials of `Search`, at one noise level.

    Validation examples are taken from the training part.

    Attributes:
      validation_examples: how many.
    """

    validation_examples: int

    held_out_part: ClassVar[str] = "validation"

    def validate(self) -> None:
        """As for the experiment and the search; also there must be one noise level."""
        super().validate()
        if len(self.noise_levels) > 1:
            raise ValueError(f"noise_levels must be one in a search, got {self.noise_levels}")
        if self.validation_examples < 1:
            raise ValueError(f"validation_examples must be >= 1, got {self.validation_examples}")

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        rows = super()._rows["train"]
        if self.validation_examples >= len(rows):
            raise ValueError(
                f"validation_examples must be < {len(rows)}, the share of the data kept for "
                f"training, got {self.validation_examples}"
            )
        at = len(rows) - self.validation_examples
        return {"train": rows[:at], "validation": rows[at:]}
