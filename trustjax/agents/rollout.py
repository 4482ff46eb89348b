"""Rollouts: many environments side by side, stepped by a policy inside one scan.

What every environment draws comes from a key of its own, folded in by its place among all of them,
so that a rollout is the same however the environments are split over devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trustjax.distributions import Distribution
from trustjax.envs import Environment
from trustjax.models.actor_critic import Actor, Carry, default_float, restarted

Normalize = Callable[[jax.Array], jax.Array]


class Sums(NamedTuple):
    """What is summed up since an episode began, [environment].

    Attributes:
      episode_return: float, rewards.
      episode_length: int32, steps.
      discounted_return: float, g <- discount g + r; its variance scales the rewards.
    """

    episode_return: jax.Array
    episode_length: jax.Array
    discounted_return: jax.Array


class Runner(NamedTuple):
    """Environments under way; every array has a leading axis of environments.

    Attributes:
      place: int32, of the environment among those of all devices.
      env_state: of the environments.
      observation: float [environment, features], what the policy sees next, flat.
      starts: bool, whether it is the first of an episode.
      actor_carry: memory of the policy, () without one.
      critic_carry: memory of the value.
      sums: since the episodes began.
    """

    place: jax.Array
    env_state: Any
    observation: jax.Array
    starts: jax.Array
    actor_carry: Carry
    critic_carry: Carry
    sums: Sums


class Rollout(NamedTuple):
    """Transitions, [time, environment, ...].

    Attributes:
      observation: float [..., features], as the environment gave it.
      starts: bool, whether it is the first of an episode.
      distribution: of the actions.
      action: drawn from it, before it is cut to the bounds of the environment.
      reward: float.
      terminated: bool, the episode came to its end.
      truncated: bool, a time limit cut it.
      final_observation: float [..., features], what the step led to, before any reset.
    """

    observation: jax.Array
    starts: jax.Array
    distribution: Distribution
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_observation: jax.Array


def start(
    env: Environment,
    env_params: Any,
    key: jax.Array,
    num_envs: int,
    carries: tuple[Carry, Carry],
) -> Runner:
    """Resets `num_envs` environments; `carries` are those of actor and critic."""
    place = jnp.arange(num_envs, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, place)
    observation, env_state = jax.vmap(env.reset, (0, None))(keys, env_params)
    zeros = jnp.zeros(num_envs, default_float())
    return Runner(
        place=place,
        env_state=env_state,
        observation=flat(observation),
        starts=jnp.ones(num_envs, bool),
        actor_carry=carries[0],
        critic_carry=carries[1],
        sums=Sums(zeros, jnp.zeros(num_envs, jnp.int32), zeros),
    )


def collect(
    env: Environment,
    env_params: Any,
    actor: Actor,
    variables: Any,
    normalize: Normalize,
    runner: Runner,
    key: jax.Array,
    num_steps: int,
) -> tuple[Runner, Rollout]:
    """Steps all environments of `runner` `num_steps` times with actions drawn from the policy."""
    # All keys at once: in the scan they would be many small operations.
    keys = jax.vmap(
        lambda place: jax.random.split(jax.random.fold_in(key, place), (num_steps, 2)), out_axes=2
    )(runner.place)

    def step(runner: Runner, keys: jax.Array) -> tuple[Runner, Rollout]:
        for_actions, for_steps = keys
        carry = restarted(runner.actor_carry, runner.starts)
        distribution, carry = actor.apply(variables, normalize(runner.observation), carry)
        action = jax.vmap(lambda one, key: one.sample(key))(distribution, for_actions)
        observation, env_state, reward, terminated, truncated, info = jax.vmap(
            env.step, (0, 0, 0, None)
        )(for_steps, runner.env_state, within_bounds(env, action), env_params)
        transition = Rollout(
            observation=runner.observation,
            starts=runner.starts,
            distribution=distribution,
            action=action,
            reward=reward.astype(default_float()),
            terminated=terminated,
            truncated=truncated,
            final_observation=flat(info["final_observation"]),
        )
        runner = runner._replace(
            env_state=env_state,
            observation=flat(observation),
            starts=terminated | truncated,
            actor_carry=carry,
        )
        return runner, transition

    return jax.lax.scan(step, runner, keys)


def sum_up(
    sums: Sums, reward: jax.Array, ended: jax.Array, discount: jax.typing.ArrayLike
) -> tuple[Sums, Sums]:
    """Adds rewards [time, environment] to the sums; returns them at the end and after every step.

    A step at which an episode `ended` still counts to it; the sums begin anew after it.
    """

    def step(sums: Sums, each: tuple[jax.Array, jax.Array]) -> tuple[Sums, Sums]:
        reward, ended = each
        after = Sums(
            sums.episode_return + reward,
            sums.episode_length + 1,
            jnp.asarray(discount, reward.dtype) * sums.discounted_return + reward,
        )
        return jax.tree.map(lambda x: jnp.where(ended, jnp.zeros_like(x), x), after), after

    return jax.lax.scan(step, sums, (reward, ended), unroll=8)


def within_bounds(env: Environment, action: jax.Array) -> jax.Array:
    """Continuous actions, cut to what the environment takes."""
    if env.num_actions is not None:
        return action
    return jnp.clip(action, jnp.asarray(env.action_low), jnp.asarray(env.action_high))


def flat(observation: jax.Array) -> jax.Array:
    """Observations [environment, ...] as float [environment, features]."""
    return observation.reshape(observation.shape[0], -1).astype(default_float())
