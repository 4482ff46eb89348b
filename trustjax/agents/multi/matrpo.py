r"""MATRPO: trust regions of agents that agree on ratios with their neighbours.

Li, He, arXiv:2010.07916. Every agent i has observations, rewards and a policy pi_i of its own. The
policy is over the actions of all n agents given i's observation; agent i executes its own component
of it. The joint trust region step splits into one step for each agent,

    maximise  mean(r_i A_i)   subject to   mean KL(pi_i,k || pi_i) <= delta

if the log-ratios l_i[m] = log pi_i(a_m | o_i) / pi_i,k(a_m | o_i) of every component m agree
between neighbours. The alternating direction method of multipliers (ADMM) brings them together:
with signs c_i = 1 and c_j = -1 of an edge (i, j), i < j, estimates z and multipliers y for each
edge, component and transition, and a penalty rho, agent i takes a trust region step from its old
policy on

    L_i = mean(-r_i A_i + sum_j sum_m (y_ij (c_i l_i - z_ij) + rho / 2 (c_i l_i - z_ij)^2))

and the two ends of the edge exchange log-ratios and multipliers,

    v = (y_ij + y_ji) / 2 + rho / 2 (c_i l_i + c_j l_j)
    z_ij <- (y_ij - v) / rho + c_i l_i,    y_ij <- v

Edges take turns. As in the authors' code (hepengli/matrpo), estimates begin at 0 and multipliers at
1 in every iteration (`initial_multiplier`), advantages are normalised over all agents together, and
a line search accepts a KL of 1.5 delta (`slack`). That code takes products with the Fisher matrix
on every fifth transition, and 100 exchanges an iteration, as `num_exchanges` has by default. Kuba
et al. (arXiv:2109.11251) object that the agreement on ratios restricts the policies.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_count, check_number
from trustjax._sharding import AxisName, averaged
from trustjax.agents import trpo
from trustjax.agents.algorithm import Metrics, PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.multi.base import MultiAgent, MultiAgentConfig, per_agent
from trustjax.agents.multi.networks import ConsensusActor, components
from trustjax.agents.on_policy import State
from trustjax.losses import trpo_surrogate
from trustjax.losses._ratio import log_ratio
from trustjax.models.actor_critic import Actor, unroll
from trustjax.trust import trust_metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MultiAgentConfig, trpo.Config):
    """The configuration of MATRPO: that of TRPO, with the numbers of the authors' code.

    Attributes:
      penalty: The rho of ADMM, > 0.
      initial_multiplier: Multiplier y of all edges, components and transitions before the first
        exchange of an iteration, finite; 1 in the authors' code.
      num_exchanges: Exchanges of an iteration, each of which takes two trust region steps, >= 1.
        Static.
      edges: Pairs of agents that are neighbours; None for all pairs. Static.
    """

    reward: Any = static("individual")
    critic: Any = static("local")
    learning_rate: ArrayLike = 1e-3
    num_epochs: int = static(3)
    num_minibatches: int = static(4)
    anneal_learning_rate: bool = static(False)
    radius: ArrayLike = 0.001
    damping: ArrayLike = 0.01
    backtrack: ArrayLike = 0.5
    slack: ArrayLike = 1.5
    penalty: ArrayLike = 1.0
    initial_multiplier: ArrayLike = 1.0
    num_exchanges: int = static(100)
    edges: tuple[tuple[int, int], ...] | None = static(None)

    def __post_init__(self) -> None:
        """Makes the edges hashable, as lists of a configuration file are not."""
        super().__post_init__()
        if isinstance(self.edges, list | tuple):
            pairs = tuple(tuple(e) if isinstance(e, list) else e for e in self.edges)
            object.__setattr__(self, "edges", pairs)

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        check_number("penalty", self.penalty, above=0.0)
        check_number("initial_multiplier", self.initial_multiplier, above=-math.inf, below=math.inf)
        check_count("num_exchanges", self.num_exchanges, at_least=1)
        self.neighbours(self.environment.num_agents)

    def neighbours(self, num_agents: int) -> list[tuple[int, int]]:
        """The edges (i, j), i < j. Raises ValueError for pairs that are none."""
        if num_agents < 2:
            raise FieldError("env", "have two agents or more", f"{num_agents}")
        if self.edges is None:
            return list(itertools.combinations(range(num_agents), 2))
        if not self.edges:
            raise FieldError("edges", "name one pair or more", self.edges)
        found = []
        for edge in self.edges:
            if (
                not isinstance(edge, tuple)
                or len({*edge}) != 2
                or not {*edge} <= {*range(num_agents)}
            ):
                must = f"be pairs of two different agents of 0 to {num_agents - 1}"
                raise FieldError("edges", must, edge)
            found.append((min(edge), max(edge)))
        if len({*found}) != len(found):
            raise FieldError("edges", "name every pair once", self.edges)
        return found

    def agent(  # type: ignore[override]  # not a TRPO
        self, *, axis_name: AxisName | None = None
    ) -> "MATRPO":
        """The algorithm with this configuration."""
        return MATRPO(self, axis_name=axis_name)


class Consensus(NamedTuple):
    """What ADMM knows of both ends of every edge, [n, n, time, environment, component].

    Row i, column j belong to agent i and its neighbour j.

    Attributes:
      estimate: The estimates z of c_i l_i.
      multiplier: The multipliers y, which are 1 at first.
    """

    estimate: jax.Array
    multiplier: jax.Array


def exchange(
    own: jax.Array,
    other: jax.Array,
    own_multiplier: jax.Array,
    other_multiplier: jax.Array,
    penalty: ArrayLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""What the two ends of an edge make of their log-ratios: new estimates and one multiplier.

    .. math:: v = \frac{y_i + y_j}{2} + \frac{\rho}{2} (l_i - l_j), \qquad
              z_i = \frac{y_i - v}{\rho} + l_i, \quad z_j = \frac{y_j - v}{\rho} - l_j

    With equal multipliers z_i is the mean of both log-ratios, and z_j that with a minus.

    Args:
      own: Log-ratios l_i of the end with the sign 1, float [...].
      other: Log-ratios l_j of the end with the sign -1, same shape.
      own_multiplier: Multipliers y_i, same shape.
      other_multiplier: Multipliers y_j, same shape.
      penalty: rho > 0.

    Returns:
      The estimates z_i and z_j, and the multiplier v of both ends, each [...].

    Source: arXiv:2010.07916 as in the authors' code, trainer/agent_model.py.
    """
    multiplier = (own_multiplier + other_multiplier) / 2 + penalty / 2 * (own - other)
    return (
        (own_multiplier - multiplier) / penalty + own,
        (other_multiplier - multiplier) / penalty - other,
        multiplier,
    )


class MATRPO(MultiAgent):
    """Decentralised trust region policy optimisation; see `MultiAgent` for how it is used.

    Rewards and values are each agent's own by default. Metrics of an iteration: `trust/distance` is
    the largest KL of any agent's policy over all actions; beside it stand `kl/agent_I`, the gain of
    the surrogate `gain/agent_I`, `step_fraction/agent_I` of the agent's last step, 0 where its line
    search failed, and `consensus/error`, the root of the mean squared difference of neighbours'
    log-ratios, which is 0 if they agree.

    Source: arXiv:2010.07916; https://github.com/hepengli/matrpo.
    """

    config: Config

    def _actor(self, member: Actor, together: dict[str, Any]) -> ConsensusActor:
        number = self.env.num_agents
        if self.num_actions is not None:
            member = member.clone(num_actions=self.num_actions)
        else:
            member = member.clone(action_size=number * (member.action_size or 0))
        return ConsensusActor(member=member, **together)

    def init_learner(self, params: dict[str, PyTree]) -> optax.OptState:
        """The first state of the values' optimizer; the policies need none."""
        return self.value_optimizer().init(params["critic"])

    def executed(self, member: PyTree, index: jax.Array) -> PyTree:
        """The parameters with those outputs alone that agent `index` executes; see `MultiAgent`.

        Raises ValueError if the agents have different numbers of actions.
        """
        number = self.env.num_agents
        if len({*(self.num_actions or ())}) > 1:
            raise FieldError("env", "have as many actions for every agent", self.num_actions)

        def take(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], number, -1)[..., index, :]

        outputs = {name: jax.tree.map(take, member[name]) for name in ("head", "log_std")
                   if name in member}  # fmt: skip
        return {**member, **outputs}

    def policy_of(self, member: PyTree, batch: Batch, index: jax.Array) -> Any:
        """The distributions [time, environment, n] of all actions by one agent's policy."""
        own = self.batch_of(batch, index)
        together, _ = unroll(
            self.actor.member, {"params": member}, own.observation, own.is_first, own.actor_carry
        )
        return components(together, self.env.num_agents)

    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], optax.OptState, Metrics]:
        """The exchanges of ADMM, and the fit of the values."""
        config, number = self.config, self.env.num_agents
        edges = config.neighbours(number)
        start = self.members(state.params)
        indices = jnp.arange(number)

        def at(tree: PyTree, index: jax.Array) -> PyTree:
            return jax.tree.map(lambda x: x[index], tree)

        old = jax.lax.stop_gradient(
            jax.vmap(lambda member, index: self.policy_of(member, batch, index))(start, indices)
        )
        old_log_prob = jax.vmap(lambda each: each.log_prob(batch.action))(old)

        # c_i of the edge to every other agent, 0 where there is none.
        signs = jnp.zeros((number, number), old_log_prob.dtype)
        for i, j in edges:
            signs = signs.at[i, j].set(1.0).at[j, i].set(-1.0)

        def log_ratios(member: PyTree, index: jax.Array) -> jax.Array:
            """The log-ratios l [time, environment, component] of one agent."""
            new = self.policy_of(member, batch, index).log_prob(batch.action)
            return log_ratio(new, old_log_prob[index])

        def loss(member: PyTree, index: jax.Array, consensus: Consensus) -> jax.Array:
            """The augmented Lagrangian L_i, []."""
            new = self.policy_of(member, batch, index)
            log_prob = new.log_prob(batch.action)
            surrogate = trpo_surrogate(
                jnp.sum(log_prob, -1), jnp.sum(old_log_prob[index], -1), batch.advantage[..., index]
            )
            sign = signs[index][:, None, None, None]
            apart = sign * log_ratio(log_prob, old_log_prob[index]) - consensus.estimate[index]
            terms = consensus.multiplier[index] * apart + config.penalty / 2 * jnp.square(apart)
            terms = jnp.sum(jnp.where(sign != 0, terms, jnp.zeros_like(terms)), (0, -1))
            return jnp.mean(terms - surrogate) - self.entropy_bonus(new)

        def kl(member: PyTree, index: jax.Array) -> jax.Array:
            new = self.policy_of(member, batch, index)
            return jnp.mean(jnp.sum(at(old, index).kl_divergence(new), -1))

        natural = config.natural_gradient(self.axis_name)

        def step(index: jax.Array, consensus: Consensus) -> tuple[PyTree, jax.Array]:
            """The trust region step of one agent from its old policy; see `trpo`."""
            member = at(start, index)

            def loss_fn(params: PyTree) -> jax.Array:
                return loss(params, index, consensus)

            grads = averaged(jax.grad(loss_fn)(member), self.axis_name)
            updates, found = natural.update(
                grads, natural.init(member), member, loss_fn=loss_fn,
                divergence_fn=lambda params: kl(params, index),
            )  # fmt: skip
            return optax.apply_updates(member, updates), found.step_fraction

        def meet(carry: Any, edge: jax.Array) -> tuple[Any, None]:
            """One exchange: both ends take their steps, and then tell each other of them."""
            members, consensus, fractions = carry
            # One after the other in one program; neither sees the other's new policy.
            ends, taken = jax.lax.map(lambda index: step(index, consensus), edge)
            members = jax.tree.map(lambda whole, two: whole.at[edge].set(two), members, ends)
            i, j = edge
            l_i, l_j = (log_ratios(at(members, index), index) for index in (i, j))
            y = consensus.multiplier
            z_i, z_j, v = exchange(l_i, l_j, y[i, j], y[j, i], config.penalty)
            consensus = Consensus(
                consensus.estimate.at[i, j].set(z_i).at[j, i].set(z_j),
                y.at[i, j].set(v).at[j, i].set(v),
            )
            return (members, consensus, fractions.at[edge].set(taken)), None

        shape = (number, *old_log_prob.shape)
        first = Consensus(
            *(jnp.full(shape, x, old_log_prob.dtype) for x in (0.0, config.initial_multiplier))
        )
        turns = jnp.asarray(edges)[jnp.arange(config.num_exchanges) % len(edges)]
        carry = start, first, jnp.zeros(number, old_log_prob.dtype)
        (members, _, fractions), _ = jax.lax.scan(meet, carry, turns)

        params = self.with_members(state.params, members)
        critic, value, value_loss = self.fit_values(
            self.value_optimizer(), state.params["critic"], state.learner, batch, key
        )
        moved = jax.vmap(log_ratios)(members, indices)
        ratio = jnp.exp(jnp.minimum(jnp.sum(moved, -1), 60))
        gains = [self.mean((ratio[i] - 1) * batch.advantage[..., i]) for i in range(number)]
        distances = averaged(jax.vmap(kl)(members, indices), self.axis_name)
        apart = jnp.stack([jnp.square(moved[i] - moved[j]) for i, j in edges])
        metrics = {
            **self.policy_update_metrics(params["actor"], batch),
            "loss/value": value_loss,
            **trust_metrics(jnp.asarray(config.radius, distances.dtype), jnp.max(distances)),
            "consensus/error": jnp.sqrt(self.mean(jnp.moveaxis(apart, 0, -1))),
            **per_agent("kl", distances),
            **per_agent("gain", jnp.stack(gains)),
            **per_agent("step_fraction", fractions),
        }
        return {**params, "critic": critic}, value, metrics
