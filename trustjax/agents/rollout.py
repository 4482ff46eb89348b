"""Rollouts: many environments side by side, stepped by a policy inside one scan.

Every environment has a random key of its own, made by folding in its index among all environments,
so that a rollout is the same however the environments are split over devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trustjax.distributions import Distribution, categorical
from trustjax.envs import Environment
from trustjax.envs.third_party import strip_weak_types
from trustjax.models.actor_critic import Actor, Carry, default_float, reset_carry
from trustjax.models.observations import action_mask

STEPS_PER_START = 32  # between two draws of start states
_START_KEY = 0x5747  # folded into the key of a step, which the environment may split

Prepare = Callable[[Any], Any]


class EpisodeStats(NamedTuple):
    """Sums since the start of the episode, [environment].

    Attributes:
      episode_return: Sum of the rewards, float.
      episode_length: Number of steps, int32.
      discounted_return: Sum g <- discount g + r, float; its running variance scales the rewards.
    """

    episode_return: jax.Array
    episode_length: jax.Array
    discounted_return: jax.Array


class Runner(NamedTuple):
    """The environments between two steps; every array has a leading axis of environments.

    Attributes:
      env_index: Index of each environment among those of all devices, int32 [environment].
      env_state: States of the environments.
      observation: Observations for the next action, as `prepared_for` the policy: float
        [environment, features], or a dict of parts or an array [environment, *shape].
      is_first: Whether the observation is the first of an episode, bool [environment].
      actor_carry: Carry of the policy, [environment, gru_size]; () without a GRU.
      critic_carry: Carry of the critic, [environment, gru_size]; () without a GRU.
      sums: Statistics of the episodes in progress.
    """

    env_index: jax.Array
    env_state: Any
    observation: Any
    is_first: jax.Array
    actor_carry: Carry
    critic_carry: Carry
    sums: EpisodeStats


class Transition(NamedTuple):
    """Steps of environments, with any batch axes.

    Attributes:
      observation: Observations before the step, not normalised, [..., features] as in `Runner`.
      action: Actions of the policy, before they are clipped or rescaled to the bounds of the
        environment.
      reward: Rewards of the step, float [...].
      terminated: Whether the episode terminated by itself, bool [...].
      truncated: Whether a time limit ended the episode, bool [...].
      final_observation: Observations after the step and before any reset, like `observation`.
    """

    observation: Any
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_observation: Any


class Rollout(NamedTuple):
    """Transitions of a policy, [time, environment, ...]; see `Transition` for the other fields.

    Attributes:
      is_first: Whether the observation is the first of an episode, bool.
      distribution: Distribution from which the action was drawn.
    """

    is_first: jax.Array
    distribution: Distribution
    observation: Any
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    final_observation: Any


def flatten_observations(observation: jax.Array) -> jax.Array:
    """Observations [environment, ...] flattened to float [environment, features]."""
    return observation.reshape(len(observation), math.prod(observation.shape[1:])).astype(
        default_float()
    )


def prepared_for(actor: Any) -> Prepare:
    """The function that makes observations [environment, ...] ready to be kept for a policy.

    They are flattened, unless the policy has a network in front, which takes them as they are.
    """
    network = getattr(actor, "network", None)
    return flatten_observations if network is None else strip_weak_types


def start(
    env: Environment,
    env_params: Any,
    key: jax.Array,
    num_envs: int,
    carries: tuple[Carry, Carry],
    prepare: Prepare = flatten_observations,
) -> Runner:
    """Resets `num_envs` environments; `carries` are the first ones of the actor and the critic."""
    index = jnp.arange(num_envs, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    observation, env_state = reset_envs(env, env_params, keys)
    zeros = jnp.zeros(num_envs, default_float())
    return Runner(
        env_index=index,
        env_state=env_state,
        observation=prepare(observation),
        is_first=jnp.ones(num_envs, bool),
        actor_carry=carries[0],
        critic_carry=carries[1],
        sums=EpisodeStats(zeros, jnp.zeros(num_envs, jnp.int32), zeros),
    )


def reset_envs(env: Environment, env_params: Any, keys: jax.Array) -> tuple[Any, Any]:
    """Resets environments with these keys, [environment]; returns observations and states."""
    observation, env_state = jax.vmap(env.reset, (0, None))(keys, env_params)
    if env.draws_starts:
        # With the same keys: the states that are drawn are those of the reset, and computed once.
        env_state = jax.vmap(env.draw_start, (0, 0, None))(keys, env_state, env_params)
    return observation, env_state


def collect(
    env: Environment,
    env_params: Any,
    actor: Actor,
    variables: Any,
    normalize: Prepare,
    runner: Runner,
    key: jax.Array,
    num_steps: int,
) -> tuple[Runner, Rollout]:
    """Steps all environments of `runner` `num_steps` times with actions drawn from the policy."""

    def step(runner: Runner, each: tuple[jax.Array, jax.Array]) -> tuple[Runner, Rollout]:
        time, (keys_action, keys_step) = each
        # The runner already holds the first observation of a new episode, but not its carry.
        carry = reset_carry(runner.actor_carry, runner.is_first)
        distribution, carry = actor.apply(variables, normalize(runner.observation), carry)
        action = jax.vmap(lambda one, key: one.sample(key))(distribution, keys_action)
        after, transition = step_envs(
            env, env_params, runner, action, keys_step, time, prepare=prepared_for(actor)
        )
        rollout = Rollout(runner.is_first, distribution, *transition)
        return after._replace(actor_carry=carry), rollout

    keys = draw_keys(key, runner.env_index, num_steps)
    return jax.lax.scan(step, runner, (jnp.arange(num_steps), keys))


def draw_keys(key: jax.Array, index: jax.Array, num_steps: int) -> jax.Array:
    """Random keys [step, 2, environment], one for the action and one for the environment's step.

    They are split all at once, because splits in the loop over steps are many small operations.
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
    time: jax.Array,
    *,
    squashed: bool = False,
    prepare: Prepare = flatten_observations,
) -> tuple[Runner, Transition]:
    """Steps all environments once; see `to_env_action` for `action` and `squashed`.

    `time`, int32 [], counts the steps of the rollout: every `STEPS_PER_START` of them,
    environments that draw start states draw new ones. It must not be batched by `jax.vmap`, which
    would turn this condition into a select, with a reset in every step.
    """
    env_state = runner.env_state
    if env.draws_starts:

        def draw_starts(env_state: Any) -> Any:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, _START_KEY)
            return jax.vmap(env.draw_start, (0, 0, None))(own, env_state, env_params)

        due = time % STEPS_PER_START == 0
        env_state = jax.lax.cond(due, draw_starts, lambda same: same, env_state)
    observation, env_state, reward, terminated, truncated, info = jax.vmap(
        env.step, (0, 0, 0, None)
    )(keys, env_state, to_env_action(env, action, squashed=squashed), env_params)
    transition = Transition(
        observation=runner.observation,
        action=action,
        reward=reward.astype(default_float()),
        terminated=terminated,
        truncated=truncated,
        final_observation=prepare(info["final_observation"]),
    )
    runner = runner._replace(
        env_state=env_state,
        observation=prepare(observation),
        is_first=terminated | truncated,
    )
    return runner, transition


def act_randomly(
    env: Environment,
    env_params: Any,
    runner: Runner,
    key: jax.Array,
    num_steps: int,
    discount: jax.typing.ArrayLike,
    prepare: Prepare = flatten_observations,
) -> tuple[Runner, Transition]:
    """Steps all environments `num_steps` times with uniform actions; the episode sums continue.

    Continuous actions are those of a squashed policy, in [-1, 1); discrete ones are legal.
    """

    def step(runner: Runner, each: tuple[jax.Array, jax.Array]) -> tuple[Runner, Transition]:
        time, keys = each
        mask = action_mask(runner.observation)
        action = jax.vmap(functools.partial(random_action, env))(keys[0], mask)
        return step_envs(
            env, env_params, runner, action, keys[1], time, squashed=True, prepare=prepare
        )

    keys = draw_keys(key, runner.env_index, num_steps)
    after, transitions = jax.lax.scan(step, runner, (jnp.arange(num_steps), keys))
    ended = transitions.terminated | transitions.truncated
    sums, _ = accumulate_episode_stats(runner.sums, transitions.reward, ended, discount)
    return after._replace(sums=sums), transitions


def random_action(env: Environment, key: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """A uniform action for one environment: discrete, int32 [], or squashed, float [d].

    Of discrete actions with a `mask`, bool [actions], it is one of the legal ones.
    """
    if env.num_actions is not None:
        number: Any = env.num_actions  # several at once are refused off-policy
        if mask is not None:
            return categorical(jnp.zeros(number), number, mask).sample(key)
        return jax.random.randint(key, (), 0, number, jnp.int32)
    assert env.action_low is not None
    return jax.random.uniform(key, env.action_low.shape, default_float(), -1.0, 1.0)


def example(
    env: Environment,
    env_params: Any,
    runner: Runner,
    prepare: Prepare = flatten_observations,
) -> Transition:
    """A single unbatched transition of zeros, with the shapes and dtypes of the environment."""

    def first(key: jax.Array) -> Transition:
        _, transitions = act_randomly(env, env_params, runner, key, 1, 1.0, prepare)
        one: Transition = jax.tree.map(lambda x: x[0, 0], transitions)
        return one

    shapes = jax.eval_shape(first, jax.random.key(0))
    zeros: Transition = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return zeros


def accumulate_episode_stats(
    sums: EpisodeStats, reward: jax.Array, ended: jax.Array, discount: jax.typing.ArrayLike
) -> tuple[EpisodeStats, EpisodeStats]:
    """Adds rewards [time, environment] to the sums.

    The step at which an episode `ended` still counts towards it, and the sums restart after it.

    Returns:
      The sums after the last step, [environment], and those after every step, [time, environment].
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
    """The actions for the environment, within its bounds; discrete ones are returned as they are.

    Actions of a `squashed` policy, in (-1, 1), are rescaled to the bounds; others are clipped.
    """
    if env.num_actions is not None:
        return action
    low, high = (jnp.asarray(bound, action.dtype) for bound in (env.action_low, env.action_high))
    # From (-1, 1) to the bounds; rounding may exceed them, so that these are clipped as well.
    if squashed:
        action = low + (action + 1) * (high - low) / 2
    return jnp.clip(action, low, high)
