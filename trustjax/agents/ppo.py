r"""Proximal policy optimisation: epochs on a surrogate that keeps the new policy near the old one.

Schulman, Wolski, Dhariwal, Radford, Klimov, arXiv:1707.06347, with three surrogates:

    clip          -min(r A, clip(r, 1 - eps, 1 + eps) A)                  Eq. 7
    kl            -r A + beta KL(pi_k || pi)                              Eq. 8, beta fixed
    adaptive_kl   the same, with beta halved or doubled towards a target  Section 4

The loss of a minibatch is the surrogate + c_1 / 2 (V - R)^2 - c_2 entropy (Eq. 9, minimised), with
c_2 = `entropy_coefficient`.
Details that the paper leaves to its code are fields of `Config`.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_choice, check_number
from trustjax._sharding import AxisName, averaged
from trustjax.agents.algorithm import Metrics, PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.config import OnPolicyConfig
from trustjax.agents.on_policy import OnPolicy, State
from trustjax.agents.running_statistics import standardized
from trustjax.losses import (
    adapt_kl_coefficient,
    adapt_learning_rate,
    ppo_clip_loss,
    ppo_kl_loss,
    value_loss,
)
from trustjax.losses._ratio import log_ratio
from trustjax.trust import trust_metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """The fields that PPO adds to `OnPolicyConfig`, and its own sizes and normalisations.

    With them it holds CartPole at 500, the highest return, from 100,000 steps on (ten seeds of
    ten).

    Attributes:
      surrogate: Surrogate of the policy's loss, "clip", "kl" or "adaptive_kl"; static.
      clip: Half-width eps of the interval around 1 that "clip" clips the ratio to, >= 0.
      kl_coefficient: Weight beta of the KL in "kl", and its first value in "adaptive_kl", >= 0.
      kl_target: Mean KL per iteration that "adaptive_kl" aims at (the paper's d_targ), in nats,
        > 0.
      value_coefficient: Weight c_1 of the value loss, >= 0.
      target_kl: KL in nats, > 0, that ends the epochs of an iteration: the first minibatch with
        mean(r - 1 - log r) > 1.5 target_kl, which estimates KL(pi_k || pi), and all after it leave
        the networks as they are. This is the `target_kl` of stable-baselines3. None for no end.
      desired_kl: KL in nats, > 0, at which the learning rate is held: before the step of each
        minibatch `adapt_learning_rate` moves it by the mean KL(pi_k || pi), within [1e-5, 1e-2].
        This is the `desired_kl` of RSL-RL and brax. None for a rate that does not adapt.
    """

    num_envs: int = static(16)
    num_steps: int = static(64)
    num_epochs: int = static(10)
    normalize_observations: bool = static(True)
    normalize_rewards: bool = static(True)
    normalize_advantages: Literal["batch", "minibatch", "none"] = static("minibatch")
    surrogate: Literal["clip", "kl", "adaptive_kl"] = static("clip")
    clip: ArrayLike = 0.2
    kl_coefficient: ArrayLike = 1.0
    kl_target: ArrayLike = 0.01
    value_coefficient: ArrayLike = 0.5
    target_kl: ArrayLike | None = None
    desired_kl: ArrayLike | None = None

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        check_choice("surrogate", self.surrogate, ("clip", "kl", "adaptive_kl"))
        for name in ("clip", "kl_coefficient", "value_coefficient"):
            check_number(name, getattr(self, name), at_least=0.0)
        for name in ("kl_target", "target_kl", "desired_kl"):
            check_number(name, getattr(self, name), above=0.0)
        if self.desired_kl is not None and self.anneal_learning_rate:
            raise FieldError(
                "anneal_learning_rate", "be False with desired_kl, which adapts the rate", True
            )

    def agent(self, *, axis_name: AxisName | None = None) -> "PPO":
        """The algorithm with this configuration."""
        return PPO(self, axis_name=axis_name)


class Learner(NamedTuple):
    """The optimizer state and the adaptive coefficient of PPO.

    Attributes:
      opt_state: Optimizer state of policy and value together.
      kl_coefficient: Current weight beta of the KL, float [].
    """

    opt_state: optax.OptState
    kl_coefficient: jax.Array


class AdaptiveLearner(NamedTuple):
    """The same with `desired_kl`; apart, because a checkpoint has every field, even None.

    Attributes:
      opt_state: Optimizer state of policy and value together.
      kl_coefficient: Current weight beta of the KL, float [].
      learning_rate: Current learning rate, float [].
    """

    opt_state: optax.OptState
    kl_coefficient: jax.Array
    learning_rate: jax.Array


class _Progress(NamedTuple):
    """The carry of the minibatches of an iteration.

    Attributes:
      params: Variables of the networks.
      opt_state: State of the optimizer.
      learning_rate: Rate of the next step, or None where a schedule of the optimizer has it.
      stopped: Whether the KL has ended the epochs, bool []; None without `target_kl`.
      gradient_steps: Number of steps that were taken, float []; None without `target_kl`.
    """

    params: dict[str, PyTree]
    opt_state: optax.OptState
    learning_rate: ArrayLike | None
    stopped: jax.Array | None
    gradient_steps: jax.Array | None


class PPO(OnPolicy):
    """Proximal policy optimisation; see `OnPolicy` for how it is used.

    An iteration takes `num_epochs` times `num_minibatches` steps of one optimizer, which trains
    policy and value together, on

        surrogate + c_1 / 2 (V - R)^2 - c_2 entropy

    PPO adds the metrics `loss/policy`, `loss/value`, `clip_fraction` and `kl_coefficient`, with
    `target_kl` also `gradient_steps`, the number of steps before the end, and with `desired_kl`
    `learning_rate`.

    Source: arXiv:1707.06347, Eq. 7 to 9 and Section 4.
    """

    config: Config

    def _optimizer(self, learning_rate: ArrayLike | None) -> optax.GradientTransformation:
        """The optimizer with the rate of one step; None for its own schedule."""
        config = self.config
        if learning_rate is not None:
            return config.optimizer(learning_rate)
        steps = config.num_epochs * config.num_minibatches
        return self.make_optimizer(config.optimizer, config.learning_rate, steps)

    def _learning_rate(
        self, learner: Learner | AdaptiveLearner, iteration: jax.Array
    ) -> ArrayLike | None:
        """The rate of an iteration's first step; None where the optimizer's own schedule has it."""
        if isinstance(learner, AdaptiveLearner):
            return learner.learning_rate
        if self.config.target_kl is None:
            return None
        # The schedule counts steps, of which an iteration that ends early takes fewer.
        return self.annealed(self.config.learning_rate, iteration)

    def init_learner(self, params: dict[str, PyTree]) -> Learner | AdaptiveLearner:
        """The first optimizer state, and the first values of the numbers that adapt."""
        config, dtype = self.config, jnp.zeros([]).dtype
        beta = jnp.asarray(config.kl_coefficient, dtype)
        rate = jnp.asarray(config.learning_rate, dtype)
        scheduled = config.target_kl is None and config.desired_kl is None
        opt_state = self._optimizer(None if scheduled else rate).init(params)
        if config.desired_kl is None:
            return Learner(opt_state, beta)
        return AdaptiveLearner(opt_state, beta, rate)

    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Learner | AdaptiveLearner, Metrics]:
        """Takes epochs of minibatch steps on Eq. 9, and adapts the coefficient of the KL."""
        config, learner = self.config, state.learner
        beta = learner.kl_coefficient

        def loss_fn(params: dict[str, PyTree], part: Batch) -> tuple[jax.Array, Metrics]:
            return self._loss(params, part, beta)

        def output_fn(params: dict[str, PyTree], part: Batch) -> jax.Array:
            return jnp.asarray(self.distributions(params["actor"], part)[0])

        def minibatch(before: _Progress, part: Batch) -> tuple[_Progress, Metrics]:
            rate = self._adapted_rate(before, part)
            step = self.make_train_step(loss_fn, self._optimizer(rate), output_fn)
            params, opt_state, _, aux = step(before.params, before.opt_state, part)
            after = before._replace(params=params, opt_state=opt_state, learning_rate=rate)
            return self._unless_stopped(before, after, part), aux

        limited = config.target_kl is not None
        progress, losses = self.epochs(
            batch, key, config.num_epochs, config.num_minibatches, minibatch,
            _Progress(
                state.params, learner.opt_state, self._learning_rate(learner, state.iteration),
                jnp.zeros([], bool) if limited else None,
                jnp.zeros_like(beta) if limited else None,
            ),
        )  # fmt: skip
        params = progress.params
        update_metrics = self.policy_update_metrics(params["actor"], batch)
        # Section 4: beta is halved or doubled by the KL of the whole iteration.
        if config.surrogate == "adaptive_kl":
            beta = adapt_kl_coefficient(beta, update_metrics["kl/old_new"], config.kl_target)
        last_losses = averaged(jax.tree.map(lambda x: jnp.mean(x[-1]), losses), self.axis_name)
        if config.surrogate == "clip":
            radius, distance = jnp.asarray(config.clip), update_metrics["ratio/distance"]
        else:
            radius, distance = jnp.asarray(config.kl_target), update_metrics["kl/old_new"]
        metrics = update_metrics | last_losses | trust_metrics(radius, distance)
        metrics["kl_coefficient"] = beta
        learner = learner._replace(opt_state=progress.opt_state, kl_coefficient=beta)
        if isinstance(learner, AdaptiveLearner):
            metrics["learning_rate"] = jnp.asarray(progress.learning_rate)
            learner = learner._replace(learning_rate=metrics["learning_rate"])
        if progress.gradient_steps is not None:
            metrics["gradient_steps"] = progress.gradient_steps
        return params, learner, metrics

    def _adapted_rate(self, progress: _Progress, part: Batch) -> ArrayLike | None:
        """The learning rate of a minibatch, by the KL before its step if there is `desired_kl`."""
        if self.config.desired_kl is None:
            return progress.learning_rate
        new = self.distributions(progress.params["actor"], part)
        kl = self.mean(part.old.kl_divergence(new))
        rate = jnp.asarray(progress.learning_rate)
        return adapt_learning_rate(rate, kl, self.config.desired_kl)

    def _unless_stopped(self, before: _Progress, after: _Progress, part: Batch) -> _Progress:
        """`after` the step of a minibatch, or `before` it from where `target_kl` is exceeded."""
        if before.stopped is None or before.gradient_steps is None:
            return after
        new = self.distributions(before.params["actor"], part)
        log_r = log_ratio(new.log_prob(part.action), part.log_prob)
        # The estimator k3 of KL(pi_k || pi) and the factor 1.5 are those of stable-baselines3.
        kl = self.mean(jnp.expm1(log_r) - log_r)
        stopped = before.stopped | (kl > 1.5 * jnp.asarray(self.config.target_kl, kl.dtype))
        after = after._replace(gradient_steps=before.gradient_steps + 1)
        kept: _Progress = jax.tree.map(lambda b, a: jnp.where(stopped, b, a), before, after)
        return kept._replace(stopped=stopped)

    def _loss(
        self, params: dict[str, PyTree], part: Batch, beta: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Eq. 9 of the paper on a minibatch, to be minimised, and its parts as metrics."""
        config = self.config
        new = self.distributions(params["actor"], part)
        log_prob, advantage = new.log_prob(part.action), part.advantage
        if config.normalize_advantages == "minibatch":
            advantage = standardized(
                advantage, differences_of=part.returns, axis_name=self.axis_name
            )
        # The surrogate: Eq. 7, or Eq. 8 with the old policy first in the KL.
        if config.surrogate == "clip":
            losses = ppo_clip_loss(log_prob, part.log_prob, advantage, clip=config.clip)
        else:
            kl = part.old.kl_divergence(new)
            losses = ppo_kl_loss(log_prob, part.log_prob, advantage, kl, coefficient=beta)
        policy, entropy = jnp.mean(losses), jnp.mean(new.entropy())
        values = self.values(params["critic"], part)
        value = jnp.mean(value_loss(values, part.value, part.returns, clip=config.value_clip))
        loss = (
            policy + 0.5 * config.value_coefficient * value - config.entropy_coefficient * entropy
        )
        # Ratios outside the interval, including those that Eq. 7 leaves alone by the sign of A.
        ratio = jnp.exp(log_ratio(log_prob, part.log_prob))
        clipped = jnp.mean((jnp.abs(ratio - 1) > config.clip).astype(ratio.dtype))
        return loss, {"loss/policy": policy, "loss/value": value, "clip_fraction": clipped}
