"""Pieces that the losses of pairs share: rows that are left out, lengths, bounded exponentials."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_number
from trustjax._dtypes import reduction_dtype
from trustjax._sharding import AxisName
from trustjax.losses._shapes import check_shape


def rows(where: jax.Array | None, **arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Which rows are included, and the arrays in a common dtype with zeros in the other rows.

    Raises ValueError, which names the argument, unless all have the shape of the first.
    """
    first = next(iter(arrays.values()))
    for name, array in arrays.items():
        check_shape(name, array, first)
    dtype = reduction_dtype(list(arrays.values()))
    wide = tuple(jnp.asarray(array).astype(dtype) for array in arrays.values())
    if where is None:
        return jnp.ones(jnp.shape(first), bool), wide
    check_shape("where", where, first)
    included = jnp.asarray(where).astype(bool)
    return included, tuple(jnp.where(included, x, jnp.zeros_like(x)) for x in wide)


def per_token(total: jax.Array, lengths: jax.Array | None, name: str) -> jax.Array:
    """`total` divided by the numbers of tokens, by 1 where there are none; itself without."""
    if lengths is None:
        return total
    check_shape(name, lengths, total)
    check_number(name, lengths, at_least=0)
    return total / jnp.maximum(jnp.asarray(lengths).astype(total.dtype), 1)


def both_or_none(chosen_lengths: jax.Array | None, rejected_lengths: jax.Array | None) -> None:
    """Raises FieldError if only one of the two is given."""
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise FieldError("rejected_lengths", "be given if and only if chosen_lengths is", "one")


def smoothed(logit: jax.Array, label_smoothing: jax.Array) -> jax.Array:
    """Cross-entropy of sigmoid(logit) from the label (1 - eps, eps)."""
    right, wrong = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def bounded_expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1, bounded so that its square is finite, with the gradient that it has there."""
    highest = jnp.asarray(0.45 * math.log(float(np.finfo(x.dtype).max)), x.dtype)
    # Straight through: the difference is 0 with a derivative of 1.
    return jnp.expm1(jnp.where(x > highest, highest + (x - jax.lax.stop_gradient(x)), x))


def total(number: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The sum of a number over the devices of the mesh axes."""
    return number if axis_name is None else jax.lax.psum(number, axis_name)
