r"""Soft actor-critic: the policy climbs two critics, and its entropy is worth lambda.

Haarnoja, Zhou, Hartikainen, Tucker, Ha, Tan, Kumar, Zhu, Gupta, Abbeel, Levine, arXiv:1812.05905:

    critics      (Q - y)^2 / 2,  y = r + gamma (1 - terminated) (min Q' - lambda log pi(a' | s'))
    policy       lambda log pi(a | s) - min Q(s, a)
    temperature  lambda (-log pi(a | s) - H)

with targets Q' that are moving averages of the critics. It is off-policy MDPO whose step is as long
as the entropy allows, t = 1 / lambda: the old policy drops out.
"""

import dataclasses

import jax
from jax.typing import ArrayLike

from trustjax._sharding import AxisName
from trustjax.agents.action_samples import expectation, sample_actions
from trustjax.agents.algorithm import PyTree, static
from trustjax.agents.config import OffPolicyConfig
from trustjax.agents.off_policy import Learner, OffPolicy
from trustjax.agents.replay import Replayed
from trustjax.losses import sac_actor_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OffPolicyConfig):
    """`OffPolicyConfig` with the temperature learned from 1 on; SAC adds no field."""

    temperature: ArrayLike = 1.0
    learn_temperature: bool = static(True)

    def agent(self, *, axis_name: AxisName | None = None) -> "SAC":
        """The algorithm with this configuration."""
        return SAC(self, axis_name=axis_name)


class SAC(OffPolicy):
    """Soft actor-critic; see `OffPolicy` for how it is used.

    A gradient step is one of both critics, of the policy on mean(lambda log pi - min Q), of the
    temperature if it is learned, and of the target critics. Metrics: `loss/critic`, `loss/actor`,
    `value/mean`, `entropy`, `temperature`, `kl/new_old` from before to after an iteration, and the
    means of the episodes that ended.

    Source: arXiv:1812.05905, Eq. 5 to 7, 17 and 18.
    """

    def old_actor(self, actor: PyTree) -> None:
        """Nothing."""

    def policy_losses(
        self, actor: PyTree, batch: Replayed, keys: jax.Array, learner: Learner, critics: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        """See `OffPolicy`."""
        samples = sample_actions(self.distribution(actor, batch.observation), keys)
        log_prob = samples.log_prob.sum(-1)
        q_value = self.policy_q_values(critics, batch.observation, samples)
        losses = sac_actor_loss(log_prob, q_value, temperature=self.temperature(learner))
        return expectation(samples, losses), expectation(samples, log_prob)
