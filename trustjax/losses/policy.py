r"""Losses of policies inside a trust region, to be minimised; `trpo_surrogate` alone is maximised.

With the ratio r = pi(a | s) / pi_k(a | s), the advantage A of pi_k, and a step size t:

    trpo_surrogate   r A                      subject to  mean KL(pi_k || pi) <= delta
    ppo_clip_loss    -min(r A, clip(r, 1 - eps, 1 + eps) A)
    ppo_kl_loss      -r A + beta KL(pi_k || pi)
    mdpo_loss        -r A + KL(pi || pi_k) / t                 the new policy comes first
    mdpo_actor_loss  (log pi - log pi_k) / t + lam log pi_k - Q       of actions drawn from pi
    sac_actor_loss   lam log pi - Q                                   the same with t = 1 / lam

Everything is [...]: one value per transition, float32 at least; the caller takes the mean. Numbers
of the old policy, advantages, rewards and next values are constants for gradients.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from trustjax._checks import check_choice, check_number
from trustjax.geometry.norm import widened


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
    ratio, advantage = _ratio(log_prob, old_log_prob, advantage)
    return ratio * advantage


def ppo_clip_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 0.2,
) -> jax.Array:
    r"""PPO's clipped surrogate.

    .. math:: -\min\left(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A\right)

    The gradient is 0 where A > 0 and r > 1 + eps, and where A < 0 and r < 1 - eps; nowhere else.

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
    ratio, advantage = _ratio(log_prob, old_log_prob, advantage)
    width = jnp.asarray(clip, ratio.dtype)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - width, 1 + width) * advantage)


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
    ratio, advantage = _ratio(log_prob, old_log_prob, advantage)
    kl = _alike(log_prob, kl=kl)[0]
    return -ratio * advantage + jnp.asarray(coefficient, ratio.dtype) * kl


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
    ratio, advantage = _ratio(log_prob, old_log_prob, advantage)
    kl = _alike(log_prob, kl=kl)[0]
    return -ratio * advantage + kl / jnp.asarray(step_size, ratio.dtype)


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
        _alike(values, old_values=old_values, returns=returns)
    )
    values = widened(values)
    error = jnp.square(values - returns)
    if clip is None:
        return error
    check_number("clip", clip, at_least=0.0)
    width = jnp.asarray(clip, values.dtype)
    near = old_values + jnp.clip(values - old_values, -width, width)
    return jnp.maximum(error, jnp.square(near - returns))


def mdpo_actor_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    q_value: jax.Array,
    *,
    step_size: jax.typing.ArrayLike,
    temperature: jax.typing.ArrayLike,
    order: float = 1.0,
    event_axis: int | None = None,
) -> jax.Array:
    r"""Off-policy mirror descent policy optimisation, for an action drawn from pi.

    .. math:: c \log_q \pi + q' (\lambda - c) \log_q \pi_k - Q, \qquad c = 1 / t, \quad q = 2 - q'

    with log_q x = (x^(1-q) - 1) / (1 - q), which is log x at q' = 1: the KL. The action is
    reparameterised: gradients flow through it into all three terms, while the parameters of pi_k
    and Q are the caller's constants. At c = lambda and q' = 1 it is `sac_actor_loss`.

    Args:
      log_prob: [...] float, log pi(a | s), a drawn from pi.
      old_log_prob: same shape, log pi_k of the same action.
      q_value: [...] float, Q(s, a).
      step_size: t, > 0; at most 1 / lambda, or the policy is repelled from the old one.
      temperature: lambda >= 0, weight of the entropy.
      order: q' in [1, 2], a Python number.
      event_axis: axis of `log_prob` over which the q-logarithms of the action's dimensions are
        summed, as in the authors' code; None if `log_prob` is that of the whole action. At q' = 1
        they agree.

    Returns:
      [...] float32 at least: up to a constant, its mean estimates a Bregman divergence less Q.

    Raises:
      ValueError: the shapes differ, or a number is out of range.

    Source: arXiv:2005.09814, Eq. 4 and Section 5, with the sign and the weights of
    manantomar/Mirror-Descent-Policy-Optimization, divided by t.
    """
    check_number("step_size", step_size, above=0.0)
    check_number("temperature", temperature, at_least=0.0)
    check_number("order", order, at_least=1.0, at_most=2.0)
    untyped: Any = order
    if isinstance(untyped, jax.core.Tracer):
        raise ValueError("order must be known before compilation, got a traced number")
    if jnp.shape(old_log_prob) != jnp.shape(log_prob):
        raise ValueError(
            f"old_log_prob must have the shape of log_prob, {jnp.shape(log_prob)}; "
            f"got {jnp.shape(old_log_prob)}"
        )
    logs = [_q_log(widened(each), order) for each in (log_prob, old_log_prob)]
    if event_axis is not None:
        logs = [jnp.sum(each, event_axis) for each in logs]
    new, old = logs
    _check_shape("q_value", q_value, new)
    weight = 1 / jnp.asarray(step_size, new.dtype)
    entropy_weight = jnp.asarray(temperature, new.dtype)
    return weight * new + order * (entropy_weight - weight) * old - widened(q_value)


def sac_actor_loss(
    log_prob: jax.Array, q_value: jax.Array, *, temperature: jax.typing.ArrayLike
) -> jax.Array:
    r"""Soft actor-critic's policy loss, for an action drawn from pi.

    .. math:: \lambda \log \pi(a | s) - Q(s, a)

    Gradients flow through the reparameterised action into both terms.

    Args:
      log_prob: [...] float, log pi(a | s), a drawn from pi.
      q_value: same shape, Q(s, a): the smaller one of two critics.
      temperature: lambda >= 0; a constant for gradients.

    Returns:
      [...] float32 at least.

    Raises:
      ValueError: the shapes differ, or `temperature` < 0.

    Source: Haarnoja et al., arXiv:1812.05905, Eq. 7.
    """
    check_number("temperature", temperature, at_least=0.0)
    _check_shape("q_value", q_value, log_prob)
    log_prob = widened(log_prob)
    weight = jax.lax.stop_gradient(jnp.asarray(temperature, log_prob.dtype))
    return weight * log_prob - widened(q_value)


def sac_critic_loss(
    q_value: jax.Array,
    rewards: jax.Array,
    next_q_value: jax.Array,
    next_log_prob: jax.Array,
    terminated: jax.Array,
    *,
    discount: jax.typing.ArrayLike,
    temperature: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Soft Bellman error of one critic.

    .. math:: \tfrac12 (Q(s, a) - y)^2, \qquad
              y = r + \gamma (1 - \mathrm{terminated}) (Q'(s', a') - \lambda \log \pi(a' | s'))

    Truncation is no end: s' is the observation before the reset, and y goes on from there.

    Args:
      q_value: [...] float, Q(s, a) of the critic that is trained.
      rewards: same shape.
      next_q_value: same shape, the smallest of the target critics at a' drawn from pi(. | s').
      next_log_prob: same shape, log pi(a' | s').
      terminated: same shape, bool.
      discount: gamma in [0, 1].
      temperature: lambda >= 0.

    Returns:
      [...] float32 at least; y is a constant for gradients.

    Raises:
      ValueError: the shapes differ ([batch] against [batch, 1] would broadcast to a matrix), or a
        number is out of range.

    Source: arXiv:1812.05905, Eq. 5 and 6.
    """
    check_number("discount", discount, at_least=0.0, at_most=1.0)
    check_number("temperature", temperature, at_least=0.0)
    rewards, next_q_value, next_log_prob = _alike(
        q_value, rewards=rewards, next_q_value=next_q_value, next_log_prob=next_log_prob
    )
    _check_shape("terminated", terminated, q_value)
    q_value = widened(q_value)
    weight = jax.lax.stop_gradient(jnp.asarray(temperature, q_value.dtype))
    after = jnp.asarray(discount, q_value.dtype) * (next_q_value - weight * next_log_prob)
    ended = jnp.asarray(terminated).astype(bool)
    target = rewards + jnp.where(ended, jnp.zeros_like(after), after)
    return 0.5 * jnp.square(q_value - jax.lax.stop_gradient(target))


def temperature_loss(
    log_temperature: jax.Array,
    log_prob: jax.Array,
    *,
    target_entropy: jax.typing.ArrayLike,
    form: Literal["log", "exponential"] = "exponential",
) -> jax.Array:
    r"""Moves the temperature until the policy has the entropy that is wanted.

    .. math:: \text{exponential: } \lambda (-\log \pi - \bar H), \qquad
              \text{log: } \log\lambda \, (-\log \pi - \bar H), \qquad \lambda = e^{\log\lambda}

    Args:
      log_temperature: [] float, log lambda, which is trained.
      log_prob: [...] float, log pi(a | s), a drawn from pi; a constant.
      target_entropy: H, usually less the number of action dimensions.
      form: "exponential" is the paper's; "log" that of stable-baselines, whose gradient is not
        multiplied by lambda.

    Returns:
      [...] float32 at least.

    Raises:
      ValueError: an unknown `form`.

    Source: arXiv:1812.05905, Eq. 18.
    """
    check_choice("form", form, ("log", "exponential"))
    log_prob = widened(jax.lax.stop_gradient(log_prob))
    weight = widened(log_temperature)
    weight = weight if form == "log" else jnp.exp(weight)
    return weight * (-log_prob - jnp.asarray(target_entropy, log_prob.dtype))


def _q_log(log_x: jax.Array, order: float) -> jax.Array:
    """log_q of x, q = 2 - order, from log x: (x^(order - 1) - 1) / (order - 1)."""
    if order == 1:
        return log_x
    return jnp.expm1((order - 1) * log_x) / (order - 1)


def _ratio(
    log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array
) -> tuple[jax.Array, jax.Array]:
    old_log_prob, advantage = _alike(log_prob, old_log_prob=old_log_prob, advantage=advantage)
    old_log_prob, advantage = jax.lax.stop_gradient((old_log_prob, advantage))
    return jnp.exp(widened(log_prob) - old_log_prob), advantage


def _alike(first: jax.Array, **others: jax.Array) -> tuple[jax.Array, ...]:
    """`others` in float32 at least; their shapes must be that of `first`."""
    for name, other in others.items():
        _check_shape(name, other, first)
    return tuple(widened(jnp.asarray(other)) for other in others.values())


def _check_shape(name: str, given: jax.Array, first: jax.Array) -> None:
    if jnp.shape(given) != jnp.shape(first):
        raise ValueError(
            f"{name} must have the shape of the first argument, {jnp.shape(first)}; "
            f"got {jnp.shape(given)}"
        )
