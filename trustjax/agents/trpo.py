r"""Trust region policy optimisation: the natural gradient scaled to a mean KL of delta.

Schulman, Levine, Moritz, Jordan, Abbeel, arXiv:1502.05477:

    maximise  mean(r A)   subject to   mean KL(pi_k || pi) <= delta                  Eq. 14

An iteration takes one step on the whole batch by `trustjax.optim.natural_gradient`: conjugate
gradients and a line search (Section 6 and Appendix C). The value has its own optimizer.
Stable-baselines differs: it computes products with the Fisher matrix on every fifth sample, halves
the step up to ten times (`backtrack=0.5`), and accepts a KL of up to 1.5 delta (`slack=1.5`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._sharding import AxisName, averaged
from trustjax.agents.algorithm import Metrics, PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.config import OnPolicyConfig, check_whole_batch
from trustjax.agents.on_policy import OnPolicy, State
from trustjax.losses import trpo_surrogate
from trustjax.optim import natural_gradient
from trustjax.optim.natural import NaturalState
from trustjax.trust import trust_metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """The configuration of TRPO.

    `optimizer`, `learning_rate`, `num_epochs`, `num_minibatches` and `shuffle` of `OnPolicyConfig`
    apply to the value alone. `entropy_coefficient` adds the entropy to the objective of Eq. 14, for
    the gradient and for the improvement that the line search asks for; the constraint stays.

    Attributes:
      radius: Largest mean KL of one iteration (the paper's delta), in nats, >= 0.
      damping: Multiple of the identity that is added to the Fisher matrix, >= 0.
      cg_steps: Largest number of iterations of the conjugate gradient method, one Fisher-vector
        product each; static.
      max_backtracks: Number of step lengths that the line search tries; static.
      backtrack: Factor from one step length to the next, in (0, 1).
      accept_ratio: Smallest accepted improvement of the surrogate, as a fraction of the one that
        the gradient predicts, >= 0.
      slack: Largest accepted mean KL, in units of `radius`, >= 1.
    """

    learning_rate: ArrayLike = 1e-3
    num_epochs: int = static(5)
    num_minibatches: int = static(16)
    anneal_learning_rate: bool = static(False)
    radius: ArrayLike = 0.01
    damping: ArrayLike = 0.1
    cg_steps: int = static(10)
    max_backtracks: int = static(10)
    backtrack: ArrayLike = 0.8
    accept_ratio: ArrayLike = 0.0
    slack: ArrayLike = 1.0

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        check_whole_batch(self)
        self.natural_gradient()

    def natural_gradient(
        self, axis_name: AxisName | None = None
    ) -> optax.GradientTransformationExtraArgs:
        """The transform of the policy; raises ValueError for hyperparameters out of range."""
        return natural_gradient(
            self.radius,
            damping=self.damping,
            cg_steps=self.cg_steps,
            max_backtracks=self.max_backtracks,
            backtrack=self.backtrack,
            accept_ratio=self.accept_ratio,
            slack=self.slack,
            axis_name=axis_name,
        )

    def agent(self, *, axis_name: AxisName | None = None) -> "TRPO":
        """The algorithm with this configuration."""
        return TRPO(self, axis_name=axis_name)


class Learner(NamedTuple):
    """The optimizer states of TRPO.

    Attributes:
      natural: State of the natural gradient of the policy.
      value: Optimizer state of the value.
    """

    natural: NaturalState
    value: optax.OptState


class TRPO(OnPolicy):
    """Trust region policy optimisation; see `OnPolicy` for how it is used.

    An iteration takes one step of `trustjax.optim.natural_gradient` on the whole batch, to

        maximise mean(r A) + c entropy   subject to   mean KL(pi_k || pi) <= delta

    where c is `entropy_coefficient`, 0 in the paper, and then fits the value by epochs of
    minibatches. TRPO adds the metrics `loss/value` and `step_fraction`, the fraction of the full
    step that the line search accepted.

    Source: arXiv:1502.05477, Eq. 14 and Appendix C.
    """

    config: Config

    def init_learner(self, params: dict[str, PyTree]) -> Learner:
        """The first states of both optimizers."""
        return Learner(
            self.config.natural_gradient().init(params["actor"]),
            self.value_optimizer().init(params["critic"]),
        )

    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Learner, Metrics]:
        """Takes one step of the policy and fits the value."""
        actor, learner = state.params["actor"], state.learner

        # Objective and constraint of Eq. 14, the objective with its sign turned.
        def loss_fn(params: PyTree) -> jax.Array:
            new = self.distributions(params, batch)
            surrogate = trpo_surrogate(new.log_prob(batch.action), batch.log_prob, batch.advantage)
            return -jnp.mean(surrogate) - self.entropy_bonus(new)

        def divergence_fn(params: PyTree) -> jax.Array:
            return jnp.mean(batch.old.kl_divergence(self.distributions(params, batch)))

        grads = averaged(jax.grad(loss_fn)(actor), self.axis_name)
        # Appendix C: conjugate gradients for the direction, then the line search.
        updates, natural = self.config.natural_gradient(self.axis_name).update(
            grads, learner.natural, actor, loss_fn=loss_fn, divergence_fn=divergence_fn
        )
        actor = optax.apply_updates(actor, updates)
        critic, value_state, value_loss = self.fit_values(
            self.value_optimizer(), state.params["critic"], learner.value, batch, key
        )
        update_metrics = self.policy_update_metrics(actor, batch)
        metrics = {
            "loss/value": value_loss,
            **trust_metrics(natural.radius, natural.distance),
            "step_fraction": natural.step_fraction,
        }
        return (
            {"actor": actor, "critic": critic},
            Learner(natural, value_state),
            update_metrics | metrics,
        )
