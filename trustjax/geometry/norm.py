"""Norms of whole parameter trees."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def reduction_dtype(tree: PyTree) -> jnp.dtype:
    """The dtype in which sums over the floating leaves of `tree` are taken.

    float64 if one of them is, else float32; written out because strict promotion, which users may
    switch on, refuses to name a common dtype.
    """
    leaves = (leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf))
    return jnp.dtype("float64" if any(leaf.dtype == "float64" for leaf in leaves) else "float32")


def widened(leaf: jax.Array) -> jax.Array:
    """`leaf` in float32 at least."""
    return leaf.astype(reduction_dtype(leaf))


def is_floating(leaf: Any) -> bool:
    """Whether `leaf` is an array of real floating numbers; integers, keys and float0 are not."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def non_negative(x: jax.Array) -> jax.Array:
    """`x`, of which only rounding is below 0, without that.

    Derivatives are those of `x`: `jnp.maximum(x, 0)` halves them at 0, where divergences have the
    Hessian that trust regions are made of.
    """
    return x - jax.lax.stop_gradient(jnp.minimum(x, jnp.zeros_like(x)))


def global_norm(tree: PyTree) -> jax.Array:
    r"""Euclidean norm of all floating leaves of `tree`, seen as one vector.

    .. math:: \sqrt{\sum_{\text{leaves}} \sum_i x_i^2}

    Sums are taken in float32 at least, so bfloat16 leaves lose nothing. The gradient at zero is
    not defined; guard it where you differentiate.

    Args:
      tree: any pytree; leaves that are not floating are skipped.

    Returns:
      [] in the widest dtype of the leaves, float32 at least; 0 for an empty tree.
    """
    dtype = reduction_dtype(tree)
    total = jnp.zeros([], dtype)
    for leaf in jax.tree.leaves(tree):
        if is_floating(leaf):
            total = total + jnp.sum(jnp.square(leaf.astype(dtype)))
    return jnp.sqrt(total)
