r"""GA-MATR: trust regions of several agents with values from recurrent attention over a graph.

Feng, Wu, Huang, Yuen, Graph Attention-based Reinforcement Learning for Trajectory Design and
Resource Assignment in Multi-UAV Assisted Communication, arXiv:2401.17880. Its abstract says that a
graph recurrent network takes in topology and observations, that attention weighs the messages so
that the critic evaluates behaviour accurately, and that a multi-agent trust region method gives an
estimated Nash equilibrium. The body of the paper and its code are not public; the rest is a design
of this project, in the style of GA-MATR:

    c_i = GRU(MLP(o_i)),   u_i = GAT({c_j : j heard by i}),   V_i = w . [c_i, u_i] + b

with weights shared by all agents. For a reward that all agents share they have the mean of the V_i,
so that there is one joint advantage. The policies take the steps of HATRPO, one after the other.
They see their own observations alone, unless `actor_graph` lets them hear each other.

Ablations: `critic=Graph("mean")` has no attention and `critic=Graph(gru_size=None)` no recurrence.
HAPPO and MAPPO with `critic=Graph()` have no trust region.
"""

import dataclasses

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError
from trustjax._sharding import AxisName
from trustjax.agents.algorithm import Metrics, PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.multi import hatrpo
from trustjax.agents.multi.base import Graph
from trustjax.agents.multi.sequential import Learner
from trustjax.agents.on_policy import State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(hatrpo.Config):
    """The configuration of GA-MATR: that of HATRPO with a graph-recurrent critic."""

    critic: str | Graph = static(Graph())

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        if not isinstance(self.critic, Graph):
            raise FieldError("critic", "be a Graph", repr(self.critic), advice="or use hatrpo")

    def agent(  # type: ignore[override]  # not a TRPO
        self, *, axis_name: AxisName | None = None
    ) -> "GAMATR":
        """The algorithm with this configuration."""
        return GAMATR(self, axis_name=axis_name)


class GAMATR(hatrpo.HATRPO):
    """Graph-attention multi-agent trust region in the style of GA-MATR; see `HATRPO`.

    It adds the metrics `attention/I_J`, the mean weight with which agent I hears agent J, which sum
    to 1 over J, and `attention/entropy` in nats.

    Source: arXiv:2401.17880, the abstract, with the choices named in the header.
    """

    config: Config

    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Learner, Metrics]:
        """An iteration of HATRPO, and what the critic attended to in its rollout."""
        params, learner, metrics = super().learn(state, batch, key)
        alpha = self.attention(state.params, batch)
        entropy = -jnp.sum(alpha * jnp.log(jnp.maximum(alpha, 1e-12)), -1)
        metrics["attention/entropy"] = self.mean(entropy)
        for i in range(self.env.num_agents):
            for j in range(self.env.num_agents):
                metrics[f"attention/{i}_{j}"] = self.mean(alpha[..., i, j])
        return params, learner, metrics

    def attention(self, params: dict[str, PyTree], batch: Batch) -> jax.Array:
        """Weights with which agents hear each other, meaned over heads, [time, environment, n, n].

        Rows are those that listen, and columns those that are heard.
        """

        alpha = self.critic.apply(
            params["critic"], batch.observation, batch.critic_carry, batch.is_first,
            method="attend",
        )[-1]  # fmt: skip
        weights: jax.Array = jnp.mean(alpha, -3)
        return weights
