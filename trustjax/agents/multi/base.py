"""What multi-agent algorithms share: joint networks, and the batch of one agent out of all.

A multi-agent environment is one environment of joint actions (`trustjax.envs.joint`), so rollouts,
advantages, the fit of the value and the statistics are those of `OnPolicy`. Arrays of a batch have
an axis of agents behind those of time and environments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_choice, check_count
from trustjax._sharding import AxisName
from trustjax.agents.algorithm import Algorithm, Metrics, PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.config import OnPolicyConfig
from trustjax.agents.multi.networks import (
    CentralCritic,
    JointActor,
    JointCritic,
    Neighbours,
    legal,
    view_of,
)
from trustjax.agents.on_policy import OnPolicy, State
from trustjax.agents.policy import Policy
from trustjax.agents.rollout import EpisodeStats, Rollout, Transition
from trustjax.envs import Environment
from trustjax.envs.joint import Joint, joint
from trustjax.envs.registry import make_once
from trustjax.models.actor_critic import Actor, Carry, Critic, Torso, unroll
from trustjax.models.graph import GraphAttention, GraphCritic


@dataclasses.dataclass(frozen=True)
class Graph:
    """A layer of attention between agents, and the memory in front of it.

    Attributes:
      scores: "gat", "gatv2", or "mean" for equal weights of all neighbours, without attention.
      heads: Number of heads of the attention, >= 1.
      width: Width of each head, >= 1.
      gru_size: Units of the GRU of a critic in front of the attention; None for no recurrence.
    """

    scores: Literal["gat", "gatv2", "mean"] = "gat"
    heads: int = 4
    width: int = 16
    gru_size: int | None = 64

    def __post_init__(self) -> None:
        """Raises ValueError for a size below 1 or unknown scores."""
        self.attention()
        check_count("gru_size", self.gru_size, at_least=1)

    def attention(self, dtype: Any = None) -> GraphAttention:
        """The layer of attention."""
        return GraphAttention(self.heads, self.width, self.scores, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiAgentConfig(OnPolicyConfig):
    """The fields that multi-agent algorithms add to `OnPolicyConfig`.

    `network`, `critic_network`, `policy_obs_key` and `value_obs_key` are not for them.

    Attributes:
      env: Object with JaxMARL's conventions, or its name for `trustjax.envs.make`; static.
      reward: What the agents are trained on: "team", the mean of the rewards of all, which is what
        the theory of HATRPO is about, or "individual", their own. Static.
      critic: What values are made of: "central", the state that all agents together know, with one
        value of it for all agents of a team, "local", each agent's own observation, or a `Graph`,
        the recurrent attention of GA-MATR over all observations. Static.
      actor_graph: Attention over the neighbours' observations in front of the policies, which then
        hear each other when they act; its `gru_size` must be None. None for policies of their own
        observations alone. Static.
    """

    env: Any = static("trustjax:MultiUAV")
    reward: Literal["team", "individual"] = static("team")
    critic: str | Graph = static("central")
    actor_graph: Graph | None = static(None)
    normalize_observations: bool = static(True)
    normalize_rewards: bool = static(True)

    def __post_init__(self) -> None:
        """Takes the environment out of its joint form, which is made again."""
        super().__post_init__()
        if isinstance(self.env, Joint):
            object.__setattr__(self, "env", self.env.unwrapped)

    @property
    def environment(self) -> Joint:
        """The joint environment of all agents."""
        env: Any = make_once(self.env) if isinstance(self.env, str) else self.env
        return joint(env)

    @property
    def shares_parameters(self) -> bool:
        """Whether all agents have the same parameters."""
        return False

    @property
    def identifies_agents(self) -> bool:
        """Whether policies see which agent they are."""
        return False

    @property
    def is_recurrent(self) -> bool:
        """See `OnPolicyConfig`; the memory of a graph critic is its own."""
        return self.gru_size is not None or (
            isinstance(self.critic, Graph) and self.critic.gru_size is not None
        )

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        if isinstance(self.env, Environment):
            raise FieldError("env", "be a multi-agent environment", self.env)
        for name in ("network", "critic_network", "policy_obs_key", "value_obs_key"):
            if getattr(self, name) is not None:
                raise FieldError(name, "be None for several agents", getattr(self, name))
        check_choice("reward", self.reward, ("team", "individual"))
        if not isinstance(self.critic, Graph):
            check_choice("critic", self.critic, ("central", "local"))
        elif self.gru_size is not None:
            raise FieldError(
                "gru_size", "be None with a graph", self.gru_size,
                advice="the memory of the critic is the graph's own gru_size",
            )  # fmt: skip
        if self.actor_graph is not None and self.actor_graph.gru_size is not None:
            raise FieldError("actor_graph", "have gru_size=None", self.actor_graph)
        super().validate()


class MultiAgent(OnPolicy):
    """An on-policy algorithm of several agents; see `Algorithm` for how it is used.

    `act` takes joint observations, `agent.env.observe(observations, env_state)`, and returns a
    joint action, of which `agent.env.actions` makes the dict of the environment. `episode/return`
    is the mean over the agents.

    >>> import jax
    >>> from trustjax.agents.multi import hatrpo
    >>> from trustjax.envs.matrix_game import MatrixGame
    >>> game = MatrixGame([[0.0, 1.0], [1.0, 0.0]], common=True)
    >>> config = hatrpo.Config(env=game, num_envs=32, num_steps=4, total_steps=2560, hidden=(8,))
    >>> state, history = jax.jit(config.agent().train)(jax.random.key(0))
    >>> history["episode/return"].shape
    (20,)
    """

    config: MultiAgentConfig
    env: Joint

    def __init__(self, config: MultiAgentConfig, *, axis_name: AxisName | None = None) -> None:
        """Checks the configuration and builds the joint networks."""
        Algorithm.__init__(self, config, axis_name=axis_name)
        numbers = self.env.num_actions
        self.num_actions = None if numbers is None else tuple(numbers)  # type: ignore[arg-type]
        common: dict[str, Any] = {
            "hidden": config.hidden, "activation": config.activation,
            "orthogonal": config.orthogonal, "dtype": config.dtype, "gru_size": config.gru_size,
        }  # fmt: skip
        together: dict[str, Any] = {
            "num_agents": self.env.num_agents,
            "shared": config.shares_parameters,
            "identify": config.identifies_agents,
        }
        low = self.env.action_low
        graph = config.actor_graph
        member = Actor(
            **common,
            num_actions=None if self.num_actions is None else max(self.num_actions),
            action_size=None if low is None else low.shape[-1],
            initial_log_std=config.initial_log_std,
            network=None if graph is None else Neighbours(graph.attention(config.dtype)),
        )
        self.actor: Any = self._actor(member, together)
        if config.critic_hidden is not None:
            common["hidden"] = config.critic_hidden
        self.critic: Any = self._critic(common, together)

    def _actor(self, member: Actor, together: dict[str, Any]) -> Any:
        return JointActor(member=member, num_actions=self.num_actions, **together)

    def _critic(self, common: dict[str, Any], together: dict[str, Any]) -> Any:
        config, num_agents = self.config, self.env.num_agents
        is_team = config.reward == "team"
        if isinstance(config.critic, Graph):
            member = Torso(**{**common, "gru_size": config.critic.gru_size})
            attention = config.critic.attention(config.dtype)
            return GraphCritic(member, attention, num_agents, pooled=is_team)
        if config.critic == "local":
            return JointCritic(member=Critic(**common), **together)
        return CentralCritic(**common, obs_key="state", num_agents=num_agents, common=is_team)

    def policy(self, state: Any) -> Policy:
        """The trained policies alone, which act together and can be saved."""
        return dataclasses.replace(super().policy(state), env=self.env)

    def accumulate_episode_stats(
        self, before: Any, steps: Rollout | Transition
    ) -> tuple[EpisodeStats, EpisodeStats, Metrics]:
        """The statistics of the mean reward of the agents; see `Algorithm`."""
        return super().accumulate_episode_stats(
            before, steps._replace(reward=jnp.mean(steps.reward, -1))
        )

    def _batch(self, state: State, rollout: Rollout, returns: Any) -> tuple[Batch, Carry]:
        """The transitions [time, environment, agent, ...] with the advantages of every agent.

        Advantages are normalised together over all agents; those of a team with a central critic
        are the same for all, so that each agent's are normalised as well.
        """
        reward = rollout.reward
        if self.config.reward == "team":
            mean = jnp.mean(reward, -1, keepdims=True)
            reward = jnp.broadcast_to(mean, reward.shape)
        ends: dict[str, Any] = {
            name: jnp.broadcast_to(getattr(rollout, name)[..., None], reward.shape)
            for name in ("terminated", "truncated")
        }
        return super()._batch(state, rollout._replace(reward=reward, **ends), returns)

    # Pieces for algorithms that update one agent after the other.

    def members(self, params: dict[str, PyTree]) -> PyTree:
        """The parameters of all policies, each leaf with a leading axis of agents."""
        return params["actor"]["params"]["member"]

    def with_members(self, params: dict[str, PyTree], members: PyTree) -> dict[str, PyTree]:
        """The parameters with other policies."""
        return {**params, "actor": {"params": {"member": members}}}

    def executed(self, member: PyTree, index: jax.Array) -> PyTree:
        """The parameters of a network of the agent's own actions alone, of those of one policy."""
        del index
        return member

    def batch_of(self, batch: Batch, index: jax.Array) -> Batch:
        """The batch of the agent with this index alone, [time, environment, ...]."""

        def take(x: jax.Array) -> jax.Array:
            taken: jax.Array = jax.lax.dynamic_index_in_dim(x, index, 2, keepdims=False)
            return taken

        has_neighbours = self.config.actor_graph is not None
        carry = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(
                x.reshape(len(x), self.env.num_agents, -1), index, 1, keepdims=False
            ),
            batch.actor_carry,
        )
        return batch._replace(
            observation=view_of(batch.observation, index, has_neighbours=has_neighbours),
            old=jax.tree.map(take, batch.old),
            action=take(batch.action),
            log_prob=take(batch.log_prob),
            advantage=take(batch.advantage),
            value=take(batch.value),
            returns=take(batch.returns),
            actor_carry=carry,
            critic_carry=(),
        )

    def member_distributions(self, member: PyTree, own: Batch, index: jax.Array) -> Any:
        """The distributions of one policy at the observations of `batch_of`."""
        found = unroll(
            self.actor.member, {"params": member}, own.observation, own.is_first, own.actor_carry
        )[0]
        return legal(found, self.num_actions, index)

    def in_drawn_order(
        self,
        key: jax.Array,
        step: Callable[[Any, jax.Array, jax.Array], tuple[Any, PyTree]],
        carry: Any,
    ) -> tuple[Any, PyTree]:
        """Scans `step(carry, index, key)` over the agents in an order that is drawn anew.

        Returns the last carry, and the results in the order of the agents, [n].
        """
        num_agents = self.env.num_agents
        key_order, key_steps = jax.random.split(key)
        order = jax.random.permutation(key_order, num_agents)
        keys = jax.random.split(key_steps, num_agents)
        carry, found = jax.lax.scan(lambda c, each: step(c, *each), carry, (order, keys))
        return carry, jax.tree.map(lambda x: jnp.zeros_like(x).at[order].set(x), found)


def per_agent(name: str, values: jax.Array) -> Metrics:
    """One metric for each agent, with the index of the agent in its name.

    Args:
      name: Name of the metric.
      values: Its values for n agents, [n].

    Returns:
      The values by name: NAME/agent_0, NAME/agent_1, ..., each [].
    """
    return {f"{name}/agent_{index}": value for index, value in enumerate(values)}


def factor_metrics(
    log_factor: jax.Array, mean: Callable[[jax.Array], ArrayLike]
) -> dict[str, jax.Array]:
    """Metrics of the compounded ratios of all agents, exp(`log_factor`) [time, environment].

    `factor/effective` is the effective share of the transitions, mean(w)^2 / mean(w^2), which is 1
    for equal weights w.
    """
    weight = jnp.exp(jnp.minimum(log_factor, 40.0))
    first, second = jnp.asarray(mean(weight)), jnp.asarray(mean(jnp.square(weight)))
    effective = jnp.square(first) / jnp.maximum(second, float(np.finfo(weight.dtype).tiny))
    return {"factor/mean": first, "factor/effective": effective}
