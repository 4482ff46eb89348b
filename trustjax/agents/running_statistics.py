r"""Running mean and variance as pure state, merged over batches and over devices.

Two groups of n_1 and n_2 numbers are merged by Chan's rule, with d = m_2 - m_1 and n = n_1 + n_2:

    m = m_1 + d n_2 / n,    M = v_1 n_1 + v_2 n_2 + d^2 n_1 n_2 / n,    v = M / n
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from trustjax._checks import FieldError
from trustjax._dtypes import widened
from trustjax._sharding import AxisName, averaged
from trustjax.models.actor_critic import default_float

_EPSILON = 1e-8


class Statistics(NamedTuple):
    """Mean and variance of all numbers seen so far.

    Attributes:
      mean: Mean, float [*shape].
      variance: Population variance, float [*shape].
      size: Number of numbers, float [].
    """

    mean: jax.Array
    variance: jax.Array
    size: jax.Array


def initial_statistics(shape: tuple[int, ...]) -> Statistics:
    """The statistics of no numbers: mean 0 and variance 1, which change nothing, with size 0."""
    dtype = default_float()
    return Statistics(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.zeros([], dtype))


def initial_observation_statistics(example: Any) -> Any:
    """The statistics of no observations, for an array [*shape] or a dict of arrays.

    A part of numbers that are not floating, such as pixels or flags, has None: it is not
    normalised.
    """
    if isinstance(example, dict):
        return {name: initial_observation_statistics(part) for name, part in example.items()}
    if not jnp.issubdtype(example.dtype, jnp.floating):
        return None
    return initial_statistics(example.shape)


def merged_observations(statistics: Any, batch: Any, *, axis_name: AxisName | None = None) -> Any:
    """The statistics of every part after `batch`; see `merged`."""
    if isinstance(statistics, dict):
        return {
            name: merged_observations(part, batch[name], axis_name=axis_name)
            for name, part in statistics.items()
        }
    return None if statistics is None else merged(statistics, batch, axis_name=axis_name)


def normalized_observations(observation: Any, statistics: Any, clip: ArrayLike) -> Any:
    """Every part by its own statistics; see `normalized`."""
    if isinstance(statistics, dict):
        return {
            name: normalized_observations(observation[name], part, clip)
            for name, part in statistics.items()
        }
    return normalized(observation, statistics, clip)


def merged(
    statistics: Statistics, batch: jax.Array, *, axis_name: AxisName | None = None
) -> Statistics:
    """The statistics after `batch` [..., *shape], which is split evenly over the devices.

    Raises ValueError for an empty batch.
    """
    if not batch.size:
        raise FieldError("batch", "not be empty", f"shape {batch.shape}")
    batch = widened(batch).astype(statistics.mean.dtype)
    axes = tuple(range(batch.ndim - statistics.mean.ndim))
    rough = averaged(jnp.mean(batch, axes), axis_name)
    # A second pass over the differences recovers what the sum of large numbers lost to rounding.
    mean = rough + averaged(jnp.mean(batch - rough, axes), axis_name)
    variance = averaged(jnp.mean(jnp.square(batch - mean), axes), axis_name)
    number = batch.size // max(statistics.mean.size, 1)
    if axis_name is not None:
        number = number * jax.lax.axis_size(axis_name)
    added = jnp.asarray(number, statistics.size.dtype)
    size = statistics.size + added
    share = added / size
    distance = mean - statistics.mean
    # Chan's rule divided by n, so that no term grows with the number of numbers.
    return Statistics(
        statistics.mean + distance * share,
        statistics.variance * (1 - share)
        + variance * share
        + jnp.square(distance) * share * (1 - share),
        size,
    )


def normalized(x: jax.Array, statistics: Statistics | None, clip: ArrayLike) -> jax.Array:
    """(x - mean) / std, clipped to [-clip, clip]; `x` itself if `statistics` is None."""
    if statistics is None:
        return x
    scaled = (x - statistics.mean) * jax.lax.rsqrt(statistics.variance + _EPSILON)
    return _clipped(scaled, clip)


def scaled(x: jax.Array, statistics: Statistics | None, clip: ArrayLike) -> jax.Array:
    """x / std, clipped to [-clip, clip]; `x` itself if `statistics` is None."""
    if statistics is None:
        return x
    return _clipped(x * jax.lax.rsqrt(statistics.variance + _EPSILON), clip)


def standardized(
    x: jax.Array, *, differences_of: jax.Array, axis_name: AxisName | None = None
) -> jax.Array:
    """(x - mean) / (std + 1e-8) over all of `x` and all devices, with the population std.

    The result is 0 if the std is within rounding error, that is at most four units in the last
    place of the root mean square of the numbers that `x` are `differences_of`. Otherwise equal
    advantages would become noise of size 1, and TRPO would take a full step along it.
    """
    mean, std = _mean_and_std(x, axis_name)
    equal = std <= _rounding(differences_of, axis_name)
    return jnp.where(equal, jnp.zeros_like(x), (x - mean) / (std + _EPSILON))


def explained_variance(
    values: jax.Array, returns: jax.Array, *, axis_name: AxisName | None = None
) -> jax.Array:
    r"""The fraction of the variance of `returns` that `values` explain, over all devices; [].

    .. math:: 1 - \frac{\mathrm{Var}(R - V)}{\mathrm{Var}(R)}

    It is 1 if they explain all of it, 0 if they explain no more than a constant, and negative if
    they add to it, whatever the scale of the returns. It is NaN, as undefined, if the returns
    differ by rounding error alone, as in `standardized`.
    """

    # In units of the largest return, because squares of tiny or huge numbers under- or overflow.
    unit = averaged(jnp.max(jnp.abs(returns)), axis_name)
    unit = jnp.where(unit == 0, jnp.ones_like(unit), unit)
    values, returns = values / unit, returns / unit
    std = _mean_and_std(returns, axis_name)[1]
    is_constant = std <= _rounding(returns, axis_name)
    residual = _mean_and_std(returns - values, axis_name)[1]
    residual = residual / jnp.where(is_constant, jnp.ones_like(std), std)
    return jnp.where(is_constant, jnp.full_like(residual, jnp.nan), 1 - jnp.square(residual))


def _mean_and_std(x: jax.Array, axis_name: AxisName | None) -> tuple[jax.Array, jax.Array]:
    mean = averaged(jnp.mean(x), axis_name)
    return mean, jnp.sqrt(averaged(jnp.mean(jnp.square(x - mean)), axis_name))


def _rounding(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Four units in the last place of the root mean square of `x` over all devices; []."""
    size = jnp.sqrt(averaged(jnp.mean(jnp.square(x)), axis_name))
    return 4 * float(np.finfo(x.dtype).eps) * size


def _clipped(x: jax.Array, clip: ArrayLike) -> jax.Array:
    bound = jnp.asarray(clip, x.dtype)
    return jnp.clip(x, -bound, bound)
