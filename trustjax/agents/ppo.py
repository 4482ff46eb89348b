r"""Proximal policy optimisation: epochs on a surrogate that keeps the new policy near the old one.

Schulman, Wolski, Dhariwal, Radford, Klimov, arXiv:1707.06347, with three surrogates:

    clip          -min(r A, clip(r, 1 - eps, 1 + eps) A)                  Eq. 7
    kl            -r A + beta KL(pi_k || pi)                              Eq. 8, beta fixed
    adaptive_kl   the same, with beta halved or doubled towards a target  Section 4

The loss of a minibatch is the surrogate + c_1 / 2 (V - R)^2 - c_2 entropy (Eq. 9, minimised).
Details that the paper leaves to its code are fields of `Config`.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._checks import check_choice, check_number
from trustjax._sharding import AxisName, averaged
from trustjax.agents.algorithm import Metrics, PyTree, static
from trustjax.agents.batch import Batch
from trustjax.agents.config import OnPolicyConfig
from trustjax.agents.on_policy import OnPolicy, State
from trustjax.agents.running_statistics import standardized
from trustjax.losses import adapt_kl_coefficient, ppo_clip_loss, ppo_kl_loss, value_loss
from trustjax.losses._ratio import log_ratio
from trustjax.trust import trust_metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """The fields that PPO adds to `OnPolicyConfig`.

    Attributes:
      surrogate: Surrogate of the policy's loss, "clip", "kl" or "adaptive_kl"; static.
      clip: Half-width eps of the interval around 1 that "clip" clips the ratio to, >= 0.
      kl_coefficient: Weight beta of the KL in "kl", and its first value in "adaptive_kl", >= 0.
      kl_target: Mean KL per iteration that "adaptive_kl" aims at (the paper's d_targ), in nats,
        > 0.
      value_coefficient: Weight c_1 of the value loss, >= 0.
      entropy_coefficient: Weight c_2 of the entropy bonus, >= 0.
    """

    normalize_advantages: Literal["batch", "minibatch", "none"] = static("minibatch")
    surrogate: Literal["clip", "kl", "adaptive_kl"] = static("clip")
    clip: ArrayLike = 0.2
    kl_coefficient: ArrayLike = 1.0
    kl_target: ArrayLike = 0.01
    value_coefficient: ArrayLike = 0.5
    entropy_coefficient: ArrayLike = 0.0

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        check_choice("surrogate", self.surrogate, ("clip", "kl", "adaptive_kl"))
        for name in ("clip", "kl_coefficient", "value_coefficient", "entropy_coefficient"):
            check_number(name, getattr(self, name), at_least=0.0)
        check_number("kl_target", self.kl_target, above=0.0)

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


class PPO(OnPolicy):
    """Proximal policy optimisation; see `OnPolicy` for how it is used.

    An iteration takes `num_epochs` times `num_minibatches` steps of one optimizer, which trains
    policy and value together, on

        surrogate + c_1 / 2 (V - R)^2 - c_2 entropy

    PPO adds the metrics `loss/policy`, `loss/value`, `clip_fraction` and `kl_coefficient`.

    Source: arXiv:1707.06347, Eq. 7 to 9 and Section 4.
    """

    config: Config

    def _optimizer(self) -> optax.GradientTransformation:
        config = self.config
        steps = config.num_epochs * config.num_minibatches
        return self.make_optimizer(config.optimizer, config.learning_rate, steps)

    def init_learner(self, params: dict[str, PyTree]) -> Learner:
        """The first optimizer state and the first coefficient of the KL."""
        dtype = jnp.zeros([]).dtype
        return Learner(
            self._optimizer().init(params), jnp.asarray(self.config.kl_coefficient, dtype)
        )

    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Learner, Metrics]:
        """Takes epochs of minibatch steps on Eq. 9, and adapts the coefficient of the KL."""
        config = self.config
        opt_state, beta = state.learner

        def loss_fn(params: dict[str, PyTree], part: Batch) -> tuple[jax.Array, Metrics]:
            return self._loss(params, part, beta)

        def output_fn(params: dict[str, PyTree], part: Batch) -> jax.Array:
            return jnp.asarray(self.distributions(params["actor"], part)[0])

        step = self.make_train_step(loss_fn, self._optimizer(), output_fn)

        def minibatch(carry: tuple[PyTree, optax.OptState], part: Batch) -> tuple[PyTree, Metrics]:
            params, opt_state, _, aux = step(*carry, part)
            return (params, opt_state), aux

        (params, opt_state), losses = self.epochs(
            batch, key, config.num_epochs, config.num_minibatches, minibatch,
            (state.params, opt_state),
        )  # fmt: skip
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
        return params, Learner(opt_state, beta), metrics | {"kl_coefficient": beta}

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
