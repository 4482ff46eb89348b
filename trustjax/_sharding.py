"""Sums, averages and rows over devices, and values that differ, inside `jax.shard_map`."""

from typing import Any

import jax

from trustjax._dtypes import is_complex, is_floating

PyTree = Any
AxisName = str | tuple[str, ...]


def averaged(tree: PyTree, axis_name: AxisName | None) -> PyTree:
    """The mean of every leaf over the shards, in a single reduction.

    Args:
      tree: Any pytree. Integers and random keys have no mean and stay as they are.
      axis_name: The axes of the mesh or of `jax.vmap` over which to average; None leaves `tree`
        as it is.
    """
    if axis_name is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    has_mean = [is_floating(leaf) or is_complex(leaf) for leaf in leaves]
    means = iter(
        jax.lax.pmean([x for x, has in zip(leaves, has_mean, strict=True) if has], axis_name)
    )
    found = [next(means) if has else x for x, has in zip(leaves, has_mean, strict=True)]
    return jax.tree.unflatten(structure, found)


def summed(number: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The sum of `number` over the shards; `number` itself without an axis."""
    return number if axis_name is None else jax.lax.psum(number, axis_name)


def gathered(rows: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The rows of all shards, one behind the other; `rows` itself without an axis."""
    return rows if axis_name is None else jax.lax.all_gather(rows, axis_name, tiled=True)


def as_local_as(other: PyTree, params: PyTree) -> PyTree:
    """`params` with every floating leaf varying over the mesh axes over which `other` varies.

    Under `jax.shard_map` the gradient with respect to a replicated leaf is summed over the devices.
    That must not happen where the function differs between the devices, such as the loss of each
    device's part of the batch, or the loss at weights that each device attacks on its own.
    """
    axes = set().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves(other)))

    def localize(leaf: Any) -> Any:
        missing = tuple(axes - _varying_axes(leaf)) if is_floating(leaf) else ()
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(localize, params) if axes else params


def _varying_axes(leaf: Any) -> frozenset[str]:
    leaf_type = jax.typeof(leaf)
    if hasattr(leaf_type, "manual_axis_type"):
        return frozenset(leaf_type.manual_axis_type.varying)
    return frozenset(getattr(leaf_type, "vma", ()))  # before JAX had `manual_axis_type`
