"""Penalties as configuration: a loss of `trustjax.losses`, its weight, and its reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from trustjax._checks import check_number

PyTree = Any
Logits = Callable[[], jax.Array]


class Penalty(Protocol):
    """A term of the training loss: `weight` times the mean of the values that a call returns.

    Attributes:
      weight: Factor in the training loss; a traced number if a search varies it.
    """

    @property
    def weight(self) -> float:
        """Factor in the training loss."""

    def start(self, params: PyTree) -> PyTree:
        """Reference parameters before the first step; None if the penalty needs none."""

    def refreshed(self, reference: PyTree, params: PyTree) -> PyTree:
        """Reference parameters of the next step; `params` are those before this step's update."""

    def __call__(self, logits: jax.Array, at_reference: Logits, under_noise: Logits) -> jax.Array:
        """Values [examples] for logits [examples, classes].

        The two functions return the logits of the reference and of noised inputs; only the one that
        is called costs a forward pass.
        """


@dataclass(frozen=True)
class FromReference:
    """Compares with earlier weights: with the previous ones (TRPO) or their moving average (MESA).

    The weights of a step enter the average before their update.

    Attributes:
      loss: Function `(logits, reference_logits) -> values`, such as `trustjax.losses.trpo_penalty`.
      weight: Factor in the training loss, >= 0.
      decay: Share of the old reference that is kept, in [0, 1]; 0 for the previous weights.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    weight: float = 0.1
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, at_least=0.0)
        check_number("decay", self.decay, at_least=0.0, at_most=1.0)

    def start(self, params: PyTree) -> PyTree:
        """A copy of the parameters, so that both can be donated."""
        return jax.tree.map(jnp.copy, params)

    def refreshed(self, reference: PyTree, params: PyTree) -> PyTree:
        """The moving average after `params` have entered it."""
        return optax.incremental_update(params, reference, 1.0 - self.decay)

    def __call__(self, logits: jax.Array, at_reference: Logits, under_noise: Logits) -> jax.Array:
        """Values of the loss against the logits of the reference."""
        return self.loss(logits, at_reference())


@dataclass(frozen=True)
class UnderNoise:
    """Compares with the same weights on noised inputs, as R3F does.

    Attributes:
      loss: Function `(logits, noised_logits) -> values`, such as `trustjax.losses.r3f_penalty`.
      weight: Factor in the training loss, >= 0.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    weight: float = 0.1

    def __post_init__(self) -> None:
        check_number("weight", self.weight, at_least=0.0)

    def start(self, params: PyTree) -> None:
        """There is no reference."""

    def refreshed(self, reference: None, params: PyTree) -> None:
        """There is no reference."""

    def __call__(self, logits: jax.Array, at_reference: Logits, under_noise: Logits) -> jax.Array:
        """Values of the loss against the logits on noised inputs."""
        return self.loss(logits, under_noise())
