"""The interface of environments with several agents, which is the one of JaxMARL 0.2."""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from trustjax._checks import check_choice

Observations = dict[str, jax.Array]
Actions = dict[str, jax.Array]
MultiAgentStep = tuple[
    Observations, Any, dict[str, jax.Array], dict[str, jax.Array], dict[str, Any]
]


class MultiAgentEnvironment(abc.ABC):
    """Several agents that act at the same time, as pure functions of keys and states.

    Observations, actions, rewards and ends are dicts with one entry for each agent, as in JaxMARL,
    whose wrappers take these environments as they are. Observations have one more entry,
    "world_state", float [d], which a centralised critic may see.

    JaxMARL has one flag for all ends. Here `infos` say which kind an end is, because the value of
    what follows is 0 after a termination and not after a time limit:

        infos["terminated"]         bool [n]: the episode came to its own end
        infos["truncated"]          bool [n]: the time limit ended it; never both
        infos["final_observation"]  of `step` alone: the observations that the step led to, before
                                    any reset

    All other entries of `infos` have the shape [n]. JaxMARL's training scripts expect this shape of
    every entry; `LogWrapper(env, replace_info=True)` drops the others.

    Attributes:
      name: Full name, such as "trustjax:MultiUAV".
      agents: Names of the agents.
      num_agents: Number of agents n.
      observation_spaces: Space of each agent's observation, with `shape` and `dtype`.
      action_spaces: Space of each agent's action: `n` is the number of discrete actions; a box has
        `low`, `high` and `shape`.
      unwrapped: The wrapped environment of another package; None if there is none.
      on_host: Whether steps leave the compiled program for Python: never.
    """

    name: str
    unwrapped: Any = None
    on_host: bool = False

    @property
    @abc.abstractmethod
    def agents(self) -> list[str]:
        """Names of the agents."""

    @property
    @abc.abstractmethod
    def observation_spaces(self) -> dict[str, Any]:
        """Space of each agent's observation."""

    @property
    @abc.abstractmethod
    def action_spaces(self) -> dict[str, Any]:
        """Space of each agent's action."""

    @abc.abstractmethod
    def reset(self, key: jax.Array) -> tuple[Observations, Any]:
        """Starts an episode, and returns the first observations and the state."""

    @abc.abstractmethod
    def step_env(self, key: jax.Array, state: Any, actions: Actions) -> MultiAgentStep:
        """Takes one step and starts no new episode.

        Returns:
          observations: Observations after the step.
          state: State after the step.
          rewards: Reward of each agent, float [].
          dones: Whether the episode has ended, bool [], for each agent and for "__all__".
          infos: "terminated" and "truncated", bool [n], and numbers [n] of the environment.
        """

    @abc.abstractmethod
    def get_obs(self, state: Any) -> Observations:
        """The observations in a state."""

    @abc.abstractmethod
    def get_world_state(self, state: Any) -> jax.Array:
        """What a centralised critic may see of a state, float [d]."""

    def adjacency(self, state: Any) -> jax.Array:
        """The graph of the agents, bool [n, n]: whether i hears j. All hear all, unless overridden.

        The diagonal is True.
        """
        del state
        return jnp.ones((self.num_agents, self.num_agents), bool)

    def step(
        self, key: jax.Array, state: Any, actions: Actions, reset_state: Any = None
    ) -> MultiAgentStep:
        """Takes one step, and starts a new episode if the old one ended.

        Args:
          key: Random key.
          state: State before the step.
          actions: Action of each agent.
          reset_state: State in which a new episode starts; by default it is drawn.

        Returns:
          As `step_env`, with the observations and the state of the new episode if the old one
          ended, and with "final_observation" in `infos`.
        """
        key_step, key_reset = jax.random.split(key)
        final, after, rewards, dones, infos = self.step_env(key_step, state, actions)
        if reset_state is None:
            first = self.reset(key_reset)
        else:
            first = self.get_obs(reset_state), reset_state
        observations, state = jax.tree.map(
            lambda new, old: jnp.where(dones["__all__"], new, old), first, (final, after)
        )
        return observations, state, rewards, dones, {**infos, "final_observation": final}

    @property
    def num_agents(self) -> int:
        """Number of agents."""
        return len(self.agents)

    def observation_space(self, agent: str) -> Any:
        """Space of an agent's observation; ValueError if there is no agent of this name."""
        check_choice("agent", agent, self.agents)
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Any:
        """Space of an agent's action; ValueError if there is no agent of this name."""
        check_choice("agent", agent, self.agents)
        return self.action_spaces[agent]

    def get_avail_actions(self, state: Any) -> dict[str, jax.Array]:
        """Which discrete actions are legal, bool [n] for each agent; all, unless overridden."""
        del state
        return {
            agent: jnp.ones(space.n if hasattr(space, "n") else space.shape, bool)
            for agent, space in self.action_spaces.items()
        }

    @property
    def agent_classes(self) -> dict[str, list[str]]:
        """The agents that may share one policy, by the name of their class."""
        return {"agents": list(self.agents)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
