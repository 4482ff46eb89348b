r"""Losses of policies and critics that learn from replayed transitions, to be minimised.

With an action a drawn from pi, c = 1 / t and the entropy's weight lam:

    sac_actor_loss      lam log pi - Q                         Eq. 7 of soft actor-critic
    mdpo_actor_loss     c log pi + (lam - c) log pi_k - Q      the same at c = lam
    mdpo_forward_loss   -log pi of actions that are weighted by pi_k^(1 - lam t) exp(t Q)
    sac_critic_loss     (Q - y)^2 / 2,  y = r + gamma (1 - terminated) (Q' - lam log pi')
    temperature_loss    lam (-log pi - H)

Where actions are discrete, one of A, give [..., A] to the losses of the actor, a number for every
action, and take `policy_mean` of what they return: the expectation over pi is exact then, and needs
no draw. For the critic, take it of the next critics and of log pi'.

Everything is [...]: one value per transition, float32 at least; the caller takes the mean. Rewards
and what follows a transition are constants for gradients. A log-probability of -inf, of an action
that cannot be, adds nothing where its weight is 0.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_choice, check_number
from trustjax._dtypes import widened
from trustjax.losses._ratio import exp_times, times
from trustjax.losses._shapes import alike, check_shape


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
    if jnp.shape(old_log_prob) != jnp.shape(log_prob):
        raise FieldError(
            "old_log_prob",
            f"have the shape of log_prob, {jnp.shape(log_prob)}",
            jnp.shape(old_log_prob),
        )
    logs = [tsallis_log(each, order=order) for each in (log_prob, old_log_prob)]
    if event_axis is not None:
        logs = [jnp.sum(each, event_axis) for each in logs]
    new, old = logs
    check_shape("q_value", q_value, new)
    weight = 1 / jnp.asarray(step_size, new.dtype)
    entropy_weight = jnp.asarray(temperature, new.dtype)
    return weight * new + times(order * (entropy_weight - weight), old) - widened(q_value)


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
    check_shape("q_value", q_value, log_prob)
    log_prob = widened(log_prob)
    weight = jax.lax.stop_gradient(jnp.asarray(temperature, log_prob.dtype))
    return times(weight, log_prob) - widened(q_value)


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
    rewards, next_q_value, next_log_prob = alike(
        q_value, rewards=rewards, next_q_value=next_q_value, next_log_prob=next_log_prob
    )
    check_shape("terminated", terminated, q_value)
    q_value = widened(q_value)
    weight = jax.lax.stop_gradient(jnp.asarray(temperature, q_value.dtype))
    after = jnp.asarray(discount, q_value.dtype) * (next_q_value - times(weight, next_log_prob))
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
    log_temperature = widened(log_temperature)
    excess = -log_prob - jnp.asarray(target_entropy, log_prob.dtype)
    return log_temperature * excess if form == "log" else exp_times(log_temperature, excess)


def mdpo_forward_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    q_value: jax.Array,
    *,
    step_size: jax.typing.ArrayLike,
    temperature: jax.typing.ArrayLike,
    drawn: bool,
) -> jax.Array:
    r"""Off-policy MDPO with the other direction of the projection.

    .. math:: -\sum_i w_i \log \pi(a_i | s), \qquad
              w \propto \pi_k^{1 - \lambda t} e^{t Q}, \qquad \sum_i w_i = 1

    `mdpo_actor_loss` minimises KL(pi || pi') to that optimum pi' of the step, this one
    KL(pi' || pi). Without limits on pi both end at pi'.

    Args:
      log_prob: [..., N] float, log pi of N actions.
      old_log_prob: same shape, log pi_k; a constant.
      q_value: same shape, Q; a constant.
      step_size: t, > 0.
      temperature: lambda >= 0.
      drawn: whether the actions are draws from pi_k, for which the weights are
        pi_k^(-lambda t) exp(t Q), normalised over the draws; else they are all there are.

    Returns:
      [...] float32 at least.

    Raises:
      ValueError: the shapes differ, or a number is out of range.

    Source: Mei et al., On Principled Entropy Exploration in Policy Optimization, IJCAI 2019, which
    arXiv:2005.09814 names as its own with the other direction.
    """
    check_number("step_size", step_size, above=0.0)
    check_number("temperature", temperature, at_least=0.0)
    old_log_prob, q_value = jax.lax.stop_gradient(
        alike(log_prob, old_log_prob=old_log_prob, q_value=q_value)
    )
    log_prob = widened(log_prob)
    step = jnp.asarray(step_size, log_prob.dtype)
    power = (0.0 if drawn else 1.0) - jnp.asarray(temperature, log_prob.dtype) * step
    possible = old_log_prob != -jnp.inf
    safe = jnp.where(possible, old_log_prob, jnp.zeros_like(old_log_prob))
    weights = jax.nn.softmax(power * safe + step * q_value, where=possible)
    # What pi_k cannot do weighs nothing, though log pi may be -inf there.
    return -jnp.sum(times(weights, log_prob), -1)


def tsallis_log(log_x: jax.Array, *, order: float) -> jax.Array:
    r"""The q-logarithm with the paper's q' = `order`, from a logarithm.

    .. math:: \log_q x = \frac{x^{1 - q} - 1}{1 - q}, \qquad q = 2 - q'

    Args:
      log_x: [...] float, log x; no clamp is needed, as the power is taken of the logarithm.
      order: q' in [1, 2], a Python number; 1 is the logarithm itself.

    Returns:
      [...] float32 at least.

    Raises:
      ValueError: `order` is out of range, or traced.

    Source: arXiv:2005.09814, Section 5.2; the convention of q' is that of its last version.
    """
    untyped: Any = order
    if isinstance(untyped, jax.core.Tracer):
        raise FieldError("order", "be known before compilation", "a traced number")
    check_number("order", order, at_least=1.0, at_most=2.0)
    log_x = widened(log_x)
    return log_x if order == 1 else jnp.expm1((order - 1) * log_x) / (order - 1)


def policy_mean(log_probs: jax.Array, values: jax.Array) -> jax.Array:
    r"""The expectation over A discrete actions.

    .. math:: \sum_a \pi(a | s) \, x_a

    Args:
      log_probs: [..., A] float, log pi; -inf adds 0, whatever the value there is.
      values: same shape, x.

    Returns:
      [...] float32 at least.

    Raises:
      ValueError: the shapes differ.
    """
    (values,) = alike(log_probs, values=values)
    log_probs = widened(log_probs)
    possible = log_probs != -jnp.inf
    log_probs, values = (jnp.where(possible, x, jnp.zeros_like(x)) for x in (log_probs, values))
    return jnp.sum(jnp.where(possible, jnp.exp(log_probs) * values, jnp.zeros_like(values)), -1)
