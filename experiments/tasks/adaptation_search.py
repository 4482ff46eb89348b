"""Learning rate and radius for every method of the adaptation experiment."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.tasks.adaptation import Adaptation, HeldOut
from experiments.tasks.search import Search
from experiments.tasks.supervised import apply_eval
from trustjax.data import unit_range
from trustjax.parallel import replicated


@dataclass(kw_only=True)
class AdaptationSearch(Search, Adaptation):
    """The stages of `Adaptation` with the trials of `Search`.

    Validation examples are of the target domain; unseen domains are not looked at.
    """

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        """Validation examples of the target domain alone."""
        domain = self._domain(self.target, self._rows["validation"], salt=1)
        images = unit_range(domain.images[None])
        return jax.device_put(HeldOut(images, domain.labels), replicated(self._devices))

    def _evaluate(self, params: Any, model_state: Any, held_out: HeldOut) -> dict[str, jax.Array]:
        logits = apply_eval(self._network, params, model_state, held_out.images[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, held_out.labels)
        correct = jnp.argmax(logits, -1) == held_out.labels
        return {"validation/accuracy": jnp.mean(correct), "validation/loss": jnp.mean(losses)}

    def _measure(self, params: Any, model_state: Any, held_out: HeldOut) -> dict[str, jax.Array]:
        measures = self._evaluate(params, model_state, held_out)
        return {name.replace("validation", "final"): value for name, value in measures.items()}
