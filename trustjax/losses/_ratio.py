"""Ratios of probabilities from their logarithms, and their products, without NaN.

Zero times infinity is NaN, in a value as in a slope: of a transition that has no advantage or is
masked, of an action that has no weight.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._dtypes import widened


def log_ratio(log_prob: jax.Array, old_log_prob: jax.Array) -> jax.Array:
    """log pi - log pi_k in float32 at least; 0, a constant, where both are -inf."""
    log_prob, old_log_prob = widened(log_prob), widened(old_log_prob)
    impossible = (log_prob == -jnp.inf) & (old_log_prob == -jnp.inf)
    zeros = jnp.zeros_like(log_prob)
    return jnp.where(impossible, zeros, log_prob) - jnp.where(impossible, zeros, old_log_prob)


def exp_times(log_weight: jax.Array, x: jax.Array) -> jax.Array:
    """exp(log_weight) x; the weight is clipped at half the largest number, but keeps its slope.

    A product with x may still be infinite, with its sign; that of x = 0 is 0.
    """
    highest = jnp.asarray(math.log(float(np.finfo(log_weight.dtype).max) / 2), log_weight.dtype)
    log_weight = jnp.where(log_weight == jnp.inf, highest, log_weight)
    # The difference is 0 and its slope 1: without that, what is too likely would never be mended.
    clipped = highest + (log_weight - jax.lax.stop_gradient(log_weight))
    return jnp.exp(jnp.where(log_weight > highest, clipped, log_weight)) * x


def times(weight: jax.Array, log_prob: jax.Array) -> jax.Array:
    """weight log_prob, which is 0 where the weight is 0 and the action cannot be."""
    nothing = (weight == 0) & (log_prob == -jnp.inf)
    return weight * jnp.where(nothing, jnp.zeros_like(log_prob), log_prob)
