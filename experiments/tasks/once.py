"""A stage that does all its work in one step and keeps nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.trackers import Row

State = dict[str, jax.Array]


@dataclass(frozen=True)
class Once:
    """A stage of the experiment loop whose rows are all made by one call.

    Attributes:
      name: of the stage.
      measure: gives the rows.
    """

    name: str
    measure: Callable[[], list[Row]]
    num_steps: int = 1
    steps_per_chunk: int = 1

    def init(self, final: Mapping[str, Any]) -> State:
        """There is nothing to keep, but a checkpoint wants an array."""
        del final
        return {"nothing": jnp.zeros([])}

    def batches(self) -> None:
        """There is no data."""

    def advance(
        self, state: State, batches: None, step: int, num_steps: int
    ) -> tuple[State, list[Row]]:
        """The rows."""
        del batches, step, num_steps
        return state, self.measure()

    def finish(self, state: State) -> list[Row]:
        """The rows of `advance` say it all."""
        del state
        return []
