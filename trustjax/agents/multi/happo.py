r"""HAPPO: clipped ratios of several agents, one after the other.

Kuba, Chen, Wen, Wen, Sun, Wang, Yang, arXiv:2109.11251 (Section 4.2 and Algorithm 4). In an order
that is drawn anew in every iteration, agent i_m takes epochs of gradient steps to maximise

    mean(min(r M, clip(r, 1 - eps, 1 + eps) M)),    r = pi^{i_m}(a | o) / pi_k^{i_m}(a | o)

where M is the joint advantage times the ratios of the agents before it, as in HATRPO. Only the
agent's own ratio is clipped. The value is fitted after all policies.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._checks import check_number
from trustjax._sharding import AxisName
from trustjax.agents.algorithm import PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.config import check_whole_batch
from trustjax.agents.multi.base import MultiAgentConfig
from trustjax.agents.multi.sequential import Found, Sequential
from trustjax.losses import ppo_clip_loss
from trustjax.losses._ratio import exp_times, log_ratio


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MultiAgentConfig):
    """The configuration of HAPPO.

    Attributes:
      clip: Half-width eps of the interval around 1 that the agent's own ratio is clipped to, >= 0.
      policy_epochs: Passes of each policy over the transitions of an iteration, >= 1; static.
        `num_epochs` are those of the value.
    """

    clip: ArrayLike = 0.2
    policy_epochs: int = static(5)
    num_epochs: int = static(5)
    num_minibatches: int = static(4)
    entropy_coefficient: ArrayLike = 0.01

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        check_whole_batch(self)
        check_number("clip", self.clip, at_least=0.0)
        check_number("policy_epochs", self.policy_epochs, at_least=1)

    def agent(self, *, axis_name: AxisName | None = None) -> "HAPPO":
        """The algorithm with this configuration."""
        return HAPPO(self, axis_name=axis_name)


class HAPPO(Sequential):
    """Heterogeneous-agent proximal policy optimisation; see `Sequential`.

    `trust/distance` is the largest mean abs(r - 1) of any agent and `trust/radius` is eps. Metrics
    of each agent are `kl/agent_I` and the gain of the surrogate, `gain/agent_I`.

    Source: arXiv:2109.11251, Algorithm 4.
    """

    config: Config

    def _policy_optimizer(self) -> optax.GradientTransformation:
        config = self.config
        steps = config.policy_epochs * config.num_minibatches
        return self.make_optimizer(config.optimizer, config.learning_rate, steps)

    def init_member(self, member: PyTree) -> optax.OptState:
        """The first optimizer state of one policy."""
        return self._policy_optimizer().init(member)

    def member_step(
        self,
        before: tuple[PyTree, optax.OptState],
        batch: Batch,
        index: jax.Array,
        log_factor: jax.Array,
        key: jax.Array,
    ) -> tuple[tuple[PyTree, optax.OptState], Found]:
        """The epochs of one agent; see `Sequential`. The distance is the mean abs(r - 1)."""
        config = self.config
        own = self.batch_of(batch, index)
        old = self.member_distributions(before[0], own, index)
        own = own._replace(
            old=old,
            log_prob=old.log_prob(own.action),
            advantage=exp_times(log_factor, own.advantage),  # M
        )

        def loss_fn(params: PyTree, part: Batch) -> tuple[jax.Array, None]:
            new = self.member_distributions(params, part, index)
            losses = ppo_clip_loss(
                new.log_prob(part.action), part.log_prob, part.advantage, clip=config.clip
            )
            return jnp.mean(losses) - self.entropy_bonus(new), None

        train_step = self.make_train_step(loss_fn, self._policy_optimizer())

        def minibatch(carry: Any, part: Batch) -> tuple[Any, jax.Array]:
            params, opt_state, loss, _ = train_step(*carry, part)
            return (params, opt_state), loss

        after, _ = self.epochs(
            own, key, config.policy_epochs, config.num_minibatches, minibatch, before
        )
        new = self.member_distributions(after[0], own, index)
        log_r = log_ratio(new.log_prob(own.action), own.log_prob)
        metrics = {
            "kl": self.mean(old.kl_divergence(new)),
            "gain": self.mean(exp_times(log_r, own.advantage) - own.advantage),
        }
        distance = self.mean(jnp.abs(jnp.exp(jnp.minimum(log_r, 60)) - 1))
        return after, Found(log_r, distance, jnp.asarray(config.clip, distance.dtype), metrics)
