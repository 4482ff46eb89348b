"""Environments of gymnax, https://github.com/RobertTLange/gymnax."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import check_number
from trustjax.envs.arguments import check_arguments, coerce_like
from trustjax.envs.environment import Environment, EnvParams, EnvState, Observation, Step
from trustjax.envs.third_party import building, default_promotion, import_extra, strip_weak_types


def names() -> tuple[str, ...]:
    """Names of gymnax's environments, including those that were registered with it."""
    return tuple(_package().registered_envs)


class Gymnax(Environment):
    """An environment of gymnax, whose steps are those of gymnax to the bit.

    Observations are float. Numbers and flags are cast, and an observation from a discrete space of
    size n, such as the position in FrozenLake, becomes one-hot, float [n].

    Args:
      name: Name in gymnax, such as "CartPole-v1".
      **kwargs: Fields of the environment's parameters, such as `max_steps_in_episode`, or arguments
        of its constructor, such as `size` of "DeepSea-bsuite".

    Raises:
      ValueError: An argument is neither of these or is of the wrong kind, or the spaces of
        observations or actions are neither discrete nor a box.
    """

    def __init__(self, name: str, /, **kwargs: Any) -> None:
        """Builds the environment and its default parameters."""
        self.name = f"gymnax:{name}"
        gymnax = _package()
        with building():
            self.unwrapped, params = gymnax.make(name)
            defaults = _fields(params)
            arguments = kwargs.keys() - defaults.keys()
            if arguments:
                known = inspect.signature(type(self.unwrapped)).parameters
                check_arguments(self.name, arguments, [*defaults, *known])
                self.unwrapped, params = gymnax.make(
                    name, **{key: kwargs[key] for key in arguments}
                )
                defaults = _fields(params)
            changed = {
                key: coerce_like(key, value, defaults[key])
                for key, value in kwargs.items()
                if key in defaults
            }
            check_number("max_steps_in_episode", changed.get("max_steps_in_episode"), at_least=1)
            self.default_params = dataclasses.replace(params, **changed)
            seen = self.unwrapped.observation_space(self.default_params)
            actions = self.unwrapped.action_space(self.default_params)
        for kind, space in (("observations", seen), ("actions", actions)):
            if not hasattr(space, "n") and not hasattr(space, "low"):
                raise ValueError(
                    f"{self.name} must have {kind} in one discrete space or one box, "
                    f"got {type(space).__name__}"
                )
        self._one_hot_size = int(seen.n) if hasattr(seen, "n") else None
        self.observation_shape = (
            tuple(seen.shape) if self._one_hot_size is None else (self._one_hot_size,)
        )
        self.num_actions = int(actions.n) if hasattr(actions, "n") else None
        self._action_shape = tuple(actions.shape)
        if self.num_actions is None:
            self.action_low, self.action_high = (
                np.broadcast_to(np.asarray(bound, np.float32), actions.shape).reshape(-1)
                for bound in (actions.low, actions.high)
            )

    def reset(self, key: jax.Array, params: EnvParams = None) -> tuple[Observation, EnvState]:
        """See `Environment`."""
        params = self.default_params if params is None else params
        with default_promotion():
            observation, state = self.unwrapped.reset(key, params)
            return self._seen(observation), strip_weak_types(state)

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams = None
    ) -> Step:
        """See `Environment`."""
        params = self.default_params if params is None else params
        action = jnp.reshape(action, self._action_shape)
        with default_promotion():
            observation, state, reward, terminated, truncated, info = self.unwrapped.step(
                key, state, action, params
            )
            terminated = jnp.asarray(terminated, bool)
            return (
                self._seen(observation),
                strip_weak_types(state),
                jnp.reshape(jnp.asarray(reward, jnp.result_type(float)), ()),
                terminated,
                jnp.asarray(truncated, bool) & ~terminated,
                {"final_observation": self._seen(info["final_observation"])},
            )

    def _seen(self, observation: Any) -> jax.Array:
        dtype = jnp.result_type(float)
        if self._one_hot_size is not None:
            return jax.nn.one_hot(observation, self._one_hot_size, dtype=dtype)
        return jnp.asarray(observation, dtype)


def _fields(params: Any) -> dict[str, Any]:
    return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}


def _package() -> Any:
    return import_extra("gymnax", install='"trustjax[rl]"')
