r"""Soft actor-critic: the policy maximises the smaller of two critics plus its weighted entropy.

Haarnoja, Zhou, Hartikainen, Tucker, Ha, Tan, Kumar, Zhu, Gupta, Abbeel, Levine, arXiv:1812.05905.
The losses, all minimised, with the temperature lambda (the paper's alpha) and the target entropy H:

    critics      (Q - y)^2 / 2,  y = r + gamma (1 - terminated) (min Q' - lambda log pi(a' | s'))
    policy       lambda log pi(a | s) - min Q(s, a)
    temperature  lambda (-log pi(a | s) - H)

The target critics Q' are moving averages of the critics. SAC is off-policy MDPO with the largest
step size that the entropy allows, t = 1 / lambda, where the old policy drops out of the loss.
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
    """`OffPolicyConfig` with a learned temperature that starts at 1; SAC adds no field."""

    temperature: ArrayLike = 1.0
    learn_temperature: bool = static(True)

    def agent(self, *, axis_name: AxisName | None = None) -> "SAC":
        """The algorithm with this configuration."""
        return SAC(self, axis_name=axis_name)


class SAC(OffPolicy):
    """Soft actor-critic; see `OffPolicy` for how it is used.

    A gradient step updates both critics, the policy on mean(lambda log pi - min Q), the temperature
    if it is learned, and the target critics. The metrics are `loss/critic`, `loss/actor`,
    `value/mean`, `entropy`, `temperature`, `kl/new_old` of the policies after and before the
    iteration, and the means of the episodes that ended.

    Source: arXiv:1812.05905, Eq. 5 to 7, 17 and 18.
    """

    def init_old_actor(self, actor: PyTree) -> None:
        """None: SAC has no old policy."""

    def policy_losses(
        self, actor: PyTree, batch: Replayed, keys: jax.Array, learner: Learner, critics: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        """Eq. 7 of the paper; see `OffPolicy`."""
        samples = sample_actions(self.distribution(actor, batch.observation), keys)
        # The dimensions of an action are independent given the observation.
        log_prob = samples.log_prob.sum(-1)
        q_value = self.policy_q_values(critics, batch.observation, samples)
        losses = sac_actor_loss(log_prob, q_value, temperature=self.temperature(learner))
        return expectation(samples, losses), expectation(samples, log_prob)
