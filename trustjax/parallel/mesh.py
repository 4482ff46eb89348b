"""A mesh of one axis, and the placements of arrays on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trustjax._checks import FieldError

PyTree = Any


def make_mesh(num_devices: int | None = None, *, axis_name: str = "data") -> Mesh:
    """A mesh of one axis over the first `num_devices` devices; None for all of them.

    XLA derives from the placement of the inputs what each device computes (`AxisType.Auto`). Raises
    ValueError if there are not that many devices.
    """
    devices = jax.devices()
    if num_devices is None:
        num_devices = len(devices)
    if not 1 <= num_devices <= len(devices):
        raise FieldError(
            "num_devices",
            f"be from 1 to {len(devices)}, the number of devices that JAX sees",
            num_devices,
        )
    return jax.make_mesh(
        (num_devices,), (axis_name,), (AxisType.Auto,), devices=devices[:num_devices]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of an array of which every device holds a whole copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The placement of an array whose `axis`, of the examples, is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def fully_sharded(tree: PyTree, mesh: Mesh) -> PyTree:
    """The placements of arrays of which every device holds an equal part.

    Every array is split along its longest axis whose length is a multiple of the number of devices,
    the first one of several; an array without such an axis is on every device as a whole. The
    placements are those of `jax.device_put` and `jax.lax.with_sharding_constraint`; a step that is
    compiled with such parameters gathers them where it needs them, and sums gradients into parts.

    >>> mesh = make_mesh(1)
    >>> fully_sharded({"kernel": jax.numpy.zeros((2, 6))}, mesh)["kernel"].spec
    PartitionSpec(None, 'data')
    """

    def of(leaf: Any) -> NamedSharding:
        lengths = [n if n and n % mesh.size == 0 else 0 for n in np.shape(leaf)]
        if not any(lengths):
            return replicated(mesh)
        return batch_sharding(mesh, lengths.index(max(lengths)))

    return jax.tree.map(of, tree)
