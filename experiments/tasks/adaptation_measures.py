"""What the adaptation experiment measures of one network; under vmap, of all lanes at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.tasks.supervised import apply_eval
from trustjax.geometry import epsilon_sharpness, linear_cka

PyTree = Any


class HeldOut(NamedTuple):
    """Examples that no network is trained on.

    Attributes:
      images: Float32 [domains, examples, height, width, channels] in [0, 1]. Of test examples, the
        first domain is the source, the second the target, and the others are unseen; validation
        examples are of the target alone.
      labels: Int32 [examples], the same in every domain.
    """

    images: jax.Array
    labels: jax.Array


Measure = Callable[[PyTree, PyTree, HeldOut], dict[str, jax.Array]]  # of params and model_state


class Measures(NamedTuple):
    """What is measured after every chunk of a training, and at its end."""

    after_chunk: Measure
    final: Measure


def domain_measures(network: nn.Module, unseen: Sequence[str], sharpness_examples: int) -> Measures:
    """Accuracy in every domain; at the end also sharpness on the target and similarity to it.

    Args:
      network: Flax module.
      unseen: Shifts of the unseen domains, which name their accuracies.
      sharpness_examples: Target examples on which the sharpness is measured.
    """

    def domain_accuracies(params: PyTree, model_state: PyTree, held_out: HeldOut) -> jax.Array:
        def accuracy(images: jax.Array) -> jax.Array:
            logits = apply_eval(network, params, model_state, images)
            return jnp.mean(jnp.argmax(logits, -1) == held_out.labels)

        # One domain after the other, to hold the activations of one only.
        accuracies: jax.Array = jax.lax.map(accuracy, held_out.images)
        return accuracies

    def after_chunk(params: PyTree, model_state: PyTree, held_out: HeldOut) -> dict[str, jax.Array]:
        accuracies = domain_accuracies(params, model_state, held_out)
        mean = {"accuracy/unseen": jnp.mean(accuracies[2:])} if unseen else {}
        return {"accuracy/source": accuracies[0], "accuracy/target": accuracies[1], **mean}

    def final(params: PyTree, model_state: PyTree, held_out: HeldOut) -> dict[str, jax.Array]:
        few = slice(0, sharpness_examples)

        def loss(params: PyTree) -> jax.Array:
            logits = apply_eval(network, params, model_state, held_out.images[1, few])
            labels = held_out.labels[few]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses)

        def features(images: jax.Array) -> jax.Array:
            _, found = apply_eval(network, params, model_state, images, return_features=True)
            return jnp.asarray(found)

        accuracies = domain_accuracies(params, model_state, held_out)
        found = {
            "final/target": accuracies[1],
            "final/source": accuracies[0],
            "final/sharpness": epsilon_sharpness(loss, params),
        }
        if not unseen:
            return found
        # Linear CKA between the features (what enters the head) of the target images and those of
        # the same images in an unseen domain, averaged over these domains.
        target = features(held_out.images[1])
        similarities = jax.lax.map(
            lambda images: linear_cka(target, features(images)), held_out.images[2:]
        )
        return found | {
            "final/unseen": jnp.mean(accuracies[2:]),
            "final/similarity": jnp.mean(similarities),
            **{f"final/{name}": accuracies[i] for i, name in enumerate(unseen, start=2)},
        }

    return Measures(after_chunk, final)


def validation_measures(network: nn.Module) -> Measures:
    """Accuracy and mean loss on the validation examples, after every chunk and at the end."""

    def measure(
        prefix: str, params: PyTree, model_state: PyTree, held_out: HeldOut
    ) -> dict[str, jax.Array]:
        logits = apply_eval(network, params, model_state, held_out.images[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, held_out.labels)
        correct = jnp.argmax(logits, -1) == held_out.labels
        return {f"{prefix}/accuracy": jnp.mean(correct), f"{prefix}/loss": jnp.mean(losses)}

    return Measures(partial(measure, "validation"), partial(measure, "final"))
