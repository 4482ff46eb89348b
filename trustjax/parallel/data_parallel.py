"""Data parallelism: every device works on its part of the batch.

A jitted train step needs no change. If `shard_batch` places the batch and `replicated` places the
parameters and the optimizer state, XLA has every device compute its examples and sums the
gradients, with one all-reduce per pass. The numbers are those of one device up to the order of the
sums, and SAM and TRAM make one attack for the whole batch. `data_parallel_step` is for the other
case, one attack per device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from trustjax._checks import FieldError
from trustjax.parallel.mesh import batch_sharding, replicated

PyTree = Any


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of `mesh` can share `batch_size` examples equally."""
    if batch_size % mesh.size:
        raise FieldError(
            "batch_size", f"be a multiple of the number of devices, {mesh.size}", batch_size
        )


def shard_batch(batch: PyTree, mesh: Mesh, *, axis: int = 0) -> PyTree:
    """Places `batch` on `mesh`, with `axis` of every array, the examples, split over the devices.

    Raises ValueError if the number of examples is not a multiple of the number of devices.
    """
    _check_batch(batch, mesh, axis)
    return jax.device_put(batch, batch_sharding(mesh, axis))


def _check_batch(batch: PyTree, mesh: Mesh, axis: int) -> None:
    for leaf in jax.tree.leaves(batch):
        check_batch_size(leaf.shape[axis], mesh)


def data_parallel_step(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A compiled train step in which every device attacks on its own (m-sharpness).

    Each of the n devices computes the first gradient, the divergence and the attack from its own
    batch_size / n examples. The optimizer, whose `axis_name` is the axis of the mesh, averages the
    gradients at the n attacked points, so that parameters and state stay equal on all devices.

    Args:
      step: `step(params, opt_state, batch, key) -> (params, opt_state, loss, aux)`, such as a step
        of `trustjax.optim.two_pass_step` with an optimizer like `sam(0.05, axis_name="data")`.
      mesh: A mesh from `make_mesh`.

    Returns:
      A step with the same arguments, which donates `params` and `opt_state`. `loss` is the mean
      over devices, and `aux` gets a leading axis of devices. Each device folds its index into the
      key.

    Raises:
      ValueError: The devices cannot share the batch equally; or, from `jax.vmap` and about
        `out_axes`, the optimizer does not average over the axis.

    >>> import jax, jax.numpy as jnp, optax
    >>> from trustjax.optim import sam, two_pass_step
    >>> from trustjax.parallel import make_mesh
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> tx = optax.chain(sam(0.05, axis_name="data"), optax.sgd(0.1))
    >>> step = data_parallel_step(two_pass_step(loss_fn, tx), make_mesh())
    >>> params = jnp.zeros(2)
    >>> batch = {"x": jnp.ones((8, 2)), "y": jnp.ones(8)}
    >>> params, state, loss, aux = step(params, tx.init(params), batch, jax.random.key(0))
    >>> print(loss)
    1.0
    """
    (axis_name,) = mesh.axis_names

    def local_step(params: PyTree, opt_state: PyTree, batch: PyTree, key: jax.Array) -> Any:
        # Each device draws its own dropout and noise.
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        params, opt_state, loss, aux = step(params, opt_state, batch, key)
        return params, opt_state, jax.lax.pmean(loss, axis_name), aux

    # vmap over the devices' parts, whose axis the mesh splits. shard_map would sum the gradients of
    # replicated parameters over the devices before the optimizer sees them.
    step_per_device = jax.vmap(
        local_step,
        in_axes=(None, None, 0, None),
        out_axes=(None, None, None, 0),
        axis_name=axis_name,
        spmd_axis_name=axis_name,
    )
    everywhere, split = replicated(mesh), batch_sharding(mesh)

    def parallel_step(params: PyTree, opt_state: PyTree, batch: PyTree, key: jax.Array) -> Any:
        batch = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
        return step_per_device(params, opt_state, batch, key)

    compiled = jax.jit(
        parallel_step,
        donate_argnums=(0, 1),
        in_shardings=(everywhere, everywhere, split, everywhere),
        out_shardings=(everywhere, everywhere, everywhere, split),
    )

    def checked_step(params: PyTree, opt_state: PyTree, batch: PyTree, key: jax.Array) -> Any:
        _check_batch(batch, mesh, axis=0)
        return compiled(params, opt_state, batch, key)

    return checked_step
