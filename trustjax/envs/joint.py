"""A multi-agent environment with JaxMARL's conventions as one environment of joint actions.

JaxMARL's environments take and return dicts with an entry for each agent. Here the entries are
stacked along an axis of agents, in the order of `env.agents`, so that rollouts, statistics and
networks work on arrays.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError
from trustjax.envs.environment import Environment, EnvParams, EnvState, Observation, Step
from trustjax.envs.third_party import strip_weak_types

_NEEDED = ("agents", "reset", "step_env", "observation_space", "action_space")


class Joint(Environment):
    """All agents of an environment with JaxMARL's conventions side by side.

    An observation is a dict of the parts

        agents   the observations of n agents, flattened and padded with zeros to the longest,
                 float [n, d]
        state    what all agents together know, float [m]: the environment's "world_state", or its
                 first row where every agent has a copy, or all observations side by side
        graph    who hears whom, bool [n, n]: entry (i, j) says whether agent i hears agent j. It is
                 `env.adjacency(state)` where the environment has this method, and complete
                 otherwise. Every agent hears itself

    and the reward is one number per agent, float [n]. A joint action is int32 [n], or float [n, a].
    An episode ends for all agents together, where `dones["__all__"]` is set. It is truncated where
    `infos["truncated"]` is, and terminated otherwise: JaxMARL's own environments do not say which,
    so that their ends are terminations. What else is in `infos` comes with "final_observation".

    Args:
      env: Object with JaxMARL's `agents`, `reset`, `step_env`, `observation_space` and
        `action_space`. Agents may have observations of different lengths and different numbers of
        discrete actions; continuous actions must have the same number of dimensions.

    Raises:
      ValueError: `env` lacks one of these, or its spaces cannot be stacked.
    """

    def __init__(self, env: Any) -> None:
        """Reads the spaces of all agents."""
        missing = [name for name in _NEEDED if not hasattr(env, name)]
        if missing or isinstance(env, Environment):
            raise FieldError(
                "env", "be a multi-agent environment with JaxMARL's conventions",
                type(env).__name__, advice=f"it lacks {', '.join(missing)}" if missing else "",
            )  # fmt: skip
        self.unwrapped = env
        self.name = str(getattr(env, "name", type(env).__name__))
        self.agents: tuple[str, ...] = tuple(env.agents)
        self._set_actions([env.action_space(agent) for agent in self.agents])
        shapes = [env.observation_space(agent).shape for agent in self.agents]
        self.width = max(int(np.prod(shape)) for shape in shapes)
        first = jax.eval_shape(self.reset, jax.random.key(0))[0]
        self.observation_shape = {name: tuple(part.shape) for name, part in first.items()}

    @property
    def num_agents(self) -> int:
        """Number n of agents."""
        return len(self.agents)

    def reset(self, key: jax.Array, params: EnvParams = None) -> tuple[Observation, EnvState]:
        """See `Environment`."""
        del params
        observations, state = self.unwrapped.reset(key)
        return self.observe(observations, state), strip_weak_types(state)

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams = None
    ) -> Step:
        """See `Environment`; the reward is float [n]."""
        del params
        key_step, key_reset = jax.random.split(key)
        observations, after, rewards, dones, infos = self.unwrapped.step_env(
            key_step, state, self.actions(action)
        )
        done = jnp.asarray(dones["__all__"], bool)
        truncated = done & jnp.any(jnp.asarray(infos.get("truncated", False)))
        final = self.observe(observations, after)

        def select(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(done, a, b).astype(a.dtype), new, old)

        new_observation, new_state = self.reset(key_reset)
        reward = jnp.stack([jnp.asarray(rewards[agent], jnp.float32) for agent in self.agents])
        info = {**infos, "final_observation": final}
        return (
            select(new_observation, final), select(new_state, after), reward,
            done & ~truncated, truncated, info,
        )  # fmt: skip

    def observe(self, observations: Any, state: EnvState) -> dict[str, jax.Array]:
        """The parts of a joint observation, from what the environment returns.

        Args:
          observations: The dict of observations.
          state: The state in which they were made, which has the graph of the agents.
        """
        rows = [jnp.ravel(observations[agent]).astype(jnp.float32) for agent in self.agents]
        padded = jnp.stack([jnp.pad(row, (0, self.width - row.size)) for row in rows])
        world = observations.get("world_state")
        if world is None:
            world = jnp.concatenate(rows)
        elif jnp.ndim(world) == 2:
            world = world[0]
        if hasattr(self.unwrapped, "adjacency"):
            graph = jnp.asarray(self.unwrapped.adjacency(state), bool)
        else:
            graph = jnp.ones((self.num_agents, self.num_agents), bool)
        return {
            "agents": padded,
            "state": jnp.ravel(world).astype(jnp.float32),
            "graph": graph | jnp.eye(self.num_agents, dtype=bool),
        }

    def actions(self, joint: jax.Array) -> dict[str, jax.Array]:
        """The dict of actions that the environment takes, from a joint action [n] or [n, a]."""
        return {agent: joint[index] for index, agent in enumerate(self.agents)}

    def _set_actions(self, spaces: list[Any]) -> None:
        numbers = [getattr(space, "n", None) for space in spaces]
        if all(number is not None for number in numbers):
            self.num_actions = tuple(int(number) for number in numbers if number is not None)
            return
        boxes = [hasattr(space, "low") and len(space.shape) == 1 for space in spaces]
        shapes = {tuple(space.shape) for space in spaces}
        if not all(boxes) or len(shapes) > 1:
            raise FieldError(
                "env",
                "have discrete actions for all agents, or continuous ones of the same shape [a]",
                ", ".join(
                    f"{agent}: {type(space).__name__}{tuple(space.shape)}"
                    for agent, space in zip(self.agents, spaces, strict=True)
                ),
            )
        low, high = (
            np.stack([np.broadcast_to(getattr(space, name), space.shape) for space in spaces])
            for name in ("low", "high")
        )
        self.action_low, self.action_high = low.astype(np.float32), high.astype(np.float32)


@functools.lru_cache(maxsize=64)
def joint(env: Any) -> Joint:
    """The joint environment of a multi-agent one; the same object for the same environment."""
    return env if isinstance(env, Joint) else Joint(env)
