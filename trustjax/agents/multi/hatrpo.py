r"""HATRPO: trust regions of several agents, one after the other.

Kuba, Chen, Wen, Wen, Sun, Wang, Yang, arXiv:2109.11251 (Section 4 and Algorithm 3). In an order
i_1, ..., i_n that is drawn anew in every iteration, agent i_m takes a step to

    maximise  mean(r^{i_m} M^{i_1:m})   subject to   mean KL(pi_k^{i_m} || pi^{i_m}) <= delta

    M^{i_1:1} = A,    M^{i_1:m+1} = r^{i_m} M^{i_1:m}

where r^{i_m} = pi^{i_m}(a | o) / pi_k^{i_m}(a | o) and A is the joint advantage, the same for all
agents of a team. The compounded ratio is never clipped. The paper has r - 1 in place of r, which
differs by a constant. For a reward that all agents share, exact advantages and a bound on the
largest KL, the joint return never falls (Theorem 2). With individual rewards each agent takes its
own A, which no theorem is about.

As in the authors' later code (HARL), the value is fitted after all policies, the ratios are
recomputed with the networks of the update, and there is no entropy in the objective. That code sums
exp(l_1 - l_0) - 1 - (l_1 - l_0) over discrete actions without their probabilities, in place of the
KL; this is `divergence="unweighted"`. The first code multiplied no ratios of action dimensions in
its line search.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._checks import check_choice
from trustjax._sharding import AxisName, averaged
from trustjax.agents import trpo
from trustjax.agents.algorithm import PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.multi.base import MultiAgentConfig
from trustjax.agents.multi.sequential import Found, Sequential
from trustjax.distributions import Categorical
from trustjax.losses import trpo_surrogate
from trustjax.losses._ratio import exp_times, log_ratio
from trustjax.optim.natural import NaturalState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MultiAgentConfig, trpo.Config):
    """The configuration of HATRPO: that of TRPO, with the step sizes of HARL.

    Attributes:
      divergence: Constraint of discrete policies: "kl", or "unweighted", the sum of the authors'
        code, which allows smaller steps. Static.
    """

    divergence: Literal["kl", "unweighted"] = static("kl")
    learning_rate: ArrayLike = 1e-3
    num_epochs: int = static(5)
    num_minibatches: int = static(4)
    anneal_learning_rate: bool = static(False)
    accept_ratio: ArrayLike = 0.5

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        check_choice("divergence", self.divergence, ("kl", "unweighted"))

    def agent(  # type: ignore[override]  # not a TRPO
        self, *, axis_name: AxisName | None = None
    ) -> "HATRPO":
        """The algorithm with this configuration."""
        return HATRPO(self, axis_name=axis_name)


class HATRPO(Sequential):
    """Heterogeneous-agent trust region policy optimisation; see `Sequential`.

    Metrics of an iteration: `trust/distance` is the largest KL of any agent, and beside it stand
    `kl/agent_I`, the gain of the surrogate `gain/agent_I` >= 0, and `step_fraction/agent_I`, which
    is 0 where the line search failed and the policy stayed.

    Source: arXiv:2109.11251, Algorithm 3.
    """

    config: Config

    def init_member(self, member: PyTree) -> NaturalState:
        """The first state of the natural gradient of one policy."""
        state: NaturalState = self.config.natural_gradient().init(member)
        return state

    def member_step(
        self,
        before: tuple[PyTree, NaturalState],
        batch: Batch,
        index: jax.Array,
        log_factor: jax.Array,
        key: jax.Array,
    ) -> tuple[tuple[PyTree, NaturalState], Found]:
        """The step of one agent; see `Sequential`. The distance is its mean KL.

        If the line search failed, the parameters are the old ones to the bit and log r is 0.
        """
        del key
        member, natural = before
        own = self.batch_of(batch, index)
        # Ratios are 1 at first to the bit only if both policies come from one program.
        old = jax.lax.stop_gradient(self.member_distributions(member, own, index))
        old_log_prob = old.log_prob(own.action)
        weighted = exp_times(log_factor, own.advantage)  # M

        def loss_fn(params: PyTree) -> jax.Array:
            new = self.member_distributions(params, own, index)
            surrogate = trpo_surrogate(new.log_prob(own.action), old_log_prob, weighted)
            return -jnp.mean(surrogate) - self.entropy_bonus(new)

        def divergence_fn(params: PyTree) -> jax.Array:
            new = self.member_distributions(params, own, index)
            return jnp.mean(self._divergence(old, new))

        grads = averaged(jax.grad(loss_fn)(member), self.axis_name)
        updates, natural = self.config.natural_gradient(self.axis_name).update(
            grads, natural, member, loss_fn=loss_fn, divergence_fn=divergence_fn
        )
        member = optax.apply_updates(member, updates)
        new = self.member_distributions(member, own, index)
        log_r = log_ratio(new.log_prob(own.action), old_log_prob)
        kl = self.mean(old.kl_divergence(new))
        metrics = {
            "kl": kl,
            "gain": self.mean(exp_times(log_r, weighted) - weighted),
            "step_fraction": natural.step_fraction,
        }
        return (member, natural), Found(log_r, kl, natural.radius, metrics)

    def _divergence(self, old: Any, new: Any) -> jax.Array:
        """The divergence of the constraint, [...]."""
        if self.config.divergence == "unweighted" and isinstance(old, Categorical):
            return unweighted_divergence(old.log_probs(), new.log_probs())
        divergence: jax.Array = old.kl_divergence(new)
        return divergence


def unweighted_divergence(old_log_probs: jax.Array, log_probs: jax.Array) -> jax.Array:
    r"""The sum over actions that the authors' codes take for the KL of discrete policies.

    .. math:: \sum_a e^{l_a} - 1 - l_a, \qquad l_a = \log\pi(a) - \log\pi_k(a)

    With weights pi_k(a) it would be the KL. Its curvature is larger by about the number of actions.

    Args:
      old_log_probs: log pi_k of all actions, float [..., A]; a constant.
      log_probs: log pi of all actions, same shape.

    Returns:
      [...], >= 0; excluded actions add 0.
    """
    log_r = log_ratio(log_probs, old_log_probs)
    return jnp.sum(jnp.expm1(log_r) - log_r, -1)
