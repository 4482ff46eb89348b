"""Which dtype a number has, and in which one sums of it are taken."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def reduction_dtype(tree: PyTree) -> jnp.dtype:
    """The dtype in which sums over the floating leaves of `tree` are taken.

    float64 if one of them is, else float32; written out because strict promotion, which users may
    switch on, refuses to name a common dtype.
    """
    dtypes = (dtype_of(leaf) for leaf in jax.tree.leaves(tree) if is_floating(leaf))
    return jnp.dtype("float64" if any(dtype == "float64" for dtype in dtypes) else "float32")


def widened(leaf: jax.Array) -> jax.Array:
    """`leaf` in float32 at least."""
    return jnp.asarray(leaf).astype(reduction_dtype(leaf))


def is_floating(leaf: Any) -> bool:
    """Whether `leaf` holds real floating numbers, as an array or a Python number.

    Integers, keys and float0 are not.
    """
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float) if dtype is None else bool(jnp.issubdtype(dtype, jnp.floating))


def is_complex(leaf: Any) -> bool:
    """Whether `leaf` holds complex numbers, as an array or a Python number."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, complex)
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


def dtype_of(leaf: Any) -> jnp.dtype:
    """The dtype that a number has in JAX: NumPy's and Python's are float64 only if x64 is on."""
    return jnp.dtype(jnp.result_type(leaf))
