r"""Losses of language policies that bound the ratio otherwise than PPO's clip.

With r, s_i, the advantage A and the options of `trustjax.losses.group`, whose bounds, masks and
dtypes hold here too:

    cispo_loss   -sg[clip(r, 1 - e, 1 + e_high)] A log pi                      token_mean
    sapo_loss    -4 / tau sigmoid(tau (r - 1)) A                               sequence_mean
    gmpo_loss    -A exp(mean_t clip(log r, -e, e_high)), clipped where PPO is  sequence_mean
    vespo_loss   -sg[phi(R_i)] A log pi, phi(w) = w^k exp(lambda (1 - w))      token_mean
    luspo_loss   -L_i min(s A, clip(s, 1 - e, 1 + e_high) A)                   sequence_sum

DPPO is `cispo_loss` with `clip=1, clip_high=19` and the weights of `divergence_mask`.
"""

import math

import jax
import jax.numpy as jnp

from trustjax._checks import check_scalar
from trustjax._sharding import AxisName
from trustjax.losses._ratio import LARGEST_LOG_RATIO, bounded_log_ratio, clip_log_ratio
from trustjax.losses._shapes import zero_masked
from trustjax.losses._tokens import (
    Options,
    finished,
    sequence_log_ratio,
    surrogate,
    tokens_of,
)
from trustjax.losses.reduction import masked_mean

SMALLEST_WEIGHT = 1e-8  # of VESPO, as in TRL


def cispo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 1.0,
    clip_high: jax.typing.ArrayLike | None = 4.0,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "token_mean",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Clipped importance sampling: the weight is clipped, and every token keeps its gradient.

    .. math:: -\mathrm{sg}\left[\mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon_{high})\right]
              A \log\pi

    Args:
      log_probs, old_log_probs, advantages, mask, reference_log_probs, beta, kl, weights, reduction,
        normalizer, axis_name: As in `grpo_loss`.
      clip: Epsilon; 1 leaves small weights as they are, as the paper does.
      clip_high: Epsilon above 1; None means `clip`. The paper does not state it; the largest weight
        5 is ScaleRL's (arXiv:2510.13786). TRL's `epsilon_high` is the largest weight itself.

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`.

    Source: MiniMax-M1, arXiv:2506.13585, Eqs. 4 and 5.
    """
    check_scalar("clip", clip, at_least=0.0)
    check_scalar("clip_high", clip_high, at_least=0.0)
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    ratio = jnp.exp(bounded_log_ratio(jax.lax.stop_gradient(tokens.log_ratio)))
    lowest = 1 - jnp.asarray(clip, ratio.dtype)
    highest = 1 + jnp.asarray(clip if clip_high is None else clip_high, ratio.dtype)
    losses = -jnp.clip(ratio, lowest, highest) * tokens.advantages * tokens.log_probs
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return finished(losses, tokens, options)


def sapo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    tau_positive: jax.typing.ArrayLike = 1.0,
    tau_negative: jax.typing.ArrayLike = 1.05,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "sequence_mean",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Soft adaptive policy optimisation: a smooth gate in place of the clip.

    .. math:: -\frac{4}{\tau} \sigma\left(\tau (r - 1)\right) A

    Its gradient is that of -r A at r = 1 and fades on both sides; a larger tau fades faster.

    Args:
      log_probs, old_log_probs, advantages, mask, reference_log_probs, beta, kl, weights, reduction,
        normalizer, axis_name: As in `grpo_loss`.
      tau_positive, tau_negative: Temperatures tau of tokens with A > 0 and of the others, > 0.

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`, or a temperature is not > 0.

    Source: Gao et al., arXiv:2511.20347.
    """
    check_scalar("tau_positive", tau_positive, above=0.0)
    check_scalar("tau_negative", tau_negative, above=0.0)
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    ratio = jnp.exp(bounded_log_ratio(tokens.log_ratio))
    dtype = ratio.dtype
    positive, negative = jnp.asarray(tau_positive, dtype), jnp.asarray(tau_negative, dtype)
    tau = jnp.where(tokens.advantages > 0, positive, negative)
    losses = -4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * tokens.advantages
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return finished(losses, tokens, options)


def gmpo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 0.4,
    clip_high: jax.typing.ArrayLike | None = None,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "sequence_mean",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Geometric-mean policy optimisation: log-ratios of tokens are clipped, then averaged.

    .. math:: -A_i \exp\Big(\frac{1}{L_i} \sum_t c_{it}\Big), \qquad
              A_i c_{it} = \min\left(A_i \log r_{it},
              A_i \, \mathrm{clip}(\log r_{it}, -\epsilon, \epsilon_{high})\right)

    Args:
      log_probs, old_log_probs, mask, reference_log_probs, beta, kl, weights, reduction, normalizer,
        axis_name: As in `grpo_loss`. Every token of an answer carries the answer's loss.
      advantages: As in `grpo_loss`; the mean over the tokens of an answer is taken.
      clip, clip_high: Half-widths around log r = 0, >= 0; `clip_high=None` means `clip`.

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`.

    Source: Zhao et al., arXiv:2507.20673, whose range is (e^-0.4, e^0.4).
    """
    check_scalar("clip", clip, at_least=0.0)
    check_scalar("clip_high", clip_high, at_least=0.0)
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    low = jnp.asarray(clip, tokens.log_ratio.dtype)
    high = low if clip_high is None else jnp.asarray(clip_high, low.dtype)
    # The bounds of a clip of r whose logarithms are -low and high; where A is 0, so is the loss.
    log_r = clip_log_ratio(tokens.log_ratio, tokens.advantages, -jnp.expm1(-low), jnp.expm1(high))
    mean = bounded_log_ratio(sequence_log_ratio(log_r, tokens.mask))
    advantage = masked_mean(tokens.advantages, tokens.mask, sequence=True)[:, None]
    losses = zero_masked(-advantage * jnp.exp(mean), tokens.mask)
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return finished(losses, tokens, options)


def vespo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    k_positive: jax.typing.ArrayLike = 2.0,
    lambda_positive: jax.typing.ArrayLike = 3.0,
    k_negative: jax.typing.ArrayLike = 3.0,
    lambda_negative: jax.typing.ArrayLike = 2.0,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "token_mean",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Variational sequence-level soft policy optimisation: a smooth weight of the whole answer.

    .. math:: -\mathrm{sg}[\varphi(R_i)] A \log\pi, \qquad
              \varphi(w) = w^k e^{\lambda (1 - w)}, \qquad R_i = \prod_t r_{it}

    phi(1) = 1, and phi falls to 0 on both sides of k / lambda. log r is bounded by 20 on both sides
    and R below by 1e-8, as in TRL.

    Args:
      log_probs, old_log_probs, advantages, mask, reference_log_probs, beta, kl, weights, reduction,
        normalizer, axis_name: As in `grpo_loss`. With the log-probabilities of the sampler as
        `old_log_probs`, R includes the correction of the rollout.
      k_positive, lambda_positive: Exponent k and rate lambda where A >= 0, >= 0 and > 0.
      k_negative, lambda_negative: The same where A < 0.

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`, or an exponent or rate is out of range.

    Source: VESPO as in TRL's `GRPOTrainer.get_gamma_weights`.
    """
    for name, number in (("k_positive", k_positive), ("k_negative", k_negative)):
        check_scalar(name, number, at_least=0.0)
    check_scalar("lambda_positive", lambda_positive, above=0.0)
    check_scalar("lambda_negative", lambda_negative, above=0.0)
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    bound, dtype = LARGEST_LOG_RATIO, tokens.log_ratio.dtype
    log_w = jnp.sum(jnp.clip(tokens.log_ratio, -bound, bound), -1, keepdims=True)
    log_w = jnp.clip(log_w, math.log(SMALLEST_WEIGHT), bound)
    gained = tokens.advantages >= 0
    k = jnp.where(gained, jnp.asarray(k_positive, dtype), jnp.asarray(k_negative, dtype))
    rate = jnp.where(
        gained, jnp.asarray(lambda_positive, dtype), jnp.asarray(lambda_negative, dtype)
    )
    # In logarithms, so that a large w is not raised to a power before the exponential shrinks it.
    phi = jax.lax.stop_gradient(jnp.exp(k * log_w - rate * jnp.expm1(log_w)))
    losses = -phi * tokens.advantages * tokens.log_probs
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return finished(losses, tokens, options)


def luspo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 2e-3,
    clip_high: jax.typing.ArrayLike | None = 2.5e-3,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "sequence_sum",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Length-unbiased sequence policy optimisation: GSPO's loss times the length of the answer.

    .. math:: -L_i \min\left(s_i A, \mathrm{clip}(s_i, 1 - \epsilon, 1 + \epsilon_{high}) A\right)

    GSPO divides the gradient of a token by the length of its answer; here a token weighs the same
    in long and short answers.

    Args:
      log_probs, old_log_probs, advantages, mask, clip, clip_high, reference_log_probs, beta, kl,
        weights, reduction, normalizer, axis_name: As in `grpo_loss`.

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`.

    Source: Liu et al., arXiv:2602.05261.
    """
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    log_s = sequence_log_ratio(tokens.log_ratio, tokens.mask)
    losses = surrogate(log_s, tokens.advantages, clip, clip_high, None)
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return finished(losses, tokens, options)
