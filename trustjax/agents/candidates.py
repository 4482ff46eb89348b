"""Actions at which policy and critics are asked: a draw of continuous ones, all of a choice."""

from typing import Any, NamedTuple

import jax

from trustjax.distributions import Categorical, DiagonalGaussian
from trustjax.losses import policy_mean


class Candidates(NamedTuple):
    """Actions for [batch] observations.

    Attributes:
      before_tanh: float [batch, d], the draw before it is squashed; None for a choice.
      log_prob: float [batch, candidate, d], log pi of every dimension; d is 1 for a choice.
    """

    before_tanh: jax.Array | None
    log_prob: jax.Array


def draw(distribution: Any, keys: jax.Array, *, slope: float = 0.0) -> Candidates:
    """Actions of a policy, Categorical or TanhGaussian, at [batch] observations.

    `keys` are those of groups of equal size that the batch consists of, `slope` is that of
    `TanhGaussian.log_prob_before_tanh`.
    """
    if isinstance(distribution, Categorical):
        return Candidates(None, distribution.log_probs()[..., None])
    gaussian = DiagonalGaussian(*distribution)
    groups = jax.tree.map(lambda x: x.reshape(len(keys), -1, x.shape[-1]), gaussian)
    draws = jax.vmap(lambda one, key: one.sample(key))(groups, keys)
    before_tanh = draws.reshape(gaussian.mean.shape)
    log_prob = distribution.log_prob_before_tanh(before_tanh, slope=slope)
    return Candidates(before_tanh, log_prob[:, None])


def log_prob_of(distribution: Any, candidates: Candidates, *, slope: float = 0.0) -> jax.Array:
    """Another policy's log-probabilities of the candidates, [batch, candidate, d]."""
    if candidates.before_tanh is None:
        log_probs: jax.Array = distribution.log_probs()
        return log_probs[..., None]
    log_prob: jax.Array = distribution.log_prob_before_tanh(candidates.before_tanh, slope=slope)
    return log_prob[:, None]


def expected(candidates: Candidates, values: jax.Array) -> jax.Array:
    """The mean over the policy of values [batch, candidate]; [batch]."""
    if candidates.before_tanh is None:
        return policy_mean(candidates.log_prob[..., 0], values)
    return values[:, 0]
