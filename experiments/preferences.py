"""Losses of preferences as configuration: what a loss of `trustjax.losses` reads of the pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError


class Pairs(NamedTuple):
    """Log-probabilities of the answers of a batch, float32 [pairs] each, and their lengths.

    Attributes:
      policy_chosen: log pi(y_w | x), summed over the tokens of the answer.
      policy_rejected: log pi(y_l | x).
      reference_chosen: log pi_ref(y_w | x).
      reference_rejected: log pi_ref(y_l | x).
      chosen_lengths: Tokens of y_w, int32.
      rejected_lengths: Tokens of y_l.
      policy_kl: log pi of mismatched answers, [2 pairs]; None if the loss does not ask for them.
      reference_kl: log pi_ref of them.
    """

    policy_chosen: jax.Array
    policy_rejected: jax.Array
    reference_chosen: jax.Array
    reference_rejected: jax.Array
    chosen_lengths: jax.Array
    rejected_lengths: jax.Array
    policy_kl: jax.Array | None = None
    reference_kl: jax.Array | None = None


Rewards = tuple[jax.Array, jax.Array]


def log_ratio_rewards(pairs: Pairs) -> Rewards:
    """log pi(y | x) - log pi_ref(y | x) of both answers: DPO's reward over beta."""
    chosen = pairs.policy_chosen - pairs.reference_chosen
    return chosen, pairs.policy_rejected - pairs.reference_rejected


def mean_log_prob_rewards(pairs: Pairs) -> Rewards:
    """log pi(y | x) per token of both answers: SimPO's reward over beta."""
    chosen = pairs.policy_chosen / jnp.maximum(pairs.chosen_lengths, 1)
    return chosen, pairs.policy_rejected / jnp.maximum(pairs.rejected_lengths, 1)


class PreferenceLoss(Protocol):
    """A loss of pairs, and the reward that a policy trained with it implies.

    Attributes:
      mismatched: Whether the loss reads log-probabilities of mismatched answers.
    """

    @property
    def mismatched(self) -> bool:
        """Whether the loss reads `policy_kl` and `reference_kl`."""

    def __call__(self, pairs: Pairs) -> jax.Array:
        """Losses [pairs or examples], whose mean is minimised."""

    def rewards(self, pairs: Pairs) -> Rewards:
        """The implied rewards of chosen and rejected answers, up to a positive factor."""


_DPO = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
_LENGTHS = ("chosen_lengths", "rejected_lengths")


@dataclass(frozen=True)
class PairLoss:
    """A loss that compares the two answers of a pair.

    Attributes:
      loss: A loss of `trustjax.losses` whose numbers are given.
      arguments: Names of the fields of `Pairs` that it is called with; by default those of DPO.
    """

    loss: Callable[..., jax.Array]
    arguments: Sequence[str] = _DPO

    def __post_init__(self) -> None:
        for name in self.arguments:
            if name not in (*_DPO, *_LENGTHS):
                raise FieldError("arguments", f"name some of {[*_DPO, *_LENGTHS]}", repr(name))

    @property
    def mismatched(self) -> bool:
        """No mismatched answers are read."""
        return False

    def __call__(self, pairs: Pairs) -> jax.Array:
        """Losses [pairs]."""
        return self.loss(**{name: getattr(pairs, name) for name in self.arguments})

    def rewards(self, pairs: Pairs) -> Rewards:
        """Log-ratios to the reference if the loss reads it, else log-probabilities.

        They are means over the tokens if the loss reads the lengths of both answers.
        """
        chosen, rejected = pairs.policy_chosen, pairs.policy_rejected
        if "reference_chosen" in self.arguments:
            chosen, rejected = log_ratio_rewards(pairs)
        if {*_LENGTHS} <= {*self.arguments}:
            chosen = chosen / jnp.maximum(pairs.chosen_lengths, 1)
            rejected = rejected / jnp.maximum(pairs.rejected_lengths, 1)
        return chosen, rejected


@dataclass(frozen=True)
class ExampleLoss:
    """A loss of single answers that are good or bad: the chosen and the rejected ones.

    Attributes:
      loss: `trustjax.losses.kto_loss` whose numbers are given.
      mismatched: Whether it reads mismatched answers.
    """

    loss: Callable[..., jax.Array]
    mismatched: bool = True

    def __call__(self, pairs: Pairs) -> jax.Array:
        """Losses [2 pairs], the chosen answers first."""
        policy = jnp.concatenate([pairs.policy_chosen, pairs.policy_rejected])
        reference = jnp.concatenate([pairs.reference_chosen, pairs.reference_rejected])
        desirable = jnp.arange(policy.size) < pairs.policy_chosen.size
        if self.mismatched:
            return self.loss(policy, reference, desirable, pairs.policy_kl, pairs.reference_kl)
        return self.loss(policy, reference, desirable)

    def rewards(self, pairs: Pairs) -> Rewards:
        """Log-ratios to the reference."""
        return log_ratio_rewards(pairs)
