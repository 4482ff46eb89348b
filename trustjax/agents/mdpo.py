"""Mirror descent policy optimisation, on-policy; for the off-policy form see `off_policy_mdpo`.

Tomar, Shani, Efroni, Ghavamzadeh, arXiv:2005.09814. Eq. 5 and Algorithm 1:

    pi_{k+1}  ~  argmin_pi  mean( -r A + KL(pi || pi_k) / t_k ),   t_k = 1 - k / K

It takes m gradient steps on the whole batch while pi_k stays fixed, without a clip or a line
search. The new policy comes first in the KL. With m = 1 the gradient of the KL is still zero, and
the step is the vanilla policy gradient.

The authors' code (manantomar/Mirror-Descent-Policy-Optimization) differs in three ways: it sets
t_k = 1 - (k - 1) / K, which lags by one iteration and starts above 1; its learning rate is constant
where the paper speaks of annealing; and the policy that acts in the first iteration is not the one
that learns.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._checks import check_choice, check_number
from trustjax._sharding import AxisName
from trustjax.agents.algorithm import Metrics, PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.config import OnPolicyConfig, check_whole_batch
from trustjax.agents.off_policy_mdpo import OffPolicyConfig as OffPolicyConfig
from trustjax.agents.off_policy_mdpo import OffPolicyMDPO as OffPolicyMDPO
from trustjax.agents.on_policy import OnPolicy, State
from trustjax.losses import mdpo_loss
from trustjax.models.actor_critic import default_float
from trustjax.trust import trust_metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """The configuration of on-policy MDPO.

    `num_epochs`, `num_minibatches` and `shuffle` of `OnPolicyConfig` apply to the value alone.
    `optimizer` and `learning_rate` apply to both policy and value, which have separate states.

    Attributes:
      value_learning_rate: Learning rate of the value, > 0; None for `learning_rate`.
      policy_steps: Gradient steps of the policy in one iteration (the paper's m), >= 1; static.
      step_size: Step size t_0 of the mirror descent step in the first iteration, > 0.
      anneal_step_size: Whether t_k = t_0 (1 - k / K) falls over the K iterations; otherwise
        t_k = t_0. Static.
      kl: Direction of the KL: "new_old" for the paper's KL(pi || pi_k), or "old_new" for
        KL(pi_k || pi); static.
    """

    num_epochs: int = static(5)
    num_minibatches: int = static(16)
    value_learning_rate: ArrayLike | None = None
    policy_steps: int = static(10)
    step_size: ArrayLike = 1.0
    anneal_step_size: bool = static(True)
    kl: Literal["new_old", "old_new"] = static("new_old")

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        check_whole_batch(self)
        check_number("policy_steps", self.policy_steps, at_least=1)
        for name in ("step_size", "value_learning_rate"):
            check_number(name, getattr(self, name), above=0.0)
        check_choice("kl", self.kl, ("new_old", "old_new"))

    def agent(self, *, axis_name: AxisName | None = None) -> "MDPO":
        """The algorithm with this configuration."""
        return MDPO(self, axis_name=axis_name)


class Learner(NamedTuple):
    """The optimizer states of MDPO.

    Attributes:
      policy: Optimizer state of the policy.
      value: Optimizer state of the value.
    """

    policy: optax.OptState
    value: optax.OptState


class MDPO(OnPolicy):
    """On-policy mirror descent policy optimisation; see `OnPolicy` for how it is used.

    An iteration takes m gradient steps of the policy on the whole batch, on

        mean(-r A + KL(pi || pi_k) / t_k) - c entropy,   t_k = t_0 max(1 - k / K, 1 / K)

    where c is `entropy_coefficient`, 0 in the paper, and then fits the value by epochs of
    minibatches. Without `anneal_step_size`, t_k = t_0 throughout. MDPO adds the metrics
    `loss/value` and `step_size`, which is t_k.

    Source: arXiv:2005.09814, Eq. 5 and Algorithm 1.
    """

    config: Config

    def _optimizers(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        config, make = self.config, self.config.optimizer
        rate, value_rate = config.learning_rate, config.value_learning_rate
        return (
            self.make_optimizer(make, rate, config.policy_steps),
            self.make_optimizer(
                make,
                rate if value_rate is None else value_rate,
                config.num_epochs * config.num_minibatches,
            ),
        )

    def init_learner(self, params: dict[str, PyTree]) -> Learner:
        """The first states of both optimizers."""
        policy, value = self._optimizers()
        return Learner(policy.init(params["actor"]), value.init(params["critic"]))

    def step_size(self, iteration: jax.Array) -> jax.Array:
        """The step size t_k of iteration k, float []; at least t_0 / K if it is annealed."""
        first = jnp.asarray(self.config.step_size, default_float())
        if not self.config.anneal_step_size:
            return first
        num_updates = self.config.num_updates
        # The lower bound keeps 1 / t_k finite in iterations after the last one.
        return first * jnp.maximum(
            1 - iteration.astype(default_float()) / num_updates, 1 / num_updates
        )

    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Learner, Metrics]:
        """Takes m steps of the policy and fits the value: one iteration of Algorithm 1."""
        policy_tx, value_tx = self._optimizers()
        step_size = self.step_size(state.iteration)
        actor, policy_state = self._improve_policy(
            policy_tx, state.params["actor"], state.learner.policy, batch, step_size
        )
        critic, value_state, value_loss = self.fit_values(
            value_tx, state.params["critic"], state.learner.value, batch, key
        )
        update_metrics = self.policy_update_metrics(actor, batch)
        distance = update_metrics[f"kl/{self.config.kl}"]
        # A loss no higher than at pi_k means KL <= t_k (gain + c (entropy - entropy of pi_k)).
        old: Any = batch.old
        more_entropy = update_metrics["entropy"] - self.mean(old.entropy())
        gain = update_metrics["gain"] + self.config.entropy_coefficient * more_entropy
        radius = step_size * jnp.maximum(gain, 0)
        metrics = {
            "loss/value": value_loss,
            "step_size": step_size,
            **trust_metrics(radius, distance),
        }
        return (
            {"actor": actor, "critic": critic},
            Learner(policy_state, value_state),
            update_metrics | metrics,
        )

    def _improve_policy(
        self,
        tx: optax.GradientTransformation,
        actor: PyTree,
        opt_state: optax.OptState,
        batch: Batch,
        step_size: jax.Array,
    ) -> tuple[PyTree, optax.OptState]:
        """The policy and its optimizer state after m gradient steps on Eq. 5, pi_k fixed."""
        config = self.config

        def loss_fn(params: PyTree, batch: Batch) -> tuple[jax.Array, None]:
            new = self.distributions(params, batch)
            if config.kl == "new_old":
                kl = new.kl_divergence(batch.old)
            else:
                kl = batch.old.kl_divergence(new)
            losses = mdpo_loss(
                new.log_prob(batch.action), batch.log_prob, batch.advantage, kl,
                step_size=step_size,
            )  # fmt: skip
            return jnp.mean(losses) - self.entropy_bonus(new), None

        def output_fn(params: PyTree, batch: Batch) -> jax.Array:
            return jnp.asarray(self.distributions(params, batch)[0])

        step = self.make_train_step(loss_fn, tx, output_fn)

        def descend(carry: tuple[PyTree, optax.OptState], _: None) -> tuple[PyTree, None]:
            params, opt_state, _, _ = step(*carry, batch)
            return (params, opt_state), None

        return jax.lax.scan(descend, (actor, opt_state), length=config.policy_steps)[0]
