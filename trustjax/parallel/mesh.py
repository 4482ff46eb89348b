"""A mesh of one axis, and the placements of arrays on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trustjax._checks import FieldError


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
