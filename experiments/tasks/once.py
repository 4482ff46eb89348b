"""A stage that does all its work in one step and keeps no state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.trackers import Row

State = dict[str, jax.Array]


@dataclass(frozen=True)
class Once:
    """A stage of the experiment loop whose rows all come from one call.

    Attributes:
      name: Name of the stage.
      measure: Returns the rows.
      num_steps: Always 1.
      steps_per_chunk: Always 1.
    """

    name: str
    measure: Callable[[], list[Row]]
    num_steps: int = 1
    steps_per_chunk: int = 1

    def init(self, final: Mapping[str, Any]) -> State:
        """A placeholder: there is nothing to keep, but a checkpoint needs an array."""
        del final
        return {"nothing": jnp.zeros([])}

    def batches(self) -> None:
        """There is no data."""

    def advance(
        self, state: State, batches: None, step: int, num_steps: int
    ) -> tuple[State, list[Row]]:
        """The unchanged state, and the rows of `measure`."""
        del batches, step, num_steps
        return state, self.measure()

    def finish(self, state: State) -> list[Row]:
        """No rows beside those of `advance`."""
        del state
        return []
