"""What HAPPO and HATRPO share: policies are updated one after the other, in a drawn order.

Kuba, Chen, Wen, Wen, Sun, Wang, Yang, arXiv:2109.11251 (Algorithms 3 and 4). The advantage of an
agent's update is multiplied by the ratios of the agents before it,

    M^{i_1:1} = A,    M^{i_1:m+1} = r^{i_m} M^{i_1:m}

and the value is fitted after all policies. An algorithm is what one agent does: `init_member` and
`member_step`.
"""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trustjax.agents.algorithm import Metrics, PyTree
from trustjax.agents.batch import Batch
from trustjax.agents.multi.base import MultiAgent, factor_metrics, per_agent
from trustjax.agents.on_policy import State
from trustjax.trust import trust_metrics


class Learner(NamedTuple):
    """The optimizer states of a sequential algorithm.

    Attributes:
      policy: Optimizer states of all policies, with a leading axis of agents.
      value: Optimizer state of the value.
    """

    policy: Any
    value: optax.OptState


class Found(NamedTuple):
    """What the step of one agent says of itself.

    Attributes:
      log_ratio: log r of its actions, float [time, environment], which compounds.
      distance: How far the policy moved, in the unit of the radius, [].
      radius: Radius of its trust region, [].
      metrics: Metrics of this agent by name, each [].
    """

    log_ratio: jax.Array
    distance: jax.Array
    radius: jax.Array
    metrics: dict[str, jax.Array]


class Sequential(MultiAgent):
    """Multi-agent algorithms that update the policies one after the other; see `MultiAgent`.

    Metrics of each agent have the names NAME/agent_I, and `trust/distance` is the largest of all.
    """

    @abc.abstractmethod
    def init_member(self, member: PyTree) -> Any:
        """The first optimizer state of one policy."""

    @abc.abstractmethod
    def member_step(
        self,
        before: tuple[PyTree, Any],
        batch: Batch,
        index: jax.Array,
        log_factor: jax.Array,
        key: jax.Array,
    ) -> tuple[tuple[PyTree, Any], Found]:
        """The update of one agent.

        Args:
          before: Parameters of its policy, and the state of its optimizer.
          batch: The batch of all agents.
          index: Index of the agent, int32 [].
          log_factor: Sum of the log-ratios of the agents before it, float [time, environment].
          key: Random key of the update.

        Returns:
          The new parameters and the new state, and what it says of the step.
        """

    def init_learner(self, params: dict[str, PyTree]) -> Learner:
        """The first states of all optimizers."""
        return Learner(
            jax.vmap(self.init_member)(self.members(params)),
            self.value_optimizer().init(params["critic"]),
        )

    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Learner, Metrics]:
        """Updates of all policies in a drawn order, and then the fit of the value."""
        key_agents, key_values = jax.random.split(key)
        learner: Learner = state.learner

        def step(carry: Any, index: jax.Array, key: jax.Array) -> tuple[Any, Any]:
            everyone, log_factor = carry
            before = jax.tree.map(lambda x: x[index], everyone)
            after, found = self.member_step(before, batch, index, log_factor, key)
            everyone = jax.tree.map(lambda whole, own: whole.at[index].set(own), everyone, after)
            # M of the next agent: the ratio of this one compounds.
            return (everyone, log_factor + found.log_ratio), found[1:]

        start = (self.members(state.params), learner.policy), jnp.zeros_like(batch.log_prob[..., 0])
        ((members, policy), log_factor), found = self.in_drawn_order(key_agents, step, start)
        distances, radii, by_agent = found
        params = self.with_members(state.params, members)
        critic, value, value_loss = self.fit_values(
            self.value_optimizer(), state.params["critic"], learner.value, batch, key_values
        )
        metrics = {
            **self.policy_update_metrics(params["actor"], batch),
            "loss/value": value_loss,
            **trust_metrics(radii[0], jnp.max(distances)),
            **factor_metrics(log_factor, self.mean),
        }
        for name, values in by_agent.items():
            metrics |= per_agent(name, values)
        return {**params, "critic": critic}, Learner(policy, value), metrics
