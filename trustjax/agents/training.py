"""Training with callbacks or evaluations between chunks of iterations, or on several devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_count, check_number
from trustjax.agents.algorithm import Algorithm, Metrics, PyTree, S
from trustjax.agents.running_statistics import Statistics

Callback = Callable[[Any, Metrics], bool | None]

# Folded into the key of a training it gives that of the evaluations; no split has such an index.
EVALUATION = 2**31


class Best(NamedTuple):
    """The policy with the highest mean return so far, as the part of a state that acts.

    An agent takes it for a state: `agent.policy(best)`, `agent.act(best, ...)`.

    Attributes:
      params: Variables of the policy, {"actor": ...}.
      observations: Statistics that normalise its observations; None if they are not normalised.
      mean_return: Its mean return, float []; -inf before the first evaluation.
    """

    params: dict[str, PyTree]
    observations: Statistics | None
    mean_return: jax.Array


def initial_best(state: Any) -> Best:
    """A copy of the policy of a first state, which any evaluation exceeds."""
    actor, observations = jax.tree.map(jnp.copy, (state.params["actor"], state.observations))
    return Best({"actor": actor}, observations, jnp.full([], -jnp.inf))


def evaluate_and_keep_best(
    agent: Algorithm[S], state: S, best: Best, key: jax.Array, num_episodes: int
) -> tuple[Best, Metrics]:
    """The better one of a state's policy and `best`, and the evaluation of that policy.

    Args:
      agent: The algorithm.
      state: State whose policy plays, without noise in its actions.
      best: The best policy so far, which stays unless the mean return is higher than its own. A
        return that is NaN is not.
      key: Random key of the episodes. With the same key all evaluations begin from the same states,
        so that their differences are those of the policies.
      num_episodes: Number of episodes, >= 1.

    Returns:
      The best policy, and the means `evaluation/return` and `evaluation/length`, [].
    """
    found = agent.evaluate(state, key, num_episodes)
    mean_return = jnp.mean(found.returns).astype(best.mean_return.dtype)
    own = Best({"actor": state.params["actor"]}, state.observations, mean_return)
    better = mean_return > best.mean_return
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), own, best)
    return best, {
        "evaluation/return": mean_return,
        "evaluation/length": jnp.mean(found.lengths.astype(mean_return.dtype)),
    }


def train_with_evaluations(
    agent: Algorithm[S], key: jax.Array, *, updates_per_evaluation: int, num_episodes: int
) -> tuple[S, Metrics, Best]:
    """`agent.train(key)` with evaluations on the way, and the best policy that they found.

    A pure function of the key, which `jax.jit` compiles as a whole and `jax.vmap` maps over seeds.
    The training is the same as without evaluations, whose episodes have keys of their own.

    Args:
      agent: Algorithm, such as PPO, TRPO, MDPO or SAC.
      key: Random key of the whole training.
      updates_per_evaluation: Iterations between two evaluations, >= 1. There is always one after
        the last iteration.
      num_episodes: Episodes of each evaluation, >= 1, played without noise in the actions. All
        evaluations of a training begin from the same states.

    Returns:
      The last state.
      The metrics of `train`, [iterations], with `evaluation/return`, `evaluation/length`, and
      `evaluation/steps`, the steps of all environments together so far, int32; [evaluations].
      The policy with the highest mean return; the earliest one if several have it.

    Raises:
      ValueError: `updates_per_evaluation` or `num_episodes` < 1.

    >>> import jax
    >>> from trustjax.agents import ppo
    >>> agent = ppo.PPO(ppo.Config(total_steps=3 * 16 * 64, hidden=(8,)))
    >>> def train(key):
    ...     return train_with_evaluations(agent, key, updates_per_evaluation=2, num_episodes=4)
    >>> state, history, best = jax.jit(train)(jax.random.key(0))
    >>> history["evaluation/steps"].tolist()
    [2048, 3072]
    >>> bool(best.mean_return == history["evaluation/return"].max())
    True
    >>> policy = agent.policy(best)
    """
    check_number("updates_per_evaluation", updates_per_evaluation, at_least=1)
    check_number("num_episodes", num_episodes, at_least=1)
    config, key_play = agent.config, jax.random.fold_in(key, EVALUATION)

    def stretch(carry: tuple[S, Best], num_updates: int) -> tuple[tuple[S, Best], Any]:
        state, history = agent.advance(carry[0], num_updates)
        best, found = evaluate_and_keep_best(agent, state, carry[1], key_play, num_episodes)
        found["evaluation/steps"] = state.iteration * config.steps_per_update
        return (state, best), (history, found)

    state = agent.init(key)
    whole, rest = divmod(config.num_updates - config.first_update, updates_per_evaluation)
    carry, (history, found) = jax.lax.scan(
        lambda carry, _: stretch(carry, updates_per_evaluation),
        (state, initial_best(state)), length=whole,
    )  # fmt: skip
    history = jax.tree.map(lambda x: x.reshape(-1), history)
    if rest:
        carry, (last_history, last) = stretch(carry, rest)
        last = jax.tree.map(lambda x: x[None], last)
        history, found = jax.tree.map(
            lambda *parts: jnp.concatenate(parts), (history, found), (last_history, last)
        )
    return carry[0], history | found, carry[1]


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
        is not a multiple of the number of devices times `num_minibatches`; or `numbers` has a name
        that the Config lacks, not `num_seeds` values, or none to be used for.
    """
    (axis_name,) = mesh.axis_names
    make = functools.partial(make_agent, axis_name=axis_name if mesh.size > 1 else None)
    agent = make(config)
    if mesh.size > 1:
        config.check_devices(mesh.size)
    seeds = num_seeds is not None
    specs = agent.state_specs(axis_name, batch_axes=int(seeds))
    check_count("num_seeds", num_seeds, at_least=1)
    each = {name: jnp.asarray(values) for name, values in (numbers or {}).items()}
    swept = {f.name for f in dataclasses.fields(config) if not f.metadata.get("static")}
    for name, values in each.items():
        if name not in swept:
            raise FieldError(f"numbers.{name}", "be a number of the Config", sorted(swept))
        if not seeds or values.shape[:1] != (num_seeds,):
            must = f"have one value for each of num_seeds, {num_seeds}"
            raise FieldError(f"numbers.{name}", must, f"shape {values.shape}")

    def lanes(method: str) -> Callable[[Any], Any]:
        """A method of the agent for one seed, or for all seeds, each with its numbers."""
        if not seeds:
            return getattr(agent, method)  # type: ignore[no-any-return]

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
    init_lanes = lanes("init")

    def init(key: jax.Array) -> S:
        if seeds and (count := len(key)) != num_seeds:
            raise FieldError("key", f"be keys of num_seeds, {num_seeds} seeds", count)
        return init_lanes(key)  # type: ignore[no-any-return]

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
