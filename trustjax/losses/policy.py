r"""Losses of policies inside a trust region, to be minimised; only `trpo_surrogate` is maximised.

These losses take transitions of the old policy; the ones for replayed transitions are in
`off_policy`. With the ratio r = pi(a | s) / pi_k(a | s), the advantage A of pi_k and the step size
t:

    trpo_surrogate   r A                      subject to  mean KL(pi_k || pi) <= delta
    ppo_clip_loss    -min(r A, clip(r, 1 - eps, 1 + eps) A)
    ppo_kl_loss      -r A + beta KL(pi_k || pi)
    mdpo_loss        -r A + KL(pi || pi_k) / t                 the new policy comes first

All arrays are [...] with one value per transition, in float32 at least; the caller takes the mean.
Log-probabilities of the old policy and advantages are constants for gradients.

No finite argument gives NaN, in value or gradient. Ratios above half the largest number of the
dtype (e^88 in float32) are clipped and keep the gradient that they have at that bound, so that a
policy that went too far is driven back. Transitions with A = 0 or a mask of 0 have neither value
nor gradient. An action that is impossible under both policies, with both log-probabilities -inf,
has r = 1 and no gradient.
"""

import jax
import jax.numpy as jnp

from trustjax._checks import check_number, check_scalar
from trustjax._dtypes import widened
from trustjax.losses._ratio import clip_log_ratio, exp_times, log_ratio
from trustjax.losses._shapes import same_shape
from trustjax.losses.off_policy import mdpo_actor_loss as mdpo_actor_loss
from trustjax.losses.off_policy import sac_actor_loss as sac_actor_loss
from trustjax.losses.off_policy import sac_critic_loss as sac_critic_loss
from trustjax.losses.off_policy import temperature_loss as temperature_loss


def trpo_surrogate(log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
    r"""The importance-weighted advantage, TRPO's estimate of the improvement; to be maximised.

    .. math:: r A, \qquad r = \exp(\log\pi - \log\pi_k)

    Args:
      log_prob: log pi(a | s) of the policy that is trained, float [...].
      old_log_prob: log pi_k(a | s) of the policy that acted, same shape; a constant for gradients.
      advantage: Advantages A, same shape; a constant for gradients.

    Returns:
      Surrogate [...] in float32 at least.

    Raises:
      ValueError: The shapes differ.

    Source: Schulman et al., arXiv:1502.05477, Eq. 14.
    """
    return exp_times(*_weighed(log_prob, old_log_prob, advantage))


def ppo_clip_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 0.2,
) -> jax.Array:
    r"""The clipped surrogate of PPO.

    .. math:: -\min\left(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A\right)

    The gradient is 0 where A > 0 and r > 1 + eps, where A < 0 and r < 1 - eps, and where A = 0.

    Args:
      log_prob, old_log_prob, advantage: As in `trpo_surrogate`.
      clip: Half-width eps of the interval around 1, >= 0; it may be traced.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: The shapes differ, or `clip` < 0.

    Source: Schulman et al., arXiv:1707.06347, Eq. 7, which is maximised.
    """
    check_scalar("clip", clip, at_least=0.0)
    log_r, advantage = _weighed(log_prob, old_log_prob, advantage)
    # Eq. 7 clips r only where that lowers the objective: above if A > 0, below if A < 0.
    log_r = clip_log_ratio(log_r, advantage, clip, None)
    return -exp_times(log_r, advantage)


def ppo_kl_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    kl: jax.Array,
    *,
    coefficient: jax.typing.ArrayLike,
) -> jax.Array:
    r"""The surrogate of PPO with a KL penalty.

    .. math:: -r A + \beta \, KL(\pi_k \| \pi)

    Args:
      log_prob, old_log_prob, advantage: As in `trpo_surrogate`.
      kl: KL(pi_k || pi) in nats, `old.kl_divergence(new)`, same shape.
      coefficient: Weight beta of the KL, >= 0; see `adapt_kl_coefficient`.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: The shapes differ, or `coefficient` < 0.

    Source: arXiv:1707.06347, Eq. 8, which is maximised.
    """
    check_number("coefficient", coefficient, at_least=0.0)
    log_r, advantage = _weighed(log_prob, old_log_prob, advantage)
    kl = same_shape(log_prob, kl=kl)[0]
    # Eq. 8 with its sign turned; the old policy comes first in the KL.
    return -exp_times(log_r, advantage) + jnp.asarray(coefficient, log_r.dtype) * kl


def adapt_kl_coefficient(
    coefficient: jax.Array, kl: jax.Array, target: jax.typing.ArrayLike
) -> jax.Array:
    r"""The coefficient of `ppo_kl_loss` for the next iteration.

    .. math:: \beta / 2 \text{ if } d < d_{targ} / 1.5, \quad
              2 \beta \text{ if } d > 1.5 \, d_{targ}, \quad \text{else } \beta

    The result is kept within [1e-6, 1e6]: at 0 or infinity, which float32 reaches after some 150
    iterations to one side, doubling and halving would never come back.

    Args:
      coefficient: Current weight beta, float [].
      kl: Mean KL d between the policies before and after the update, in nats, float [].
      target: Target d_targ of the mean KL, in nats, > 0.

    Returns:
      The next weight, [] in the dtype of `coefficient`.

    Raises:
      ValueError: `target` is not > 0.

    Source: arXiv:1707.06347, Section 4.
    """
    check_number("target", target, above=0.0)
    target = jnp.asarray(target, kl.dtype)
    adapted = jnp.where(kl > 1.5 * target, 2 * coefficient, coefficient)
    return jnp.clip(jnp.where(kl < target / 1.5, coefficient / 2, adapted), 1e-6, 1e6)


def adapt_learning_rate(
    learning_rate: jax.Array,
    kl: jax.Array,
    target: jax.typing.ArrayLike,
    *,
    lowest: jax.typing.ArrayLike = 1e-5,
    highest: jax.typing.ArrayLike = 1e-2,
) -> jax.Array:
    r"""The learning rate that follows the KL from the policy of the rollout.

    .. math:: \max(\eta / 1.5, \eta_{min}) \text{ if } d > 2 \, d_{targ}, \quad
              \min(1.5 \, \eta, \eta_{max}) \text{ if } 0 < d < d_{targ} / 2, \quad
              \text{else } \eta

    Args:
      learning_rate: Current learning rate eta, float [].
      kl: Mean KL(pi_k || pi) d of the policy from the one of the rollout, in nats, float []. A KL
        of 0, that of the first minibatch, changes nothing.
      target: Target d_targ of the mean KL, in nats, > 0.
      lowest: Bound below which the rate does not fall, > 0.
      highest: Bound above which the rate does not rise, > 0.

    Returns:
      The next learning rate, [] in the dtype of `learning_rate`.

    Raises:
      ValueError: `target`, `lowest` or `highest` is not > 0.

    Source: the schedule "adaptive" of RSL-RL, arXiv:2509.10771, and `ADAPTIVE_KL` of brax.
    """
    for name, number in (("target", target), ("lowest", lowest), ("highest", highest)):
        check_number(name, number, above=0.0)
    target = jnp.asarray(target, kl.dtype)
    lowest, highest = (jnp.asarray(bound, learning_rate.dtype) for bound in (lowest, highest))
    slower = jnp.maximum(learning_rate / 1.5, lowest)
    faster = jnp.minimum(learning_rate * 1.5, highest)
    adapted = jnp.where(kl > 2 * target, slower, learning_rate)
    return jnp.where((kl > 0) & (kl < target / 2), faster, adapted)


def mdpo_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    kl: jax.Array,
    *,
    step_size: jax.typing.ArrayLike,
) -> jax.Array:
    r"""The policy loss of on-policy mirror descent policy optimisation.

    .. math:: -r A + \frac{1}{t} KL(\pi \| \pi_k)

    It is minimised by several gradient steps on the same transitions. At the old policy the
    gradient of the KL is 0, so that a single step is a step of the vanilla policy gradient. Without
    limits on pi the minimum is pi_k exp(t A), normalised.

    Args:
      log_prob, old_log_prob, advantage: As in `trpo_surrogate`.
      kl: KL(pi || pi_k) in nats, `new.kl_divergence(old)`, same shape.
      step_size: Step size t, > 0; the paper lets it fall from 1 to 0 over training.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: The shapes differ, or `step_size` is not > 0.

    Source: Tomar et al., arXiv:2005.09814, Eq. 5, which is maximised.
    """
    check_scalar("step_size", step_size, above=0.0)
    log_r, advantage = _weighed(log_prob, old_log_prob, advantage)
    kl = same_shape(log_prob, kl=kl)[0]
    # Eq. 5 with its sign turned; the new policy comes first in the KL.
    return -exp_times(log_r, advantage) + kl / jnp.asarray(step_size, log_r.dtype)


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    *,
    clip: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""The squared error of the values, or the larger of the plain and the clipped one.

    .. math:: \max\left((V - R)^2, (V_k + \mathrm{clip}(V - V_k, -\epsilon, \epsilon) - R)^2\right)

    Args:
      values: V of the network that is trained, float [...].
      old_values: V_k at the time of the rollout, same shape; a constant for gradients.
      returns: Targets R, same shape; a constant for gradients.
      clip: Largest change eps of the clipped values, in units of the values, >= 0; None for the
        plain squared error.

    Returns:
      Losses [...] in float32 at least, without the factor 1/2 that some codes have.

    Raises:
      ValueError: The shapes differ, or `clip` < 0.

    Source: the authors' code of PPO; it is not in their paper.
    """
    old_values, returns = jax.lax.stop_gradient(
        same_shape(values, old_values=old_values, returns=returns)
    )
    values = widened(values)
    error = jnp.square(values - returns)
    if clip is None:
        return error
    check_scalar("clip", clip, at_least=0.0)
    width = jnp.asarray(clip, values.dtype)
    near = old_values + jnp.clip(values - old_values, -width, width)
    return jnp.maximum(error, jnp.square(near - returns))


def _weighed(
    log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log r and A in float32 at least, with A and log pi_k as constants for gradients."""
    old_log_prob, advantage = same_shape(log_prob, old_log_prob=old_log_prob, advantage=advantage)
    old_log_prob, advantage = jax.lax.stop_gradient((old_log_prob, advantage))
    return log_ratio(log_prob, old_log_prob), advantage
