"""Checks that arguments have the same shape, because broadcasting would hide a mistake."""

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError
from trustjax._dtypes import widened


def same_shape(first: jax.Array, **others: jax.Array) -> tuple[jax.Array, ...]:
    """`others` in float32 at least; raises ValueError unless they have the shape of `first`."""
    for name, other in others.items():
        check_shape(name, other, first)
    return tuple(widened(jnp.asarray(other)) for other in others.values())


def check_shape(name: str, given: jax.Array, first: jax.Array) -> None:
    """Raises ValueError, which names the argument, unless `given` has the shape of `first`."""
    if jnp.shape(given) != jnp.shape(first):
        raise FieldError(
            name, f"have the shape of the first argument, {jnp.shape(first)}", jnp.shape(given)
        )
