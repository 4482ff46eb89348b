"""Methods that train a policy over the items of a group, as configuration.

A loss takes the log-probabilities of the items of each group under the policy and under an anchor,
[B, P], and their rewards, [B, P], and returns one value per group, [B].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from trustjax._checks import FieldError, check_count, check_number
from trustjax.losses import (
    adpo_loss,
    group_relative,
    pl_dpo_loss,
    ppo_clip_loss,
    ranking_of,
    trpo_surrogate,
)

Target = Callable[..., jax.Array]  # of rewards [B, P], with `where`; of a pair's rewards [B], [B]


class Loss(Protocol):
    """A loss of groups."""

    def __call__(self, log_probs: jax.Array, anchor: jax.Array, rewards: jax.Array) -> jax.Array:
        """Losses [B] of log-probabilities, those of the anchor, and rewards, each [B, P]."""


@dataclass(frozen=True)
class Method:
    """How a policy is trained.

    Attributes:
      loss: Loss of the groups.
      optimizer: Optimizer of the policy. It is also given the loss and the divergence from the
        policy before the step, for those that search.
      refresh_every: Steps after which the policy becomes the anchor; None for the first anchor to
        stay.
      pairs: Whether a step draws two items of each group instead of taking all.
      steps: Steps of training, >= 1.
      batch_size: Groups in a step, >= 1.
    """

    loss: Loss
    optimizer: optax.GradientTransformation
    refresh_every: int | None = None
    pairs: bool = False
    steps: int = 600
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "refresh_every"):
            check_count(name, getattr(self, name), at_least=1)
        if self.steps % (self.refresh_every or 1):
            raise FieldError("refresh_every", f"divide steps = {self.steps}", self.refresh_every)


@dataclass(frozen=True)
class Pairs:
    """A loss of pairs, in which the item with the larger reward is the preferred one.

    Attributes:
      loss: `(policy_chosen, policy_rejected, reference_chosen, reference_rejected) -> losses`, such
        as `trustjax.losses.dpo_loss` with its beta.
      target: `(chosen_rewards, rejected_rewards) -> s`, such as
        `trustjax.losses.bradley_terry_targets`, the probability that the preferred item is better,
        which the loss gets as `target`; None for a loss without.
    """

    loss: Callable[..., jax.Array]
    target: Target | None = None

    def __call__(self, log_probs: jax.Array, anchor: jax.Array, rewards: jax.Array) -> jax.Array:
        """Losses [B] of groups of two items."""
        if rewards.shape[-1] != 2:
            raise FieldError("pairs", "be true for a loss of pairs", False)
        is_first = rewards[:, 0] >= rewards[:, 1]
        chosen, rejected = (
            [jnp.where(first, array[:, 0], array[:, 1]) for array in (log_probs, anchor, rewards)]
            for first in (is_first, ~is_first)
        )
        graded = {} if self.target is None else {"target": self.target(chosen[2], rejected[2])}
        return self.loss(chosen[0], rejected[0], chosen[1], rejected[1], **graded)


@dataclass(frozen=True)
class Listwise:
    """`trustjax.losses.adpo_loss` with targets from the rewards.

    Attributes:
      target: `rewards -> q`, such as `trustjax.losses.reward_targets`.
      temperature: tau, > 0.
    """

    target: Target
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0.0)

    def __call__(self, log_probs: jax.Array, anchor: jax.Array, rewards: jax.Array) -> jax.Array:
        """Losses [B]."""
        return adpo_loss(log_probs, anchor, self.target(rewards), temperature=self.temperature)


@dataclass(frozen=True)
class Ranking:
    """`trustjax.losses.pl_dpo_loss` of the items in the order of their rewards.

    Attributes:
      beta: Weight of the anchor, > 0.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0.0)

    def __call__(self, log_probs: jax.Array, anchor: jax.Array, rewards: jax.Array) -> jax.Array:
        """Losses [B]."""
        return pl_dpo_loss(log_probs, anchor, ranking_of(rewards), beta=self.beta)


@dataclass(frozen=True)
class Clipped:
    """`trustjax.losses.ppo_clip_loss`, in expectation over the items under the anchor.

    Advantages are rewards relative to their group, and the anchor is the policy that acts.

    Attributes:
      clip: Half-width of the interval around 1 in which ratios count, >= 0.
    """

    clip: float = 0.2

    def __post_init__(self) -> None:
        check_number("clip", self.clip, at_least=0.0)

    def __call__(self, log_probs: jax.Array, anchor: jax.Array, rewards: jax.Array) -> jax.Array:
        """Losses [B]."""
        losses = ppo_clip_loss(log_probs, anchor, group_relative(rewards), clip=self.clip)
        return jnp.sum(jnp.exp(anchor) * losses, -1)


@dataclass(frozen=True)
class Surrogate:
    """Minus `trustjax.losses.trpo_surrogate`, in expectation over the items under the anchor.

    Advantages are as in `Clipped`. The trust region is the optimizer's.
    """

    def __call__(self, log_probs: jax.Array, anchor: jax.Array, rewards: jax.Array) -> jax.Array:
        """Losses [B]."""
        gains = trpo_surrogate(log_probs, anchor, group_relative(rewards))
        return -jnp.sum(jnp.exp(anchor) * gains, -1)
