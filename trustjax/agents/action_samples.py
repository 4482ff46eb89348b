"""Actions at which losses are evaluated: one continuous sample, or all discrete actions."""

from typing import Any, NamedTuple

import jax

from trustjax.distributions import Categorical, DiagonalGaussian
from trustjax.losses import policy_mean


class ActionSamples(NamedTuple):
    """Actions for [batch] observations.

    Attributes:
      before_tanh: Samples before they are squashed by tanh, float [batch, d]; None for discrete
        actions.
      log_prob: log pi of each dimension in nats, float [batch, action, d]. Continuous actions have
        an action axis of length 1, discrete actions have d = 1.
    """

    before_tanh: jax.Array | None
    log_prob: jax.Array


def sample_actions(distribution: Any, keys: jax.Array, *, epsilon: float = 0.0) -> ActionSamples:
    """Samples actions of a policy, a Categorical or a TanhGaussian, at [batch] observations.

    The batch consists of groups of equal size, with one of the `keys` [group] each. `epsilon` is
    the one of `TanhGaussian.log_prob_before_tanh`.
    """
    if isinstance(distribution, Categorical):
        return ActionSamples(None, distribution.log_probs()[..., None])
    gaussian = DiagonalGaussian(*distribution)
    groups = jax.tree.map(lambda x: x.reshape(len(keys), -1, x.shape[-1]), gaussian)
    draws = jax.vmap(lambda one, key: one.sample(key))(groups, keys)
    before_tanh = draws.reshape(gaussian.mean.shape)
    log_prob = distribution.log_prob_before_tanh(before_tanh, epsilon=epsilon)
    return ActionSamples(before_tanh, log_prob[:, None])


def log_prob_of(distribution: Any, samples: ActionSamples, *, epsilon: float = 0.0) -> jax.Array:
    """Log-probabilities of the samples under another policy, [batch, action, d]."""
    if samples.before_tanh is None:
        log_probs: jax.Array = distribution.log_probs()
        return log_probs[..., None]
    log_prob: jax.Array = distribution.log_prob_before_tanh(samples.before_tanh, epsilon=epsilon)
    return log_prob[:, None]


def expectation(samples: ActionSamples, values: jax.Array) -> jax.Array:
    """The expectation of `values` [batch, action] over the policy, [batch].

    It is exact for discrete actions, and the value of the one sample for continuous ones.
    """
    if samples.before_tanh is None:
        return policy_mean(samples.log_prob[..., 0], values)
    return values[:, 0]
