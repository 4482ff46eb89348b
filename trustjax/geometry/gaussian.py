"""Divergences between diagonal Gaussians, the policies of continuous actions: one per example."""

import jax
import jax.numpy as jnp

from trustjax._checks import check_number
from trustjax.geometry._gaps import exponential_gap
from trustjax.geometry.divergence import same_shape


def gaussian_kl(
    mean_p: jax.Array,
    log_std_p: jax.Array,
    mean_q: jax.Array,
    log_std_q: jax.Array,
    *,
    axis: int = -1,
) -> jax.Array:
    r"""The Kullback-Leibler divergence of one diagonal Gaussian p from another, q.

    .. math:: \sum_i \log\frac{\sigma_{q,i}}{\sigma_{p,i}}
              + \frac{\sigma_{p,i}^2 + (\mu_{p,i} - \mu_{q,i})^2}{2 \sigma_{q,i}^2} - \frac12

    Args:
      mean_p: [..., dimensions] float.
      log_std_p: The natural logarithm of the standard deviation, broadcastable to the means.
      mean_q: Of the same shape as `mean_p`.
      log_std_q: As `log_std_p`.
      axis: The axis of the dimensions.

    Returns:
      [...] in nats, float32 at least, >= 0.

    Raises:
      ValueError: The shapes of the means differ.
    """
    mean_p, log_std_p, mean_q, log_std_q = _as_arrays(mean_p, log_std_p, mean_q, log_std_q)
    squared_shift = jnp.square(in_units(mean_p - mean_q, log_std_q))
    return 0.5 * jnp.sum(exponential_gap(2 * (log_std_p - log_std_q)) + squared_shift, axis)


def gaussian_renyi(
    mean_p: jax.Array,
    log_std_p: jax.Array,
    mean_q: jax.Array,
    log_std_q: jax.Array,
    *,
    order: float,
    axis: int = -1,
) -> jax.Array:
    r"""The Rényi divergence of one diagonal Gaussian p from another, q.

    .. math:: \sum_i \frac{a (\mu_{p,i} - \mu_{q,i})^2}{2 s_i^2}
              + \frac{1}{1 - a} \log\frac{s_i}{\sigma_{p,i}^{1-a} \sigma_{q,i}^{a}},
              \qquad s_i^2 = a \sigma_{q,i}^2 + (1 - a) \sigma_{p,i}^2

    Infinite where :math:`s_i^2 \le 0`, which happens only for orders above 1.

    Args:
      mean_p: [..., dimensions] float.
      log_std_p: The natural logarithm of the standard deviation, broadcastable to the means.
      mean_q: Of the same shape as `mean_p`.
      log_std_q: As `log_std_p`.
      order: a > 0, a Python number; 1 is KL.
      axis: The axis of the dimensions.

    Returns:
      [...] float32 at least, >= 0.

    Raises:
      ValueError: The shapes of the means differ, or `order` is not > 0.

    Source: Gil, Alajaji and Linder, Rényi divergence measures for commonly used univariate
    continuous distributions, Information Sciences 249 (2013), Table 2.
    """
    check_number("order", order, above=0.0)
    if order == 1:
        return gaussian_kl(mean_p, log_std_p, mean_q, log_std_q, axis=axis)
    mean_p, log_std_p, mean_q, log_std_q = _as_arrays(mean_p, log_std_p, mean_q, log_std_q)
    log_ratio = 2 * (log_std_p - log_std_q)
    shift = mean_p - mean_q
    # In units of sigma_q, s^2 is 1 + (1 - a) (e^r - 1) with r = log(sigma_p^2 / sigma_q^2). Where
    # e^r would overflow, in units of sigma_p: 1 + a (e^-r - 1).
    wide = log_ratio > 30
    zeros = jnp.zeros_like(log_ratio)
    r, wide_r = jnp.where(wide, zeros, log_ratio), jnp.where(wide, log_ratio, zeros)
    excess = jnp.where(wide, order * jnp.expm1(-wide_r), (1 - order) * jnp.expm1(r))
    # s^2 <= 0, which only orders above 1 reach.
    infinite = excess <= -1
    excess = jnp.where(infinite, zeros, excess)
    unit = jnp.where(wide, log_std_p, log_std_q)
    term = order * jnp.square(in_units(shift, unit)) / (1 + excess)
    # log(1 + v) = v - gap(log(1 + v)): the first orders of r cancel, so they are not written.
    gap = exponential_gap(r) - exponential_gap(jnp.log1p(excess)) / (1 - order)
    far = (order * wide_r + jnp.log1p(excess)) / (1 - order)
    term = term + jnp.where(wide, far, gap)
    return 0.5 * jnp.sum(jnp.where(infinite, jnp.full_like(term, jnp.inf), term), axis)


def in_units(difference: jax.Array, log_unit: jax.Array) -> jax.Array:
    """difference / exp(log_unit); 0 where the difference is 0, however small the unit is."""
    log_unit = jnp.where(difference == 0, jnp.zeros_like(log_unit), log_unit)
    return difference * jnp.exp(-log_unit)


def _as_arrays(
    mean_p: jax.Array, log_std_p: jax.Array, mean_q: jax.Array, log_std_q: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """All four as arrays of the shape and dtype of the means, float32 at least."""
    if jnp.shape(mean_p) != jnp.shape(mean_q):
        raise ValueError(
            "mean_p and mean_q must have the same shape, got "
            f"{jnp.shape(mean_p)} and {jnp.shape(mean_q)}"
        )
    mean_p, mean_q = same_shape(mean_p, mean_q)
    log_std_p, log_std_q = (
        jnp.broadcast_to(jnp.asarray(x).astype(mean_p.dtype), mean_p.shape)
        for x in (log_std_p, log_std_q)
    )
    return mean_p, log_std_p, mean_q, log_std_q
