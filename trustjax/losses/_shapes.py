"""Arguments of the same shape, because broadcasting would hide a mistake, and their masks."""

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError
from trustjax._dtypes import reduction_dtype, widened


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


def masked(mask: jax.Array, **arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays in one dtype, float32 at least, with 0 in masked places.

    Raises ValueError, which names the argument, unless all have the shape of `mask`, a bool array.
    """
    for name, array in arrays.items():
        check_shape(name, array, mask)
    dtype = reduction_dtype(tuple(arrays.values()))
    return tuple(zero_masked(jnp.asarray(array).astype(dtype), mask) for array in arrays.values())


def zero_masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    """`values` with 0 where the bool array `mask` is False.

    It comes before any arithmetic: NaN may stand in masked places, and 0 times NaN is NaN, in a
    gradient as well.
    """
    return jnp.where(mask, values, jnp.zeros_like(values))
