"""Penalties as configuration: a loss of `trustjax.losses`, its weight, what it compares with."""

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
    """A term of the training loss, `weight` times the mean of what a call returns.

    Attributes:
      weight: a number, or a traced one where a search varies it.
    """

    @property
    def weight(self) -> float:
        """See above."""

    def start(self, params: PyTree) -> PyTree:
        """The reference parameters before the first step; None if there are none."""

    def refreshed(self, reference: PyTree, params: PyTree) -> PyTree:
        """Those of the next step; `params` are the present ones, before their update."""

    def __call__(self, logits: jax.Array, at_reference: Logits, under_noise: Logits) -> jax.Array:
        """Values [examples] for logits [examples, classes]; the two calls give other logits."""


@dataclass(frozen=True)
class FromReference:
    """Compares with earlier weights: TRPO (the previous ones), MESA (their moving average).

    The average takes in the weights of a step before their update.

    Attributes:
      loss: `(logits, reference_logits) -> values`, such as `trustjax.losses.trpo_penalty`.
      weight: factor in the training loss, >= 0.
      decay: share of the old reference that is kept, in [0, 1]; 0 for the previous weights.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    weight: float = 0.1
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, at_least=0.0)
        check_number("decay", self.decay, at_least=0.0, at_most=1.0)

    def start(self, params: PyTree) -> PyTree:
        """A copy, so that it can be donated beside the parameters."""
        return jax.tree.map(jnp.copy, params)

    def refreshed(self, reference: PyTree, params: PyTree) -> PyTree:
        """The moving average with `params` taken in."""
        return optax.incremental_update(params, reference, 1.0 - self.decay)

    def __call__(self, logits: jax.Array, at_reference: Logits, under_noise: Logits) -> jax.Array:
        """The loss against the logits of the reference."""
        return self.loss(logits, at_reference())


@dataclass(frozen=True)
class UnderNoise:
    """Compares with the same weights on noised inputs: R3F.

    Attributes:
      loss: `(logits, noised_logits) -> values`, such as `trustjax.losses.r3f_penalty`.
      weight: factor in the training loss, >= 0.
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
        """The loss against the logits on noised inputs."""
        return self.loss(logits, under_noise())
