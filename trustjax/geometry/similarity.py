"""Similarity of representations."""

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._dtypes import widened


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    r"""Linear centred kernel alignment of two representations of the same examples.

    .. math:: \frac{\| Y^\top X \|_F^2}{\| X^\top X \|_F \, \| Y^\top Y \|_F}

    with the columns of X and Y centred. Indifferent to rotations and to the scale of either.

    Args:
      x: [examples, features] float.
      y: [examples, other features] float, rows in the same order.

    Returns:
      [] float32 at least, in [0, 1]; 0 where one of them is constant.

    Raises:
      ValueError: not two matrices with the same number of rows.

    Source: Kornblith et al., arXiv:1905.00414, Eq. 4-5 with linear kernels.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be matrices of equal length, got {x.shape} and {y.shape}")
    x, y = (_centred(widened(z)) for z in (x, y))
    # Unit scale first: the fourth powers below would leave the range of float32.
    x, y = (z / jnp.maximum(jnp.max(jnp.abs(z)), float(np.finfo(z.dtype).tiny)) for z in (x, y))

    def squared_norm(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)))

    product = jnp.sqrt(squared_norm(x, x)) * jnp.sqrt(squared_norm(y, y))
    zero = product == 0
    ratio = squared_norm(y, x) / jnp.where(zero, jnp.ones_like(product), product)
    return jnp.where(zero, jnp.zeros_like(ratio), ratio)


def _centred(z: jax.Array) -> jax.Array:
    """`z` less the means of its columns; zero in constant columns, whose mean is rounded."""
    constant = jnp.max(z, axis=0) == jnp.min(z, axis=0)
    return jnp.where(constant[None], jnp.zeros_like(z), z - jnp.mean(z, axis=0, keepdims=True))
