"""Euclidean norms of arrays and of parameter trees, for numbers of any size."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._dtypes import is_floating, reduction_dtype, widened

PyTree = Any


def non_negative(x: jax.Array) -> jax.Array:
    """`x` with its negative entries, which are rounding errors, set to 0.

    Derivatives are those of `x`. `jnp.maximum(x, 0)` would halve them at 0, where divergences have
    the Hessian that trust regions are made of.
    """
    return x - jax.lax.stop_gradient(jnp.minimum(x, jnp.zeros_like(x)))


def global_norm(tree: PyTree) -> jax.Array:
    r"""The Euclidean norm of all floating leaves of `tree`, seen as one vector.

    .. math:: \sqrt{\sum_{\text{leaves}} \sum_i x_i^2}

    Sums are computed in float32 at least, so bfloat16 leaves lose nothing. If squares under- or
    overflow, the numbers are first divided by the largest of them. The gradient at zero is 0. A NaN
    gives NaN, and an infinity gives infinity.

    Args:
      tree: Any pytree. Leaves that are not floating are skipped.

    Returns:
      [] in the widest dtype of the leaves, float32 at least; 0 for an empty tree.
    """
    dtype = reduction_dtype(tree)
    leaves = [jnp.asarray(leaf, dtype) for leaf in jax.tree.leaves(tree) if is_floating(leaf)]
    leaves = [leaf for leaf in leaves if leaf.size]
    if not leaves:
        return jnp.zeros([], dtype)
    norm: jax.Array = _root_of_squares(leaves)
    return norm


def vector_norm(
    x: jax.Array, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False
) -> jax.Array:
    r"""The Euclidean norms of `x` along `axis`, for numbers of any size, as in `global_norm`.

    Args:
      x: float array, read in float32 at least.
      axis: The axes of the vectors; None for all axes.
      keepdims: Whether axes of size 1 stay in their place.

    Returns:
      The norms, an array of the other axes, in float32 at least.
    """
    x = widened(jnp.asarray(x))
    if x.size == 0:
        return jnp.sum(x, axis, keepdims=keepdims)
    norm: jax.Array = _root_of_squares([x], axis, keepdims)
    return norm


@functools.partial(jax.jit, static_argnames=("axis", "keepdims"))
def _root_of_squares(
    parts: Sequence[jax.Array], axis: int | tuple[int, ...] | None = None, keepdims: bool = False
) -> jax.Array:
    """The root of the sum of squares over `axis` and over all parts, which share the other axes."""
    kept = axis is not None

    def squares(scale: jax.Array) -> jax.Array:
        terms = [jnp.sum(jnp.square(x / scale), axis, keepdims=kept) for x in parts]
        return sum(terms[1:], start=terms[0])

    def root(total: jax.Array, usable: jax.Array) -> jax.Array:
        # The root has no derivative at 0 and at infinity, and a NaN there would reach the gradient
        # also through the branch that is not selected.
        return jnp.sqrt(jnp.where(usable, total, jnp.ones_like(total)))

    total = squares(jnp.ones([], parts[0].dtype))
    information = np.finfo(total.dtype)
    # Above this all squares that underflow are together less than a rounding error of their sum.
    lowest = float(information.tiny / information.eps) * sum(x.size for x in parts)
    usable = (total > lowest) & (total < jnp.inf)

    def scaled() -> jax.Array:
        tops = [jnp.max(jnp.abs(x), axis, keepdims=kept) for x in parts]
        top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
        # The norm does not depend on the scale, so no gradient flows through it. Zero, infinity
        # and NaN are no scale: they reach the sum as they are.
        top = jnp.where((top > 0) & (top < jnp.inf), top, jnp.ones_like(top))
        shares = squares(top)
        positive = shares != 0
        return jnp.where(positive, top * root(shares, positive), jnp.zeros_like(top))

    norm: jax.Array = jax.lax.cond(jnp.all(usable), lambda: root(total, usable), scaled)
    return jnp.squeeze(norm, axis) if kept and not keepdims else norm
