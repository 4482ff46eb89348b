"""Methods that learn from choices among alternatives, as configuration.

A loss takes the scores of the alternatives, which are their log-ratios to an anchor over the
temperature, what was chosen (one-hot), and which alternatives were available, each [B, J], and
returns losses [B].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from trustjax._checks import check_count, check_number
from trustjax.losses import adpo_loss, plackett_luce_loss, ranking_of


class Loss(Protocol):
    """A loss of choices."""

    def __call__(self, scores: jax.Array, chosen: jax.Array, available: jax.Array) -> jax.Array:
        """Losses [B]."""


@dataclass(frozen=True)
class Method:
    """How utilities are learned from choices.

    Attributes:
      loss: Loss of the choices.
      anchored: Whether the anchor is the reference, rather than the uniform distribution.
      temperature: tau, by which the log-ratios are divided, > 0; the inverse of beta.
      refreshes: How often the policy becomes the anchor, evenly over the training, >= 0.
    """

    loss: Loss
    anchored: bool = True
    temperature: float = 1.0
    refreshes: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0.0)
        check_count("refreshes", self.refreshes, at_least=0)


@dataclass(frozen=True)
class ListwiseChoice:
    """`trustjax.losses.adpo_loss` with the choice as target, softened over the other alternatives.

    Without smoothing and with a uniform anchor this is the likelihood of the multinomial logit.

    Attributes:
      smoothing: Share of the target that the alternatives that were not chosen have, in [0, 1).
    """

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("smoothing", self.smoothing, at_least=0.0, below=1.0)

    def __call__(self, scores: jax.Array, chosen: jax.Array, available: jax.Array) -> jax.Array:
        """Losses [B]."""
        others = available & (chosen == 0)
        count = jnp.sum(others, -1, keepdims=True)
        # With a single alternative there is nothing to soften.
        share = jnp.where(count > 0, self.smoothing, 0.0)
        target = (1 - share) * chosen + share * others / jnp.maximum(count, 1)
        nothing = jnp.zeros_like(scores)  # the anchor is in the scores
        return adpo_loss(scores, nothing, target, temperature=1.0, where=available)


@dataclass(frozen=True)
class ChosenPairs:
    """The list broken up into pairs of the choice and each other alternative.

    Attributes:
      loss: Loss of pairs with `where`, such as `trustjax.losses.dpo_loss`, with a beta of 1.
    """

    loss: Callable[..., jax.Array]

    def __call__(self, scores: jax.Array, chosen: jax.Array, available: jax.Array) -> jax.Array:
        """Losses [B], the means over the pairs."""
        others = available & (chosen == 0)
        of_chosen = jnp.broadcast_to(jnp.sum(scores * chosen, -1, keepdims=True), scores.shape)
        nothing = jnp.zeros_like(scores)
        losses = self.loss(of_chosen, scores, nothing, nothing, where=others)
        return jnp.sum(losses, -1) / jnp.maximum(jnp.sum(others, -1), 1)


@dataclass(frozen=True)
class TopChoice:
    """The Plackett-Luce likelihood of the first place, as nothing is known of the others.

    It is `ListwiseChoice` without smoothing, by another way.
    """

    def __call__(self, scores: jax.Array, chosen: jax.Array, available: jax.Array) -> jax.Array:
        """Losses [B]."""
        ranking = ranking_of(chosen, where=available)
        return plackett_luce_loss(scores, ranking, top_k=1, where=available)
