"""Networks of all agents side by side, as one network of joint observations.

Parameters of agents that do not share them have a leading axis of agents. The carries of GRUs stand
side by side, [..., n * gru_size], so that rollouts treat a joint network like any other.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from trustjax.distributions import EXCLUDED, Categorical, Distribution, MultiCategorical
from trustjax.models.actor_critic import Carry, Critic, Torso
from trustjax.models.graph import GraphAttention, for_all, joined_carry, split_carry


class PerAgent(nn.Module):
    """A network for every agent, with parameters of its own or with those of all.

    Attributes:
      member: The network of one agent.
      num_agents: Number n of agents.
      shared: Whether all agents have the same parameters.
      identify: Whether an agent's observation is followed by n numbers that say which agent it is.
    """

    member: Torso
    num_agents: int
    shared: bool = False
    identify: bool = False

    @property
    def network(self) -> nn.Module:
        """What is in front of the output: rollouts then keep observations as they are."""
        return self.member

    @property
    def gru_size(self) -> int | None:
        """Size of the memory of all agents together; None without a GRU."""
        return None if self.member.gru_size is None else self.num_agents * self.member.gru_size

    @property
    def dtype(self) -> DTypeLike | None:
        """Dtype of the computation; None for that of the parameters."""
        return self.member.dtype

    def apply_members(
        self, observation: Any, carry: Carry, is_first: jax.Array | None, out_axis: int
    ) -> tuple[Any, Carry]:
        """The outputs of all agents, stacked along `out_axis`, and the next carry; see `Torso`."""
        seen = views(observation, has_neighbours=self.member.network is not None)
        if self.identify:
            names = jnp.eye(self.num_agents, dtype=seen.dtype)
            names = jnp.broadcast_to(names, (*seen.shape[:-1], self.num_agents))
            seen = jnp.concatenate([seen, names], -1)
        carry = split_carry(carry, self.num_agents)
        axes = {"own": -2, "others": None, "edges": -2} if isinstance(seen, dict) else -2
        if self.shared and isinstance(seen, dict):
            # One observation after the other, so that the attention knows who listens.
            lifted = nn.vmap(
                _call, variable_axes={"params": None}, split_rngs={"params": False},
                in_axes=(axes, -2, None), out_axes=(out_axis, -2),
            )  # fmt: skip
            output, carry = lifted(self.member, seen, carry, is_first)
        elif self.shared:
            output, carry = self.member(seen, carry, for_all(is_first, self.num_agents))
        else:
            lifted = nn.vmap(
                _call, variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=(axes, -2, None), out_axes=(out_axis, -2),
            )  # fmt: skip
            output, carry = lifted(self.member, seen, carry, is_first)
        return output, joined_carry(carry)


class JointActor(PerAgent):
    """The policies of all agents: independent distributions [..., n] given the observations.

    Attributes:
      num_actions: Numbers of discrete actions of the agents, up to the largest of which logits are
        excluded; None for continuous actions.
    """

    num_actions: tuple[int, ...] | None = None

    @nn.compact
    def __call__(
        self, observation: Any, carry: Carry = (), is_first: jax.Array | None = None
    ) -> tuple[Distribution, Carry]:
        """The distributions [..., n] for joint observations, and the next carry."""
        distribution, carry = self.apply_members(observation, carry, is_first, out_axis=-2)
        return legal(distribution, self.num_actions), carry


class ConsensusActor(PerAgent):
    """Policies over the actions of all agents, each of which executes its own component.

    Agent i has a distribution [..., n] of the actions of all n agents given its own observation, as
    MATRPO needs it; what it thinks of the others' actions is for the update alone.
    """

    @nn.compact
    def __call__(
        self, observation: Any, carry: Carry = (), is_first: jax.Array | None = None
    ) -> tuple[Distribution, Carry]:
        """The distributions [..., n] of what is executed, and the next carry."""
        discrete = getattr(self.member, "num_actions", None) is not None
        out_axis = -3 if discrete else -2
        found, carry = self.apply_members(observation, carry, is_first, out_axis=out_axis)
        own = np.arange(self.num_agents)
        every = components(found, self.num_agents)  # [..., agent, component]
        executed: Distribution = jax.tree.map(lambda x: x[..., own, own, :], every)
        return executed, carry


def components(distribution: Any, num_agents: int) -> Any:
    """Distributions [..., n] of the single actions, of one distribution of all of them together."""
    if isinstance(distribution, MultiCategorical):
        return Categorical(distribution.logits)
    return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], num_agents, -1), distribution)


class JointCritic(PerAgent):
    """A value for every agent from its own observation alone, as in independent PPO."""

    @nn.compact
    def __call__(
        self, observation: Any, carry: Carry = (), is_first: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """The values [..., n] of joint observations, and the next carry."""
        return self.apply_members(observation, carry, is_first, out_axis=-1)


class CentralCritic(Torso):
    """The values of the state that all agents together know.

    Attributes:
      num_agents: Number n of agents.
      common: Whether there is one value for all agents, for a reward that they share.
    """

    num_agents: int = 1
    common: bool = True

    @nn.compact
    def __call__(
        self, x: Any, carry: Carry = (), is_first: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """The values [..., n] of joint observations, and the next carry."""
        hidden, carry = super().__call__(x, carry, is_first)
        values = self.dense(1 if self.common else self.num_agents, 1.0, "head")(hidden)
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        return jnp.broadcast_to(values, (*values.shape[:-1], self.num_agents)), carry


class Neighbours(nn.Module):
    """Features of an agent that hears its neighbours: its own observation and what it attends to.

    Attributes:
      attention: The layer between the agents.
    """

    attention: GraphAttention

    @nn.compact
    def __call__(self, view: dict[str, jax.Array]) -> jax.Array:
        """Features [..., width] of one agent's view, as `views` makes it."""
        heard, _ = self.attention(
            view["own"][..., None, :], view["others"], view["edges"][..., None, :]
        )
        return jnp.concatenate([view["own"], jnp.tanh(heard[..., 0, :])], -1)


def views(observation: Any, *, has_neighbours: bool) -> Any:
    """What the policies see of joint observations [...], with an axis of agents at -2.

    It is each agent's own observation, [..., n, d]. With neighbours it is a dict of that, "own",
    of the observations of all, "others" [..., n, d] without an axis of who sees them, and of
    "edges", bool [..., n, n], who hears whom.
    """
    own = observation["agents"]
    return {"own": own, "others": own, "edges": observation["graph"]} if has_neighbours else own


def view_of(observation: Any, index: jax.Array, *, has_neighbours: bool) -> Any:
    """What the agent with this index sees of joint observations [...]; see `views`."""

    def take(x: jax.Array) -> jax.Array:
        return jnp.take(x, index, axis=-2)

    own = take(observation["agents"])
    if not has_neighbours:
        return own
    return {"own": own, "others": observation["agents"], "edges": take(observation["graph"])}


def legal(
    distribution: Any, num_actions: tuple[int, ...] | None, index: jax.Array | None = None
) -> Any:
    """Distributions without the actions that an agent does not have, whose probability is 0.

    `distribution` is that of all agents, [..., n, A], or of the one with this `index`, [..., A].
    """
    if num_actions is None or len(set(num_actions)) == 1:
        return distribution
    mask = jnp.asarray(np.arange(max(num_actions)) < np.array(num_actions)[:, None])
    if index is not None:
        mask = mask[index]
    logits = distribution.logits
    return Categorical(jnp.where(mask, logits, jnp.asarray(EXCLUDED, logits.dtype)))


def _call(network: Any, seen: Any, carry: Carry, is_first: jax.Array | None) -> tuple[Any, Carry]:
    found: tuple[Any, Carry] = network(seen, carry, is_first)
    return found


def member_critic(**kwargs: Any) -> Critic:
    """A critic of one agent's own observation."""
    return Critic(**kwargs)
