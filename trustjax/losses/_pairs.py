"""Pieces that the losses of pairs share: rows that are left out, lengths, bounded exponentials."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_number
from trustjax.losses._shapes import check_shape, masked


def rows(where: jax.Array | None, **arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Which rows are included, and the arrays in a common dtype with zeros in the other rows.

    Raises ValueError, which names the argument, unless all have the shape of the first.
    """
    first = next(iter(arrays.values()))
    if where is None:
        included = jnp.ones(jnp.shape(first), bool)
    else:
        check_shape("where", where, first)
        included = jnp.asarray(where).astype(bool)
    return included, masked(included, **arrays)


def length_normalised(total: jax.Array, lengths: jax.Array | None, name: str) -> jax.Array:
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
