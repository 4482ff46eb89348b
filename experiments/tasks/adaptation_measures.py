"""What experiments on transfer measure of one network; under vmap, of all lanes at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.tasks.objectives import Batch, Objective, accuracy, mean_loss
from trustjax.geometry import epsilon_sharpness, linear_cka

PyTree = Any
# A number by which a domain is judged, from the objective, logits and batch.
Score = Callable[[Objective, jax.Array, Batch], jax.Array]
# Of frozen weights, params, model_state and held-out examples.
Measure = Callable[[PyTree, PyTree, PyTree, Batch], dict[str, jax.Array]]


class Measures(NamedTuple):
    """What is measured after every chunk of a training, and at its end."""

    after_chunk: Measure
    final: Measure


def perplexity(objective: Objective, logits: jax.Array, batch: Batch) -> jax.Array:
    """Exponential of the mean cross-entropy, []."""
    return jnp.exp(mean_loss(objective, logits, batch))


SCORES: dict[str, Score] = {"accuracy": accuracy, "perplexity": perplexity}


def domain_measures(
    objective: Objective,
    metric: str,
    unseen: Sequence[str],
    sharpness_examples: int,
    *,
    has_source: bool = True,
    is_parallel: bool = True,
) -> Measures:
    """The score in every domain; at the end also sharpness on the target and similarity to it.

    The measures take batches with a leading axis of domains: the source if there is one, the
    target, and the unseen domains.

    Args:
      objective: The network and its labels.
      metric: Score of a domain, a name in `SCORES`.
      unseen: Names of the unseen domains, which name their scores.
      sharpness_examples: Target examples on which the sharpness is measured.
      has_source: Whether the first domain is the source.
      is_parallel: Whether an example of a domain shows the same thing in all others, so that
        features can be compared.
    """
    first = ["source", "target"] if has_source else ["target"]

    def scores(
        frozen: PyTree, params: PyTree, model_state: PyTree, held_out: Batch
    ) -> dict[str, jax.Array]:
        def of_domain(batch: Batch) -> jax.Array:
            logits, _ = objective.outputs(frozen, params, model_state, batch)
            return SCORES[metric](objective, logits, batch)

        # One domain after the other, to hold the activations of one only.
        found = dict(zip([*first, *unseen], jax.lax.map(of_domain, held_out), strict=True))
        mean = jnp.mean(jnp.stack([found[name] for name in unseen])) if unseen else None
        return found if mean is None else {**found, "unseen": mean}

    def after_chunk(
        frozen: PyTree, params: PyTree, model_state: PyTree, held_out: Batch
    ) -> dict[str, jax.Array]:
        found = scores(frozen, params, model_state, held_out)
        shown = [name for name in (*first, "unseen") if name in found]
        return {f"{metric}/{name}": found[name] for name in shown}

    def final(
        frozen: PyTree, params: PyTree, model_state: PyTree, held_out: Batch
    ) -> dict[str, jax.Array]:
        target = jax.tree.map(lambda x: x[len(first) - 1], held_out)
        few = jax.tree.map(lambda x: x[:sharpness_examples], target)

        def loss(params: PyTree) -> jax.Array:
            logits, _ = objective.outputs(frozen, params, model_state, few)
            return mean_loss(objective, logits, few)

        features = partial(objective.features, frozen, params, model_state)
        found = scores(frozen, params, model_state, held_out)
        measured = {f"final/{name}": value for name, value in found.items()}
        measured["final/sharpness"] = epsilon_sharpness(loss, params)
        if unseen and is_parallel:
            # Linear CKA between the features (what enters the head) of the target examples and
            # those of the same examples in an unseen domain, averaged over these domains.
            of_target = features(target)
            others = jax.tree.map(lambda x: x[len(first) :], held_out)
            similarities = jax.lax.map(lambda batch: linear_cka(of_target, features(batch)), others)
            measured["final/similarity"] = jnp.mean(similarities)
        return measured

    return Measures(after_chunk, final)


def validation_measures(objective: Objective, metric: str) -> Measures:
    """Score and mean loss on the validation examples, after every chunk and at the end."""

    def measure(
        prefix: str, frozen: PyTree, params: PyTree, model_state: PyTree, held_out: Batch
    ) -> dict[str, jax.Array]:
        batch = jax.tree.map(lambda x: x[0], held_out)
        logits, _ = objective.outputs(frozen, params, model_state, batch)
        return {
            f"{prefix}/{metric}": SCORES[metric](objective, logits, batch),
            f"{prefix}/loss": mean_loss(objective, logits, batch),
        }

    return Measures(partial(measure, "validation"), partial(measure, "final"))
