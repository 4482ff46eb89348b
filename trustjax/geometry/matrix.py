"""Normalised and nearly orthogonal matrices, and arrays read as stacks of matrices."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_number
from trustjax._dtypes import widened
from trustjax.geometry.norm import vector_norm

# From KellerJordan/Muon: so steep at zero that singular values end in about 0.7 to 1.2, not at 1.
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def frobenius_normalize(
    matrix: jax.Array, *, axis: tuple[int, ...] = (-2, -1), epsilon: jax.typing.ArrayLike = 1e-7
) -> jax.Array:
    r"""The matrix divided by its Frobenius norm.

    .. math:: X = G / (\|G\|_F + \epsilon)

    A zero matrix stays zero. The norm is computed in float32 at least.

    Args:
      matrix: floats [..., m, n]. Each trailing matrix has its own norm.
      axis: The axes of a matrix, which may be others, or more than two.
      epsilon: The number added to the norm.

    Returns:
      The normalised matrix, of the shape and dtype of `matrix`.

    >>> print(frobenius_normalize(jnp.array([[3.0, 0.0], [0.0, 4.0]])))
    [[0.6 0. ]
     [0.  0.8]]
    """
    wide = widened(matrix)
    norm = vector_norm(wide, axis, keepdims=True)
    return (wide / (norm + jnp.asarray(epsilon, wide.dtype))).astype(matrix.dtype)


def newton_schulz(
    matrix: jax.Array,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
) -> jax.Array:
    r"""Steps of the quintic Newton-Schulz iteration towards the nearest semi-orthogonal matrix.

    .. math:: X \leftarrow a X + (b A + c A^2) X, \qquad A = X X^T

    Each step maps every singular value s to a s + b s^3 + c s^5 and keeps the singular vectors. The
    largest singular value must be at most 1 at the start: see `frobenius_normalize`. With the
    default coefficients the values do not converge to 1, but end in about 0.7 to 1.2.

    Args:
      matrix: floats [..., m, n].
      steps: The number of iterations, >= 0.
      coefficients: a, b, c.

    Returns:
      The last iterate, of the shape and dtype of `matrix`; products have the precision of this
      dtype.

    Raises:
      ValueError: `steps` is negative, or `matrix` has fewer than two axes.

    Source: KellerJordan/Muon.
    """
    check_number("steps", steps, at_least=0)
    if matrix.ndim < 2:
        raise FieldError("matrix", "have two axes or more", f"shape {matrix.shape}")
    a, b, c = (jnp.asarray(coefficient, matrix.dtype) for coefficient in coefficients)
    # A of the transpose of a tall matrix is the smaller of the two Gram matrices.
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = jnp.matrix_transpose(matrix) if is_tall else matrix
    for _ in range(steps):
        gram = x @ jnp.matrix_transpose(x)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.matrix_transpose(x) if is_tall else x


def size_along(x: jax.Array, axes: tuple[int, ...]) -> int:
    """The number of entries of `x` along `axes`."""
    return math.prod(x.shape[axis] for axis in axes)


def as_matrices(
    function: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    fan_in: tuple[int, ...],
    fan_out: tuple[int, ...],
) -> jax.Array:
    """Applies `function` to `x` as a stack of matrices [..., inputs, outputs].

    Args:
      function: A function from a stack of matrices to one of the same shape.
      x: The array, such as a convolution kernel.
      fan_in: The axes that make up the rows of a matrix, none of them negative.
      fan_out: The axes that make up its columns. All other axes count separate matrices.

    Returns:
      The result, with the shape and the order of axes of `x`.
    """
    others = tuple(axis for axis in range(x.ndim) if axis not in (*fan_in, *fan_out))
    order = (*others, *fan_in, *fan_out)
    moved = jnp.transpose(x, order)
    stack = moved.reshape(
        *(x.shape[axis] for axis in others), size_along(x, fan_in), size_along(x, fan_out)
    )
    inverse = tuple(order.index(axis) for axis in range(x.ndim))
    return jnp.transpose(function(stack).reshape(moved.shape), inverse)
