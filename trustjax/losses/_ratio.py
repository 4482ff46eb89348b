"""Probability ratios from log-probabilities, and products with them, without NaN.

Zero times infinity is NaN, in a value as in a gradient. It would arise for a transition that has no
advantage or is masked, and for an action that has no weight.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._dtypes import widened

LARGEST_LOG_RATIO = 20.0


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
    highest = math.log(float(np.finfo(log_weight.dtype).max) / 2)
    return jnp.exp(_bounded(log_weight, highest)) * x


def bounded_log_ratio(log_ratio: jax.Array) -> jax.Array:
    """log r, at most 20, so that sums of ratios over many tokens stay finite.

    A clipped ratio keeps the gradient that it has at the bound.
    """
    return _bounded(log_ratio, LARGEST_LOG_RATIO)


def clip_log_ratio(
    log_r: jax.Array,
    advantage: jax.Array,
    clip: jax.typing.ArrayLike,
    clip_high: jax.typing.ArrayLike | None,
) -> jax.Array:
    """log r, clipped where PPO's surrogate clips: above 1 + clip_high for A > 0, below 1 - clip for
    A < 0."""
    # Clipping log r instead of r avoids the derivative of an exp that overflows, whose product with
    # 0 is NaN.
    width = jnp.asarray(clip, log_r.dtype)
    highest = jnp.log1p(width if clip_high is None else jnp.asarray(clip_high, log_r.dtype))
    lowest = jnp.log(jnp.maximum(1 - width, jnp.zeros_like(width)))
    log_r = jnp.where((advantage > 0) & (log_r > highest), highest, log_r)
    return jnp.where((advantage < 0) & (log_r < lowest), lowest, log_r)


def clipped_sides(
    ratio: jax.Array,
    advantage: jax.Array,
    clip: jax.typing.ArrayLike,
    clip_high: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """Where PPO's surrogate clips the ratio: below 1 - clip for A < 0, and above 1 + clip_high for
    A > 0."""
    width = jnp.asarray(clip, ratio.dtype)
    high = width if clip_high is None else jnp.asarray(clip_high, ratio.dtype)
    return (advantage < 0) & (ratio < 1 - width), (advantage > 0) & (ratio > 1 + high)


def _bounded(log_weight: jax.Array, bound: float) -> jax.Array:
    highest = jnp.asarray(bound, log_weight.dtype)
    log_weight = jnp.where(log_weight == jnp.inf, highest, log_weight)
    # Straight through: the difference is 0 with a derivative of 1. Without a gradient, a policy
    # whose ratio is too large would never be driven back.
    clipped = highest + (log_weight - jax.lax.stop_gradient(log_weight))
    return jnp.where(log_weight > highest, clipped, log_weight)


def times(weight: jax.Array, log_prob: jax.Array) -> jax.Array:
    """weight log_prob, with 0 (-inf) = 0 for an action that is impossible and has no weight."""
    undefined = (weight == 0) & (log_prob == -jnp.inf)
    return weight * jnp.where(undefined, jnp.zeros_like(log_prob), log_prob)
