r"""Mirror descent policy optimisation, on-policy (`MDPO`) and off-policy (`OffPolicyMDPO`).

Tomar, Shani, Efroni, Ghavamzadeh, arXiv:2005.09814. The on-policy form, Eq. 5 and Algorithm 1, is

    pi_{k+1}  ~  argmin_pi  mean( -r A + KL(pi || pi_k) / t_k ),   t_k = 1 - k / K

It takes m gradient steps on the whole batch while pi_k stays fixed, without a clip or a line
search. The new policy comes first in the KL. With m = 1 the gradient of the KL is still zero, and
the step is the vanilla policy gradient.

The authors' code (manantomar/Mirror-Descent-Policy-Optimization) differs in three ways: it sets
t_k = 1 - (k - 1) / K, which lags by one iteration and starts above 1; its learning rate is constant
where the paper speaks of annealing; and the policy that acts in the first iteration is not the one
that learns.

The off-policy form, Eq. 4 and Algorithm 2, has c = 1 / t, the entropy weight lambda, and an old
policy pi_k that is copied every m gradient steps:

    policy   mean( c log pi + (lambda - c) log pi_k - Q ),   a ~ pi, Q the smaller of two critics

At c = lambda it is SAC. With m = 1 it is SAC in expectation, as the gradient of the KL is zero. An
order other than 1 replaces the logarithms by q-logarithms and the KL by a Tsallis divergence.

The authors' off-policy code has a third network, for V, and its targets use a moving average of
that network; here, as in the last version of SAC, the critics have moving averages of their own. In
their code the policy maximises the first critic (`actor_critic="first"`), acts without noise in
training (`explore="mode"`), has 0.001 (mean^2 + log_std^2) in its loss (`regularization=0.001`),
and densities are clipped from below at 1e-6.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_choice, check_number, is_concrete_number
from trustjax._sharding import AxisName
from trustjax.agents import config, off_policy
from trustjax.agents.action_samples import ActionSamples, expectation, log_prob_of, sample_actions
from trustjax.agents.algorithm import Metrics, PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.config import OnPolicyConfig, check_whole_batch
from trustjax.agents.on_policy import OnPolicy, State
from trustjax.agents.replay import Replayed
from trustjax.distributions import Categorical, TanhGaussian
from trustjax.losses import mdpo_actor_loss, mdpo_forward_loss, mdpo_loss, tsallis_log
from trustjax.models.actor_critic import default_float
from trustjax.models.observations import action_mask
from trustjax.trust import trust_metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """The fields that MDPO adds to `OnPolicyConfig`, and its own sizes and normalisations.

    With them it holds CartPole at 500, the highest return, from 42,000 steps on (five seeds of
    five).

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

    num_envs: int = static(16)
    num_steps: int = static(64)
    normalize_observations: bool = static(True)
    normalize_rewards: bool = static(True)
    learning_rate: ArrayLike = 1e-3
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OffPolicyConfig(config.OffPolicyConfig):
    """The fields that off-policy MDPO adds to `trustjax.agents.OffPolicyConfig`.

    Attributes:
      policy_steps: Gradient steps between two copies of the old policy (the paper's m), >= 1.
      step_size: Step size t of the mirror descent step, > 0 and at most 1 / temperature. While a
        learned temperature lambda is above 1 / t, the step in effect is 1 / lambda.
      order: Order q' of the Tsallis divergence and entropy, in [1, 2]; 1 is the KL. Static.
      projection: The KL to the optimum of the step that is minimised: the paper's "reverse", with
        the new policy first, or "forward"; static.
      num_candidates: Samples of the old policy per observation in the forward projection with
        continuous actions, >= 2; static.
      regularization: Weight of mean^2 + log_std^2 in the policy's loss for continuous actions,
        >= 0.
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
        numbers = self.step_size, self.temperature
        if not self.learn_temperature and all(map(is_concrete_number, numbers)):
            step_size, temperature = (np.asarray(number, np.float64) for number in numbers)
            if np.any(step_size * temperature > 1 + 1e-6):  # 1e-6: float32 numbers are rounded
                largest = 1 / np.max(temperature)
                raise FieldError(
                    "step_size",
                    f"be at most 1 / temperature, {largest:g}, because a larger one repels the "
                    "policy from the old one",
                    self.step_size,
                )

    def agent(self, *, axis_name: AxisName | None = None) -> "OffPolicyMDPO":
        """The algorithm with this configuration."""
        return OffPolicyMDPO(self, axis_name=axis_name)


class OffPolicyMDPO(off_policy.OffPolicy):
    """Off-policy mirror descent policy optimisation; see `OffPolicy` for how it is used.

    A gradient step of the policy minimises

        mean(c log pi + (lambda - c) log pi_k - Q),   c = 1 / t, pi_k copied every m steps

    or its Tsallis form, or the forward projection. The critics and the temperature learn as in SAC.
    MDPO adds the metrics `trust/distance`, `trust/radius`, `trust/used` and `step_size`, the step
    in effect, to those of SAC.

    Source: arXiv:2005.09814, Eq. 4, Section 5 and Algorithm 2.
    """

    config: OffPolicyConfig

    @property
    def tanh_epsilon(self) -> float:
        """1e-6 for orders above 1, which need densities: those overflow near actions of +-1."""
        return 0.0 if self.config.order == 1 else 1e-6

    def init_old_actor(self, actor: PyTree) -> PyTree:
        """A copy of the initial policy."""
        return jax.tree.map(jnp.copy, actor)

    def refresh_old_actor(self, learner: off_policy.Learner, actor: PyTree) -> off_policy.Learner:
        """The learner, whose old policy becomes the current one every m gradient steps."""
        steps = jnp.asarray(self.config.policy_steps, learner.gradient_steps.dtype)
        # As a select, because m may be traced.
        due = learner.gradient_steps % steps == 0
        old_actor = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), actor, learner.old_actor
        )
        return learner._replace(old_actor=old_actor)

    def entropy_log(self, log_prob: jax.Array) -> jax.Array:
        """The sum of the q-logarithms of all dimensions, as in the authors' code."""
        return jnp.sum(tsallis_log(log_prob, order=self.config.order), -1)

    def step_size(self, learner: off_policy.Learner) -> jax.Array:
        """The step size in effect, min(t, 1 / lambda), float [].

        Without limits on pi the step goes to log pi = (1 - lambda t) log pi_k + t Q, whose fixed
        point is Q / lambda. Beyond t = 1 / lambda the weight of log pi_k is negative: the policy is
        repelled from the old one and overshoots the fixed point. At 1 / lambda the loss is that of
        SAC, so that a learned temperature goes on controlling the entropy, which it would not if it
        were capped at 1 / t instead.
        """
        first = jnp.asarray(self.config.step_size, default_float())
        return first / jnp.maximum(self.temperature(learner) * first, 1)

    def policy_losses(
        self,
        actor: PyTree,
        batch: Replayed,
        keys: jax.Array,
        learner: off_policy.Learner,
        critics: PyTree,
    ) -> tuple[jax.Array, jax.Array]:
        """Eq. 4 of the paper, divided by t; see `OffPolicy`."""
        config = self.config
        new = self.distribution(actor, batch.observation)
        old = self.distribution(learner.old_actor, batch.observation)
        samples = sample_actions(new, keys, epsilon=self.tanh_epsilon)
        log_prob = expectation(samples, samples.log_prob.sum(-1))
        weights = {
            "step_size": self.step_size(learner),
            "temperature": self.temperature(learner),
        }
        if config.projection == "reverse":
            losses = expectation(
                samples,
                mdpo_actor_loss(
                    samples.log_prob, log_prob_of(old, samples, epsilon=self.tanh_epsilon),
                    self.policy_q_values(critics, batch.observation, samples),
                    order=config.order, event_axis=-1, **weights,
                ),
            )  # fmt: skip
        else:
            losses = self._forward_losses(new, old, batch, keys, critics, weights)
        # The authors' code has this term, the paper's loss has not.
        if isinstance(new, TanhGaussian):
            size = jnp.mean(jnp.square(new.mean), -1) + jnp.mean(jnp.square(new.log_std), -1)
            losses = losses + jnp.asarray(config.regularization, size.dtype) * size
        return losses, log_prob

    def policy_update_metrics(
        self, state: off_policy.State, batch: Replayed, keys: jax.Array, before: PyTree
    ) -> Metrics:
        """The distance of the policy from the old one, and the bound that its loss implies.

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

        keys_new, keys_old = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        gain = objective(new, keys_new) - objective(old, keys_old)
        step_size = self.step_size(learner).astype(gain.dtype)
        return {
            **super().policy_update_metrics(state, batch, keys, before),
            **trust_metrics(step_size * jnp.maximum(gain, 0), self.mean(new.kl_divergence(old))),
            "step_size": step_size,
        }

    def _forward_losses(
        self,
        new: Any,
        old: Any,
        batch: Replayed,
        keys: jax.Array,
        critics: PyTree,
        weights: dict[str, jax.Array],
    ) -> jax.Array:
        """The forward projection over samples of the old policy, or over all discrete actions."""
        mask = action_mask(batch.observation)
        if mask is not None:
            # In the optimum pi_k^(1 - lambda t) exp(t Q) a masked action has no weight, not even at
            # t = 1 / lambda, where a finite log pi_k drops out.
            mask = mask.reshape(old.logits.shape)
            excluded = ~mask & jnp.any(mask, -1, keepdims=True)
            old = Categorical(jnp.where(excluded, -jnp.inf, old.logits))
        count = 1 if isinstance(old, Categorical) else self.config.num_candidates
        sample_keys = jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)
        samples = jax.vmap(lambda keys: sample_actions(old, keys))(sample_keys)

        def evaluate(one: ActionSamples) -> tuple[jax.Array, jax.Array]:
            log_prob = log_prob_of(new, one).sum(-1)
            return log_prob, self.policy_q_values(critics, batch.observation, one)

        # [sample, batch, action], where either the sample or the action axis has length 1.
        log_prob, q_value = jax.vmap(evaluate)(samples)
        log_prob, old_log_prob, q_value = (
            jnp.moveaxis(x, 0, -1).reshape(x.shape[1], -1)
            for x in (log_prob, samples.log_prob.sum(-1), q_value)
        )
        return mdpo_forward_loss(
            log_prob, old_log_prob, q_value, drawn=isinstance(old, TanhGaussian), **weights
        )
