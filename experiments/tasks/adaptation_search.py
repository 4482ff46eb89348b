"""Learning rate and radius for every method of the adaptation experiment."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from experiments.optimizers import Method
from experiments.runtime.task import Summary
from experiments.tasks.adaptation import Adaptation, HeldOut
from experiments.tasks.search import Grid, Search, label
from experiments.tasks.supervised import Lanes, apply_eval
from experiments.trackers import Row
from trustjax.data import unit_range
from trustjax.parallel import replicated


@dataclass(kw_only=True)
class AdaptationSearch(Adaptation):
    """The stages of `Adaptation`, each with all trials of a method side by side.

    Validation examples are of the target domain; unseen domains are not looked at.

    Attributes:
      grid: what is tried of each method; see `Search`.
    """

    grid: Grid

    lanes_compete: ClassVar[bool] = True

    @property
    def search(self) -> Search:
        """The trials of the methods that are run."""
        methods = {name: self.methods[name] for name in self._names()}
        return Search(methods, self.grid, self.num_seeds)

    def validate(self) -> None:
        """As for the experiment and the search."""
        super().validate()
        self.search.validate()

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
    def _held_out(self) -> HeldOut:
        """Validation examples of the target domain alone."""
        domain = self._domain(self.target, self._rows["validation"], salt=1)
        images = unit_range(domain.images[None])
        sharding = replicated(self._devices)
        return HeldOut(*jax.device_put((images, domain.labels), sharding))

    def _evaluate(self, params: Any, model_state: Any, held_out: HeldOut) -> dict[str, jax.Array]:
        logits = apply_eval(self._network, params, model_state, held_out.images[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, held_out.labels)
        correct = jnp.argmax(logits, -1) == held_out.labels
        return {"validation/accuracy": jnp.mean(correct), "validation/loss": jnp.mean(losses)}

    def _measure(self, params: Any, model_state: Any, held_out: HeldOut) -> dict[str, jax.Array]:
        measures = self._evaluate(params, model_state, held_out)
        return {name.replace("validation", "final"): value for name, value in measures.items()}
