"""What an environment is here: gymnax 1.x's interface, whatever is behind it."""

import abc
from typing import Any

import jax
import numpy as np

Observation = Any
EnvState = Any
EnvParams = Any
Step = tuple[Observation, EnvState, jax.Array, jax.Array, jax.Array, dict[str, Any]]


class Environment(abc.ABC):
    """One environment as pure functions; `jax.vmap` over keys and states makes many of them.

    Attributes:
      name: such as "gymnax:CartPole-v1".
      default_params: pytree of numbers that may differ between calls; its
        `max_steps_in_episode` is the time limit.
      observation_shape: of one observation.
      num_actions: how many there are, if they are discrete, else None.
      action_low: float32 [d], bounds of continuous actions, else None; may be infinite.
      action_high: float32 [d].
      unwrapped: the environment of another package that is behind it, else None.
    """

    name: str
    default_params: EnvParams
    observation_shape: tuple[int, ...]
    num_actions: int | None
    action_low: np.ndarray | None = None
    action_high: np.ndarray | None = None
    unwrapped: Any = None

    @abc.abstractmethod
    def reset(self, key: jax.Array, params: EnvParams = None) -> tuple[Observation, EnvState]:
        """Starts an episode; keys may be typed or of the old style."""

    @abc.abstractmethod
    def step(
        self,
        key: jax.Array,
        state: EnvState,
        action: jax.Array,
        params: EnvParams = None,
    ) -> Step:
        """One step, and a new episode if that one ended.

        Returns:
          observation: of the new episode, where one began.
          state: the same.
          reward: float [].
          terminated: bool [], the episode came to its own end.
          truncated: bool [], the time limit ended the episode; never together with `terminated`.
          info: "final_observation" is what the step led to, before any reset, in every step.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
