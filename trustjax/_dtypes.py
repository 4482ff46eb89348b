"""Which dtype a number has, and in which dtype sums of such numbers are computed."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def reduction_dtype(tree: PyTree) -> jnp.dtype:
    """The dtype in which sums over the floating leaves of `tree` are computed.

    This is float64 if one of the leaves is, otherwise float32. It is not left to promotion, because
    strict promotion, which users may switch on, refuses to name a common dtype.
    """
    dtypes = (dtype_of(leaf) for leaf in jax.tree.leaves(tree) if is_floating(leaf))
    return jnp.dtype("float64" if any(dtype == "float64" for dtype in dtypes) else "float32")


def widened(leaf: jax.Array) -> jax.Array:
    """`leaf` as an array in which sums keep their digits: float32, or float64 if it already is.

    Sums and squares in bfloat16 or float16 lose digits, and the latter overflow at 65504.
    """
    return jnp.asarray(leaf).astype(reduction_dtype(leaf))


def is_floating(leaf: Any) -> bool:
    """Whether `leaf` holds real floating-point numbers, as an array or as a Python number.

    False for integers, random keys and float0, the dtype of the gradient of an integer.
    """
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float) if dtype is None else bool(jnp.issubdtype(dtype, jnp.floating))


def is_complex(leaf: Any) -> bool:
    """Whether `leaf` holds complex numbers, as an array or as a Python number."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, complex)
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


def dtype_of(leaf: Any) -> jnp.dtype:
    """The dtype that `leaf` has in JAX, where float64 of NumPy and Python needs x64 mode."""
    return jnp.dtype(jnp.result_type(leaf))
