"""Episodes of a network of vehicles, played by trained policies or by planners without learning."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustjax.envs.joint import Joint
from trustjax.envs.uav import UAVState

# act(observation, state, key, carry) -> (joint action, carry), for one network
Act = Callable[[Any, Any, jax.Array, Any], tuple[jax.Array, Any]]

# What is reported of an episode, and its unit.
MEASURES = {
    "return": "",
    "sum_rate": "Mbit/s",
    "jain": "",
    "energy": "kJ per vehicle",
    "collisions": "per episode",
}
_ITERATIONS = 10  # of Lloyd's method, which has settled on a dozen users by then


def play(
    env: Joint, act: Act, key: jax.Array, num_episodes: int, carry: Any = ()
) -> dict[str, jax.Array]:
    """Plays whole episodes, and measures them.

    Args:
      env: Vehicles (`trustjax.envs.MultiUAV`), whose episodes all have the same length.
      act: Chooses the joint actions.
      key: Random key. The same key begins all episodes alike, whoever plays.
      num_episodes: Episodes that are played side by side.
      carry: What `act` remembers at the start of an episode.

    Returns:
      Each of `MEASURES`, float [episode]: the sum of the mean rewards of the vehicles, the mean
      rate of all users together, the mean Jain index of their rates, the energy of propulsion, and
      the number of steps of a vehicle with a collision.
    """

    def episode(key: jax.Array) -> dict[str, jax.Array]:
        steps = _steps(env, act, key, carry)[1]
        means = ("sum_rate", "jain")
        return {k: jnp.mean(x) if k in means else jnp.sum(x) for k, x in steps.items()}

    return jax.vmap(episode)(jax.random.split(key, num_episodes))


def flight(env: Joint, act: Act, key: jax.Array, carry: Any = ()) -> UAVState:
    """The states before each step of one whole episode, [time, ...], for `uav_figures`.

    The arguments are those of `play`.
    """
    states: UAVState = jax.tree.map(np.asarray, jax.jit(lambda: _steps(env, act, key, carry)[0])())
    return states


def _steps(env: Joint, act: Act, key: jax.Array, carry: Any) -> tuple[UAVState, Any]:
    """The states before each step of an episode, and the measures of each step."""
    key_reset, key_play = jax.random.split(key)

    def step(now: Any, key: jax.Array) -> tuple[Any, Any]:
        observation, state, carry = now
        key_act, key_step = jax.random.split(key)
        action, carry = act(observation, state, key_act, carry)
        observation, after, reward, _, _, info = env.step(key_step, state, action)
        found = {
            "return": jnp.mean(reward),
            "sum_rate": jnp.mean(info["sum_rate"]) / 1e6,
            "jain": jnp.mean(info["jain"]),
            "energy": jnp.mean(info["energy"]) / 1e3,
            "collisions": jnp.sum(info["collision"]),
        }
        return (observation, after, carry), (state, found)

    keys = jax.random.split(key_play, env.unwrapped.max_steps_in_episode)
    steps: tuple[UAVState, Any] = jax.lax.scan(step, (*env.reset(key_reset), carry), keys)[1]
    return steps


def random_walk(env: Joint) -> Act:
    """Every vehicle chooses among its actions with equal probability."""
    numbers = _numbers(env)

    def act(observation: Any, state: Any, key: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
        del observation, state
        return jax.random.randint(key, (len(numbers),), 0, jnp.array(numbers), jnp.int32), carry

    return act


def k_means(env: Joint) -> Act:
    """Vehicles fly to the centres of as many clusters of users, and send at full power.

    Lloyd's method starts at the places of the vehicles, so that each has the cluster next to it.
    The planner sees all users, farther than a vehicle senses.
    """

    def act(observation: Any, state: Any, key: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
        del observation
        return toward(env, state, clusters(state.vehicles[:, :2], state.users), key), carry

    return act


def toward(env: Joint, state: Any, targets: jax.Array, key: jax.Array) -> jax.Array:
    """The action [N] that brings each vehicle next to its target [N, 2], at full power."""

    def outcome(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = env.actions(jnp.full(env.num_agents, number, jnp.int32))
        after = env.unwrapped.step_env(key, state, chosen)[1]
        return jnp.linalg.norm(after.vehicles[:, :2] - targets, axis=-1), after.power

    away, power = jax.vmap(outcome)(jnp.arange(max(_numbers(env))))  # [action, vehicle]
    # A metre decides before the power does, whose share of the largest is at most 1.
    cost = jnp.round(away) - power / env.unwrapped.max_power / 2
    return jnp.argmin(cost, 0).astype(jnp.int32)


def greedy(env: Joint) -> Act:
    """Vehicles choose, one after the other, what makes the next reward of the team largest.

    The planner knows the model. Those that have not chosen yet hover at full power.
    """
    numbers = _numbers(env)

    def act(observation: Any, state: Any, key: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
        del observation

        def reward(actions: jax.Array) -> jax.Array:
            rewards = env.unwrapped.step_env(key, state, env.actions(actions))[2]
            return jnp.mean(jnp.stack([rewards[agent] for agent in env.agents]))

        def choose(actions: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            options = jnp.arange(max(numbers), dtype=jnp.int32)
            values = jax.vmap(lambda one: reward(actions.at[index].set(one)))(options)
            return actions.at[index].set(jnp.argmax(values).astype(jnp.int32)), None

        start = toward(env, state, state.vehicles[:, :2], key)
        return jax.lax.scan(choose, start, jnp.arange(len(numbers)))[0], carry

    return act


PLANNERS: dict[str, Callable[[Joint], Act]] = {
    "random_walk": random_walk,
    "k_means": k_means,
    "greedy": greedy,
}


def clusters(starts: jax.Array, users: jax.Array) -> jax.Array:
    """Centres [N, 2] of clusters of users [K, 2] by Lloyd's method from the starts [N, 2].

    The centre of a cluster without users stays.
    """

    def iteration(centers: jax.Array, _: None) -> tuple[jax.Array, None]:
        apart = jnp.sum(jnp.square(users[:, None] - centers[None]), -1)
        own = jax.nn.one_hot(jnp.argmin(apart, 1), len(centers), axis=0)  # [N, K]
        number = jnp.sum(own, 1, keepdims=True)
        means = own @ users / jnp.maximum(number, 1)
        return jnp.where(number > 0, means, centers), None

    return jax.lax.scan(iteration, starts, length=_ITERATIONS)[0]


def trained(agent: Any, state: Any, *, deterministic: bool) -> Act:
    """The policies of a training."""
    return functools.partial(_act, agent.policy(state), deterministic)


def _act(
    policy: Any, deterministic: bool, observation: Any, state: Any, key: jax.Array, carry: Any
) -> tuple[jax.Array, Any]:
    del state
    found: tuple[jax.Array, Any] = policy.act(observation, key, carry, deterministic=deterministic)
    return found


def _numbers(env: Joint) -> tuple[int, ...]:
    assert env.num_actions is not None  # `Vehicles.validate` asks for it
    numbers: Any = env.num_actions
    return tuple(numbers)
