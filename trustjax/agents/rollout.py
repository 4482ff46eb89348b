"""Rollouts: many environments side by side, stepped by a policy inside one scan.

What every environment draws comes from a key of its own, folded in by its index among all of them,
so that a rollout is the same however the environments are split over devices.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trustjax.distributions import Distribution
from trustjax.envs import Environment
from trustjax.models.actor_critic import Actor, Carry, default_float, restarted

Normalize = Callable[[jax.Array], jax.Array]


class EpisodeStats(NamedTuple):
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
      env_index: int32, of the environment among those of all devices.
      env_state: of the environments.
      observation: float [environment, features], what the policy sees next, flat.
      is_first: bool, whether it is the first of an episode.
      actor_carry: memory of the policy, () without one.
      critic_carry: memory of the value.
      sums: since the episodes began.
    """

    env_index: jax.Array
    env_state: Any
    observation: jax.Array
    is_first: jax.Array
    actor_carry: Carry
    critic_carry: Carry
    sums: EpisodeStats


class Transition(NamedTuple):
    """Steps of environments, [..., ...].

    Attributes:
      observation: float [..., features], as the environment gave it.
      action: of the policy, before it is clipped or rescaled to the bounds of the environment.
      reward: float.
      terminated: bool, whether the episode came to its end.
      truncated: bool, whether a time limit ended the episode.
      final_observation: float [..., features], what the step led to, before any reset.
    """

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_observation: jax.Array


class Rollout(NamedTuple):
    """Transitions of a policy, [time, environment, ...]; see `Transition`.

    Attributes:
      is_first: bool, whether the observation is the first of an episode.
      distribution: from which the action was drawn.
    """

    is_first: jax.Array
    distribution: Distribution
    observation: jax.Array
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
    index = jnp.arange(num_envs, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    observation, env_state = jax.vmap(env.reset, (0, None))(keys, env_params)
    zeros = jnp.zeros(num_envs, default_float())
    return Runner(
        env_index=index,
        env_state=env_state,
        observation=flat(observation),
        is_first=jnp.ones(num_envs, bool),
        actor_carry=carries[0],
        critic_carry=carries[1],
        sums=EpisodeStats(zeros, jnp.zeros(num_envs, jnp.int32), zeros),
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

    def step(runner: Runner, keys: jax.Array) -> tuple[Runner, Rollout]:
        for_actions, for_steps = keys
        carry = restarted(runner.actor_carry, runner.is_first)
        distribution, carry = actor.apply(variables, normalize(runner.observation), carry)
        action = jax.vmap(lambda one, key: one.sample(key))(distribution, for_actions)
        after, transition = step_envs(env, env_params, runner, action, for_steps)
        rollout = Rollout(runner.is_first, distribution, *transition)
        return after._replace(actor_carry=carry), rollout

    return jax.lax.scan(step, runner, draw_keys(key, runner.env_index, num_steps))


def draw_keys(key: jax.Array, index: jax.Array, num_steps: int) -> jax.Array:
    """Keys [step, 2, environment] for actions and for environments.

    All at once: in a loop over steps they would be many small operations.
    """
    return jax.vmap(
        lambda index: jax.random.split(jax.random.fold_in(key, index), (num_steps, 2)), out_axes=2
    )(index)


def step_envs(
    env: Environment,
    env_params: Any,
    runner: Runner,
    action: jax.Array,
    keys: jax.Array,
    *,
    squashed: bool = False,
) -> tuple[Runner, Transition]:
    """Steps all environments once; `action` and `squashed` as in `to_env_action`."""
    observation, env_state, reward, terminated, truncated, info = jax.vmap(
        env.step, (0, 0, 0, None)
    )(keys, runner.env_state, to_env_action(env, action, squashed=squashed), env_params)
    transition = Transition(
        observation=runner.observation,
        action=action,
        reward=reward.astype(default_float()),
        terminated=terminated,
        truncated=truncated,
        final_observation=flat(info["final_observation"]),
    )
    runner = runner._replace(
        env_state=env_state, observation=flat(observation), is_first=terminated | truncated
    )
    return runner, transition


def act_randomly(
    env: Environment,
    env_params: Any,
    runner: Runner,
    key: jax.Array,
    num_steps: int,
    discount: jax.typing.ArrayLike,
) -> tuple[Runner, Transition]:
    """Steps all environments with uniform actions, squashed ones; sums go on."""

    def step(runner: Runner, keys: jax.Array) -> tuple[Runner, Transition]:
        action = jax.vmap(lambda key: random_action(env, key))(keys[0])
        return step_envs(env, env_params, runner, action, keys[1], squashed=True)

    after, transitions = jax.lax.scan(step, runner, draw_keys(key, runner.env_index, num_steps))
    ended = transitions.terminated | transitions.truncated
    sums, _ = accumulate_episode_stats(runner.sums, transitions.reward, ended, discount)
    return after._replace(sums=sums), transitions


def random_action(env: Environment, key: jax.Array) -> jax.Array:
    """A uniform action for one environment: discrete, or [d] in [-1, 1), squashed."""
    if env.num_actions is not None:
        return jax.random.randint(key, (), 0, env.num_actions, jnp.int32)
    assert env.action_low is not None
    return jax.random.uniform(key, env.action_low.shape, default_float(), -1.0, 1.0)


def example(env: Environment, env_params: Any, runner: Runner) -> Transition:
    """A transition of one environment, of zeros."""

    def first(key: jax.Array) -> Transition:
        _, transitions = act_randomly(env, env_params, runner, key, 1, 1.0)
        one: Transition = jax.tree.map(lambda x: x[0, 0], transitions)
        return one

    shapes = jax.eval_shape(first, jax.random.key(0))
    zeros: Transition = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return zeros


def accumulate_episode_stats(
    sums: EpisodeStats, reward: jax.Array, ended: jax.Array, discount: jax.typing.ArrayLike
) -> tuple[EpisodeStats, EpisodeStats]:
    """Adds rewards [time, environment] to the sums; returns them at the end and after every step.

    A step at which an episode `ended` still counts to it; the sums begin anew after it.
    """

    def step(
        sums: EpisodeStats, each: tuple[jax.Array, jax.Array]
    ) -> tuple[EpisodeStats, EpisodeStats]:
        reward, ended = each
        after = EpisodeStats(
            sums.episode_return + reward,
            sums.episode_length + 1,
            jnp.asarray(discount, reward.dtype) * sums.discounted_return + reward,
        )
        return jax.tree.map(lambda x: jnp.where(ended, jnp.zeros_like(x), x), after), after

    return jax.lax.scan(step, sums, (reward, ended), unroll=8)


def to_env_action(env: Environment, action: jax.Array, *, squashed: bool) -> jax.Array:
    """Continuous actions as the environment takes them.

    Actions of a `squashed` policy, in (-1, 1), are rescaled to its bounds; others are clipped.
    """
    if env.num_actions is not None:
        return action
    low, high = (jnp.asarray(bound, action.dtype) for bound in (env.action_low, env.action_high))
    if squashed:
        action = low + (action + 1) * (high - low) / 2
    return jnp.clip(action, low, high)


def flat(observation: jax.Array) -> jax.Array:
    """Observations [environment, ...] as float [environment, features]."""
    return observation.reshape(len(observation), math.prod(observation.shape[1:])).astype(
        default_float()
    )
