"""AuON's brake r, and the norm of the average that it is measured on, each to a rounding error.

r is so near to 1 that r - 1, called its excess, is what can be computed: from all entries, from
their second and fourth moments where these suffice, or from the size of the matrix alone.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._dtypes import widened
from trustjax.geometry.matrix import size_along


def brake_excess(entries: jax.Array, *, axis: tuple[int, ...] = (-2, -1)) -> jax.Array:
    r"""r - 1 for the brake r of AuON, which is too near to 1 for float32.

    .. math:: r - 1 = \sqrt{\mathrm{mean} \cosh(x)^2} - 1
                    = \mathrm{expm1}(\tfrac12 \mathrm{log1p}(\mathrm{mean} \sinh(x)^2))

    Args:
      entries: gamma times the normalised matrix, floats [..., m, n].
      axis: the axes of a matrix.

    Returns:
      [..., 1, 1], >= 0.
    """
    grown = jnp.expm1(jnp.abs(widened(entries)))
    sinh = 0.5 * grown * (1 + 1 / (1 + grown))  # several times faster than jnp.sinh on CPU
    return excess_of(jnp.mean(jnp.square(sinh), axis=axis, keepdims=True))


def excess_of(mean_square_sinh: jax.Array) -> jax.Array:
    """r - 1 for r = sqrt(1 + mean of sinh squared)."""
    return jnp.expm1(0.5 * jnp.log1p(mean_square_sinh))


def known_excess(gamma: jax.typing.ArrayLike, size: int, dtype: jnp.dtype) -> float | None:
    """r - 1 where its bounds in the docstring of `auon.py` agree to a rounding error, else None.

    So large a matrix need not be read again. A traced gamma gives None.
    """
    if isinstance(gamma, jax.core.Tracer) or jnp.size(gamma) > 1:
        return None
    slope = np.asarray(gamma).item()
    if slope > 10:
        return None
    low, high = slope**2 / (2 * size), math.sinh(slope) ** 2 / (2 * size)
    return (low + high) / 2 if high - low <= 2 * np.finfo(dtype).eps else None


def two_moments_suffice(gamma: jax.typing.ArrayLike, size: int, dtype: jnp.dtype) -> bool:
    r"""Whether the sums of x^2 and x^4 give r - 1 to a rounding error. A traced gamma: False.

    :math:`K = (\sum x^2)^2 / \sum x^4` entries of one size, :math:`\sqrt{\sum x^2 / K}`, have these
    sums, and so the same first two terms of the series of sinh squared. The other terms are at most
    what they are for a single entry of 1, and differ by less than a quarter of that.
    """
    if isinstance(gamma, jax.core.Tracer) or jnp.size(gamma) > 1:
        return False
    slope = min(np.asarray(gamma).item(), 10.0)
    rest = math.sinh(slope) ** 2 - slope**2 - slope**4 / 3
    return bool(rest <= 8 * size * np.finfo(dtype).eps)


def scaled_average(
    ratio: jax.Array,
    momentum: jax.Array,
    gradient: jax.Array | None,
    scale: jax.Array,
) -> jax.Array:
    """`scale` times H / (1 - beta), or `scale` times M without Nesterov's gradient.

    Every use computes it anew from M and G: XLA on CPU then reads these inside its reductions,
    and does not write H to memory for the sake of several uses.
    """
    if gradient is None:
        return scale * momentum
    return (scale * ratio) * momentum + scale * gradient


# Compiled, as otherwise the branches would be, in every update outside jit.
@functools.partial(jax.jit, static_argnames=("axes", "with_fourth"))
def norm_and_spread(
    ratio: jax.Array,
    momentum: jax.Array,
    gradient: jax.Array | None,
    *,
    axes: tuple[int, ...],
    with_fourth: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A scale, the norm over `axes` of H / (1 - beta) times it, and (sum of x^2)^2 / (sum of x^4).

    The scale is 1, unless powers of the numbers under- or overflow: then one over the largest.
    Without `with_fourth` the last of the three is 1.
    """

    multiple = functools.partial(scaled_average, ratio, momentum, gradient)

    def sums(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        square = jnp.square(multiple(scale))
        total = jnp.sum(square, axes, keepdims=True)
        fourth = jnp.sum(jnp.square(square), axes, keepdims=True) if with_fourth else total
        return total, fourth

    one = jnp.ones([], momentum.dtype)
    total, fourth = sums(one)
    info, size = np.finfo(momentum.dtype), size_along(momentum, axes)
    # Above this all powers that underflow are together less than a rounding error of their sum.
    lowest = size * float(info.tiny / info.eps)

    def plain() -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.ones_like(total), total, fourth

    def scaled() -> tuple[jax.Array, jax.Array, jax.Array]:
        top = jnp.max(jnp.abs(multiple(one)), axes, keepdims=True)
        largest = float(info.max) ** 0.75  # its inverse is no subnormal number, which would be 0
        scale = 1 / jnp.clip(top, 1 / largest, largest)
        return scale, *sums(scale)

    usable = jnp.all((jnp.minimum(total, fourth) > lowest) & (jnp.maximum(total, fourth) < jnp.inf))
    scale, total, fourth = jax.lax.cond(usable, plain, scaled)
    spread = jnp.square(total) / one_for_zero(fourth) if with_fourth else jnp.ones_like(total)
    return scale, jnp.sqrt(total), one_for_zero(spread)


def one_for_zero(x: jax.Array) -> jax.Array:
    """A divisor that is not zero; NaN stays."""
    return jnp.where(x == 0, jnp.ones_like(x), x)


def log_brake(entries: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """log r, from log cosh, for entries of any size."""
    size = jnp.abs(entries)
    log_cosh = size + jnp.log1p(jnp.exp(-2 * size)) - math.log(2)
    return 0.5 * (
        jax.nn.logsumexp(2 * log_cosh, axis=axes, keepdims=True)
        - math.log(size_along(entries, axes))
    )
