"""Measures of the similarity of two representations."""

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._dtypes import widened


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    r"""Linear centred kernel alignment of two representations of the same examples.

    .. math:: \frac{\| Y^\top X \|_F^2}{\| X^\top X \|_F \, \| Y^\top Y \|_F}

    The columns of X and Y are centred. Rotations and the scale of either do not change the value.

    Args:
      x: [examples, features] float.
      y: [examples, other features] float, with the examples in the same order.

    Returns:
      [] float32 at least, in [0, 1]; 0 where one of the representations is constant.

    Raises:
      ValueError: `x` and `y` are not two matrices with the same number of rows.

    Source: Kornblith et al., arXiv:1905.00414, Eq. 4-5 with linear kernels.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be matrices of equal length, got {x.shape} and {y.shape}")
    x, y = (_centred(widened(z)) for z in (x, y))
    # To unit scale first, because the fourth powers below would under- or overflow.
    x, y = (z / jnp.maximum(jnp.max(jnp.abs(z)), float(np.finfo(z.dtype).tiny)) for z in (x, y))

    def squared_norm(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)))

    product = jnp.sqrt(squared_norm(x, x)) * jnp.sqrt(squared_norm(y, y))
    zero = product == 0
    ratio = squared_norm(y, x) / jnp.where(zero, jnp.ones_like(product), product)
    return jnp.where(zero, jnp.zeros_like(ratio), ratio)


def _centred(z: jax.Array) -> jax.Array:
    """`z` minus the means of its columns, and exactly zero in columns that are constant."""
    # The mean of a constant column is rounded, so the difference is not zero.
    constant = jnp.max(z, axis=0) == jnp.min(z, axis=0)
    return jnp.where(constant[None], jnp.zeros_like(z), z - jnp.mean(z, axis=0, keepdims=True))
