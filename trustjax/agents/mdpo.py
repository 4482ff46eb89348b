r"""Mirror descent policy optimisation, on-policy.

Tomar, Shani, Efroni, Ghavamzadeh, arXiv:2005.09814, Eq. 5 and Algorithm 1:

    pi_{k+1}  ~  argmin_pi  mean( -r A + KL(pi || pi_k) / t_k ),   t_k = 1 - k / K

by m gradient steps on the whole batch, pi_k frozen meanwhile. No clip, no line search. The new
policy comes first in the KL. With m = 1 the KL has no slope yet, and this is the vanilla policy
gradient.

The authors' code (manantomar/Mirror-Descent-Policy-Optimization) has t_k = 1 - (k - 1) / K, one
step late and above 1 at first; a constant learning rate where the paper speaks of annealing;
rollouts of a policy that is not the learner's in the first iteration.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._checks import check_choice, check_number
from trustjax._sharding import AxisName
from trustjax.agents.batch import Batch
from trustjax.agents.config import OnPolicyConfig, static, whole_batch
from trustjax.agents.on_policy import Metrics, OnPolicy, PyTree, State, trust
from trustjax.losses import mdpo_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """What MDPO adds to `OnPolicyConfig`, of which epochs and minibatches are the value's.

    The optimizer and its rate are those of policy and value, each with a state of its own.

    Attributes:
      policy_steps: m, gradient steps of the policy in an iteration; static.
      step_size: t_0, > 0.
      anneal_step_size: t_k = t_0 (1 - k / K), K iterations; else t_k = t_0; static.
      kl: "new_old" for KL(pi || pi_k), the paper's; "old_new" for KL(pi_k || pi); static.
    """

    num_epochs: int = static(5)
    num_minibatches: int = static(16)
    policy_steps: int = static(10)
    step_size: ArrayLike = 1.0
    anneal_step_size: bool = static(True)
    kl: Literal["new_old", "old_new"] = static("new_old")

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        whole_batch(self)
        check_number("policy_steps", self.policy_steps, at_least=1)
        check_number("step_size", self.step_size, above=0.0)
        check_choice("kl", self.kl, ("new_old", "old_new"))

    def agent(self, *, axis_name: AxisName | None = None) -> "MDPO":
        """The algorithm with this configuration."""
        return MDPO(self, axis_name=axis_name)


class Learner(NamedTuple):
    """What MDPO keeps: states of the optimizers of policy and value."""

    policy: optax.OptState
    value: optax.OptState


class MDPO(OnPolicy):
    """On-policy MDPO; see `OnPolicy` for how it is used."""

    config: Config

    def _optimizer(self, steps_per_update: int) -> optax.GradientTransformation:
        return self.make_optimizer(
            self.config.optimizer, self.config.learning_rate, steps_per_update
        )

    def _optimizers(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        config = self.config
        return (
            self._optimizer(config.policy_steps),
            self._optimizer(config.num_epochs * config.num_minibatches),
        )

    def init_learner(self, params: dict[str, PyTree]) -> Learner:
        """The states of both optimizers."""
        policy, value = self._optimizers()
        return Learner(policy.init(params["actor"]), value.init(params["critic"]))

    def step_size(self, iteration: jax.Array) -> jax.Array:
        """t_k of iteration k; at least t_0 / K, should it be called after the last one."""
        first = jnp.asarray(self.config.step_size)
        if not self.config.anneal_step_size:
            return first
        num_updates = self.config.num_updates
        return first * jnp.maximum(1 - iteration / num_updates, 1 / num_updates)

    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Learner, Metrics]:
        """m steps of the policy, epochs of the value."""
        config, (policy_tx, value_tx) = self.config, self._optimizers()
        step_size = self.step_size(state.iteration)

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
            return jnp.mean(losses), None

        def output_fn(params: PyTree, batch: Batch) -> jax.Array:
            return jnp.asarray(self.distributions(params, batch)[0])

        step = self.step(loss_fn, policy_tx, output_fn)

        def descend(carry: tuple[PyTree, optax.OptState], _: None) -> tuple[PyTree, None]:
            params, opt_state, _, _ = step(*carry, batch)
            return (params, opt_state), None

        (actor, policy_state), _ = jax.lax.scan(
            descend, (state.params["actor"], state.learner.policy), length=config.policy_steps
        )
        critic, value_state, value_loss = self.fit_values(
            value_tx, state.params["critic"], state.learner.value, batch, key
        )
        moved = self.moved(actor, batch)
        distance = moved[f"kl/{config.kl}"]
        # A loss no higher than at pi_k means KL <= t_k gain.
        radius = step_size * jnp.maximum(moved["gain"], 0)
        metrics = {
            "loss/value": value_loss,
            "step_size": step_size,
            **trust(radius, distance),
        }
        return (
            {"actor": actor, "critic": critic},
            Learner(policy_state, value_state),
            moved | metrics,
        )
