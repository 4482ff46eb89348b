"""A base class that makes a whole environment of plain steps."""

import abc
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_number
from trustjax.envs.checking import check_flag, check_reward, check_same, unpacked
from trustjax.envs.environment import Environment, EnvParams, EnvState, Observation, Step
from trustjax.envs.third_party import strip_weak_types


class EpisodicParams(NamedTuple):
    """The parameters of an environment without parameters of its own.

    Attributes:
      max_steps_in_episode: Time limit of an episode in steps, >= 1; infinity for none.
    """

    max_steps_in_episode: ArrayLike = 1000


class EpisodicState(NamedTuple):
    """The state of an environment within its episode.

    Attributes:
      now: State as `reset_env` and `step_env` return it.
      time: Steps since the start of the episode, int32 [].
    """

    now: Any
    time: jax.Array


class EpisodicEnvironment(Environment):
    """An environment that is written as plain resets and steps.

    A subclass defines `reset_env` and `step_env`, and its actions: `num_actions`, or `action_low`
    and `action_high`. The base class adds the time limit, the start of a new episode after the end
    of the last, `info["final_observation"]`, and the shape of observations. A reset is computed in
    every step, because `jax.vmap` would make it so anyway.

    Attributes:
      default_params: Parameters that `reset_env` and `step_env` receive, any pytree of numbers. It
        has the time limit `max_steps_in_episode`, >= 1, as an attribute or as a key; infinity
        stands for no limit.

    Raises:
      ValueError: `reset_env` or `step_env` returns something else than it must, or the parameters
        have no time limit of at least 1; the result or parameter is named, at the first call.

    >>> class Walk(EpisodicEnvironment):
    ...     num_actions = 2
    ...
    ...     def reset_env(self, key, params):
    ...         return jnp.zeros(1), jnp.zeros(())
    ...
    ...     def step_env(self, key, state, action, params):
    ...         place = state + 2 * action - 1
    ...         return place[None], place, place / 3, place >= 3
    >>> Walk().observation_shape
    (1,)
    """

    default_params: EnvParams = EpisodicParams()

    @abc.abstractmethod
    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[Observation, Any]:
        """The first observation and state of an episode; both are pytrees of arrays."""

    @abc.abstractmethod
    def step_env(
        self, key: jax.Array, state: Any, action: jax.Array, params: EnvParams
    ) -> tuple[Observation, Any, jax.Array, jax.Array]:
        """One step, which knows neither a time limit nor a next episode.

        Returns:
          observation: Observation after the step.
          state: State after the step, with the shapes and dtypes of `reset_env`.
          reward: Reward of the step, a number.
          terminated: Whether the episode terminated by itself, bool [].
        """

    @functools.cached_property
    def observation_shape(self) -> Any:
        """The shape of one observation, found by tracing `reset_env`."""
        observation, _ = jax.eval_shape(self.reset, jax.random.key(0))
        return jax.tree.map(lambda x: tuple(x.shape), observation)

    def reset(self, key: jax.Array, params: EnvParams = None) -> tuple[Observation, EnvState]:
        """See `Environment`."""
        params = self.default_params if params is None else params
        result = unpacked("env.reset_env", self.reset_env(key, params), ("observation", "state"))
        observation, now = strip_weak_types(tuple(result))
        return observation, EpisodicState(now, jnp.zeros([], jnp.int32))

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams = None
    ) -> Step:
        """See `Environment`."""
        params = self.default_params if params is None else params
        limit = _time_limit(params)
        key_step, key_reset = jax.random.split(key)
        names = ("observation", "state", "reward", "terminated")
        result = self.step_env(key_step, state.now, action, params)
        final_observation, now, reward, terminated = unpacked("env.step_env", result, names)
        check_reward("env.step_env.reward", reward)
        check_flag("env.step_env.terminated", terminated)
        first = self.reset(key_reset, params)
        then = strip_weak_types((final_observation, EpisodicState(now, state.time + 1)))
        check_same("env.step_env.observation", then[0], first[0], "env.reset_env")
        check_same("env.step_env.state", then[1].now, first[1].now, "env.reset_env")
        terminated = jnp.asarray(terminated)
        truncated = (then[1].time >= limit) & ~terminated
        ended = terminated | truncated
        observation, state = jax.tree.map(lambda new, old: jnp.where(ended, new, old), first, then)
        reward = jnp.asarray(reward, jnp.result_type(float))
        info = {"final_observation": then[0]}
        return observation, state, reward, terminated, truncated, info


def _time_limit(params: EnvParams) -> ArrayLike:
    name = "max_steps_in_episode"
    limit: Any = params.get(name) if isinstance(params, Mapping) else getattr(params, name, None)
    if limit is None:
        raise FieldError(
            "env.default_params", f"have {name}", repr(params), advice="infinity means no limit"
        )
    check_number(name, limit, at_least=1)
    return limit  # type: ignore[no-any-return]
