r"""Trust region policy optimisation: the natural gradient, scaled to a mean KL of delta.

Schulman, Levine, Moritz, Jordan, Abbeel, arXiv:1502.05477:

    maximise  mean(r A)   subject to   mean KL(pi_k || pi) <= delta                  Eq. 14

One step per iteration, on the whole batch, by `trustjax.optim.natural_gradient`: conjugate
gradients and a line search, Section 6 and Appendix C. The value is fitted by its own optimizer.
Where stable-baselines differs: it takes products with the Fisher matrix on every fifth sample,
halves the step up to ten times (`backtrack=0.5`) and accepts a KL of 1.5 delta (`slack=1.5`).
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
from trustjax.agents.config import OnPolicyConfig, whole_batch
from trustjax.agents.on_policy import OnPolicy, State
from trustjax.losses import trpo_surrogate
from trustjax.optim import natural_gradient
from trustjax.optim.natural import NaturalState
from trustjax.trust import trust_metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """What TRPO adds to `OnPolicyConfig`, of which optimizer, rate and epochs are the value's.

    Attributes:
      radius: delta, the mean KL that an iteration may make, >= 0.
      damping: added to the Fisher matrix, >= 0.
      cg_steps: products of the solver at most; static.
      max_backtracks: steps that the line search tries; static.
      backtrack: by which each is shorter than the last, in (0, 1).
      accept_ratio: the least gain, as a share of what the gradient promises, >= 0.
      slack: the KL that is accepted, in units of delta, >= 1.
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
        whole_batch(self)
        self.natural_gradient()

    def natural_gradient(
        self, axis_name: AxisName | None = None
    ) -> optax.GradientTransformationExtraArgs:
        """The transform that makes the policy's step; raises ValueError for its numbers."""
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
    """What TRPO keeps.

    Attributes:
      natural: state of the natural gradient.
      value: state of the value's optimizer.
    """

    natural: NaturalState
    value: optax.OptState


class TRPO(OnPolicy):
    """Trust region policy optimisation; see `OnPolicy` for how it is used.

    An iteration is one step of `trustjax.optim.natural_gradient` on the whole batch,

        maximise mean(r A)   subject to   mean KL(pi_k || pi) <= delta

    and epochs of minibatches for the value, with the optimizer of the configuration. Metrics beside
    those of all: `loss/value`, `step_fraction`, what the line search left of the step.

    Source: arXiv:1502.05477, Eq. 14 and Appendix C.
    """

    config: Config

    def _value_optimizer(self) -> optax.GradientTransformation:
        config = self.config
        steps = config.num_epochs * config.num_minibatches
        return self.make_optimizer(config.optimizer, config.learning_rate, steps)

    def init_learner(self, params: dict[str, PyTree]) -> Learner:
        """The states of both optimizers."""
        return Learner(
            self.config.natural_gradient().init(params["actor"]),
            self._value_optimizer().init(params["critic"]),
        )

    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Learner, Metrics]:
        """One step of the policy, epochs of the value."""
        actor, learner = state.params["actor"], state.learner

        def loss_fn(params: PyTree) -> jax.Array:
            log_prob = self.distributions(params, batch).log_prob(batch.action)
            return -jnp.mean(trpo_surrogate(log_prob, batch.log_prob, batch.advantage))

        def divergence_fn(params: PyTree) -> jax.Array:
            return jnp.mean(batch.old.kl_divergence(self.distributions(params, batch)))

        grads = averaged(jax.grad(loss_fn)(actor), self.axis_name)
        updates, natural = self.config.natural_gradient(self.axis_name).update(
            grads, learner.natural, actor, loss_fn=loss_fn, divergence_fn=divergence_fn
        )
        actor = optax.apply_updates(actor, updates)
        critic, value_state, value_loss = self.fit_values(
            self._value_optimizer(), state.params["critic"], learner.value, batch, key
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
