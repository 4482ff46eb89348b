r"""Losses of policies and critics that learn from replayed transitions, to be minimised.

With an action a drawn from pi, c = 1 / t and the entropy weight lam:

    sac_actor_loss      lam log pi - Q                         Eq. 7 of soft actor-critic
    mdpo_actor_loss     c log pi + (lam - c) log pi_k - Q      the same at c = lam
    mdpo_forward_loss   -log pi of actions that are weighted by pi_k^(1 - lam t) exp(t Q)
    sac_critic_loss     (Q - y)^2 / 2,  y = r + gamma (1 - terminated) (Q' - lam log pi')
    temperature_loss    lam (-log pi - H)

With A discrete actions, pass arrays [..., A] with one number per action to the losses of the actor,
and take the `policy_mean` of the result: the expectation over pi is then exact and needs no sample.
For the critic, take the `policy_mean` of the next critics and of log pi'.

All arrays are [...] with one value per transition, in float32 at least; the caller takes the mean.
Rewards and next values are constants for gradients. An impossible action, whose log-probability is
-inf, adds nothing where its weight is 0.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_choice, check_number, check_scalar
from trustjax._dtypes import widened
from trustjax.losses._ratio import exp_times, times
from trustjax.losses._shapes import check_shape, same_shape


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
    r"""The policy loss of off-policy mirror descent policy optimisation, for an action from pi.

    .. math:: c \log_q \pi + q' (\lambda - c) \log_q \pi_k - Q, \qquad c = 1 / t, \quad q = 2 - q'

    Here log_q x = (x^(1-q) - 1) / (1 - q), which is log x at q' = 1, where the divergence is the
    KL. The action is reparameterised: gradients flow through it into all three terms, while the
    parameters of pi_k and Q are constants of the caller. At c = lambda and q' = 1 the loss is
    `sac_actor_loss`.

    Args:
      log_prob: log pi(a | s) of an action a drawn from pi, float [...].
      old_log_prob: log pi_k of the same action, same shape.
      q_value: Q(s, a), float [...].
      step_size: Step size t, > 0. It should be at most 1 / lambda, because a larger one repels the
        policy from the old one.
      temperature: Entropy weight lambda, >= 0; a constant for gradients.
      order: Order q' of the divergence, in [1, 2], as a Python number.
      event_axis: Axis of `log_prob` over which the q-logarithms of the dimensions of an action are
        summed, as in the authors' code; None if `log_prob` is the one of the whole action. Both
        agree at q' = 1.

    Returns:
      Losses [...] in float32 at least. Up to a constant, their mean estimates a Bregman divergence
      minus Q.

    Raises:
      ValueError: The shapes differ, or a hyperparameter is out of range.

    Source: arXiv:2005.09814, Eq. 4 and Section 5, with the sign and the weights of
    manantomar/Mirror-Descent-Policy-Optimization, divided by t.
    """
    check_scalar("step_size", step_size, above=0.0)
    check_scalar("temperature", temperature, at_least=0.0)
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
    entropy_weight = jax.lax.stop_gradient(jnp.asarray(temperature, new.dtype))
    # Eq. 4 divided by t. The factor q' of the old policy comes from the gradient of the Bregman
    # divergence at pi_k.
    return weight * new + times(order * (entropy_weight - weight), old) - widened(q_value)


def sac_actor_loss(
    log_prob: jax.Array, q_value: jax.Array, *, temperature: jax.typing.ArrayLike
) -> jax.Array:
    r"""The policy loss of soft actor-critic, for an action drawn from pi.

    .. math:: \lambda \log \pi(a | s) - Q(s, a)

    Gradients flow through the reparameterised action into both terms.

    Args:
      log_prob: log pi(a | s) of an action a drawn from pi, float [...].
      q_value: Q(s, a) of the smaller of two critics, same shape.
      temperature: Entropy weight lambda, >= 0; a constant for gradients.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: The shapes differ, or `temperature` < 0.

    Source: Haarnoja et al., arXiv:1812.05905, Eq. 7.
    """
    check_scalar("temperature", temperature, at_least=0.0)
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
    r"""The soft Bellman error of one critic.

    .. math:: \tfrac12 (Q(s, a) - y)^2, \qquad
              y = r + \gamma (1 - \mathrm{terminated}) (Q'(s', a') - \lambda \log \pi(a' | s'))

    A truncated episode does not end in theory: s' is the observation before the reset, and y
    bootstraps from it.

    Args:
      q_value: Q(s, a) of the critic that is trained, float [...].
      rewards: Rewards r, same shape.
      next_q_value: The smaller target critic at an action a' drawn from pi(. | s'), same shape.
      next_log_prob: log pi(a' | s'), same shape.
      terminated: Whether the episode terminated at the step, bool, same shape.
      discount: Discount factor gamma per step, in [0, 1].
      temperature: Entropy weight lambda, >= 0; a constant for gradients.

    Returns:
      Losses [...] in float32 at least; y is a constant for gradients.

    Raises:
      ValueError: The shapes differ ([batch] and [batch, 1] would broadcast to a matrix), or a
        hyperparameter is out of range.

    Source: arXiv:1812.05905, Eq. 5 and 6.
    """
    check_scalar("discount", discount, at_least=0.0, at_most=1.0)
    check_scalar("temperature", temperature, at_least=0.0)
    rewards, next_q_value, next_log_prob = same_shape(
        q_value, rewards=rewards, next_q_value=next_q_value, next_log_prob=next_log_prob
    )
    check_shape("terminated", terminated, q_value)
    q_value = widened(q_value)
    weight = jax.lax.stop_gradient(jnp.asarray(temperature, q_value.dtype))
    # The soft value of s': Q' minus the weighted log-probability of a'.
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
    r"""The loss of the temperature, which moves the entropy of the policy towards its target.

    .. math:: \text{exponential: } \lambda (-\log \pi - \bar H), \qquad
              \text{log: } \log\lambda \, (-\log \pi - \bar H), \qquad \lambda = e^{\log\lambda}

    Args:
      log_temperature: The trained log lambda, float [].
      log_prob: log pi(a | s) of an action a drawn from pi, float [...]; a constant for gradients.
      target_entropy: Target entropy H in nats, usually minus the number of action dimensions.
      form: "exponential" for the form of the paper, or "log" for the one of stable-baselines, whose
        gradient is not multiplied by lambda.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: `form` is unknown, or a number is an array of several.

    Source: arXiv:1812.05905, Eq. 18.
    """
    check_choice("form", form, ("log", "exponential"))
    check_scalar("log_temperature", log_temperature)
    check_scalar("target_entropy", target_entropy)
    log_prob = widened(jax.lax.stop_gradient(log_prob))
    log_temperature = widened(log_temperature)
    # Positive where the entropy is above its target, which lowers the temperature.
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
    r"""The policy loss of off-policy MDPO with the other direction of the projection.

    .. math:: -\sum_i w_i \log \pi(a_i | s), \qquad
              w \propto \pi_k^{1 - \lambda t} e^{t Q}, \qquad \sum_i w_i = 1

    The weights are the optimum pi' of the step. `mdpo_actor_loss` minimises KL(pi || pi'), and this
    loss KL(pi' || pi). Without limits on pi both are minimal at pi'.

    Args:
      log_prob: log pi of N actions, float [..., N].
      old_log_prob: log pi_k of the actions, same shape; a constant for gradients.
      q_value: Q of the actions, same shape; a constant for gradients.
      step_size: Step size t, > 0.
      temperature: Entropy weight lambda, >= 0; a constant for gradients.
      drawn: Whether the actions are samples of pi_k. Their weights are then pi_k^(-lambda t)
        exp(t Q), normalised over the samples. Otherwise they are all actions there are.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: The shapes differ, or a hyperparameter is out of range.

    Source: Mei et al., On Principled Entropy Exploration in Policy Optimization, IJCAI 2019, which
    arXiv:2005.09814 describes as its own method with the other direction of the KL.
    """
    check_scalar("step_size", step_size, above=0.0)
    check_scalar("temperature", temperature, at_least=0.0)
    old_log_prob, q_value = jax.lax.stop_gradient(
        same_shape(log_prob, old_log_prob=old_log_prob, q_value=q_value)
    )
    log_prob = widened(log_prob)
    step = jnp.asarray(step_size, log_prob.dtype)
    # Samples of pi_k already carry one factor of pi_k in their frequency.
    weight = jax.lax.stop_gradient(jnp.asarray(temperature, log_prob.dtype))
    power = (0.0 if drawn else 1.0) - weight * step
    possible = old_log_prob != -jnp.inf
    safe = jnp.where(possible, old_log_prob, jnp.zeros_like(old_log_prob))
    weights = jax.nn.softmax(power * safe + step * q_value, where=possible)
    # Actions that are impossible under pi_k have no weight, even where log pi is -inf.
    return -jnp.sum(times(weights, log_prob), -1)


def tsallis_log(log_x: jax.Array, *, order: float) -> jax.Array:
    r"""The q-logarithm of x from log x, with the paper's q' = `order`.

    .. math:: \log_q x = \frac{x^{1 - q} - 1}{1 - q}, \qquad q = 2 - q'

    Args:
      log_x: log x, float [...]; it needs no lower bound, as the power is computed from it.
      order: Order q' in [1, 2], as a Python number; 1 gives the logarithm itself.

    Returns:
      The q-logarithm [...] in float32 at least.

    Raises:
      ValueError: `order` is out of range or traced.

    Source: arXiv:2005.09814, Section 5.2, with q' as in its last version.
    """
    untyped: Any = order
    if isinstance(untyped, jax.core.Tracer):
        raise FieldError("order", "be known before compilation", "a traced number")
    check_number("order", order, at_least=1.0, at_most=2.0)
    log_x = widened(log_x)
    # With 1 - q = q' - 1; expm1 keeps precision for orders near 1.
    return log_x if order == 1 else jnp.expm1((order - 1) * log_x) / (order - 1)


def policy_mean(log_probs: jax.Array, values: jax.Array) -> jax.Array:
    r"""The expectation of values over A discrete actions.

    .. math:: \sum_a \pi(a | s) \, x_a

    Args:
      log_probs: log pi of all actions, float [..., A]; -inf adds 0, whatever the value is.
      values: Values x of the actions, same shape.

    Returns:
      Expectations [...] in float32 at least.

    Raises:
      ValueError: The shapes differ.
    """
    (values,) = same_shape(log_probs, values=values)
    log_probs = widened(log_probs)
    possible = log_probs != -jnp.inf
    log_probs, values = (jnp.where(possible, x, jnp.zeros_like(x)) for x in (log_probs, values))
    return jnp.sum(jnp.where(possible, jnp.exp(log_probs) * values, jnp.zeros_like(values)), -1)
