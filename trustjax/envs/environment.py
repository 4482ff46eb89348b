"""The interface of all environments, which is the one of gymnax 1.x."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Observation = Any
EnvState = Any
EnvParams = Any
Step = tuple[Observation, EnvState, jax.Array, jax.Array, jax.Array, dict[str, Any]]


class Environment(abc.ABC):
    """One environment as pure functions; `jax.vmap` over keys and states makes many of them.

    Attributes:
      name: Full name, such as "gymnax:CartPole-v1"; for a subclass without one, the name of the
        class.
      default_params: Pytree of numbers that may differ between calls. Its `max_steps_in_episode` is
        the time limit in steps.
      observation_shape: Shape of one observation; a dict of shapes if it is a dict of arrays.
      num_actions: Number of discrete actions, or a tuple of numbers, one for each of several
        actions that are taken together; None if actions are continuous.
      action_low: Lower bounds of continuous actions, float32 [d], which may be infinite; None if
        actions are discrete.
      action_high: Upper bounds of continuous actions, float32 [d], like `action_low`.
      on_host: Whether steps leave the compiled program for Python. Such environments are slow, and
        `jax.vmap` cannot evaluate several seeds of them at once.
      draws_starts: Whether agents use `draw_start` in place of a reset in every step.
      unwrapped: The wrapped environment of another package; None if there is none.
    """

    name: str
    default_params: EnvParams = None
    observation_shape: Any
    num_actions: int | tuple[int, ...] | None = None
    action_low: np.ndarray | None = None
    action_high: np.ndarray | None = None
    on_host: bool = False
    draws_starts: bool = False
    unwrapped: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Names a subclass that has no name after its class."""
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abc.abstractmethod
    def reset(self, key: jax.Array, params: EnvParams = None) -> tuple[Observation, EnvState]:
        """Starts an episode; keys may be typed or old-style keys.

        Returns:
          The first observation, an array or a dict of arrays, and the state. A part named
          "action_mask", bool, says which discrete actions are legal.
        """

    def draw_start(self, key: jax.Array, state: EnvState, params: EnvParams = None) -> EnvState:
        """The state with a new start state, in which the episodes that follow will start.

        Where `draws_starts` is True, agents call it after resets and every 32 steps, and `step`
        starts new episodes in this state: a cheap form for environments with expensive resets.
        """
        del key, params
        return state

    @abc.abstractmethod
    def step(
        self,
        key: jax.Array,
        state: EnvState,
        action: jax.Array,
        params: EnvParams = None,
    ) -> Step:
        """Takes one step, and starts a new episode if the old one ended.

        Returns:
          observation: Observation after the step, or the first one of the new episode.
          state: State after the step, or the first one of the new episode.
          reward: Reward of the step, float [].
          terminated: Whether the episode terminated by itself, bool [].
          truncated: Whether the time limit ended the episode, bool []; never set together with
            `terminated`.
          info: Dict whose "final_observation" is the observation after the step and before any
            reset, in every step.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def example_action(env: Environment) -> jax.Array:
    """An action of `env` with its shape and dtype, all zeros."""
    if env.num_actions is not None:
        return jnp.zeros(np.shape(env.num_actions), jnp.int32)
    assert env.action_low is not None
    return jnp.zeros(env.action_low.shape, jnp.result_type(float))
