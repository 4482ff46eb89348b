r"""Losses of policies inside a trust region, to be minimised; `trpo_surrogate` alone is maximised.

Here those of a rollout of the old policy; those of replayed transitions are in `off_policy`.

With the ratio r = pi(a | s) / pi_k(a | s), the advantage A of pi_k, and a step size t:

    trpo_surrogate   r A                      subject to  mean KL(pi_k || pi) <= delta
    ppo_clip_loss    -min(r A, clip(r, 1 - eps, 1 + eps) A)
    ppo_kl_loss      -r A + beta KL(pi_k || pi)
    mdpo_loss        -r A + KL(pi || pi_k) / t                 the new policy comes first

Everything is [...]: one value per transition, float32 at least; the caller takes the mean. Numbers
of the old policy and advantages are constants for gradients.

No finite argument gives NaN, in value or gradient. Ratios beyond half the largest number of the
dtype, e^88 in float32, are clipped and keep the slope that they have there, so that a policy that
went too far is driven back; transitions with A = 0 or a mask of 0 have neither value nor slope. An
action that neither policy can take, both of whose log-probabilities are -inf, has r = 1 and no
gradient.
"""

import jax
import jax.numpy as jnp

from trustjax._checks import check_number
from trustjax._dtypes import widened
from trustjax.losses._ratio import exp_times, log_ratio
from trustjax.losses._shapes import alike
from trustjax.losses.off_policy import mdpo_actor_loss as mdpo_actor_loss
from trustjax.losses.off_policy import sac_actor_loss as sac_actor_loss
from trustjax.losses.off_policy import sac_critic_loss as sac_critic_loss
from trustjax.losses.off_policy import temperature_loss as temperature_loss


def trpo_surrogate(log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
    r"""What the old policy's transitions say of the new policy's return; to be maximised.

    .. math:: r A, \qquad r = \exp(\log\pi - \log\pi_k)

    Args:
      log_prob: [...] float, log pi(a | s) of the policy that is trained.
      old_log_prob: same shape, of the policy that acted; a constant.
      advantage: same shape, A; a constant.

    Returns:
      [...] float32 at least.

    Raises:
      ValueError: the shapes differ.

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
    r"""PPO's clipped surrogate.

    .. math:: -\min\left(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A\right)

    The gradient is 0 where A > 0 and r > 1 + eps, and where A < 0 and r < 1 - eps, however far r
    is; and where A = 0.

    Args:
      log_prob, old_log_prob, advantage: as in `trpo_surrogate`.
      clip: eps, >= 0; a number, which may be traced.

    Returns:
      [...] float32 at least.

    Raises:
      ValueError: the shapes differ, or `clip` < 0.

    Source: Schulman et al., arXiv:1707.06347, Eq. 7, which is maximised.
    """
    check_number("clip", clip, at_least=0.0)
    log_r, advantage = _weighed(log_prob, old_log_prob, advantage)
    width = jnp.asarray(clip, log_r.dtype)
    # Cut before exp, whose slope is infinite where it overflows: infinity times 0 is NaN.
    highest = jnp.log1p(width)
    lowest = jnp.log(jnp.maximum(1 - width, jnp.zeros_like(width)))
    log_r = jnp.where((advantage > 0) & (log_r > highest), highest, log_r)
    log_r = jnp.where((advantage < 0) & (log_r < lowest), lowest, log_r)
    return -exp_times(log_r, advantage)


def ppo_kl_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    kl: jax.Array,
    *,
    coefficient: jax.typing.ArrayLike,
) -> jax.Array:
    r"""PPO's surrogate with a penalty.

    .. math:: -r A + \beta \, KL(\pi_k \| \pi)

    Args:
      log_prob, old_log_prob, advantage: as in `trpo_surrogate`.
      kl: same shape, KL of the old policy from the new: `old.kl_divergence(new)`.
      coefficient: beta, >= 0; see `adapt_kl_coefficient`.

    Returns:
      [...] float32 at least.

    Raises:
      ValueError: the shapes differ, or `coefficient` < 0.

    Source: arXiv:1707.06347, Eq. 8, which is maximised.
    """
    check_number("coefficient", coefficient, at_least=0.0)
    log_r, advantage = _weighed(log_prob, old_log_prob, advantage)
    kl = alike(log_prob, kl=kl)[0]
    return -exp_times(log_r, advantage) + jnp.asarray(coefficient, log_r.dtype) * kl


def adapt_kl_coefficient(
    coefficient: jax.Array, kl: jax.Array, target: jax.typing.ArrayLike
) -> jax.Array:
    r"""The coefficient of `ppo_kl_loss` for the next iteration.

    .. math:: \beta / 2 \text{ if } d < d_{targ} / 1.5, \quad
              2 \beta \text{ if } d > 1.5 \, d_{targ}, \quad \text{else } \beta

    Args:
      coefficient: beta, [] float.
      kl: d, [] float, the mean KL that the update made.
      target: d_targ, > 0.

    Returns:
      [] in the dtype of `coefficient`.

    Raises:
      ValueError: `target` is not > 0.

    Source: arXiv:1707.06347, Section 4.
    """
    check_number("target", target, above=0.0)
    target = jnp.asarray(target, kl.dtype)
    adapted = jnp.where(kl > 1.5 * target, 2 * coefficient, coefficient)
    return jnp.where(kl < target / 1.5, coefficient / 2, adapted)


def mdpo_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    kl: jax.Array,
    *,
    step_size: jax.typing.ArrayLike,
) -> jax.Array:
    r"""On-policy mirror descent policy optimisation.

    .. math:: -r A + \frac{1}{t} KL(\pi \| \pi_k)

    Minimised by several gradient steps on the same transitions. At the old policy the KL has no
    slope: one step is one of the vanilla policy gradient. Without limits on pi the minimum is
    pi_k exp(t A), normalised.

    Args:
      log_prob, old_log_prob, advantage: as in `trpo_surrogate`.
      kl: same shape, KL of the new policy from the old: `new.kl_divergence(old)`.
      step_size: t, > 0; falls from 1 to 0 over training in the paper.

    Returns:
      [...] float32 at least.

    Raises:
      ValueError: the shapes differ, or `step_size` is not > 0.

    Source: Tomar et al., arXiv:2005.09814, Eq. 5, which is maximised.
    """
    check_number("step_size", step_size, above=0.0)
    log_r, advantage = _weighed(log_prob, old_log_prob, advantage)
    kl = alike(log_prob, kl=kl)[0]
    return -exp_times(log_r, advantage) + kl / jnp.asarray(step_size, log_r.dtype)


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    *,
    clip: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Squared error of the values, the larger one of two if clipped.

    .. math:: \max\left((V - R)^2, (V_k + \mathrm{clip}(V - V_k, -\epsilon, \epsilon) - R)^2\right)

    Args:
      values: [...] float, V, of the network that is trained.
      old_values: same shape, V_k, when the rollout was made; a constant.
      returns: same shape, R; a constant.
      clip: eps, >= 0; None for the squared error alone.

    Returns:
      [...] float32 at least, without the factor 1/2 that some codes have.

    Raises:
      ValueError: the shapes differ, or `clip` < 0.

    Source: in the code of PPO, not in its paper.
    """
    old_values, returns = jax.lax.stop_gradient(
        alike(values, old_values=old_values, returns=returns)
    )
    values = widened(values)
    error = jnp.square(values - returns)
    if clip is None:
        return error
    check_number("clip", clip, at_least=0.0)
    width = jnp.asarray(clip, values.dtype)
    near = old_values + jnp.clip(values - old_values, -width, width)
    return jnp.maximum(error, jnp.square(near - returns))


def _weighed(
    log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log r, and A, which is a constant as log pi_k is."""
    old_log_prob, advantage = alike(log_prob, old_log_prob=old_log_prob, advantage=advantage)
    old_log_prob, advantage = jax.lax.stop_gradient((old_log_prob, advantage))
    return log_ratio(log_prob, old_log_prob), advantage
