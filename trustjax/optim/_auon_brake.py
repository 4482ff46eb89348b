r"""AuON's brake r, to a rounding error.

r is so close to 1 that r - 1, called its excess, is computed instead. With X of Frobenius norm 1
and N entries, :math:`r^2 - 1 = \mathrm{mean} \sinh(\gamma X)^2`, which comes from all entries, from
their second and fourth moments where these suffice, or from N alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._dtypes import widened
from trustjax.geometry.matrix import size_along


def brake_excess(entries: jax.Array, *, axis: tuple[int, ...] = (-2, -1)) -> jax.Array:
    r"""The excess of AuON's brake over 1, from all entries of a matrix.

    .. math:: r - 1 = \sqrt{\mathrm{mean} \cosh(x)^2} - 1
                    = \mathrm{expm1}(\tfrac12 \mathrm{log1p}(\mathrm{mean} \sinh(x)^2))

    Args:
      entries: gamma times the normalised matrix, floats [..., m, n].
      axis: The axes of a matrix.

    Returns:
      The excess, [..., 1, 1], >= 0.
    """
    # sinh from expm1, as it loses no digits near 0; several times faster than jnp.sinh on CPU.
    grown = jnp.expm1(jnp.abs(widened(entries)))
    sinh = 0.5 * grown * (1 + 1 / (1 + grown))
    return _excess(jnp.mean(jnp.square(sinh), axis=axis, keepdims=True))


def _excess(mean_square_sinh: jax.Array) -> jax.Array:
    """r - 1 for r = sqrt(1 + mean of sinh squared), also where this rounds to 1."""
    return jnp.expm1(0.5 * jnp.log1p(mean_square_sinh))


def known_excess(gamma: jax.typing.ArrayLike, size: int, dtype: jnp.dtype) -> float | None:
    r"""r - 1 of a matrix of `size` entries, if that is all one needs to know of the matrix.

    With N = `size`, :math:`1 + \gamma^2 / N \le r^2 \le 1 + \sinh(\gamma)^2 / N`. Where these
    bounds agree to a rounding error the matrix need not be read again.

    Returns:
      The mean of both bounds; None where they differ by more, or where `gamma` is traced.
    """
    if isinstance(gamma, jax.core.Tracer) or jnp.size(gamma) > 1:
        return None
    slope = np.asarray(gamma).item()
    if slope > 10:  # before sinh overflows
        return None
    low, high = slope**2 / (2 * size), math.sinh(slope) ** 2 / (2 * size)
    return (low + high) / 2 if high - low <= 2 * np.finfo(dtype).eps else None


def two_moments_suffice(gamma: jax.typing.ArrayLike, size: int, dtype: jnp.dtype) -> bool:
    r"""Whether the sums of x^2 and x^4 give r - 1 to a rounding error; False for a traced gamma.

    :math:`K = (\sum x^2)^2 / \sum x^4` entries of one size, :math:`\sqrt{\sum x^2 / K}`, have the
    same two sums, and with them the same first two terms of the series of sinh squared. The other
    terms are at most those of a single entry of 1, and differ by less than a quarter of these.
    """
    if isinstance(gamma, jax.core.Tracer) or jnp.size(gamma) > 1:
        return False
    slope = min(np.asarray(gamma).item(), 10.0)
    # sinh(x)^2 = x^2 + x^4 / 3 + ...
    rest = math.sinh(slope) ** 2 - slope**2 - slope**4 / 3
    return bool(rest <= 8 * size * np.finfo(dtype).eps)


def excess_of_spread(norm: jax.Array, spread: jax.Array, size: int) -> jax.Array:
    """r - 1 of a matrix of this Frobenius norm, from the number K of `two_moments_suffice`.

    Args:
      norm: gamma times the norm, [..., 1, 1].
      spread: K, [..., 1, 1].
      size: The number of entries.
    """
    sinh = jnp.sinh(norm / jnp.sqrt(spread))
    return _excess(jnp.square(sinh) * (spread / size))


def log_brake(entries: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """log r of matrices whose entries may be so large that cosh overflows."""
    size = jnp.abs(entries)
    log_cosh = size + jnp.log1p(jnp.exp(-2 * size)) - math.log(2)
    return 0.5 * (
        jax.nn.logsumexp(2 * log_cosh, axis=axes, keepdims=True)
        - math.log(size_along(entries, axes))
    )
