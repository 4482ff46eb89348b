"""Training in compiled chunks of iterations with callbacks between them, or on several devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from trustjax._checks import check_number
from trustjax.agents.algorithm import Algorithm, Metrics, S

Callback = Callable[[Any, Metrics], bool | None]


def train_in_chunks(
    agent: Algorithm[S], key: jax.Array, *, updates_per_chunk: int, callback: Callback
) -> tuple[S, Metrics]:
    """`agent.train(key)` with a callback after every chunk of iterations; the results are the same.

    Args:
      agent: Algorithm, such as PPO, TRPO, MDPO or SAC.
      key: Random key of the whole training.
      updates_per_chunk: Iterations in a chunk, >= 1. The last chunk may be shorter, and is then
        compiled separately.
      callback: Function `callback(state, metrics)`, called with metrics [iterations of the chunk].
        It may save, plot or evaluate, and ends the training by returning True. The next chunk
        overwrites the state, so that the callback must copy what is to be kept.

    Returns:
      The last state and the history, like `train`.

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
    numbers: Mapping[str, ArrayLike] | None = None,
) -> tuple[Callable[[jax.Array], S], Callable[[S, int], tuple[S, Metrics]]]:
    """`init` and `advance` of an agent whose environments are split over the devices of a mesh.

    The results are those of one device up to the order of sums: each environment has random keys of
    its own, minibatches consist of the same environments, and gradients, statistics, Fisher-vector
    products and line searches use means over all devices.

    Args:
      make_agent: Factory `make_agent(config, axis_name=...)`, such as `PPO` or `SAC`.
      config: Config of the agent.
      mesh: Mesh with one axis, such as `trustjax.parallel.make_mesh()`.
      num_seeds: Number of seeds that are trained side by side; keys, states and histories then have
        a leading axis of seeds. None for one seed without such an axis.
      numbers: Numbers of the configuration by name, each [num_seeds], that differ between what is
        trained side by side, such as the learning rates of a search. The other numbers are those of
        `config`.

    Returns:
      The compiled functions `init(key) -> State` and
      `advance(state, num_updates) -> (State, Metrics)`; `advance` donates its state.

    Raises:
      ValueError: The environments cannot be split over the devices, for instance because `num_envs`
        is not a multiple of the number of devices times `num_minibatches`.
    """
    (axis_name,) = mesh.axis_names
    make = functools.partial(make_agent, axis_name=axis_name if mesh.size > 1 else None)
    agent = make(config)
    if mesh.size > 1:
        config.check_devices(mesh.size)
    seeds = num_seeds is not None
    specs = agent.state_specs(axis_name, batch_axes=int(seeds))

    def lanes(method: str) -> Callable[[Any], Any]:
        """A method of the agent for one seed, or for all seeds, each with its numbers."""
        if not seeds:
            return getattr(agent, method)  # type: ignore[no-any-return]
        each = {name: jnp.asarray(values) for name, values in (numbers or {}).items()}

        def lane(own: Mapping[str, jax.Array], x: Any) -> Any:
            return getattr(make(dataclasses.replace(config, **own)) if own else agent, method)(x)

        return functools.partial(jax.vmap(lane), each)

    update = lanes("update")
    if mesh.size > 1:
        update = jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(specs, PartitionSpec()),
            # Third-party environments are not written for varying types; means are taken by hand.
            check_vma=False,
        )
    init = lanes("init")
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
