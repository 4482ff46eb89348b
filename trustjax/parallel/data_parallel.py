"""Data parallelism: every device works on its part of the batch.

A jitted train step needs no change. With the batch placed by `shard_batch` and parameters and
optimizer state by `replicated`, XLA lets every device compute its examples and sums the gradients:
one all-reduce a pass, and the numbers of one device up to the order of the sums. SAM and TRAM then
make one attack for the whole batch. `data_parallel_step` is for the other case, an attack a device.
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
    """Splits the examples, `axis` of every array of `batch`, over the devices of `mesh`.

    Raises ValueError if their number is not a multiple of that of the devices.
    """
    _check_batch(batch, mesh, axis)
    return jax.device_put(batch, batch_sharding(mesh, axis))


def _check_batch(batch: PyTree, mesh: Mesh, axis: int) -> None:
    for leaf in jax.tree.leaves(batch):
        check_batch_size(leaf.shape[axis], mesh)


def data_parallel_step(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A compiled train step in which every device attacks on its own (m-sharpness).

    Each of the n devices takes the first gradient, the divergence and the attack from its own
    batch_size / n examples. The gradients at the n attacked points are averaged by the optimizer
    (its `axis_name` is the mesh's), so parameters and state stay the same everywhere.

    Args:
      step: `step(params, opt_state, batch, key) -> (params, opt_state, loss, aux)` such as one by
        `trustjax.optim.two_pass_step`, with an optimizer like `sam(0.05, axis_name="data")`.
      mesh: made by `make_mesh`.

    Returns:
      A step with the same arguments. `params` and `opt_state` are donated. `loss` is the mean over
      devices; `aux` gets a leading axis of devices. Each device folds its index into the key.

    Raises:
      ValueError: a batch that the devices cannot share equally; from `jax.vmap`, about `out_axes`,
        if the optimizer does not average over the axis.

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
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        params, opt_state, loss, aux = step(params, opt_state, batch, key)
        return params, opt_state, jax.lax.pmean(loss, axis_name), aux

    # vmap and not shard_map, under which gradients of replicated parameters are summed over the
    # devices before the optimizer sees them. Its axis is the one that is split.
    everywhere = jax.vmap(
        local_step,
        in_axes=(None, None, 0, None),
        out_axes=(None, None, None, 0),
        axis_name=axis_name,
        spmd_axis_name=axis_name,
    )
    whole, parts = replicated(mesh), batch_sharding(mesh)

    def parallel_step(params: PyTree, opt_state: PyTree, batch: PyTree, key: jax.Array) -> Any:
        batch = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
        return everywhere(params, opt_state, batch, key)

    compiled = jax.jit(
        parallel_step,
        donate_argnums=(0, 1),
        in_shardings=(whole, whole, parts, whole),
        out_shardings=(whole, whole, whole, parts),
    )

    def checked_step(params: PyTree, opt_state: PyTree, batch: PyTree, key: jax.Array) -> Any:
        _check_batch(batch, mesh, axis=0)
        return compiled(params, opt_state, batch, key)

    return checked_step
