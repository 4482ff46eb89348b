"""Probes: tiny environments whose values are known, to find the bugs of an agent.

Each probe demands one thing more than the probes before it, so that the first one that an agent
fails says where to look: at the value network ("constant", "observation"), at the discount and the
targets ("delayed"), at the policy ("action", "both", "continuous"), at time limits ("time_limit",
"final_observation"), or at the memory ("memory").

The idea is from Andy Jones, Debugging RL, Without the Agonizing Pain (2021); five of the probes are
in rejax.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_choice, check_number
from trustjax.envs.arguments import coerce_like
from trustjax.envs.environment import Environment, EnvParams, EnvState, Observation, Step

Numbers = Sequence[Any] | jax.Array  # scalars, or arrays of one shape


class ProbeParams(NamedTuple):
    """The parameters of a probe that may differ between calls.

    Attributes:
      max_steps_in_episode: Time limit of an episode in steps, >= 1.
    """

    max_steps_in_episode: jax.typing.ArrayLike = 5


class ProbeState(NamedTuple):
    """The state of a probe.

    Attributes:
      time: Steps since the start of the episode, int32 [].
      sign: +1 or -1, drawn at the start of the episode, float [].
    """

    time: jax.Array
    sign: jax.Array


class _Rules(NamedTuple):
    """The rules of a probe, with its time t, its sign s, the action a and the observation x.

    Attributes:
      length: Steps until the episode terminates; None if it never does.
      observe: Function (t, s) -> entries of the observation.
      reward: Function (t, s, a) -> reward of the step taken at time t.
      value: Function (x, discount) -> value of the best policy.
      actions: Number of discrete actions; None for one continuous action in [-1, 1].
    """

    length: int | None
    observe: Callable[[Any, Any], Numbers]
    reward: Callable[[Any, Any, Any], Any]
    value: Callable[[Numbers, Any], Any]
    actions: int | None = 2


_PROBES = {
    "constant": _Rules(1, lambda t, s: [1], lambda t, s, a: 1, lambda x, g: 1),
    "observation": _Rules(1, lambda t, s: [s], lambda t, s, a: s, lambda x, g: x[0]),
    "delayed": _Rules(2, lambda t, s: [t], lambda t, s, a: t, lambda x, g: g ** (1 - x[0])),
    "action": _Rules(1, lambda t, s: [1], lambda t, s, a: 2 * a - 1, lambda x, g: 1),
    "both": _Rules(1, lambda t, s: [s], lambda t, s, a: s * (2 * a - 1), lambda x, g: 1),
    "continuous": _Rules(
        1, lambda t, s: [1], lambda t, s, a: 1 - (a - 0.5) ** 2, lambda x, g: 1, actions=None
    ),
    "time_limit": _Rules(None, lambda t, s: [1], lambda t, s, a: 1, lambda x, g: 1 / (1 - g)),
    # Observation and reward alternate between +1 and -1: after an odd time limit the final
    # observation is -1, and the first one of the new episode is +1.
    "final_observation": _Rules(
        None, lambda t, s: [1 - 2 * (t % 2)], lambda t, s, a: 1 - 2 * (t % 2),
        lambda x, g: x[0] / (1 + g),
    ),
    # The sign is shown at the start, and the fourth step rewards the action that repeats it.
    "memory": _Rules(
        4, lambda t, s: [jnp.where(t == 0, s, 0), t],
        lambda t, s, a: jnp.where(t == 3, s * (2 * a - 1), 0), lambda x, g: g ** (3 - x[1]),
    ),
}  # fmt: skip

PROBES = tuple(_PROBES)


class Probe(Environment):
    """A tiny environment with a known value.

    | name | observation | steps | reward | value of the best policy |
    |---|---|---|---|---|
    | constant | 1 | 1 | 1 | 1 |
    | observation | s | 1 | s | the observation |
    | delayed | t | 2 | 1 at the second | discount, then 1 |
    | action | 1 | 1 | +1 for action 1, -1 for 0 | 1 |
    | both | s | 1 | +1 if action 1 meets s = 1 or 0 meets -1, else -1 | 1 |
    | continuous | 1 | 1 | 1 - (action - 0.5)^2 | 1 |
    | time_limit | 1 | no end | 1 | 1 / (1 - discount) |
    | final_observation | x: 1, -1, 1, ... | no end | x | x / (1 + discount) |
    | memory | s, then 0; t | 4 | as "both", at the fourth | discount^(3 - t) |

    Here s is +1 or -1, drawn at the start of an episode, and t is the number of steps taken so far.
    Where the action does not matter there are two actions, and every policy has the value in the
    table. The time limit is 5 steps; it truncates "time_limit" and "final_observation", which would
    go on forever. An agent that takes a truncation for a termination finds too small a value. An
    agent that bootstraps from the observation after the reset finds a wrong value of
    "final_observation", because the final observation has the opposite sign.

    Args:
      name: Name in the table.
      max_steps_in_episode: Time limit in steps, >= 1.

    Raises:
      ValueError: The name is unknown, or the time limit is out of range.

    >>> env = Probe("delayed")
    >>> print(env.value(jnp.array([[0.0], [1.0]]), discount=0.5))
    [0.5 1. ]
    """

    def __init__(self, name: str, *, max_steps_in_episode: int = 5) -> None:
        """Builds the probe."""
        check_choice("name", name, PROBES)
        limit = coerce_like("max_steps_in_episode", max_steps_in_episode, 5)
        check_number("max_steps_in_episode", limit, at_least=1)
        self._rules = _PROBES[name]
        self.name = f"probe:{name}"
        self.default_params = ProbeParams(limit)
        self.observation_shape = (len(self._rules.observe(0, 0)),)
        self.num_actions = self._rules.actions
        if self.num_actions is None:
            self.action_low, self.action_high = -np.ones(1, np.float32), np.ones(1, np.float32)

    def reset(self, key: jax.Array, params: EnvParams = None) -> tuple[Observation, EnvState]:
        """See `Environment`."""
        del params
        sign = 2 * jax.random.bernoulli(key).astype(_float()) - 1
        state = ProbeState(jnp.zeros([], jnp.int32), sign)
        return self._observe(state), state

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams = None
    ) -> Step:
        """See `Environment`."""
        limit = (self.default_params if params is None else params).max_steps_in_episode
        number = jnp.reshape(action, ()).astype(_float())
        reward = self._rules.reward(state.time.astype(_float()), state.sign, number)
        then = state._replace(time=state.time + 1)
        terminated = jnp.asarray(self._rules.length is not None and then.time >= self._rules.length)
        truncated = (then.time >= limit) & ~terminated
        final_observation = self._observe(then)
        new = self.reset(key)
        observation, state = jax.tree.map(
            lambda new, old: jnp.where(terminated | truncated, new, old),
            new,
            (final_observation, then),
        )
        info = {"final_observation": final_observation}
        return observation, state, jnp.asarray(reward, _float()), terminated, truncated, info

    def value(self, observation: jax.Array, discount: jax.typing.ArrayLike) -> jax.Array:
        """The value of the best policy: its discounted sum of rewards from `observation` on.

        Args:
          observation: Observations [..., *observation_shape] at which an action is taken, so not
            the `final_observation` of an episode that terminated.
          discount: Discount factor per step, in [0, 1]; it must be below 1 for the value of
            "time_limit" to be finite.

        Returns:
          Values, float [...].

        Raises:
          ValueError: `discount` is out of range, or the observation has another shape.
        """
        check_number("discount", discount, at_least=0.0, at_most=1.0)
        observation = jnp.asarray(observation, _float())
        if observation.shape[-1:] != self.observation_shape:
            raise FieldError(
                "observation", f"be [..., {self.observation_shape[0]}]", observation.shape
            )
        value = self._rules.value(jnp.moveaxis(observation, -1, 0), jnp.asarray(discount, _float()))
        return jnp.broadcast_to(jnp.asarray(value, _float()), observation.shape[:-1])

    def _observe(self, state: ProbeState) -> jax.Array:
        numbers = self._rules.observe(state.time.astype(_float()), state.sign)
        return jnp.stack([jnp.asarray(number, _float()) for number in numbers])


def _float() -> Any:
    """JAX's default float: float32, or float64 if x64 is enabled."""
    return jnp.result_type(float)
