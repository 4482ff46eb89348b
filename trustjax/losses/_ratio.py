"""Probability ratios from log-probabilities, and products with them, without NaN.

Zero times infinity is NaN, in a value as in a gradient. It would arise for a transition that has no
advantage or is masked, and for an action that has no weight.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._dtypes import widened


def log_ratio(log_prob: jax.Array, old_log_prob: jax.Array) -> jax.Array:
    """log pi - log pi_k in float32 at least; a constant 0 where both are -inf."""
    log_prob, old_log_prob = widened(log_prob), widened(old_log_prob)
    impossible = (log_prob == -jnp.inf) & (old_log_prob == -jnp.inf)
    zeros = jnp.zeros_like(log_prob)
    return jnp.where(impossible, zeros, log_prob) - jnp.where(impossible, zeros, old_log_prob)


def exp_times(log_weight: jax.Array, x: jax.Array) -> jax.Array:
    """exp(log_weight) x, with the weight clipped at half the largest number of the dtype.

    A clipped weight keeps the gradient that it has at the bound. The product may still be infinite,
    with the sign of x; it is 0 for x = 0.
    """
    highest = jnp.asarray(math.log(float(np.finfo(log_weight.dtype).max) / 2), log_weight.dtype)
    log_weight = jnp.where(log_weight == jnp.inf, highest, log_weight)
    # Straight through: the difference is 0 with a derivative of 1. Without a gradient, a policy
    # whose ratio is too large would never be driven back.
    clipped = highest + (log_weight - jax.lax.stop_gradient(log_weight))
    return jnp.exp(jnp.where(log_weight > highest, clipped, log_weight)) * x


def times(weight: jax.Array, log_prob: jax.Array) -> jax.Array:
    """weight log_prob, with 0 (-inf) = 0 for an action that is impossible and has no weight."""
    undefined = (weight == 0) & (log_prob == -jnp.inf)
    return weight * jnp.where(undefined, jnp.zeros_like(log_prob), log_prob)
