r"""MAPPO and independent PPO: clipped ratios of all agents at the same time.

Yu, Velu, Vinitsky, Gao, Wang, Bayen, Wu, arXiv:2103.01955. Every agent maximises PPO's surrogate
of its own ratio,

    mean over agents of  mean(min(r^i A^i, clip(r^i, 1 - eps, 1 + eps) A^i))

The values see the state of all agents (`critic="central"`). Independent PPO (de Witt et al.,
arXiv:2011.09533) has values of each agent's own observation: `critic="local"`. Both share the
parameters of all policies by default, as in their papers; `share_parameters=False` does not.
The authors' code normalises values by running statistics; here rewards are divided by the running
deviation of their discounted sum, and the error of the value is squared in place of Huber's.
"""

import dataclasses

import jax
from jax.typing import ArrayLike

from trustjax._checks import FieldError
from trustjax._sharding import AxisName
from trustjax.agents import ppo
from trustjax.agents.algorithm import static
from trustjax.agents.multi.base import MultiAgent, MultiAgentConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MultiAgentConfig, ppo.Config):
    """The configuration of MAPPO: that of PPO, and what agents share.

    Attributes:
      share_parameters: Whether all agents have one policy, and one local critic; static.
      identify_agents: Whether an agent's observation is followed by n numbers that say which agent
        it is, with which shared policies can differ; static.
    """

    share_parameters: bool = static(True)
    identify_agents: bool = static(False)
    num_epochs: int = static(10)
    num_minibatches: int = static(4)
    entropy_coefficient: ArrayLike = 0.01

    @property
    def shares_parameters(self) -> bool:
        """Whether all agents have the same parameters."""
        return self.share_parameters

    @property
    def identifies_agents(self) -> bool:
        """Whether policies see which agent they are."""
        return self.identify_agents

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        if self.identify_agents and self.actor_graph is not None:
            raise FieldError("identify_agents", "be False with an actor_graph", True)

    def agent(self, *, axis_name: AxisName | None = None) -> "MAPPO":
        """The algorithm with this configuration."""
        return MAPPO(self, axis_name=axis_name)


class MAPPO(MultiAgent, ppo.PPO):
    """Multi-agent proximal policy optimisation; see `MultiAgent`, and `PPO` for its metrics.

    Source: arXiv:2103.01955, Appendix A.
    """

    config: Config
