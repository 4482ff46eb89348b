r"""Running mean and variance as pure state, merged over batches and over devices.

Chan's rule: with a second group of n_2 numbers, d = m_2 - m_1 and n = n_1 + n_2,

    m = m_1 + d n_2 / n,    M = v_1 n_1 + v_2 n_2 + d^2 n_1 n_2 / n,    v = M / n
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from trustjax._sharding import AxisName, averaged
from trustjax.geometry.norm import widened
from trustjax.models.actor_critic import default_float

_EPSILON = 1e-8


class Statistics(NamedTuple):
    """Mean and variance of all numbers seen so far.

    Attributes:
      mean: [*shape] float.
      variance: [*shape] float, that of the population.
      size: [] float, how many.
    """

    mean: jax.Array
    variance: jax.Array
    size: jax.Array


def initial_statistics(shape: tuple[int, ...]) -> Statistics:
    """Mean 0 and variance 1 with hardly any weight, as in stable-baselines."""
    dtype = default_float()
    return Statistics(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.asarray(1e-4, dtype))


def merged(
    statistics: Statistics, batch: jax.Array, *, axis_name: AxisName | None = None
) -> Statistics:
    """The statistics after `batch` [..., *shape], of which every device has an equal part."""
    batch = widened(batch).astype(statistics.mean.dtype)
    axes = tuple(range(batch.ndim - statistics.mean.ndim))
    mean = averaged(jnp.mean(batch, axes), axis_name)
    variance = averaged(jnp.mean(jnp.square(batch - mean), axes), axis_name)
    number = batch.size // max(statistics.mean.size, 1)
    if axis_name is not None:
        number = number * jax.lax.axis_size(axis_name)
    added = jnp.asarray(number, statistics.size.dtype)
    size = statistics.size + added
    share = added / size
    distance = mean - statistics.mean
    return Statistics(
        statistics.mean + distance * share,
        statistics.variance * (1 - share)
        + variance * share
        + jnp.square(distance) * share * (1 - share),
        size,
    )


def normalized(x: jax.Array, statistics: Statistics | None, clip: ArrayLike) -> jax.Array:
    """(x - mean) / std, between -clip and clip; `x` itself if there are no statistics."""
    if statistics is None:
        return x
    scaled = (x - statistics.mean) * jax.lax.rsqrt(statistics.variance + _EPSILON)
    return _clipped(scaled, clip)


def scaled(x: jax.Array, statistics: Statistics | None, clip: ArrayLike) -> jax.Array:
    """x / std, between -clip and clip; `x` itself if there are no statistics."""
    if statistics is None:
        return x
    return _clipped(x * jax.lax.rsqrt(statistics.variance + _EPSILON), clip)


def standardized(
    x: jax.Array, *, differences_of: jax.Array, axis_name: AxisName | None = None
) -> jax.Array:
    """(x - mean) / (std + 1e-8) over all of `x` and all devices, std that of the population.

    It is 0 if the std is below the rounding of the numbers that `x` are `differences_of`, four
    units in the last place of their root mean square. Else equal advantages would come out as
    noise of size 1, and TRPO take a step of full length along it.
    """
    mean = averaged(jnp.mean(x), axis_name)
    std = jnp.sqrt(averaged(jnp.mean(jnp.square(x - mean)), axis_name))
    size = jnp.sqrt(averaged(jnp.mean(jnp.square(differences_of)), axis_name))
    apart = std > 4 * float(np.finfo(x.dtype).eps) * size
    return jnp.where(apart, (x - mean) / (std + _EPSILON), jnp.zeros_like(x))


def _clipped(x: jax.Array, clip: ArrayLike) -> jax.Array:
    bound = jnp.asarray(clip, x.dtype)
    return jnp.clip(x, -bound, bound)
