"""Actions at which policy and critics are evaluated: a continuous sample, or all discrete ones."""

from typing import Any, NamedTuple

import jax

from trustjax.distributions import Categorical, DiagonalGaussian
from trustjax.losses import policy_mean


class ActionSamples(NamedTuple):
    """Actions for [batch] observations.

    Attributes:
      before_tanh: float [batch, d], the sample before it is squashed; None for discrete actions.
      log_prob: float [batch, action, d], log pi of every dimension; d is 1 for discrete
        actions.
    """

    before_tanh: jax.Array | None
    log_prob: jax.Array


def sample_actions(distribution: Any, keys: jax.Array, *, epsilon: float = 0.0) -> ActionSamples:
    """Actions of a policy, Categorical or TanhGaussian, at [batch] observations.

    `keys` are those of groups of equal size that the batch consists of, `epsilon` is that of
    `TanhGaussian.log_prob_before_tanh`.
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
    """Another policy's log-probabilities of the samples, [batch, action, d]."""
    if samples.before_tanh is None:
        log_probs: jax.Array = distribution.log_probs()
        return log_probs[..., None]
    log_prob: jax.Array = distribution.log_prob_before_tanh(samples.before_tanh, epsilon=epsilon)
    return log_prob[:, None]


def expectation(samples: ActionSamples, values: jax.Array) -> jax.Array:
    """The expectation over the policy of values [batch, action]; [batch]."""
    if samples.before_tanh is None:
        return policy_mean(samples.log_prob[..., 0], values)
    return values[:, 0]
