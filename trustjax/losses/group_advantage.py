r"""Rewards and advantages of answers that come in groups, one group for a prompt.

    soft_overlong_penalty                   a penalty for answers near the maximum length: DAPO
    informative_groups                      groups whose rewards differ: DAPO's filter
    token_rewards                           the reward on the last token, less a KL on every token
    reinforce_plus_plus_advantages          returns, whitened over all tokens of the batch
    reinforce_plus_plus_baseline_advantages rewards less their group's mean, whitened likewise
    trust_weight, trust_grpo_advantages     a second reward, trusted as far as it agrees: Trust-GRPO

`advantage.group_relative` and `advantage.leave_one_out` are the advantages of GRPO and RLOO. All
are constants for gradients.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_choice, check_scalar, is_concrete_number
from trustjax._dtypes import widened
from trustjax._sharding import AxisName, summed
from trustjax.losses._shapes import check_shape, zero_masked
from trustjax.losses._tokens import per_token
from trustjax.losses.advantage import accumulate, group_relative
from trustjax.losses.kl_estimator import kl_estimate
from trustjax.losses.reduction import masked_mean, token_mask

SCHEDULES = {
    "exponential": lambda progress: jnp.exp(-progress),
    "linear": lambda progress: jnp.clip(1 - progress, 0, 1),
    "cosine": lambda progress: (1 + jnp.cos(math.pi * jnp.clip(progress, 0, 1))) / 2,
    "constant": jnp.ones_like,
}


def soft_overlong_penalty(
    lengths: jax.Array,
    *,
    max_length: jax.typing.ArrayLike = 20480,
    cache: jax.typing.ArrayLike = 4096,
    factor: jax.typing.ArrayLike = 1.0,
    bounded: bool = True,
) -> jax.Array:
    r"""A penalty that grows over the last tokens before the maximum length.

    .. math:: R = f \max\left(\min\left((L_{max} - L_{cache} - L) / L_{cache}, 0\right), -1\right)

    Args:
      lengths: Lengths L of answers in tokens, [...].
      max_length: Maximum length L_max, > 0.
      cache: Tokens L_cache before it over which the penalty grows, > 0, at most L_max.
      factor: Largest penalty f, >= 0.
      bounded: Whether answers beyond L_max are penalised by f, as in the paper; otherwise by more,
        as in verl.

    Returns:
      Penalties [...] <= 0 in float32 at least, to be added to rewards.

    Raises:
      ValueError: A number is out of range.

    Source: Yu et al., arXiv:2503.14476, Eq. 13.

    >>> import jax.numpy as jnp
    >>> print(soft_overlong_penalty(jnp.array([10, 14, 16, 20]), max_length=16, cache=4))
    [ 0.  -0.5 -1.  -1. ]
    """
    check_scalar("max_length", max_length, above=0.0)
    check_scalar("cache", cache, above=0.0)
    if is_concrete_number(max_length):
        check_scalar("cache", cache, at_most=float(np.min(max_length)))
    check_scalar("factor", factor, at_least=0.0)
    lengths = widened(lengths)
    dtype = lengths.dtype
    cache = jnp.asarray(cache, dtype)
    penalty = jnp.minimum((jnp.asarray(max_length, dtype) - cache - lengths) / cache, 0)
    if bounded:
        penalty = jnp.maximum(penalty, -1)
    return jnp.asarray(factor, dtype) * penalty


def informative_groups(
    rewards: jax.Array, *, tolerance: jax.typing.ArrayLike = 1e-6, axis: int = -1
) -> jax.Array:
    r"""Which answers belong to a group whose rewards differ, so that they have an advantage.

    .. math:: \max_i r_i - \min_i r_i > tol

    The paper draws further prompts until the batch is full of such groups. Without that, groups of
    equal rewards have advantages of 0 but are still pulled towards the reference by a KL term; a
    mask with this factor leaves them out.

    Args:
      rewards: Rewards of each group along `axis`, float [..., G].
      tolerance: Largest difference that counts as none, >= 0.
      axis: Axis of the group.

    Returns:
      Bool of the shape of `rewards`, the same for all answers of a group. False for groups of one.

    Raises:
      ValueError: `tolerance` is negative.

    Source: dynamic sampling of Yu et al., arXiv:2503.14476, Eq. 11.
    """
    check_scalar("tolerance", tolerance, at_least=0.0)
    rewards = widened(rewards)
    spread = jnp.max(rewards, axis, keepdims=True) - jnp.min(rewards, axis, keepdims=True)
    return jnp.broadcast_to(spread > jnp.asarray(tolerance, rewards.dtype), rewards.shape)


def token_rewards(
    rewards: jax.Array,
    mask: jax.Array,
    *,
    log_probs: jax.Array | None = None,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k1",
) -> jax.Array:
    r"""The reward of an answer on its last token, less a KL penalty on every token.

    .. math:: r_{it} = R_i \, [t = \text{last}_i] - \beta \, \hat{KL}(\pi_{old} \| \pi_{ref})_{it}

    Their sum over time is the reward that RLOO takes; `reinforce_plus_plus_advantages` takes them
    as they are.

    Args:
      rewards: Rewards R of answers, float [batch].
      mask: True or nonzero on the tokens of the answers, [batch, time].
      log_probs: log pi_old of the tokens, float [batch, time]; None means no KL.
      reference_log_probs: log pi_ref of the tokens, same shape; None means no KL.
      beta: Weight of the KL, >= 0.
      kl: A name of `kl_estimate`.

    Returns:
      Rewards [batch, time] in float32 at least, 0 in masked places. An answer without a token has
      none.

    Raises:
      ValueError: The shapes do not fit, `beta` < 0, or only one of the log-probabilities is given.
    """
    check_scalar("beta", beta, at_least=0.0)
    keep = token_mask(mask, mask)
    last = keep & (jnp.cumsum(keep, -1) == jnp.sum(keep, -1, keepdims=True))
    check_shape("rewards", rewards, keep[:, 0])
    placed = zero_masked(per_token("rewards", rewards, keep), last)
    if log_probs is None and reference_log_probs is None:
        return placed
    if log_probs is None or reference_log_probs is None:
        missing = "log_probs" if log_probs is None else "reference_log_probs"
        raise FieldError(missing, "be given with the other log-probabilities", None)
    check_shape("log_probs", log_probs, keep)
    check_shape("reference_log_probs", reference_log_probs, keep)
    new, old = (
        zero_masked(widened(jax.lax.stop_gradient(array)), keep)
        for array in (log_probs, reference_log_probs)
    )
    return placed - zero_masked(jnp.asarray(beta, new.dtype) * kl_estimate(new, old, kl), keep)


def reinforce_plus_plus_advantages(
    rewards: jax.Array,
    mask: jax.Array,
    *,
    discount: jax.typing.ArrayLike = 1.0,
    epsilon: float = 1e-8,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""REINFORCE++: returns of tokens, whitened over all tokens of the batch.

    .. math:: G_t = r_t + \gamma G_{t+1}, \qquad
              A_t = \frac{G_t - \bar G}{\sqrt{s^2 + \epsilon}}, \qquad
              s^2 = \frac{\sum (G - \bar G)^2}{N - 1}

    Masked tokens, such as those that a tool wrote, have no reward and no discount.

    Args:
      rewards: Rewards of tokens, float [batch, time], such as `token_rewards`.
      mask: True or nonzero on the tokens of the answers, same shape.
      discount: Discount factor gamma per token, in [0, 1].
      epsilon: Small number that is added to the variance.
      axis_name: As in `reduce_tokens`; mean and variance are those of all devices.

    Returns:
      Advantages [batch, time] in float32 at least, 0 in masked places.

    Raises:
      ValueError: The shapes differ or are not [batch, time], or `discount` is out of range.

    Source: Hu et al., arXiv:2501.03262, Eq. 8.
    """
    check_scalar("discount", discount, at_least=0.0, at_most=1.0)
    keep = token_mask(rewards, mask)
    rewards = zero_masked(widened(jax.lax.stop_gradient(rewards)), keep)
    gamma = jnp.asarray(discount, rewards.dtype)
    factors = jnp.where(keep, gamma, jnp.ones_like(gamma))
    returns = accumulate(rewards.T, factors.T).T
    return _whitened(returns, keep, epsilon, axis_name)


def reinforce_plus_plus_baseline_advantages(
    rewards: jax.Array,
    mask: jax.Array,
    *,
    group_size: int,
    epsilon: float = 1e-8,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""REINFORCE++ with a baseline: rewards less their group's mean, whitened over all tokens.

    .. math:: A_{it} = \frac{a_i - \bar a}{\sqrt{s^2 + \epsilon}}, \qquad a_i = R_i - \bar R_{group}

    Args:
      rewards: Rewards R of answers, float [batch], the answers to a prompt behind each other.
      mask: True or nonzero on the tokens of the answers, [batch, time].
      group_size: Answers per prompt.
      epsilon, axis_name: As in `reinforce_plus_plus_advantages`.

    Returns:
      Advantages [batch, time] in float32 at least, 0 in masked places.

    Raises:
      ValueError: The shapes do not fit, or a group is not whole on a device.

    Source: Hu et al., arXiv:2501.03262, Section 3.
    """
    keep = token_mask(mask, mask)
    check_shape("rewards", rewards, keep[:, 0])
    centred = group_relative(rewards, scale="none", group_size=group_size)
    return _whitened(per_token("rewards", centred, keep), keep, epsilon, axis_name)


def trust_weight(
    outcome_rewards: jax.Array,
    thinking_rewards: jax.Array,
    *,
    threshold: jax.typing.ArrayLike = 0.5,
    axis: int = -1,
) -> jax.Array:
    r"""How far thinking rewards may be trusted: less where wrong answers have the higher ones.

    .. math:: \gamma = 1 \text{ if } \mu_c \ge \mu_w, \text{ else } e^{\mu_c - \mu_w}

    mu_c and mu_w are the mean thinking rewards of the answers with an outcome of at least
    `threshold` and of the others. Where one of the sets is empty, gamma is 1.

    Args:
      outcome_rewards: Outcome rewards of each group along `axis`, float [..., G].
      thinking_rewards: Thinking rewards, same shape.
      threshold: Smallest outcome of a correct answer.
      axis: Axis of the group.

    Returns:
      Weights gamma without the axis of the group, in float32 at least, constants for gradients.

    Raises:
      ValueError: The shapes differ.

    Source: Fan et al., arXiv:2505.17018, Eqs. 3 and 4.

    >>> import jax.numpy as jnp
    >>> print(trust_weight(jnp.array([1.0, 0, 0, 1]), jnp.array([0.2, 0.8, 0.9, 0.4])).round(4))
    0.5769
    """
    check_shape("thinking_rewards", thinking_rewards, outcome_rewards)
    outcome = widened(jax.lax.stop_gradient(outcome_rewards))
    thinking = widened(jax.lax.stop_gradient(thinking_rewards)).astype(outcome.dtype)
    correct = outcome >= jnp.asarray(threshold, outcome.dtype)

    def mean(chosen: jax.Array) -> jax.Array:
        count = jnp.sum(chosen, axis, dtype=thinking.dtype)
        return jnp.sum(zero_masked(thinking, chosen), axis) / jnp.maximum(count, 1)

    both = jnp.any(correct, axis) & ~jnp.all(correct, axis)
    return jnp.where(both, jnp.exp(jnp.minimum(mean(correct) - mean(~correct), 0)), 1.0)


def trust_grpo_advantages(
    outcome_rewards: jax.Array,
    thinking_rewards: jax.Array,
    *,
    step: jax.typing.ArrayLike,
    total_steps: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike = 0.3,
    form: str = "paper",
    use_trust: bool = True,
    schedule: str | Callable[[jax.Array], jax.Array] = "exponential",
    threshold: jax.typing.ArrayLike = 0.5,
    scale: str = "std",
    ddof: int = 1,
    epsilon: float = 1e-6,
    tolerance: float = 1e-6,
    axis: int = -1,
) -> jax.Array:
    r"""Trust-GRPO: advantages of the outcome plus a trusted and annealed thinking reward.

    .. math:: R_i = R^o_i + \gamma \, \alpha \, e^{-step / T} \, R^t_i, \qquad
              A_i = \frac{R_i - \bar R}{s + \epsilon}

    Dividing by s undoes gamma and the schedule in groups of equal outcomes: there the thinking
    rewards alone give advantages of full size. `form="code"` has no thinking rewards in groups
    whose outcomes are all >= 0.9 or all <= 0.1, and none for answers with an outcome < 0.2. With
    outcomes of 0 or 1, gamma is then always 1. `scale="none"` keeps the scale instead.

    Args:
      outcome_rewards: Outcome rewards R^o of each group along `axis`, float [..., G], in [0, 1].
      thinking_rewards: Thinking rewards R^t, same shape.
      step: Number of the training step, >= 0.
      total_steps: Number T of steps, > 0.
      alpha: Weight of thinking rewards, >= 0.
      form: "paper", or "code" for the released code.
      use_trust: Whether gamma weighs the thinking rewards; it is 1 otherwise, as in the paper's
        ablation without trust, whose other half is the schedule "constant".
      schedule: "exponential" e^-p with p = step / T, which ends at 0.37; "linear" 1 - p; "cosine";
        "constant"; or a function of p.
      threshold: As in `trust_weight`.
      scale, ddof, epsilon, tolerance: As in `group_relative`.
      axis: Axis of the group.

    Returns:
      Advantages of the same shape in float32 at least, constants for gradients.

    Raises:
      ValueError: The shapes differ, a number is out of range, or a name is unknown.

    Source: Fan et al., arXiv:2505.17018, Eqs. 5 to 7; code: kxfan2002/SophiaVL-R1.
    """
    check_choice("form", form, ("paper", "code"))
    check_scalar("step", step, at_least=0.0)
    check_scalar("total_steps", total_steps, above=0.0)
    check_scalar("alpha", alpha, at_least=0.0)
    if not callable(schedule):
        check_choice("schedule", schedule, SCHEDULES)
        schedule = SCHEDULES[schedule]
    check_shape("thinking_rewards", thinking_rewards, outcome_rewards)
    outcome = widened(jax.lax.stop_gradient(outcome_rewards))
    thinking = widened(jax.lax.stop_gradient(thinking_rewards)).astype(outcome.dtype)
    if form == "code":
        decided = jnp.all(outcome >= 0.9, axis, keepdims=True)
        decided |= jnp.all(outcome <= 0.1, axis, keepdims=True)
        thinking = jnp.where(decided | (outcome < 0.2), jnp.zeros_like(thinking), thinking)
    gamma = jnp.ones((), outcome.dtype)
    if use_trust:
        gamma = trust_weight(outcome, thinking, threshold=threshold, axis=axis)
        gamma = jnp.expand_dims(gamma, axis)
    progress = jnp.asarray(step, outcome.dtype) / jnp.asarray(total_steps, outcome.dtype)
    weight = jnp.asarray(alpha, outcome.dtype) * schedule(progress)
    return group_relative(
        outcome + gamma * weight * thinking,
        scale=scale,
        ddof=ddof,
        epsilon=epsilon,
        tolerance=tolerance,
        axis=axis,
    )


def _whitened(
    values: jax.Array, keep: jax.Array, epsilon: float, axis_name: AxisName | None
) -> jax.Array:
    """The values less their mean over all tokens, in units of their deviation (N - 1)."""
    centred = zero_masked(values - masked_mean(values, keep, axis_name=axis_name), keep)
    count = summed(jnp.sum(keep, dtype=values.dtype), axis_name)
    squares = summed(jnp.sum(jnp.square(centred)), axis_name)
    return centred * jax.lax.rsqrt(squares / jnp.maximum(count - 1, 1) + epsilon)
