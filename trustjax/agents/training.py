"""Training in pieces: between compiled chunks of iterations there is time to look and to stop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trustjax._checks import check_number
from trustjax.agents.algorithm import Algorithm, Metrics, S

Callback = Callable[[Any, Metrics], bool | None]


def train_in_chunks(
    agent: Algorithm[S], key: jax.Array, *, updates_per_chunk: int, callback: Callback
) -> tuple[S, Metrics]:
    """`agent.train(key)` with a callback after every chunk; the numbers are the same.

    Args:
      agent: PPO, TRPO, MDPO, SAC, ...
      key: of the whole training.
      updates_per_chunk: iterations of a chunk, >= 1; the last one may be shorter, and is compiled
        anew then.
      callback: `callback(state, metrics)`, metrics [iterations of the chunk]; it may save, plot or
        evaluate, and ends training by returning True. The state is overwritten by the next chunk:
        copy what is to be kept.

    Returns:
      The last state and the history, as `train` does.

    Raises:
      ValueError: `updates_per_chunk` < 1.
    """
    check_number("updates_per_chunk", updates_per_chunk, at_least=1)
    advance = jax.jit(agent.advance, static_argnums=1, donate_argnums=0)
    state, history = jax.jit(agent.init)(key), []
    done, total = 0, agent.config.num_updates - agent.config.first_update
    while done < total:
        length = min(updates_per_chunk, total - done)
        state, metrics = advance(state, length)
        history.append(metrics)
        done += length
        if callback(state, metrics):
            break
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *history)


def data_parallel(
    make_agent: Callable[..., Algorithm[S]],
    config: Any,
    mesh: Mesh,
    *,
    num_seeds: int | None = None,
) -> tuple[Callable[[jax.Array], S], Callable[[S, int], tuple[S, Metrics]]]:
    """`init` and `advance` of an agent whose environments are split over the devices of a mesh.

    The numbers are those of one device up to the order of sums: environments draw from keys of
    their own, minibatches are made of the same environments, and gradients, statistics, products
    with the Fisher matrix and line searches are means over all devices.

    Args:
      make_agent: `make_agent(config, axis_name=...)`, such as `PPO` or `SAC`.
      config: its Config.
      mesh: of one axis, such as `trustjax.parallel.make_mesh()`.
      num_seeds: trains so many seeds side by side: keys, states and histories have such an axis.

    Returns:
      `init(key) -> State` and `advance(state, num_updates) -> (State, Metrics)`, compiled; the
      state is donated.

    Raises:
      ValueError: environments that the devices cannot share, such as a num_envs that is no multiple
        of the number of devices times num_minibatches.
    """
    (axis_name,) = mesh.axis_names
    agent = make_agent(config, axis_name=axis_name if mesh.size > 1 else None)
    if mesh.size > 1:
        config.check_devices(mesh.size)
    seeds = num_seeds is not None
    specs = agent.state_specs(axis_name, batch_axes=int(seeds))
    update = jax.vmap(agent.update) if seeds else agent.update
    if mesh.size > 1:
        update = jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(specs, PartitionSpec()),
            # Environments by others are not written for its types; means are taken by hand.
            check_vma=False,
        )
    init = jax.vmap(agent.init) if seeds else agent.init
    placed = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )

    def advance(state: S, num_updates: int) -> tuple[S, Metrics]:
        state, history = jax.lax.scan(lambda s, _: update(s), state, length=num_updates)
        if seeds:
            history = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), history)
        return state, history

    return (
        jax.jit(init, out_shardings=placed),
        jax.jit(advance, static_argnums=1, donate_argnums=0),
    )
