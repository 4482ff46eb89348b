r"""Mirror descent policy optimisation, on-policy (`MDPO`) and off-policy (`OffPolicyMDPO`).

Tomar, Shani, Efroni, Ghavamzadeh, arXiv:2005.09814. On-policy, Eq. 5 and Algorithm 1:

    pi_{k+1}  ~  argmin_pi  mean( -r A + KL(pi || pi_k) / t_k ),   t_k = 1 - k / K

by m gradient steps on the whole batch, pi_k frozen meanwhile. No clip, no line search. The new
policy comes first in the KL. With m = 1 the KL has no slope yet, and this is the vanilla policy
gradient.

The authors' code (manantomar/Mirror-Descent-Policy-Optimization) has t_k = 1 - (k - 1) / K, one
step late and above 1 at first; a constant learning rate where the paper speaks of annealing;
rollouts of a policy that is not the learner's in the first iteration.

Off-policy, Eq. 4 and Algorithm 2, with c = 1 / t, the entropy's weight lambda, and the old policy
pi_k copied every m gradient steps:

    policy   mean( c log pi + (lambda - c) log pi_k - Q ),   a ~ pi, Q the smaller of two critics

At c = lambda it is SAC; so it is, in expectation, with m = 1, where the KL has no slope. With
another order than 1 logarithms become q-logarithms, and the KL a Tsallis divergence.

Off-policy the authors' code has a third network, for V, whose moving average the targets are made
of, where here, as in SAC's last version, the critics have moving averages of their own; the policy
climbs the first critic (`actor_critic="first"`), explores without noise (`explore="mode"`), and has
0.001 (mean^2 + log_std^2) in its loss (`regularization=0.001`); densities are clipped below 1e-6.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_choice, check_number
from trustjax._sharding import AxisName
from trustjax.agents import off_policy
from trustjax.agents.action_samples import ActionSamples, expectation, log_prob_of, sample_actions
from trustjax.agents.algorithm import Metrics, PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.config import OffPolicyConfig as SharedConfig
from trustjax.agents.config import OnPolicyConfig, whole_batch
from trustjax.agents.on_policy import OnPolicy, State
from trustjax.agents.replay import Replayed
from trustjax.distributions import Categorical, TanhGaussian
from trustjax.losses import mdpo_actor_loss, mdpo_forward_loss, mdpo_loss, tsallis_log
from trustjax.trust import trust_metrics


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
    """On-policy mirror descent policy optimisation; see `OnPolicy` for how it is used.

    An iteration is m gradient steps of the policy on the whole batch,

        mean(-r A + KL(pi || pi_k) / t_k),   t_k = `step_size` max(1 - k / K, 1 / K)

    or `step_size` throughout, and epochs of minibatches for the value. Metrics beside those of all:
    `loss/value`, `step_size`, which is t_k.

    Source: arXiv:2005.09814, Eq. 5 and Algorithm 1.
    """

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

        step = self.make_train_step(loss_fn, policy_tx, output_fn)

        def descend(carry: tuple[PyTree, optax.OptState], _: None) -> tuple[PyTree, None]:
            params, opt_state, _, _ = step(*carry, batch)
            return (params, opt_state), None

        (actor, policy_state), _ = jax.lax.scan(
            descend, (state.params["actor"], state.learner.policy), length=config.policy_steps
        )
        critic, value_state, value_loss = self.fit_values(
            value_tx, state.params["critic"], state.learner.value, batch, key
        )
        update_metrics = self.policy_update_metrics(actor, batch)
        distance = update_metrics[f"kl/{config.kl}"]
        # A loss no higher than at pi_k means KL <= t_k gain.
        radius = step_size * jnp.maximum(update_metrics["gain"], 0)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OffPolicyConfig(SharedConfig):
    """What off-policy MDPO adds to `trustjax.agents.OffPolicyConfig`.

    Attributes:
      policy_steps: m >= 1, gradient steps between two copies of the old policy.
      step_size: t, > 0, at most 1 / temperature.
      order: q' in [1, 2] of the Tsallis divergence and entropy; 1 for the KL; static.
      projection: which KL to the optimum of the step is minimised, "reverse", the paper's, with the
        new policy first, or "forward"; static.
      num_candidates: draws from the old policy that the forward projection weighs; static.
      regularization: weight >= 0 of mean^2 + log_std^2 of continuous actions.
    """

    policy_steps: ArrayLike = 1000
    step_size: ArrayLike = 1.0
    order: float = static(1.0)
    projection: Literal["reverse", "forward"] = static("reverse")
    num_candidates: int = static(16)
    regularization: ArrayLike = 0.0

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        check_number("policy_steps", self.policy_steps, at_least=1)
        check_number("step_size", self.step_size, above=0.0)
        check_number("order", self.order, at_least=1.0, at_most=2.0)
        check_choice("projection", self.projection, ("reverse", "forward"))
        check_number("num_candidates", self.num_candidates, at_least=2)
        check_number("regularization", self.regularization, at_least=0.0)
        if self.projection == "forward" and self.order != 1:
            raise FieldError("order", "be 1 with projection 'forward'", self.order)
        if isinstance(self.step_size, int | float) and isinstance(self.temperature, int | float):
            largest = 1 / self.temperature if self.temperature else math.inf
            if not self.learn_temperature and self.step_size > largest:
                raise FieldError(
                    "step_size",
                    f"be at most 1 / temperature, {largest:g}, or the policy is repelled from the "
                    "old one",
                    self.step_size,
                )

    def agent(self, *, axis_name: AxisName | None = None) -> "OffPolicyMDPO":
        """The algorithm with this configuration."""
        return OffPolicyMDPO(self, axis_name=axis_name)


class OffPolicyMDPO(off_policy.OffPolicy):
    """Off-policy mirror descent policy optimisation; see `OffPolicy` for how it is used.

    A gradient step of the policy is one on

        mean(c log pi + (lambda - c) log pi_k - Q),   c = 1 / t, pi_k copied every m of them

    or its Tsallis form, or the forward projection; those of the critics are SAC's. Metrics beside
    SAC's: `trust/distance`, `trust/radius`, `trust/used`.

    Source: arXiv:2005.09814, Eq. 4, Section 5 and Algorithm 2.
    """

    config: OffPolicyConfig

    @property
    def tanh_epsilon(self) -> float:
        """1e-6 where densities are needed, not their logarithms: near +-1 they overflow."""
        return 0.0 if self.config.order == 1 else 1e-6

    def old_actor(self, actor: PyTree) -> PyTree:
        """A copy of the first policy."""
        return jax.tree.map(jnp.copy, actor)

    def refreshed(self, learner: off_policy.Learner, actor: PyTree) -> off_policy.Learner:
        """The old policy becomes the new one every m steps."""
        steps = jnp.asarray(self.config.policy_steps, learner.gradient_steps.dtype)
        due = learner.gradient_steps % steps == 0
        old_actor = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), actor, learner.old_actor
        )
        return learner._replace(old_actor=old_actor)

    def entropy_log(self, log_prob: jax.Array) -> jax.Array:
        """The q-logarithms of all dimensions, summed, as in the authors' code."""
        return jnp.sum(tsallis_log(log_prob, order=self.config.order), -1)

    def policy_losses(
        self,
        actor: PyTree,
        batch: Replayed,
        keys: jax.Array,
        learner: off_policy.Learner,
        critics: PyTree,
    ) -> tuple[jax.Array, jax.Array]:
        """See `OffPolicy`."""
        config = self.config
        new = self.distribution(actor, batch.observation)
        old = self.distribution(learner.old_actor, batch.observation)
        samples = sample_actions(new, keys, epsilon=self.tanh_epsilon)
        log_prob = expectation(samples, samples.log_prob.sum(-1))
        numbers = {"step_size": config.step_size, "temperature": self.temperature(learner)}
        if config.projection == "reverse":
            losses = expectation(
                samples,
                mdpo_actor_loss(
                    samples.log_prob, log_prob_of(old, samples, epsilon=self.tanh_epsilon),
                    self.policy_q_values(critics, batch.observation, samples),
                    order=config.order, event_axis=-1, **numbers,
                ),
            )  # fmt: skip
        else:
            losses = self._forward_losses(new, old, batch, keys, critics, numbers)
        if isinstance(new, TanhGaussian):
            size = jnp.mean(jnp.square(new.mean), -1) + jnp.mean(jnp.square(new.log_std), -1)
            losses = losses + jnp.asarray(config.regularization, size.dtype) * size
        return losses, log_prob

    def policy_update_metrics(
        self, state: off_policy.State, batch: Replayed, keys: jax.Array, before: PyTree
    ) -> Metrics:
        """How far the policy is from the old one, and how far it might be.

        With order 1, a loss no higher than at pi_k means
        KL(pi || pi_k) <= t (E_pi[Q - lambda log pi] - E_pi_k[Q - lambda log pi_k]).
        """
        learner, critics = state.learner, state.params["critics"]
        temperature = self.temperature(learner)
        new = self.distribution(state.params["actor"], batch.observation)
        old = self.distribution(learner.old_actor, batch.observation)

        def objective(distribution: Any, keys: jax.Array) -> jax.Array:
            samples = sample_actions(distribution, keys)
            value = self.policy_q_values(critics, batch.observation, samples)
            soft = value - temperature * samples.log_prob.sum(-1)
            return self.mean(expectation(samples, soft))

        of_new, of_old = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        gain = objective(new, of_new) - objective(old, of_old)
        radius = jnp.asarray(self.config.step_size, gain.dtype) * jnp.maximum(gain, 0)
        distance = self.mean(new.kl_divergence(old))
        return super().policy_update_metrics(state, batch, keys, before) | trust_metrics(
            radius, distance
        )

    def _forward_losses(
        self,
        new: Any,
        old: Any,
        batch: Replayed,
        keys: jax.Array,
        critics: PyTree,
        numbers: dict[str, ArrayLike],
    ) -> jax.Array:
        """The forward projection, over samples of the old policy, or over all discrete actions."""
        count = 1 if isinstance(old, Categorical) else self.config.num_candidates
        many = jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)
        draws = jax.vmap(lambda keys: sample_actions(old, keys))(many)

        def of_draw(one: ActionSamples) -> tuple[jax.Array, jax.Array]:
            log_prob = log_prob_of(new, one).sum(-1)
            return log_prob, self.policy_q_values(critics, batch.observation, one)

        # [draw, batch, action]: of the two last but the batch one has length 1.
        log_prob, q_value = jax.vmap(of_draw)(draws)
        log_prob, old_log_prob, q_value = (
            jnp.moveaxis(x, 0, -1).reshape(x.shape[1], -1)
            for x in (log_prob, draws.log_prob.sum(-1), q_value)
        )
        return mdpo_forward_loss(
            log_prob, old_log_prob, q_value, drawn=isinstance(old, TanhGaussian), **numbers
        )
