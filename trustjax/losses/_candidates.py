"""Groups of candidates along the last axis: their checks, masks and normalisation.

The softmax couples all candidates of a group, so a group must be whole on one device.
"""

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_number
from trustjax.losses._shapes import check_shape, masked, zero_masked


def candidates(
    where: jax.Array | None, *, at_least: int = 1, **arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """The mask of the candidates, and the arrays in one dtype, float32 at least, 0 where masked.

    Raises FieldError, which names the array, unless all have the shape of the first one, at least
    `at_least` candidates, and groups that are whole on each device.
    """
    (name, first), *_ = arrays.items()
    shape = jnp.shape(first)
    if not shape or shape[-1] < at_least:
        raise FieldError(
            name, f"have at least {at_least} candidates along the last axis", f"shape {shape}"
        )
    for name, array in arrays.items():
        check_shape(name, array, first)
        check_whole(name, array)
    kept = jnp.broadcast_to(jnp.asarray(True if where is None else where).astype(bool), shape)
    return kept, *masked(kept, **arrays)


def check_whole(name: str, array: jax.typing.ArrayLike) -> None:
    """Raises FieldError if the last axis of `array` is known to be split over devices."""
    if isinstance(array, jax.core.Tracer):
        spec = jax.typeof(array).sharding.spec
        split = len(spec) == array.ndim and spec[-1] is not None
    elif isinstance(array, jax.Array):
        split = array.sharding.shard_shape(array.shape)[-1] < array.shape[-1]
    else:
        return
    if split:
        raise FieldError(
            name,
            "hold every group whole on one device",
            "a last axis that is split over devices",
            advice="split the axis of the groups instead",
        )


def per_group(name: str, value: jax.typing.ArrayLike, like: jax.Array) -> jax.Array:
    """A number > 0, or one number > 0 per group, as a constant that broadcasts against `like`."""
    check_number(name, value, above=0.0)
    found = jax.lax.stop_gradient(jnp.asarray(value)).astype(like.dtype)
    groups = like.shape[:-1]
    if found.ndim == 0 or found.shape == (*groups, 1):
        return found
    if found.shape != groups:
        raise FieldError(name, f"be a number or one per group, of shape {groups}", found.shape)
    return found[..., None]


def masked_log_softmax(scores: jax.Array, kept: jax.Array) -> jax.Array:
    """log softmax over the candidates that are kept, and 0 for the others."""
    # Half of the lowest number, from which the normaliser is subtracted without an overflow.
    lowest = jnp.full_like(scores, float(np.finfo(scores.dtype).min) / 2)
    log_probs = jax.nn.log_softmax(jnp.where(kept, scores, lowest), -1)
    return zero_masked(log_probs, kept)


def masked_softmax(scores: jax.Array, kept: jax.Array) -> jax.Array:
    """Softmax over the candidates that are kept, and 0 for the others."""
    return zero_masked(jnp.exp(masked_log_softmax(scores, kept)), kept)


def count(kept: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The number of candidates of each group, [..., 1]; 1 for a group without any, as a divisor."""
    return jnp.sum(kept, -1, keepdims=True).clip(1).astype(dtype)
