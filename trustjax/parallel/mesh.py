"""A row of devices, and how arrays lie on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trustjax._checks import FieldError


def make_mesh(num_devices: int | None = None, *, axis_name: str = "data") -> Mesh:
    """A mesh of one axis over the first `num_devices` devices, over all of them if None.

    Raises ValueError unless there are that many. XLA decides what each device computes from where
    the inputs lie (`AxisType.Auto`).
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
    """The placement of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The placement of arrays whose `axis`, that of the examples, is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))
